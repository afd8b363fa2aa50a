"""The centre head: one heatmap per class, and at its peaks what the box looks like.

Source: CenterPoint (arXiv:2006.11275), section 3; losses CornerNet's focal loss (arXiv:1808.01244) and L1.
Letters: B batch, C channels or classes, T tasks, K slots, k candidates, Y X rows and columns.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..boxes import Boxes3D
from ..classes import CENTERPOINT_TASKS, CLASSES
from ..config import Config
from ..errors import ConfigError
from ..grid import BevGrid
from .center_targets import BOX_MAPS, CODE_SIZE, CenterTargets, TargetConfig, center_targets
from .nms import CircleNms, RotatedNms, suppress
from .processes import num_processes, total_over_processes

# Which of a target's ten numbers each loss term sees.
LOSS_TERMS = {"xy": (0, 2), "z": (2, 3), "size": (3, 6), "yaw": (6, 8), "velocity": (8, 10)}
INITIAL_HEATMAP_BIAS = (
    -2.19
)  # sigmoid gives 0.1: most cells are empty, and the first steps should not be spent on that


class CenterHeadConfig(Config, frozen=True):
    """The head, its targets, its losses and how boxes are read from it.

    `branch_channels=None` takes all maps from the shared map with 1x1 convolutions, which tiny models prefer.
    `pool_counts` divides every task's loss by the boxes of all tasks. As published each task is divided by its
    own, so that in a small batch a task with one box or none outweighs all others.
    `code_weights` weigh the ten numbers of a box (see BOX_MAPS), velocity last.
    `centre_range_m` (x, y, z lowest, then highest) drops detections outside. `nms` has one rule per task.
    """

    tasks: tuple[tuple[str, ...], ...] = CENTERPOINT_TASKS
    shared_channels: int = 64
    branch_channels: int | None = 64
    branch_convs: int = 1  # hidden convolutions before each branch's output
    branch_kernel: int = 3
    targets: TargetConfig = TargetConfig()
    code_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
    pool_counts: bool = False
    heatmap_weight: float = 1.0
    box_weight: float = 0.25
    score_threshold: float = 0.1
    max_detections_per_task: int = 500
    centre_range_m: tuple[float, float, float, float, float, float] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    nms: tuple[CircleNms | RotatedNms, ...] = (
        CircleNms(min_squared_distance_m2=4.0),
        CircleNms(min_squared_distance_m2=12.0),
        CircleNms(min_squared_distance_m2=10.0),
        CircleNms(min_squared_distance_m2=1.0),
        CircleNms(min_squared_distance_m2=0.85),
        CircleNms(min_squared_distance_m2=0.175),
    )

    def __post_init__(self) -> None:
        names = [name for task in self.tasks for name in task]
        unknown = [name for name in names if name not in CLASSES]
        if unknown or len(set(names)) < len(names) or not all(self.tasks):
            raise ConfigError(
                f"tasks={self.tasks}; expected non-empty groups of distinct classes "
                f"among {', '.join(CLASSES)}"
            )
        if len(self.nms) != len(self.tasks):
            raise ConfigError(
                f"nms has {len(self.nms)} rules for {len(self.tasks)} tasks; "
                "give one CircleNms or RotatedNms per task"
            )
        for task, rule in zip(self.tasks, self.nms, strict=True):
            scale = rule.class_scale if isinstance(rule, RotatedNms) else None
            if scale is not None and len(scale) != len(task):
                raise ConfigError(f"class_scale={scale} for the task {task}; expected {len(task)} factors")
        if len(self.code_weights) != CODE_SIZE:
            raise ConfigError(f"code_weights has {len(self.code_weights)} entries; expected {CODE_SIZE}")
        if self.branch_kernel % 2 == 0 or self.branch_convs < 1:
            raise ConfigError(
                f"branch_kernel={self.branch_kernel}, branch_convs={self.branch_convs}; expected an odd "
                "kernel and at least one hidden convolution (branch_channels=None for none)"
            )

    @property
    def num_classes(self) -> int:
        return sum(len(task) for task in self.tasks)


class CenterHead(nn.Module):
    """Maps of a detection head, and all that is done with them.

    Per task the maps are `reg` (2), `height` (1), `dim` (3: log of length, width, height), `rot` (2: sine and
    cosine of yaw), `vel` (2) and `heatmap` (logits, one per class). Their meaning is that of our boxes;
    weights of mmdetection3d before 1.0 (width first, clockwise yaw) come over by permuting the output
    channels: dim (0, 1, 2) -> (1, 0, 2), and rot (0, 1) -> (-1, -0), signs included.
    """

    def __init__(self, config: CenterHeadConfig, in_channels: int, grid: BevGrid) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        shared = config.shared_channels
        self.shared_conv = conv_bn_relu(in_channels, shared, kernel=3)
        self.map_channels = [{**BOX_MAPS, "heatmap": len(task)} for task in config.tasks]
        if config.branch_channels is None:
            # One convolution for all maps: thirty-six small ones would each read the shared map again.
            widths = [(name, width) for task in self.map_channels for name, width in task.items()]
            self.task_heads = nn.Conv2d(shared, sum(width for _, width in widths), kernel_size=1)
            biases = torch.cat([torch.full((width,), initial_bias(name)) for name, width in widths])
            self.task_heads.bias = nn.Parameter(biases)
        else:
            self.task_heads = nn.ModuleList(
                Branches({name: self._branch(name, width) for name, width in task.items()})
                for task in self.map_channels
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _branch(self, name: str, out_channels: int) -> nn.Sequential:
        config = self.config
        assert config.branch_channels is not None
        kernel = config.branch_kernel
        layers: list[nn.Module] = []
        channels = config.shared_channels
        for _ in range(config.branch_convs):
            layers.append(conv_bn_relu(channels, config.branch_channels, kernel))
            channels = config.branch_channels
        output = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2)
        output.bias = nn.Parameter(torch.full((out_channels,), initial_bias(name)))
        return nn.Sequential(*layers, output)

    def forward(self, bev: Tensor) -> list[dict[str, Tensor]]:
        """(B, C, Y, X) -> one dict of raw maps (B, c, Y, X) per task."""
        shared = self.shared_conv(bev)
        if not isinstance(self.task_heads, nn.Conv2d):
            return [branches(shared) for branches in self.task_heads]
        all_maps = self.task_heads(shared)
        per_task = all_maps.split([sum(widths.values()) for widths in self.map_channels], dim=1)
        return [
            dict(zip(widths, maps.split(list(widths.values()), dim=1), strict=True))
            for widths, maps in zip(self.map_channels, per_task, strict=True)
        ]

    def targets(self, boxes: list[Boxes3D]) -> CenterTargets:
        """Targets of a batch, one `Boxes3D` per sample, on the boxes' device."""
        return center_targets(boxes, self.config.tasks, self.grid, self.config.targets)

    def loss(self, heads: list[dict[str, Tensor]], targets: CenterTargets) -> dict[str, Tensor]:
        """Weighted terms, summed over tasks: heatmap, xy, z, size, yaw, velocity (scalars, fp32)."""
        return {name: values.sum() for name, values in self.loss_per_task(heads, targets).items()}

    def loss_per_task(self, heads: list[dict[str, Tensor]], targets: CenterTargets) -> dict[str, Tensor]:
        """The terms of `loss` before they are summed, (T,) each. Computed in fp32 whatever autocast says."""
        with torch.autocast(targets.heatmap.device.type, enabled=False):
            logits = torch.cat([maps["heatmap"] for maps in heads], dim=1).float()
            pooled = self.config.pool_counts
            heatmap = focal_loss_per_task(logits, targets.heatmap, targets.classes_per_task, pooled)
            predicted = torch.stack(
                [gather_boxes(maps, targets.indices[:, task]).float() for task, maps in enumerate(heads)],
                dim=1,
            )  # (B, T, K, 10)
            errors = box_errors_per_task(predicted, targets, pooled)  # (T, 10)
            errors = errors * errors.new_tensor(self.config.code_weights) * self.config.box_weight
        terms = {"heatmap": heatmap * self.config.heatmap_weight}
        for name, (start, stop) in LOSS_TERMS.items():
            terms[name] = errors[:, start:stop].sum(dim=1)
        return terms

    @torch.no_grad()
    def decode(self, heads: list[dict[str, Tensor]]) -> list[Boxes3D]:
        """Boxes of every sample, task after task, by descending score within a task, labels into CLASSES."""
        per_task = [self._decode_task(task, maps) for task, maps in enumerate(heads)]
        detections = []
        for parts in zip(*per_task, strict=True):
            detections.append(
                Boxes3D(
                    boxes=torch.cat([part.boxes for part in parts]),
                    labels=torch.cat([part.labels for part in parts]),
                    scores=torch.cat([part.scores for part in parts if part.scores is not None]),
                )
            )
        return detections

    def candidates(self, task: int, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The best cells of one task, before any threshold.

        Returns:
            boxes (B, k, 9), class_in_task (B, k) int64 and scores (B, k), in descending order of score.
        """
        logits = maps["heatmap"].float().flatten(1)
        k = min(self.config.max_detections_per_task, logits.shape[1])
        best, where = logits.topk(k, dim=1)
        rows, columns = maps["heatmap"].shape[2:]
        cells = rows * columns
        cell = where % cells
        code = gather_boxes(maps, cell).float()
        (x_low, _), (y_low, _), size = self.grid.x_range_m, self.grid.y_range_m, self.grid.cell_m
        x = (cell % columns + code[..., 0]) * size + x_low
        y = (cell // columns + code[..., 1]) * size + y_low
        yaw = torch.atan2(code[..., 6], code[..., 7])
        boxes = torch.cat(
            [
                x[..., None],
                y[..., None],
                code[..., 2:3],
                code[..., 3:6].exp(),
                yaw[..., None],
                code[..., 8:10],
            ],
            dim=-1,
        )
        return boxes, where // cells, best.sigmoid()

    def _decode_task(self, task: int, maps: dict[str, Tensor]) -> list[Boxes3D]:
        config = self.config
        boxes, class_in_task, scores = self.candidates(task, maps)
        low, high = boxes.new_tensor(config.centre_range_m).split(3)
        keep = (scores > config.score_threshold) & ((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(
            dim=-1
        )
        label_of = torch.tensor([CLASSES.index(name) for name in config.tasks[task]], device=boxes.device)
        detections = []
        for sample in range(len(boxes)):
            kept = Boxes3D(boxes[sample], class_in_task[sample], scores[sample])[keep[sample]]
            kept = kept[suppress(config.nms[task], kept.boxes, kept.labels)]
            detections.append(Boxes3D(kept.boxes, label_of[kept.labels], kept.scores))
        return detections


class Branches(nn.ModuleDict):
    """The branches of one task: the same map in, one map out of each."""

    def forward(self, shared: Tensor) -> dict[str, Tensor]:
        return {name: branch(shared) for name, branch in self.items()}


def initial_bias(map_name: str) -> float:
    """Of an output convolution. Heatmaps start at a score of 0.1, since most cells are empty."""
    return -2.19 if map_name == "heatmap" else 0.0


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Same-size convolution without bias, batch norm, ReLU; parts named as in public checkpoints."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU(inplace=True)))


def gather_boxes(maps: dict[str, Tensor], cells: Tensor) -> Tensor:
    """Reads the regression maps (B, c, Y, X) of a task at (B, K) cells, row * X + column -> (B, K, 10)."""
    parts = []
    for name, width in BOX_MAPS.items():
        values = maps[name].flatten(2)
        parts.append(values.gather(2, cells[:, None].expand(-1, width, -1)))
    return torch.cat(parts, dim=1).transpose(1, 2)


def focal_loss_per_task(
    logits: Tensor, target: Tensor, classes_per_task: tuple[int, ...], pooled: bool = False
) -> Tensor:
    """CornerNet's focal loss for Gaussian targets, (B, C, Y, X) logits and targets -> (T,).

    At peaks -(1 - p)^2 log p, elsewhere -(1 - t)^4 p^2 log(1 - p), summed over the batch and a task's classes
    and divided by the task's number of peaks, or of all tasks' if `pooled`. Two boxes of a class in one cell
    are one peak.
    """
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    loss = torch.where(
        peak, -(p + 1e-12).log() * (1 - p) ** 2, -(1 - p + 1e-12).log() * p**2 * (1 - target) ** 4
    )
    sums = torch.stack([s.sum() for s in loss.sum(dim=(0, 2, 3)).split(classes_per_task)])
    peaks = torch.stack([n.sum() for n in peak.sum(dim=(0, 2, 3)).split(classes_per_task)])
    peaks = total_over_processes(peaks)
    return sums * num_processes() / (peaks.sum() if pooled else peaks).clamp(min=1)


def box_errors_per_task(predicted: Tensor, targets: CenterTargets, pooled: bool = False) -> Tensor:
    """Absolute errors of (B, T, K, 10) predictions -> (T, 10), summed and divided by the count of boxes.

    The count is the task's own, or that of all tasks if `pooled`.

    Where a target is NaN (the velocity of an object seen once) it asks for nothing; the divisor still counts
    it.
    """
    known = targets.mask[..., None] & ~targets.boxes.isnan()
    errors = (predicted - torch.where(known, targets.boxes, predicted.detach())).abs()
    count = total_over_processes(targets.mask.sum(dim=(0, 2)))  # (T,)
    return errors.sum(dim=(0, 2)) * num_processes() / ((count.sum() if pooled else count) + 1e-4)[..., None]
