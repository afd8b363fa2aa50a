"""What a simulated world looks like; the world is a pure function of these settings."""

from enum import StrEnum

from ..classes import CLASSES
from ..config import Config
from ..errors import ConfigError


class Weather(StrEnum):
    CLEAR = "clear"
    OVERCAST = "overcast"
    RAIN = "rain"
    DUSK = "dusk"
    NIGHT = "night"


class SplitConfig(Config, frozen=True):
    """A named list of scenes. Scenes are numbered through all splits, so no two splits share one."""

    name: str
    scenes: int

    def __post_init__(self) -> None:
        if not self.name or self.scenes < 1:
            raise ConfigError(
                f"split {self.name!r} has {self.scenes} scenes; give a name and at least one scene"
            )


class WorldConfig(Config, frozen=True):
    """Settings of a simulated dataset. Every scene depends on these and on its own number alone.

    Attributes:
        seed: of everything random.
        version: name of the folder of tables.
        splits: names and numbers of scenes; written to `splits.json`.
        key_frames_per_scene: annotated frames, 2 per second.
        image_size_px: (width, height) of all six cameras; the intrinsics are those of nuScenes, scaled to the
            width, and the principal point keeps its share of the height.
        camera_hz: 12 writes the images between key frames too; None writes key frames only.
        lidar_sweeps: how many of the sweeps (20 per second) before each key frame are written; 9 is all.
        lidar_beams: rings, spread evenly from -30.67 to +10.67 degrees.
        lidar_azimuth_steps: firings in one turn.
        extent_m: actors live within this distance of the middle of the ego vehicle's way.
        annotation_radius_m: actors farther from the ego vehicle are not annotated.
        classes: the detection classes that occur.
        weathers: drawn from, scene by scene; name one only for a world without variety.
        write_masks: write instance masks of the key frames' images under `instance_masks/`.
        jpeg_quality: 1 to 95.
    """

    seed: int = 0
    version: str = "v1.0-sim"
    splits: tuple[SplitConfig, ...] = (
        SplitConfig(name="train", scenes=16),
        SplitConfig(name="val", scenes=4),
    )
    key_frames_per_scene: int = 8
    image_size_px: tuple[int, int] = (352, 198)
    camera_hz: int | None = None
    lidar_sweeps: int = 9
    lidar_beams: int = 32
    lidar_azimuth_steps: int = 1080
    extent_m: float = 60.0
    annotation_radius_m: float = 60.0
    classes: tuple[str, ...] = CLASSES
    weathers: tuple[Weather, ...] = tuple(Weather)
    write_masks: bool = True
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        names = [split.name for split in self.splits]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"splits are named {names}; expected at least one, each name once")
        if not self.version or "/" in self.version:
            raise ConfigError(f"version={self.version!r} names a folder; expected something like v1.0-sim")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}; expected 0 or more")
        for name, low, high in (
            ("key_frames_per_scene", 1, 400),
            ("lidar_sweeps", 0, 9),
            ("lidar_beams", 2, 128),
            ("lidar_azimuth_steps", 36, 4000),
            ("extent_m", 20.0, 150.0),
            ("annotation_radius_m", 5.0, 150.0),
            ("jpeg_quality", 1, 95),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}={value}; expected {low} to {high}")
        if min(self.image_size_px) < 16 or max(self.image_size_px) > 4096:
            raise ConfigError(f"image_size_px={self.image_size_px}; expected 16 to 4096 pixels each way")
        if self.camera_hz not in (None, 12):
            raise ConfigError(f"camera_hz={self.camera_hz}; expected 12, or null for key frames only")
        unknown = [name for name in self.classes if name not in CLASSES]
        if unknown or not self.classes:
            raise ConfigError(f"classes names {unknown or 'nothing'}; expected some of {', '.join(CLASSES)}")
        if not self.weathers:
            raise ConfigError(f"weathers is empty; expected some of {', '.join(Weather)}")

    @property
    def num_scenes(self) -> int:
        return sum(split.scenes for split in self.splits)
