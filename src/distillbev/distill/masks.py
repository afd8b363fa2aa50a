"""Where to imitate: box, false-positive and background regions on a BEV grid, and how much each weighs.

Everything is one vectorised computation for a whole batch: boxes are padded to (B, M, 9), the offset of every
cell is turned into every box's frame and compared with half its length and width.
Letters: B batch, M boxes (padded), Y X rows and columns of a BEV grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ..boxes import BOX_FIELDS, Boxes3D
from ..config import Config
from ..errors import ConfigError
from ..grid import BevGrid
from ..models.center_targets import TargetConfig, gaussian_radius

SamplePoint = Literal["centre", "corner"]
FalsePositiveSource = Literal["heat", "student", "teacher_selected_student", "union", "boxes"]
FalsePositiveScale = Literal["region", "component"]


class ContextConfig(Config, frozen=True):
    """A ring around every box belongs to its object with less weight: what surrounds an object tells of it.

    Attributes:
        margin_cells: how far boxes grow on each side.
        weight: what cells outside all boxes weigh, those inside weigh 1.
    """

    margin_cells: float = 1.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.margin_cells <= 0:
            raise ConfigError(
                f"margin_cells={self.margin_cells} leaves no ring; choose a positive number, or context=None"
            )
        if not 0 < self.weight <= 1:
            raise ConfigError(f"context weight={self.weight}; choose a number above 0, at most 1")


class RegionConfig(Config, frozen=True):
    """How cells are divided into regions, and the scale of each.

    Attributes:
        sample: the point of a cell that must lie in a box. "corner" (lower left, half a cell off) is the
            reference's rule for CNN students.
        shape: what an object's foreground is. "box": its cells, as published; "gaussian": a blob around its
            centre that reaches 0.6 lengths out and weighs its cells by its height and by one over the object's
            area in cells (instead of `object_scale`); "gaussian_in_box": box cells weighed by that blob.
        context: a ring around boxes as lighter foreground (shape "box" only), None for none. Of several objects
            around a cell the first in the list gives the scale.
        min_one_cell: a box that holds no sample point takes the cell of its centre.
        object_scale: what the cells of an object weigh. "box_area": sqrt(cell^2 / (w l)), the reference's
            rule; "inverse_box_area": cell^2 / (w l), its rule with a context ring; "cells": 1 / sqrt(n) of the
            n cells that the object covers, which is bounded by 1 and treats a box smaller than a cell like one
            of a cell; "object": 1 / n, every object weighs the same.
        max_object_scale: an upper bound of the object scale, None for none.
        combined_scale: the reference's single scale, the maximum of object and background scale in each cell.
            It differs from separate scales only where nearly everything is a false positive.
        teacher_threshold: tau, the teacher's score above which a cell may be a false positive.
        target_threshold: tau_gt, the height of the target heat map below which a cell is not an object's.
        halo: cells outside every box whose target heat reaches tau_gt. "background" as published; "ignored"
            leaves them to the student, so that the surroundings of small objects are not pulled to empty.
    """

    sample: SamplePoint = "centre"
    shape: Literal["box", "gaussian", "gaussian_in_box"] = "box"
    context: ContextConfig | None = None
    min_one_cell: bool = True
    object_scale: Literal["box_area", "inverse_box_area", "cells", "object"] = "cells"
    max_object_scale: float | None = None
    combined_scale: bool = False
    teacher_threshold: float = 0.1
    target_threshold: float = 0.1
    halo: Literal["background", "ignored"] = "background"

    def __post_init__(self) -> None:
        for name in ("teacher_threshold", "target_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a score; choose a number from 0 to 1")
        if self.context is not None and self.shape != "box":
            raise ConfigError(
                f'a context ring around shape={self.shape!r}; choose shape="box", or context=None'
            )
        if self.max_object_scale is not None and self.max_object_scale <= 0:
            raise ConfigError(
                f"max_object_scale={self.max_object_scale} would silence all objects; "
                "choose a positive number, or None for no bound"
            )


@dataclass(frozen=True)
class Foreground:
    """Object cells of a batch, all (B, 1, Y, X): bool `mask`, `scale` (zero outside), `weight` in (0, 1] if any."""

    mask: Tensor
    scale: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Regions:
    """Disjoint regions of a batch on one grid, masks (B, 1, Y, X) bool.

    `foreground_scale` is (B, 1, Y, X); the others are (B, 1, 1, 1), or maps as well when scales are combined or
    false positives have a scale for each component. A region without cells has scale zero.
    """

    foreground: Tensor
    background: Tensor
    false_positive: Tensor
    foreground_scale: Tensor
    background_scale: Tensor
    false_positive_scale: Tensor


def pad_boxes(boxes: Sequence[Boxes3D]) -> tuple[Tensor, Tensor]:
    """Boxes of B samples -> (B, M, 9) float32 and (B, M) bool, true where a box is real; M is at least 1."""
    filler = boxes[0].boxes.new_zeros(1, len(BOX_FIELDS), dtype=torch.float32)
    rows = [sample.boxes.float() if len(sample) else filler for sample in boxes]
    padded = pad_sequence(rows, batch_first=True)
    counts = torch.tensor([len(sample) for sample in boxes]).to(padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < counts[:, None]


def cells_in_boxes(padded: Tensor, valid: Tensor, grid: BevGrid, sample: SamplePoint = "centre") -> Tensor:
    """Which cells have their sample point strictly inside which box, seen from above.

    Args:
        padded: (B, M, 9) boxes in the grid's frame.
        valid: (B, M) bool.

    Returns:
        (B, M, Y, X) bool.
    """
    offset = 0.5 if sample == "centre" else 0.0
    rows, columns = grid.shape
    x = grid.x_range_m[0] + (torch.arange(columns, device=padded.device) + offset) * grid.cell_m
    y = grid.y_range_m[0] + (torch.arange(rows, device=padded.device) + offset) * grid.cell_m
    centre_x, centre_y, _, length, width, _, yaw = padded[..., :7, None, None].unbind(2)  # (B, M, 1, 1) each
    dx, dy = (
        x - centre_x,
        y[:, None] - centre_y,
    )  # (B, M, 1, X) and (B, M, Y, 1): the rotation is a sum of both
    cos, sin = yaw.cos(), yaw.sin()
    along = (dx * cos + dy * sin).abs_()  # (B, M, Y, X)
    across = (dy * cos - dx * sin).abs_()
    half_length = (length / 2).where(valid[..., None, None], -1.0)  # no cell is inside a filler
    return (along < half_length) & (across < width / 2)


def cells_in_boxes_slow(
    boxes: Sequence[Boxes3D], grid: BevGrid, sample: SamplePoint = "centre"
) -> list[list[list[tuple[int, int]]]]:
    """The readable twin of `cells_in_boxes`: (row, column) of the cells of every box of every sample."""
    offset = 0.5 if sample == "centre" else 0.0
    rows, columns = grid.shape
    found = []
    for sample_boxes in boxes:
        cells_of_box = []
        for x, y, _, length, width, _, yaw in sample_boxes.boxes[:, :7].tolist():
            cells = []
            for row in range(rows):
                for column in range(columns):
                    dx = grid.x_range_m[0] + (column + offset) * grid.cell_m - x
                    dy = grid.y_range_m[0] + (row + offset) * grid.cell_m - y
                    along = dx * math.cos(yaw) + dy * math.sin(yaw)
                    across = dy * math.cos(yaw) - dx * math.sin(yaw)
                    if abs(along) < length / 2 and abs(across) < width / 2:
                        cells.append((row, column))
            cells_of_box.append(cells)
        found.append(cells_of_box)
    return found


def _centre_cells(padded: Tensor, valid: Tensor, grid: BevGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column (both (B, M) int64, clamped to the grid) and whether the centre lies on the grid."""
    rows, columns = grid.shape
    cells = grid.cell_coordinates(padded[..., :2]).floor().long()  # (B, M, 2)
    column, row = cells.unbind(-1)
    on_grid = valid & (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    return row.clamp(0, rows - 1), column.clamp(0, columns - 1), on_grid


def foreground_of_boxes(padded: Tensor, valid: Tensor, grid: BevGrid, config: RegionConfig) -> Foreground:
    """Cells of boxes and their scale; where boxes overlap, the first in the list gives the scale.

    Source: DistillBEV (ICCV 2023), section 3; the release takes the metric box area.
    """
    inside = cells_in_boxes(padded, valid, grid, config.sample)  # (B, M, Y, X)
    if config.min_one_cell:
        row, column, on_grid = _centre_cells(padded, valid, grid)
        add = on_grid & ~inside.flatten(2).any(dim=2)
        flat = torch.zeros_like(inside.flatten(2))
        flat.scatter_(2, (row * grid.shape[1] + column)[..., None], add[..., None])
        inside = inside | flat.view_as(inside)

    if config.object_scale in ("box_area", "inverse_box_area"):
        area_cells = (padded[..., 3] * padded[..., 4]).clamp(min=1e-6) / grid.cell_m**2
        object_scale = area_cells.reciprocal()  # (B, M)
        if config.object_scale == "box_area":
            object_scale = object_scale.sqrt()
    else:
        cells = inside.sum(dim=3, dtype=torch.int32).sum(dim=2).clamp(min=1).float()
        object_scale = cells.rsqrt() if config.object_scale == "cells" else cells.reciprocal()
    if config.max_object_scale is not None:
        object_scale = object_scale.clamp(max=config.max_object_scale)

    weight = None
    if config.context is not None:
        grown = padded.clone()
        grown[..., 3:5] += 2 * config.context.margin_cells * grid.cell_m
        weight = torch.where(inside.any(dim=1, keepdim=True), 1.0, config.context.weight)
        inside = inside | cells_in_boxes(grown, valid, grid, config.sample)

    # The first box of the list has the highest rank; rank 0 is no box. (An argmax is slower by far on a CPU.)
    num_boxes = inside.shape[1]
    ranks = torch.arange(num_boxes, 0, -1, dtype=torch.int16, device=inside.device)[:, None, None]
    rank = (inside * ranks).amax(dim=1, keepdim=True).long()  # (B, 1, Y, X)
    scale_of_rank = functional.pad(object_scale.flip(1), (1, 0))  # (B, 1 + M), zero where there is no box
    box_cells = Foreground(rank > 0, scale_of_rank.gather(1, rank.flatten(1)).view(rank.shape), weight)
    return box_cells if config.shape == "box" else _soften(box_cells, padded, valid, grid, config.shape)


def _soften(
    box_cells: Foreground,
    padded: Tensor,
    valid: Tensor,
    grid: BevGrid,
    shape: Literal["gaussian", "gaussian_in_box"],
) -> Foreground:
    """Foreground that fades with the distance from an object's centre; two of the release's variants."""
    sizes = padded[..., 3:5] / grid.cell_m  # (B, M, 2) cells
    radius = (0.6 * sizes.amax(dim=-1)).floor().clamp(min=2)
    blobs = _gaussians(padded, valid, grid, radius)
    blob = blobs.amax(dim=1, keepdim=True)
    if shape == "gaussian_in_box":
        mask = box_cells.mask & (blob > 0)
        return Foreground(mask, box_cells.scale * mask, blob)
    one_over_area = 1 / sizes.prod(dim=-1).ceil().clamp(min=1)
    scale = ((blobs > 0) * one_over_area[..., None, None]).amax(dim=1, keepdim=True)
    return Foreground(blob > 0, scale, blob)


def _gaussians(padded: Tensor, valid: Tensor, grid: BevGrid, radius_cells: Tensor) -> Tensor:
    """Blobs of (B, M) radii around the cells of box centres, cut off to squares, (B, M, Y, X).

    Boxes whose centre lies off the grid have none. Source: CornerNet (arXiv:1808.01244), section 3.2.
    """
    row, column, on_grid = _centre_cells(padded, valid, grid)
    two_variances = 2 * ((2 * radius_cells + 1) / 6) ** 2
    rows, columns = grid.shape
    dx = (torch.arange(columns, device=padded.device) - column[..., None]).float()  # (B, M, X)
    dy = (torch.arange(rows, device=padded.device) - row[..., None]).float()
    # A Gaussian is the product of one along x and one along y, so no (B, M, Y, X) exponential is needed.
    near_x = (dx.abs() <= radius_cells[..., None]) & on_grid[..., None]
    near_y = dy.abs() <= radius_cells[..., None]
    along_x = torch.exp(-(dx**2) / two_variances[..., None]) * near_x
    along_y = torch.exp(-(dy**2) / two_variances[..., None]) * near_y
    return along_y[..., :, None] * along_x[..., None, :]


def target_heat(padded: Tensor, valid: Tensor, grid: BevGrid) -> Tensor:
    """The heat map that a CenterPoint head would be taught, maximum over classes.

    Returns:
        (B, 1, Y, X) in [0, 1], a Gaussian cut off to a square around each box centre that lies on the grid.
    """
    rule = TargetConfig()
    radius = gaussian_radius(padded[..., 3:5] / grid.cell_m, rule.gaussian_overlap)  # (B, M)
    radius = radius.floor().clamp(min=rule.min_radius_cells)
    return _gaussians(padded, valid, grid, radius).amax(dim=1, keepdim=True)


def class_heat(heads: Sequence[dict[str, Tensor]]) -> Tensor | None:
    """Raw head maps -> (B, 1, Y, X) highest score of any class, clamped like CenterPoint's.

    None where the head has no heat maps.
    """
    logits = [maps["heatmap"] for maps in heads if "heatmap" in maps]
    if not logits:
        return None
    highest = torch.cat(logits, dim=1).float().amax(dim=1, keepdim=True)
    return highest.sigmoid().clamp(1e-4, 1 - 1e-4)


def heat_on_grid(heat: Tensor, grid: BevGrid) -> Tensor:
    """(B, 1, Y', X') heat over the grid's ground -> (B, 1, Y, X): maxima when coarser, nearest when finer."""
    if heat.shape[-2:] == grid.shape:
        return heat
    if heat.shape[-2] > grid.shape[0]:
        return functional.adaptive_max_pool2d(heat, grid.shape)
    return functional.interpolate(heat, grid.shape, mode="nearest-exact")


def false_positives(
    source: Literal["heat", "student", "teacher_selected_student", "union"],
    config: RegionConfig,
    targets: Tensor,
    teacher_heat: Tensor | None = None,
    student_heat: Tensor | None = None,
) -> Tensor:
    """Cells where somebody sees an object and nobody annotated one, by heat maps; all comparisons strict.

    Args:
        source: "heat": teacher score > tau, as published; "student": student score > tau;
            "teacher_selected_student": student score > tau and teacher score < tau_gt, what the teacher would
            not have said; "union": the first or the third.
        targets: (B, 1, Y, X) target heat, must be < tau_gt.
        teacher_heat, student_heat: (B, 1, Y, X) scores in [0, 1], those that the source needs.

    Returns:
        (B, 1, Y, X) bool, box cells not yet taken out.
    """
    seen = torch.zeros_like(targets, dtype=torch.bool)
    if source in ("heat", "union"):
        assert teacher_heat is not None, source
        seen = teacher_heat > config.teacher_threshold
    if source != "heat":
        assert student_heat is not None, source
        by_student = student_heat > config.teacher_threshold
        if source != "student":
            assert teacher_heat is not None, source
            by_student &= teacher_heat < config.target_threshold
        seen = seen | by_student
    return seen & (targets < config.target_threshold)


def _one_over_count(region: Tensor) -> Tensor:
    """(B, 1, Y, X) bool -> (B, 1, 1, 1) one over the number of its cells, zero where there are none."""
    count = region.sum(dim=(1, 2, 3), keepdim=True).float()
    return torch.where(count > 0, 1 / count.clamp(min=1), 0.0)


def one_over_component(region: Tensor) -> Tensor:
    """(B, 1, Y, X) bool -> the same in float, in each cell one over the size of its 4-connected component.

    Every cell takes the largest number of its component: neighbours hand theirs on, and each cell then takes
    the number of the cell that its own names, which doubles the way at every turn. Zero outside the region.
    """
    numbers = torch.arange(1, region.numel() + 1, device=region.device).view_as(region) * region
    while True:
        padded = functional.pad(numbers, (1, 1, 1, 1))
        sides = (padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:])
        largest = torch.stack((numbers, *sides)).amax(dim=0) * region
        largest = functional.pad(largest.flatten(), (1, 0))[largest]
        if torch.equal(largest, numbers):
            sizes = torch.bincount(numbers.flatten(), minlength=numbers.numel() + 1)
            return region / sizes[numbers]
        numbers = largest


