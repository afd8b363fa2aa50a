"""Two small networks that are none of ours, and batches for them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbev.boxes import Boxes3D
from distillbev.data.schema import Batch
from distillbev.distill.adapters import LayeredAdapterConfig
from distillbev.distill.distiller import Distiller
from distillbev.distill.settings import (
    AttentionTermConfig,
    DistillConfig,
    FalsePositiveConfig,
    TapConfig,
    TermConfig,
)
from distillbev.grid import BevGrid
from distillbev.models.outputs import BevMap

GRID = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-4.8, 8.0), cell_m=0.8)  # 16 x 16 cells


def box(x: float, y: float, length: float, width: float, yaw: float = 0.0) -> list[float]:
    return [x, y, 0.0, length, width, 1.5, yaw, 0.0, 0.0]


def boxes_of(*rows: list[float], label: int = 0) -> Boxes3D:
    if not rows:
        return Boxes3D.empty()
    return Boxes3D(torch.tensor(rows), torch.full((len(rows),), label))


CAR = box(1.0, 2.0, 4.5, 1.9, 0.4)


def make_batch(boxes: list[Boxes3D | None], seed: int = 0, tokens: list[str] | None = None) -> Batch:
    """Images of noise; everything else as an untouched sample has it."""
    n = len(boxes)
    eye = torch.eye(4).expand(n, 1, 4, 4)
    images = torch.randint(0, 255, (n, 1, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    return Batch(
        tokens=tokens or [f"token{seed}-{i}" for i in range(n)],
        images=images.to(torch.uint8),
        cam2img=eye,
        cam2lidar=eye,
        image_aug=eye,
        bev_aug=torch.eye(4).repeat(n, 1, 1),
        lidar2global=torch.eye(4, dtype=torch.float64).repeat(n, 1, 1),
        points=[torch.zeros(3, 5) for _ in range(n)],
        boxes=boxes,
    )


@dataclass
class ToyOutput:
    bev: dict[str, BevMap]
    heads: list[dict[str, Tensor]]


class ToyNetwork(nn.Module):
    """Maps of the given channels from the batch's images: "head" at 16 x 16 cells, "stage0" at 8 x 8."""

    def __init__(self, channels: int, seed: int, grid: BevGrid = GRID) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.grid = grid
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.stage0 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.heat = nn.Conv2d(channels, 10, 1)
        nn.init.normal_(self.heat.weight)
        nn.init.constant_(self.heat.bias, -3.6)  # some cells become false positives, most do not
        self.labels_seen: list[Boxes3D | None] = []

    def forward(self, batch: Batch) -> ToyOutput:
        self.labels_seen = list(batch.boxes)
        stem = self.stem(batch.images[:, 0].to(self.heat.weight.dtype) / 255)
        features = stem.relu()
        maps = {
            "head": BevMap(features, self.grid),
            "stage0": BevMap(self.stage0(stem), self.grid.coarser(2)),
        }
        return ToyOutput(bev=maps, heads=[{"heatmap": self.heat(features)}])


class ToyStudent(ToyNetwork):
    """Counts the boxes it is taught, so that a test sees which ones they are."""

    def loss(self, output: ToyOutput, batch: Batch) -> dict[str, Tensor]:
        self.taught = list(batch.boxes)
        heat = output.heads[0]["heatmap"]
        assert len(heat) == len(batch) and all(boxes is not None for boxes in batch.boxes)
        number = torch.tensor([float(len(boxes)) for boxes in self.taught])
        return {"heatmap": ((heat.mean(dim=(1, 2, 3)) - number) ** 2).mean()}


class ToyTeacher(ToyNetwork):
    """Finds one sure car and one doubtful pedestrian in every sample."""

    def decode(self, output: ToyOutput) -> list[Boxes3D]:
        rows = torch.tensor([box(-2.0, 1.0, 4.0, 2.0, math.pi / 3), box(3.0, 5.0, 0.7, 0.7)])
        found = Boxes3D(rows, torch.tensor([0, 5]), torch.tensor([0.9, 0.2]))
        return [found for _ in output.heads[0]["heatmap"]]


ALL_TERMS = TapConfig(
    foreground=TermConfig(weight=1.0),
    background=TermConfig(weight=1.0),
    false_positive=FalsePositiveConfig(weight=1.0),
    attention_imitation=AttentionTermConfig(weight=0.1),
)
STAGE = TapConfig(
    student="stage0", teacher="stage0", adapter=LayeredAdapterConfig(), foreground=TermConfig(weight=1.0)
)
BOTH = DistillConfig(taps=(ALL_TERMS, STAGE))
LABELLED = [boxes_of(CAR), boxes_of(CAR, CAR)]


def make_distiller(config: DistillConfig = BOTH, channels: int = 8) -> Distiller:
    teacher, student = ToyTeacher(channels, seed=1), ToyStudent(4, seed=2)
    torch.manual_seed(3)
    return Distiller.from_probe(teacher, student, config, make_batch(LABELLED))


def imitation(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: loss for name, loss in losses.items() if name.startswith("imitate/")}


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()
