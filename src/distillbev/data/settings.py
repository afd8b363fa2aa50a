"""What a detector is fed, and how training varies it."""

from __future__ import annotations

from ..config import Config
from ..errors import ConfigError
from .appearance import ColourAugConfig, GridMaskConfig
from .augment import BevAugConfig, ImageAugConfig, ImageFit
from .frame_cache import FrameCacheConfig
from .object_pasting import ObjectPastingConfig
from .virtual_points import VirtualPointsInput


class PastConfig(Config, frozen=True):
    """Which earlier key frames come with each sample: `num_frames`, each `step` key frames before the next.

    `training_steps` draws the step anew for each sample in training, from the first to the last of the two, so
    that a detector learns to cope with gaps of any length.
    """

    num_frames: int = 1
    step: int = 1
    training_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.step < 1:
            raise ConfigError(
                f"num_frames={self.num_frames}, step={self.step}; expected 1 or more of both "
                "(past=None for no earlier frames)"
            )
        if self.training_steps is not None and not 1 <= self.training_steps[0] <= self.training_steps[1]:
            raise ConfigError(f"training_steps={self.training_steps}; expected (low, high) from 1 on")


class DataConfig(Config, frozen=True):
    """What a detector is fed, and how training varies it (all augmentation is off outside training)."""

    image_size_px: tuple[int, int] = (704, 256)  # width, height of the network's image
    # The width fills the network's image and the bottom stays, as published; or the whole image is shown: for
    # cameras that are much taller than the network's image.
    image_fit: ImageFit = "width"
    image_resize_offset: float = 0.0  # added to the scale that fits, where images are not augmented
    image_aug: ImageAugConfig | None = None
    colour_aug: ColourAugConfig | None = None
    grid_mask: GridMaskConfig | None = None
    bev_aug: BevAugConfig | None = None
    cameras: tuple[str, ...] | None = None  # channels, in the order of the batch; None for all of the rig
    num_sweeps: int = 0  # earlier LiDAR sweeps besides the key sweep
    virtual_points: VirtualPointsInput | None = None  # points then have 17 columns, not 5
    object_pasting: ObjectPastingConfig | None = None  # in training, for LiDAR teachers
    past: PastConfig | None = None  # earlier key frames' images, for detectors with a history
    load_images: bool = True
    load_points: bool = True
    exact_jpeg: bool = False  # decode in full and resize as the reference does
    frame_cache: FrameCacheConfig | None = None  # decoded images and joined sweeps, on disk
    remove_ego_radius_m: float = 1.0
    min_points_in_box: int = 1  # LiDAR and radar returns together; boxes with fewer are no targets
    max_box_distance_m: float | None = None  # from the LiDAR, along x or y; None for no limit

    def __post_init__(self) -> None:
        if min(self.image_size_px) < 1:
            raise ConfigError(f"image_size_px={self.image_size_px}: width and height must be positive pixels")
        if self.object_pasting is not None and (self.load_images or not self.load_points):
            raise ConfigError(
                "object_pasting puts objects among LiDAR points only; expected load_images=false and "
                "load_points=true, or object_pasting=null for a detector that sees images"
            )
        if self.num_sweeps < 0:
            raise ConfigError(
                f"num_sweeps={self.num_sweeps}: 0 is the key sweep alone, more adds earlier ones"
            )
        if self.cameras is not None and (not self.cameras or len(set(self.cameras)) != len(self.cameras)):
            raise ConfigError(
                f"cameras={self.cameras}: name each channel once, or leave it out for all cameras"
            )