def split_regions(
    foreground: Foreground,
    config: RegionConfig,
    targets: Tensor | None = None,
    false_positive: Tensor | None = None,
    false_positive_scale: FalsePositiveScale = "region",
) -> Regions:
    """Divides all cells into foreground, false positives, background and, if asked for, an ignored halo.

    Args:
        foreground: the object cells, which come first.
        targets: (B, 1, Y, X) target heat; needed for an ignored halo.
        false_positive: (B, 1, Y, X) bool, see `false_positives`; None for no such region.
        false_positive_scale: one over the cells of the "region", as published, or of each "component" of it.
    """
    outside = ~foreground.mask
    false_positive = torch.zeros_like(outside) if false_positive is None else false_positive & outside
    background = outside & ~false_positive
    if config.halo == "ignored":
        assert targets is not None, "an ignored halo needs the target heat"
        background = background & (targets < config.target_threshold)

    foreground_scale, background_scale = foreground.scale, _one_over_count(background)
    if config.combined_scale:
        foreground_scale = background_scale = torch.maximum(foreground_scale, background_scale)
    if foreground.weight is not None:
        foreground_scale = foreground_scale * foreground.weight
    by_component = false_positive_scale == "component"
    return Regions(
        foreground=foreground.mask,
        background=background,
        false_positive=false_positive,
        foreground_scale=foreground_scale,
        background_scale=background_scale,
        false_positive_scale=(one_over_component if by_component else _one_over_count)(false_positive),
    )
