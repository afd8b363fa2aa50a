"""From image features to the ground: every pixel's features are spread along its ray and summed into cells.

Source: Lift, Splat, Shoot (arXiv:2008.05711), section 3; the way of summing without ever building the volume
of ray features is that of BEVPoolv2 (arXiv:2211.17111).
Letters: B batch, N cameras, C channels, D depth bins, H W feature rows and columns, P pixels, Y X cells.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..config import Config
from ..data.virtual_points import FLAG_COLUMN, MEASURED, NUM_COLUMNS, TIME_COLUMN
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from .depth_net import DepthAggregation, DepthNetConfig, build_depth_net
from .processes import num_processes, total_over_processes

DepthLabels = Literal["centred", "megvii", "release"]


class DepthBins(Config, frozen=True):
    """The depths along the optical axis at which a pixel may lie: start, start + step, ... below stop."""

    start_m: float = 1.0
    stop_m: float = 60.0
    step_m: float = 1.0

    def __post_init__(self) -> None:
        if self.start_m <= 0 or self.step_m <= 0 or self.stop_m <= self.start_m:
            raise ConfigError(
                f"start_m={self.start_m}, stop_m={self.stop_m}, step_m={self.step_m}; "
                "expected 0 < start < stop and a positive step"
            )

    @property
    def count(self) -> int:
        return math.ceil((self.stop_m - self.start_m) / self.step_m - 1e-6)

    def depths_m(self, device: torch.device | str = "cpu") -> Tensor:
        """(D,) metres."""
        return self.start_m + self.step_m * torch.arange(self.count, device=device)


class LiftConfig(Config, frozen=True):
    """The lift. The last two switches give the reference's geometry back, for its published weights.

    `depth_net`: a net that knows the cameras (BEVDepth); without one a single convolution says depth and
    context. `aggregate_depth`: neighbours on the rays share their features before they are summed (BEVDepth's
    depth refinement), which needs all ray features in memory.
    `z_range_m`: points above or below are dropped. `corner_aligned_pixels`: features lie from the first to
    the last pixel of the image, not at the centres of their strides. `truncate_cells`: coordinates are
    rounded towards zero, so that points up to a cell outside the lower borders count as inside.
    `compression`: see `compress`; None leaves the sums as they are, as published.
    """

    channels: int = 64
    depth: DepthBins = DepthBins()
    depth_net: DepthNetConfig | None = None
    aggregate_depth: bool = False
    z_range_m: tuple[float, float] = (-10.0, 10.0)
    corner_aligned_pixels: bool = False
    truncate_cells: bool = False
    compression: float | None = None

    def __post_init__(self) -> None:
        if self.compression is not None and self.compression <= 0:
            raise ConfigError(
                f"compression={self.compression}; expected a positive gain (10 does well), or null for none"
            )
        if self.channels < 1 or self.z_range_m[1] <= self.z_range_m[0]:
            raise ConfigError(
                f"channels={self.channels}, z_range_m={self.z_range_m}; "
                "expected 1 channel or more and a range from low to high"
            )


class DepthLossConfig(Config, frozen=True):
    """Teaches the depth bins from the points that the LiDAR measured just now, where they fall on the images.

    Per feature cell with a point: `softmax_bce` sums the binary cross entropies of all bins' probabilities
    (BEVDepth), `sigmoid_bce` those of the logits taken one by one, `cross_entropy` takes the negative log
    likelihood of the true bin. `mean_over`: the sum is divided by the cells that have a point, or by all bins
    of all cells.
    `labels`: which cell a point belongs to, and which bin a depth; see `depth_targets`.
    `virtual_points`: those of an MVP teacher label cells as well, as in the release, where the gain of such a
    teacher is then one of imitation and of denser depth labels.
    """

    loss: Literal["softmax_bce", "sigmoid_bce", "cross_entropy"] = "softmax_bce"
    mean_over: Literal["labelled_cells", "all_bins"] = "labelled_cells"
    labels: DepthLabels = "centred"
    virtual_points: bool = False
    weight: float = 3.0

    @classmethod
    def megvii(cls) -> DepthLossConfig:
        """As BEVDepth was published."""
        return cls(labels="megvii")

    @classmethod
    def release(cls) -> DepthLossConfig:
        """As the students of DistillBEV were trained."""
        return cls(loss="sigmoid_bce", mean_over="all_bins", labels="release", weight=100.0)


class DepthLift(nn.Module):
    """Says for each pixel how likely every depth is, and puts its features there on the ground."""

    def __init__(self, config: LiftConfig, in_channels: int, grid: BevGrid, stride_px: int) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.stride_px = stride_px
        self.out_channels = config.channels
        self.depth_net = None
        if config.depth_net is not None:
            self.depth_net = build_depth_net(
                config.depth_net, in_channels, config.channels, config.depth.count
            )
        else:
            # One convolution for both, depth first: two would read the features twice.
            self.depth_and_context = nn.Conv2d(
                in_channels, config.depth.count + config.channels, kernel_size=1
            )
        self.aggregation = DepthAggregation(config.channels) if config.aggregate_depth else None

    def forward(
        self, features: Tensor, cam2img: Tensor, cam2lidar: Tensor, camera_numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lifts all cameras of a batch at once.

        Args:
            features: (B, N, C_in, H, W), one feature map per camera.
            cam2img: (B, N, 4, 4), with image augmentation.
            cam2lidar: (B, N, 4, 4), with BEV augmentation.
            camera_numbers: (B, N, K), what the depth net is told of each camera (its `camera_numbers`).

        Returns:
            lifted: (B, C, Y, X) float32.
            depth_logits: (B, N, D, H, W) float32.
        """
        config = self.config
        depth_logits, context = self.look(features, camera_numbers)
        pixels = feature_pixels(features.shape[-2:], self.stride_px, config.corner_aligned_pixels)
        # Metres and sums of many small terms want full precision whatever autocast says.
        with torch.autocast(features.device.type, enabled=False):
            points = frustum_points(pixels, config.depth, cam2img, cam2lidar)  # (B, N, D, H, W, 3)
            cells = cell_indices(points, self.grid, config.z_range_m, config.truncate_cells)
            depth_probs = depth_logits.softmax(dim=2)
        lifted = self.splat(depth_probs, context, cells)
        if config.compression is not None:
            lifted = compress(lifted, config.compression)
        return lifted, depth_logits

    def splat(self, depth_probs: Tensor, context: Tensor, cells: Tensor) -> Tensor:
        """Context, times the probability of each depth, in the cells: (B, C, Y, X), see `lift_splat`."""
        with torch.autocast(context.device.type, enabled=False):
            if self.aggregation is None:
                return lift_splat(depth_probs, context, cells, self.grid)
            volume = torch.einsum("bndhw,bnchw->bncdhw", depth_probs, context)
        volume = self.aggregation(volume.flatten(0, 1)).float().unflatten(0, volume.shape[:2])
        return splat_volume(volume.movedim(2, -1), cells, self.grid)

    def look(self, features: Tensor, camera_numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Depth logits (B, N, D, H, W) and context (B, N, C, H, W) of all cameras, float32."""
        cameras, pixels = features.shape[:2], features.flatten(0, 1)
        if self.depth_net is None:
            predicted = self.depth_and_context(pixels).float().unflatten(0, cameras)
            depth_logits, context = predicted.split([self.config.depth.count, self.config.channels], dim=2)
        else:
            assert camera_numbers is not None, "a depth net must be told of its cameras"
            both = self.depth_net(pixels, camera_numbers.flatten(0, 1))
            depth_logits, context = (part.float().unflatten(0, cameras) for part in both)
        return depth_logits, context


def compress(lifted: Tensor, gain: float) -> Tensor:
    """Shortens the long vectors of a lifted map (B, C, Y, X): a root mean square of r becomes log(1 + gain r).

    A cell beside the car collects the rays of far more pixels than one 20 m away, and the norms of the BEV
    encoder, which see the whole map, leave next to nothing of the latter. Directions stay as they are.
    """
    r = (lifted.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()  # the root of 0 has no gradient
    return lifted * (torch.log1p(gain * r) / r)


def feature_pixels(feature_hw: tuple[int, ...], stride_px: int, corner_aligned: bool = False) -> Tensor:
    """Where in the image each feature lies.

    Args:
        feature_hw: rows and columns of the feature map.
        stride_px: pixels per feature.
        corner_aligned: from pixel 0 to the last one, as the reference has it.

    Returns:
        (H, W, 2): u (column) and v (row) in pixels, the centre of the image's first pixel being (0.5, 0.5).
    """
    if corner_aligned:
        v, u = (torch.linspace(0, count * stride_px - 1, count) for count in feature_hw)
    else:
        v, u = ((torch.arange(count) + 0.5) * stride_px for count in feature_hw)
    return torch.stack([u.expand(len(v), -1), v[:, None].expand(-1, len(u))], dim=-1)


def frustum_points(pixels: Tensor, bins: DepthBins, cam2img: Tensor, cam2lidar: Tensor) -> Tensor:
    """Every pixel at every depth, in the LiDAR frame.

    Args:
        pixels: (H, W, 2), u and v.
        bins: depths along the optical axis.
        cam2img: (B, N, 4, 4).
        cam2lidar: (B, N, 4, 4).

    Returns:
        (B, N, D, H, W, 3) metres.
    """
    device = cam2img.device
    rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1).to(device)  # at depth 1
    img2lidar = cam2lidar[..., :3, :3] @ torch.linalg.inv(cam2img[..., :3, :3])
    directions = torch.einsum("bnij,hwj->bnhwi", img2lidar, rays)
    depths = bins.depths_m(device).view(-1, 1, 1, 1)
    return torch.addcmul(cam2lidar[..., None, None, None, :3, 3], directions[:, :, None], depths)


def cell_indices(
    points: Tensor, grid: BevGrid, z_range_m: tuple[float, float], truncate: bool = False
) -> Tensor:
    """(B, ..., 3) points -> (B, ...) int64: (sample * Y + row) * X + column, or B * Y * X where outside."""
    rows, columns = grid.shape
    round_off = torch.trunc if truncate else torch.floor
    column = round_off((points[..., 0] - grid.x_range_m[0]) / grid.cell_m)
    row = round_off((points[..., 1] - grid.y_range_m[0]) / grid.cell_m)
    layer = round_off((points[..., 2] - z_range_m[0]) / (z_range_m[1] - z_range_m[0]))
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows) & (layer == 0)
    B = len(points)
    samples = torch.arange(B, device=points.device).view(-1, *[1] * (points.ndim - 2)) * (rows * columns)
    return torch.where(inside, (row * columns + column).long() + samples, B * rows * columns)


def lift_splat_by_volume(depth_probs: Tensor, context: Tensor, cells: Tensor, grid: BevGrid) -> Tensor:
    """The slow, readable twin of `lift_splat`: builds all ray features, then adds each to its cell."""
    return splat_volume(torch.einsum("bndhw,bnchw->bndhwc", depth_probs, context), cells, grid)


def splat_volume(ray_features: Tensor, cells: Tensor, grid: BevGrid) -> Tensor:
    """(B, N, D, H, W, C) features and the cell of each -> (B, C, Y, X), summed."""
    B, C = len(ray_features), ray_features.shape[-1]
    ground = ray_features.new_zeros(B * math.prod(grid.shape) + 1, C)  # the last row takes what lies outside
    ground = ground.index_add(0, cells.flatten(), ray_features.reshape(-1, C))
    return ground[:-1].view(B, *grid.shape, C).permute(0, 3, 1, 2)


def lift_splat(depth_probs: Tensor, context: Tensor, cells: Tensor, grid: BevGrid) -> Tensor:
    """Adds each pixel's context, times the probability of each depth, to the cells that its ray meets.

    Args:
        depth_probs: (B, N, D, H, W) float32.
        context: (B, N, C, H, W) float32.
        cells: (B, N, D, H, W), see `cell_indices`.
        grid: what the cells count on.

    Returns:
        (B, C, Y, X). Points are summed, not averaged.
    """
    B, C, D = len(context), context.shape[2], depth_probs.shape[2]
    probs_of_pixel = depth_probs.movedim(2, -1).reshape(-1, D)  # (P, D)
    cells_of_pixel = cells.movedim(2, -1).reshape(-1, D)  # (P, D)
    context_of_pixel = context.movedim(2, -1).reshape(-1, C)  # (P, C)
    num_cells = B * math.prod(grid.shape) + 1
    ground: Any = _Splat.apply(probs_of_pixel, context_of_pixel, cells_of_pixel, num_cells)
    return ground[:-1].view(B, *grid.shape, C).permute(0, 3, 1, 2)


class _Splat(torch.autograd.Function):
    """ground[cells[p, d]] += probs[p, d] * context[p], without the (P, D, C) products in memory.

    Measured on one core, six cameras: forward and backward take a tenth of the time of the twin's.
    """

    @staticmethod
    def forward(ctx: Any, probs: Tensor, context: Tensor, cells: Tensor, num_cells: int) -> Tensor:
        ctx.save_for_backward(probs, context, cells)
        ground = context.new_zeros(num_cells, context.shape[1])
        products = torch.empty_like(context)  # of one depth; small enough to stay in the cache
        for prob, cell in zip(probs.t().contiguous(), cells.t().contiguous(), strict=True):
            ground.index_add_(0, cell, torch.mul(context, prob[:, None], out=products))
        return ground

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator hides the names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        (grad_ground,) = grad_outputs
        probs, context, cells = ctx.saved_tensors
        # grad_context[p] = sum over d of probs[p, d] * grad_ground[cells[p, d]] is an embedding bag; and
        # grad_probs[p, d] = context[p] . grad_ground[cells[p, d]] is that bag's gradient at its weights.
        with torch.enable_grad():
            weights = probs.detach().requires_grad_()
            grad_context = functional.embedding_bag(
                cells, grad_ground.contiguous(), mode="sum", per_sample_weights=weights
            )
        (grad_probs,) = torch.autograd.grad(grad_context, weights, context)
        return grad_probs, grad_context.detach(), None, None


def depth_targets(
    points: list[Tensor],
    cam2img: Tensor,
    cam2lidar: Tensor,
    bins: DepthBins,
    feature_hw: tuple[int, int],
    stride_px: int,
    labels: DepthLabels = "centred",
    virtual_points: bool = False,
) -> Tensor:
    """Which depth bin each feature cell should choose, as the LiDAR sees it.

    Args:
        points: per sample (P, 5), see `Batch.points`, or MVP's 17 columns.
        cam2img: (B, N, 4, 4).
        cam2lidar: (B, N, 4, 4).
        bins: the bins.
        feature_hw: rows and columns of the feature map.
        stride_px: pixels per feature.
        labels: "centred": a point belongs to the cell that it falls into, a depth to the nearest bin, since a
            bin's features are put at its depth. "megvii": a bin takes the depths from its own to the next,
            and points less than a pixel left of or above the image count as on it. "release": bins so too,
            but a point belongs to the nearest corner of cells, and only points within the bins' range compete
            for a cell.
        virtual_points: see `points_now`.

    Returns:
        (B, N, H, W) int64: the bin of the nearest point in the cell, -1 where none has one.
    """
    within = (bins.start_m, bins.stop_m) if labels == "release" else None
    nearest = nearest_depths(
        points, cam2img, cam2lidar, feature_hw, stride_px, labels, within, virtual_points
    )
    return depth_bins(nearest, bins, nearest_bin=labels == "centred")


def nearest_depths(
    points: list[Tensor],
    cam2img: Tensor,
    cam2lidar: Tensor,
    feature_hw: tuple[int, int],
    stride_px: int,
    labels: DepthLabels = "centred",
    within_m: tuple[float, float] | None = None,
    virtual_points: bool = False,
) -> Tensor:
    """(B, N, H, W) metres along the optical axis to the nearest point of each feature cell, inf where none is.

    Args as `depth_targets`, whose `labels` say here only which cell a point belongs to; `within_m` leaves out
    points that are nearer than the first or not nearer than the second depth.
    """
    (B, N), (H, W) = cam2img.shape[:2], feature_hw
    limits = torch.tensor([W, H], device=cam2img.device)
    low, high = within_m or (1e-3, math.inf)
    with torch.autocast(cam2img.device.type, enabled=False):
        lidar2img = cam2img[..., :3, :3] @ torch.linalg.inv(cam2lidar)[..., :3, :]  # (B, N, 3, 4)
        nearest = cam2img.new_full((B, N * H * W + 1), math.inf)  # the last entry takes what lies outside
        for sample in range(B):
            xyz_m = points_now(points[sample], virtual_points)[:, :3]
            homogeneous = functional.pad(xyz_m, (0, 1), value=1.0)  # (P, 4)
            projected = torch.einsum("nij,pj->npi", lidar2img[sample], homogeneous)  # u*d, v*d, d
            depth = projected[..., 2]
            pixel = projected[..., :2] / depth.clamp(min=1e-3)[..., None]
            if labels == "megvii":
                pixel = pixel.trunc()
            cell = pixel / stride_px
            cell = cell.round() if labels == "release" else cell.floor()
            inside = (depth > 1e-3) & ((cell >= 0) & (cell < limits)).all(dim=-1)
            inside &= (depth >= low) & (depth < high)
            camera = torch.arange(N, device=depth.device)[:, None] * (H * W)
            index = torch.where(inside, camera + (cell[..., 1] * W + cell[..., 0]).long(), N * H * W)
            nearest[sample].scatter_reduce_(0, index.flatten(), depth.flatten(), "amin")
    return nearest[:, :-1].view(B, N, H, W)


def depth_bins(depths_m: Tensor, bins: DepthBins, nearest_bin: bool = True) -> Tensor:
    """Depths -> int64 bins, the nearest or the last one not beyond; -1 where no bin is."""
    with torch.autocast(depths_m.device.type, enabled=False):
        chosen = ((depths_m - bins.start_m) / bins.step_m + (0.5 if nearest_bin else 0.0)).floor()
    known = (chosen >= 0) & (chosen < bins.count)  # an empty cell is infinitely far
    return torch.where(known, chosen, -1).long()


def points_now(points: Tensor, virtual_points: bool = False) -> Tensor:
    """The points of the key sweep (time 0): what moves is elsewhere in older ones.

    Of MVP's 17 columns only measured points count unless `virtual_points` asks for all: virtual ones are
    guesses, and would teach a student's depth what its teacher's input was given.

    Raises:
        DataError: points of neither form.
    """
    if points.shape[1] == NUM_COLUMNS:
        now = points[points[:, TIME_COLUMN] == 0]
        return now if virtual_points else now[now[:, FLAG_COLUMN] == MEASURED]
    if points.shape[1] != 5:
        raise DataError(
            f"points of {points.shape[1]} columns; the depth loss reads 5 (x, y, z, intensity, time) or "
            f"{NUM_COLUMNS} (with virtual points)"
        )
    return points[points[:, 4] == 0]


def depth_loss(depth_logits: Tensor, targets: Tensor, config: DepthLossConfig) -> Tensor:
    """(B, N, D, H, W) logits and (B, N, H, W) bins -> weighted loss of the cells that have a bin."""
    known = targets >= 0
    logits = depth_logits.float().movedim(2, -1)[known]  # (cells, D)
    bins = targets[known]
    with torch.autocast(logits.device.type, enabled=False):
        if config.loss == "cross_entropy":
            total = functional.cross_entropy(logits, bins, reduction="sum")
        else:
            one_hot = functional.one_hot(bins, logits.shape[1]).to(logits.dtype)
            if config.loss == "softmax_bce":
                total = functional.binary_cross_entropy(logits.softmax(dim=1), one_hot, reduction="sum")
            else:
                total = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum")
    if config.mean_over == "all_bins":
        return config.weight * total / max(depth_logits.numel(), 1)
    count = total_over_processes(known.sum()).clamp(min=1)
    return config.weight * total * num_processes() / count
