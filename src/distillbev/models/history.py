"""Earlier frames for a convolutional student: their maps, brought to where the car is now, beside its own.

Source: BEVDet4D (arXiv:2203.17054), section 3.2. Letters: B samples, F earlier frames, C channels, Y X rows and
columns of the map.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..boxes import Boxes3D
from ..config import Config
from ..data.schema import Batch
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from .bev_encoder import ResidualBlock


class HistoryConfig(Config, frozen=True):
    """How a student looks back; which frames it sees is told by the data's `past` settings.

    `blocks`: residual blocks that every frame's map passes before it is moved and joined; 0 for none.
    `align`: an earlier frame's finished "map" is moved to where the car is now, or its "rays" are put on the
    present ground in the first place, as Megvii's BEVDepth has it. Rays blur nothing, but earlier images must
    be at hand, so that a stream, which keeps maps, cannot have it.
    `train_through_past`: let gradients flow into earlier frames; they then cost as much as the present one.
    `velocity`: what the head's velocity maps hold. A "displacement" (m over the gap to the newest earlier
    frame) is what two maps show; outside of the model velocities are m/s in any case.
    `gap_at_start_s` stands for the gap of a sample whose scene has only begun.
    `correlation_cells`: the joined map also tells how alike each cell is to the cells of the newest earlier map
    up to so far away, see `correlate`; None leaves that to be learned, as published.
    `lower_corners` takes a cell's lower corner for its place when maps are turned, as published weights do.
    """

    num_frames: int = 1
    blocks: int = 2
    train_through_past: bool = False
    align: Literal["map", "rays"] = "map"
    velocity: Literal["displacement", "per_second"] = "displacement"
    gap_at_start_s: float = 1 / 12
    correlation_cells: int | None = None
    lower_corners: bool = False

    def __post_init__(self) -> None:
        if self.correlation_cells is not None and self.correlation_cells < 1:
            raise ConfigError(
                f"correlation_cells={self.correlation_cells}; expected 1 or more, or null for no correlation"
            )
        if self.num_frames < 1 or self.blocks < 0:
            raise ConfigError(
                f"num_frames={self.num_frames}, blocks={self.blocks}; expected 1 frame or more "
                "(history=None for a student that does not look back) and 0 blocks or more"
            )
        if not 0 < self.gap_at_start_s < math.inf:
            raise ConfigError(f"gap_at_start_s={self.gap_at_start_s}; expected a positive number of seconds")


@dataclass(frozen=True)
class PastMap:
    """What is kept of an earlier frame: its map, and where the car was.

    Attributes:
        bev: (B, C, Y, X), not yet moved if `HistoryConfig.align` is "map".
        lidar2global: (B, 4, 4) float64, physical LiDAR frame of that time -> global.
        bev_aug: (B, 4, 4), as the map's.
    """

    bev: Tensor
    lidar2global: Tensor
    bev_aug: Tensor


class FrameFusion(nn.Module):
    """Refines the map of every frame, then joins them where the car is now."""

    def __init__(self, config: HistoryConfig, channels: int, grid: BevGrid) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.out_channels = channels * (1 + config.num_frames)
        if config.correlation_cells is not None:
            self.out_channels += (2 * config.correlation_cells + 1) ** 2
        self.blocks = nn.Sequential(
            *(ResidualBlock(channels, channels, 1, opens_stage=i == 0) for i in range(config.blocks))
        )

    def refine(self, lifted: Tensor) -> Tensor:
        """(B, C, Y, X) -> the same: what a frame's map goes through at its own time."""
        return self.blocks(lifted)

    def cameras(self, past: Batch, present: Batch) -> Tensor:
        """(B, N, 4, 4) an earlier frame's cameras -> LiDAR frame that its map is made in, augmented."""
        if self.config.align == "map":
            return past.cam2lidar
        past2now = torch.linalg.inv(motion_to_past(past, present).double())  # autocast leaves float64 alone
        return (past2now[:, None] @ past.cam2lidar.double()).float()

    def join(self, present: Tensor, past: Sequence[PastMap], batch: Batch) -> Tensor:
        """The present map and, behind it, the earlier ones from new to old: (B, (1 + F) * C, Y, X).

        With a correlation, its (2 R + 1)^2 channels come last.
        """
        moved = [frame.bev for frame in past]
        if self.config.align == "map":
            moved = [
                warp_map(frame.bev, motion_to_past(frame, batch), self.grid, self.config.lower_corners)
                for frame in past
            ]
        if self.config.correlation_cells is not None:
            moved.append(correlate(present, moved[0], self.config.correlation_cells))
        return torch.cat([present, *moved], dim=1)

    def gap_s(self, gaps_s: Tensor) -> Tensor:
        """(B, F) gaps, 0 where a scene has no such frame -> (B,) seconds that a displacement spans."""
        return torch.where(gaps_s[:, 0] > 0, gaps_s[:, 0], self.config.gap_at_start_s)


