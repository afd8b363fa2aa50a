"""What a centre head should say: one heatmap peak and ten numbers per box.

Source: CenterPoint (arXiv:2006.11275), section 3; the radius rule is CornerNet's (arXiv:1808.01244, 3.2).
Letters: B batch, T tasks, C classes of all tasks, K slots per task, n boxes, Y X rows and columns of the map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..boxes import Boxes3D
from ..classes import CLASSES
from ..config import Config
from ..errors import ConfigError
from ..grid import BevGrid

CellRule = Literal["floor", "truncate"]

# The regression maps of a task and their channels, in the order of a target's ten numbers: offset of the
# centre from the cell's lower corner (cells), z of the gravity centre (m), log of length, width and height
# (m), sine and cosine of yaw, velocity (m/s).
BOX_MAPS = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
CODE_SIZE = sum(BOX_MAPS.values())


class TargetConfig(Config, frozen=True):
    """How boxes become targets.

    `gaussian_overlap` is the IoU that a box shifted by the blob's radius must keep; `min_radius_cells` keeps
    small objects visible. `cell_rule`: "truncate" also accepts centres up to one cell outside the lower
    border into cell 0, as older implementations do; it exists for parity only.
    """

    max_objects: int = 500
    gaussian_overlap: float = 0.1
    min_radius_cells: int = 2
    cell_rule: CellRule = "floor"

    def __post_init__(self) -> None:
        if self.max_objects < 1:
            raise ConfigError(f"max_objects={self.max_objects}; expected at least 1 box per task and sample")
        if not 0 < self.gaussian_overlap < 1:
            raise ConfigError(f"gaussian_overlap={self.gaussian_overlap}; expected an IoU between 0 and 1")
        if self.min_radius_cells < 0:
            raise ConfigError(f"min_radius_cells={self.min_radius_cells}; expected 0 cells or more")


@dataclass
class CenterTargets:
    """Targets of a batch.

    Attributes:
        heatmap: (B, C, Y, X) in [0, 1], 1 at the cell of a box; channels are the tasks' classes in order.
        classes_per_task: how the channels divide into tasks.
        boxes: (B, T, K, 10) as BOX_MAPS; velocity NaN where unknown.
        indices: (B, T, K) int64, row * X + column of the box's cell.
        mask: (B, T, K) bool; a box outside the map, or without extent, leaves its slot False.
    """

    heatmap: Tensor
    classes_per_task: tuple[int, ...]
    boxes: Tensor
    indices: Tensor
    mask: Tensor

    @property
    def heatmaps(self) -> list[Tensor]:
        """Per task (B, classes of the task, Y, X)."""
        return list(self.heatmap.split(self.classes_per_task, dim=1))

    @staticmethod
    def empty(
        batch_size: int,
        tasks: tuple[tuple[str, ...], ...],
        grid: BevGrid,
        max_objects: int,
        device: torch.device | str = "cpu",
    ) -> CenterTargets:
        classes_per_task = tuple(len(task) for task in tasks)
        slots = (batch_size, len(tasks), max_objects)
        return CenterTargets(
            heatmap=torch.zeros(batch_size, sum(classes_per_task), *grid.shape, device=device),
            classes_per_task=classes_per_task,
            boxes=torch.zeros(*slots, CODE_SIZE, device=device),
            indices=torch.zeros(slots, dtype=torch.int64, device=device),
            mask=torch.zeros(slots, dtype=torch.bool, device=device),
        )


def gaussian_radius(size_cells: Tensor, overlap: float) -> Tensor:
    """(..., 2) length and width in cells -> (...) radius in cells, a real number.

    The smallest of CornerNet's three cases (both corners inside, both outside, one of each), with its
    well-known division by 2 where 2a would be right: every public CenterPoint was trained so.
    """
    total, area = size_cells.sum(dim=-1), size_cells.prod(dim=-1)
    shifted = (total + (total**2 - 4 * (area * (1 - overlap) / (1 + overlap))).sqrt()) / 2
    inside = (2 * total + (4 * total**2 - 16 * (1 - overlap) * area).sqrt()) / 2
    b = -2 * overlap * total
    outside = (b + (b**2 - 16 * overlap * (overlap - 1) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(shifted, inside), outside)


def encode_boxes(boxes: Tensor, offset_cells: Tensor) -> Tensor:
    """(n, 9) boxes and (n, 2) offsets of their centres within the cells -> (n, 10) numbers as BOX_MAPS."""
    yaw = boxes[:, 6:7]
    return torch.cat(
        [offset_cells, boxes[:, 2:3], boxes[:, 3:6].log(), yaw.sin(), yaw.cos(), boxes[:, 7:9]], dim=1
    )


def center_targets(
    boxes: list[Boxes3D], tasks: tuple[tuple[str, ...], ...], grid: BevGrid, config: TargetConfig
) -> CenterTargets:
    """Draws the targets of a whole batch at once, on the boxes' device.

    Within a task boxes fill the slots by class, then by their order in the sample. Classes that no task
    names, and negative labels, are left out. Boxes whose centre is not on the map, or that have no extent,
    are no target, but keep their slot.
    """
    device = boxes[0].boxes.device
    targets = CenterTargets.empty(len(boxes), tasks, grid, config.max_objects, device)
    rows, columns = grid.shape

    # Which channel and which task a label belongs to; the extra last entry answers for negative labels.
    names = [name for task in tasks for name in task]
    channel_of = torch.tensor([names.index(name) if name in names else -1 for name in CLASSES] + [-1])
    task_of_channel = torch.tensor([task for task, members in enumerate(tasks) for _ in members])
    labels = torch.cat([sample.labels for sample in boxes])
    channel = channel_of.to(device)[labels.clamp(min=-1)]
    lengths = torch.tensor([len(sample) for sample in boxes], device=device)
    sample = torch.arange(len(boxes), device=device).repeat_interleave(lengths)

    # Sorting by sample and channel also sorts by task, since a task's channels lie together.
    wanted = (channel >= 0).nonzero().squeeze(1)
    wanted = wanted[(sample[wanted] * len(names) + channel[wanted]).argsort(stable=True)]
    values, sample, channel = (
        torch.cat([s.boxes for s in boxes]).float()[wanted],
        sample[wanted],
        channel[wanted],
    )
    task = task_of_channel.to(device)[channel]
    group = sample * len(tasks) + task
    slot = torch.arange(len(group), device=device) - torch.searchsorted(group, group)

    position = grid.cell_coordinates(values[:, :2])
    cell = position.floor() if config.cell_rule == "floor" else position.trunc()
    on_map = ((cell >= 0) & (cell < cell.new_tensor([columns, rows]))).all(dim=1)  # False for NaN
    valid = (on_map & (values[:, 3:5] > 0).all(dim=1) & (slot < config.max_objects)).nonzero().squeeze(1)
    if len(valid) == 0:
        return targets
    values, sample, channel, task, slot, cell = (
        t[valid] for t in (values, sample, channel, task, slot, cell)
    )
    column, row = cell.long().unbind(dim=1)

    targets.boxes[sample, task, slot] = encode_boxes(values, position[valid] - cell)
    targets.indices[sample, task, slot] = row * columns + column
    targets.mask[sample, task, slot] = True

    radius = gaussian_radius(values[:, 3:5] / grid.cell_m, config.gaussian_overlap)
    radius = radius.long().clamp(min=config.min_radius_cells)[:, None, None]  # (n, 1, 1)
    reach = int(radius.max())
    step = torch.arange(-reach, reach + 1, device=device)
    dy, dx = step[:, None], step[None, :]
    sigma = (2 * radius + 1) / 6
    blob = torch.exp(-(dx**2 + dy**2) / (2 * sigma**2))  # (n, 2 reach + 1, 2 reach + 1)
    y, x = row[:, None, None] + dy, column[:, None, None] + dx
    inside = (dx.abs() <= radius) & (dy.abs() <= radius) & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    plane = (sample * len(names) + channel)[:, None, None]
    index = ((plane * rows + y) * columns + x).masked_fill(
        ~inside, 0
    )  # a zero added anywhere changes no maximum
    targets.heatmap.view(-1).scatter_reduce_(0, index.flatten(), (blob * inside).flatten(), "amax")
    return targets


def center_targets_by_loops(
    boxes: list[Boxes3D], tasks: tuple[tuple[str, ...], ...], grid: BevGrid, config: TargetConfig
) -> CenterTargets:
    """The slow, readable twin of `center_targets`: one box after another."""
    targets = CenterTargets.empty(len(boxes), tasks, grid, config.max_objects)
    rows, columns = grid.shape
    for b, sample in enumerate(boxes):
        first_channel = 0
        for t, task in enumerate(tasks):
            labels = sample.labels.tolist()
            members = [
                (k, i)
                for k, name in enumerate(task)
                for i in range(len(sample))
                if labels[i] == CLASSES.index(name)
            ]
            for slot, (k, i) in enumerate(members[: config.max_objects]):
                box = sample.boxes[i].float()
                u, v = grid.cell_coordinates(box[:2]).tolist()
                if math.isnan(u) or math.isnan(v) or not (box[3] > 0 and box[4] > 0):
                    continue
                to_cell = math.floor if config.cell_rule == "floor" else math.trunc
                column, row = to_cell(u), to_cell(v)
                if not (0 <= column < columns and 0 <= row < rows):
                    continue
                offset = torch.tensor([[u - column, v - row]])
                targets.boxes[b, t, slot] = encode_boxes(box[None], offset)[0]
                targets.indices[b, t, slot] = row * columns + column
                targets.mask[b, t, slot] = True

                radius = int(gaussian_radius(box[3:5] / grid.cell_m, config.gaussian_overlap))
                radius = max(config.min_radius_cells, radius)
                sigma = (2 * radius + 1) / 6
                plane = targets.heatmap[b, first_channel + k]
                for y in range(max(row - radius, 0), min(row + radius + 1, rows)):
                    for x in range(max(column - radius, 0), min(column + radius + 1, columns)):
                        blob = math.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * sigma**2))
                        plane[y, x] = max(float(plane[y, x]), blob)
            first_channel += len(task)
    return targets