def motion_to_past(past: PastMap | Batch, batch: Batch) -> Tensor:
    """(B, 4, 4) float32: present -> earlier LiDAR frame, both augmented."""
    device = batch.bev_aug.device
    # In float64: global coordinates are kilometres.
    now_aug, then_aug = batch.bev_aug.double(), past.bev_aug.to(device).double()
    now, then = batch.lidar2global.to(device).double(), past.lidar2global.to(device).double()
    return (then_aug @ torch.linalg.inv(then) @ now @ torch.linalg.inv(now_aug)).float()


def warp_map(bev: Tensor, now2past: Tensor, grid: BevGrid, lower_corners: bool = False) -> Tensor:
    """An earlier map as it looks from the present: every cell reads, bilinearly, where it then lay.

    Args:
        bev: (B, C, Y, X), the earlier map.
        now2past: (B, 4, 4), see `motion_to_past`. Heights are left out: a tilt of the car between the frames
            shortens the ground by next to nothing.
        grid: the ground of both maps.
        lower_corners: a cell lies at its lower corner (see `HistoryConfig`) instead of its centre.

    Returns:
        (B, C, Y, X), zero where the earlier map ends.
    """
    with torch.autocast(bev.device.type, enabled=False):
        column, row = source_cells(now2past, grid, lower_corners).unbind(dim=-1)
        rows, columns = grid.shape
        where = torch.stack([(2 * column + 1) / columns - 1, (2 * row + 1) / rows - 1], dim=-1)
        return functional.grid_sample(bev.float(), where, align_corners=False).to(bev.dtype)


def source_cells(now2past: Tensor, grid: BevGrid, lower_corners: bool = False) -> Tensor:
    """(B, Y, X, 2): column and row of the earlier map, as real numbers, that each present cell lay on.

    A whole number is that cell itself.
    """
    offset = 0.0 if lower_corners else 0.5  # of a cell's place from its lower corner, in cells
    places = grid.cell_centres(now2past.device) + (offset - 0.5) * grid.cell_m
    moved = torch.einsum("bij,yxj->byxi", now2past[:, :2, :2], places) + now2past[:, None, None, :2, 3]
    return grid.cell_coordinates(moved) - offset


def correlate(present: Tensor, past: Tensor, radius: int) -> Tensor:
    """How alike each present cell is to the past cells around it: what moved shows where it came from.

    Cosines of the cells' vectors; source: the correlation layer of FlowNet (arXiv:1504.06852), section 3.

    Args:
        present, past: (B, C, Y, X) on the same ground.
        radius: in cells, R.

    Returns:
        (B, (2 R + 1)^2, Y, X), rows of offsets first: channel (i, j) looks i - R rows up and j - R columns right.
        0 beyond the border.
    """
    B, _, Y, X = present.shape
    K, W = 2 * radius + 1, X + 2 * radius
    cells = functional.normalize(present, dim=1, eps=1e-3).permute(0, 2, 3, 1)
    around = functional.pad(functional.normalize(past, dim=1, eps=1e-3), (radius,) * 4).permute(0, 2, 1, 3)
    likeness = []
    for i in range(K):
        rows = torch.matmul(cells, around[:, i : i + Y]).contiguous()  # (B, Y, X, W): with all of a past row
        # Of cell j only the columns j to j + 2 R are near: a band along the diagonal.
        likeness.append(rows.as_strided((B, Y, X, K), (Y * X * W, X * W, W + 1, 1)))
    return torch.stack(likeness, dim=1).permute(0, 1, 4, 2, 3).flatten(1, 2)


def correlate_by_shifts(present: Tensor, past: Tensor, radius: int) -> Tensor:
    """The slow, readable twin of `correlate`."""
    Y, X = present.shape[-2:]
    unit = functional.normalize(present, dim=1, eps=1e-3)
    padded = functional.pad(functional.normalize(past, dim=1, eps=1e-3), (radius,) * 4)
    offsets = range(2 * radius + 1)
    likeness = [(unit * padded[..., i : i + Y, j : j + X]).sum(dim=1) for i in offsets for j in offsets]
    return torch.stack(likeness, dim=1)


def warp_map_by_loop(bev: Tensor, now2past: Tensor, grid: BevGrid, lower_corners: bool = False) -> Tensor:
    """The slow, readable twin of `warp_map`: one cell after another."""
    rows, columns = grid.shape
    (x_low, _), (y_low, _), size = grid.x_range_m, grid.y_range_m, grid.cell_m
    offset = 0.0 if lower_corners else 0.5
    moved = torch.zeros_like(bev)
    for b, matrix in enumerate(now2past.tolist()):
        for i in range(rows):
            for j in range(columns):
                x, y = x_low + (j + offset) * size, y_low + (i + offset) * size
                then_x = matrix[0][0] * x + matrix[0][1] * y + matrix[0][3]
                then_y = matrix[1][0] * x + matrix[1][1] * y + matrix[1][3]
                column, row = (then_x - x_low) / size - offset, (then_y - y_low) / size - offset
                for r in (math.floor(row), math.floor(row) + 1):
                    for c in (math.floor(column), math.floor(column) + 1):
                        if 0 <= r < rows and 0 <= c < columns:
                            moved[b, :, i, j] += (1 - abs(row - r)) * (1 - abs(column - c)) * bev[b, :, r, c]
    return moved


def scale_velocities(boxes: Sequence[Boxes3D], factors: Tensor) -> list[Boxes3D]:
    """Boxes of every sample with velocities times the sample's (B,) factor; NaN stays NaN.

    Times the gap, m/s become the displacement over it; over the gap, the reverse.
    """
    scaled = []
    for sample, factor in zip(boxes, factors.to(boxes[0].boxes), strict=True):
        values = torch.cat([sample.boxes[:, :7], sample.boxes[:, 7:9] * factor], dim=1)
        scaled.append(replace(sample, boxes=values))
    return scaled


@dataclass(frozen=True)
class _Kept:
    """A frame that a stream remembers."""

    map: PastMap
    scenes: list[str]
    timestamps_us: list[int]


class PastStream:
    """The memory of a drive: which earlier maps the present frame joins with, chosen as the loader chooses.

    One sample after another, or B drives side by side, always in the same places. A drive ends by itself when
    its scene's name changes.

    Args:
        num_frames: earlier frames that the model joins.
        step: frames between them.
    """

    def __init__(self, num_frames: int, step: int = 1) -> None:
        if num_frames < 1 or step < 1:
            raise ConfigError(f"num_frames={num_frames}, step={step}; expected 1 or more of both")
        self.num_frames, self.step = num_frames, step
        self._kept: deque[_Kept] = deque(maxlen=num_frames * step)  # newest first

    def recall(self, present: PastMap, batch: Batch) -> tuple[list[PastMap], Tensor]:
        """The earlier maps that belong to a batch, new to old, and (B, F) seconds that they lie back.

        Where a scene has no frame so far back its oldest one stands in, and the present one where it has none.

        Raises:
            DataError: the batch does not say scenes and times, has another number of samples than the frame
            before, or does not come after it.
        """
        scenes, times = scenes_and_times(batch)
        for kept in list(self._kept)[:1]:
            if len(kept.scenes) != len(scenes):
                raise DataError(
                    f"the stream follows {len(kept.scenes)} drives, the batch has {len(scenes)} samples; "
                    "give every drive its place in each batch, or start a new stream"
                )
            for token, scene, time, before, earlier in zip(
                batch.tokens, scenes, times, kept.scenes, kept.timestamps_us, strict=True
            ):
                if scene == before and time <= earlier:
                    raise DataError(
                        f"sample {token} comes {1e-6 * (earlier - time):.2f} s before the frame that the "
                        "stream saw last; feed frames in the order of time, or start a new stream"
                    )
        chosen = [
            [self._frame_of(i, scene, back) for i, scene in enumerate(scenes)] for back in self._backs()
        ]
        maps, gaps = [], []
        for of_samples in chosen:
            sources = [present if kept is None else kept.map for kept in of_samples]
            maps.append(
                PastMap(
                    bev=torch.stack([source.bev[i] for i, source in enumerate(sources)]),
                    lidar2global=torch.stack([source.lidar2global[i] for i, source in enumerate(sources)]),
                    bev_aug=torch.stack([source.bev_aug[i] for i, source in enumerate(sources)]),
                )
            )
            gaps.append(
                [
                    0.0 if kept is None else 1e-6 * (times[i] - kept.timestamps_us[i])
                    for i, kept in enumerate(of_samples)
                ]
            )
        return maps, torch.tensor(gaps, device=present.bev.device).T

    def remember(self, present: PastMap, batch: Batch) -> None:
        """Keeps the present map for the frames to come."""
        scenes, times = scenes_and_times(batch)
        detached = replace(present, bev=present.bev.detach())
        self._kept.appendleft(_Kept(detached, list(scenes), list(times)))

    def _backs(self) -> list[int]:
        return [self.step * (k + 1) for k in range(self.num_frames)]

    def _frame_of(self, place: int, scene: str, back: int) -> _Kept | None:
        """The frame `back` steps ago of the drive in a place, or the oldest one of its scene."""
        found = None
        for kept in list(self._kept)[:back]:
            if kept.scenes[place] != scene:
                break
            found = kept
        return found


def scenes_and_times(batch: Batch) -> tuple[list[str], list[int]]:
    """Scene and time (microseconds) of every sample.

    Raises:
        DataError: the batch does not tell them.
    """
    if batch.scenes is None or batch.timestamps_us is None:
        raise DataError(
            f"samples {batch.tokens} come without scenes and timestamps_us, by which a stream tells one drive "
            "from the next; set both (the loader does)"
        )
    return batch.scenes, batch.timestamps_us
