"""What every detector takes and gives; the teacher, the student and the distiller meet here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..boxes import Boxes3D
from ..data.schema import Batch
from ..errors import DataError
from ..grid import BevGrid


@dataclass
class BevMap:
    """One named level of a detector's bird's-eye view: features (B, C, Y, X) and the ground they cover."""

    features: Tensor
    grid: BevGrid


@dataclass
class QueryPredictions:
    """What object queries say, after every layer of a decoder.

    L layers, B samples, Q queries, K classes.

    Attributes:
        class_logits: (L, B, Q, K).
        boxes: (L, B, Q, 10): centre x, y, z (m), log of length, width and height (m), sine and cosine of yaw,
            velocity x and y (m/s).
    """

    class_logits: Tensor
    boxes: Tensor


@dataclass
class DetectorOutput:
    """The maps of one forward pass.

    Attributes:
        bev: named BEV maps. Detectors of ours give "stage0", "stage1", ... (the BEV encoder's stages, fine to
            coarse) and "head" (the map that enters the detection head). Camera students also give "lifted" (the
            map that enters the BEV encoder, earlier frames included).
        heads: one dict per task with raw maps (B, C, Y, X): reg 2, height 1, dim 3, rot 2 (sin, cos), vel 2,
            heatmap (one logit per class of the task).
        depth_logits: (B, N, D, H, W) of students that predict depth, else None.
        queries: of detectors with a query head, else None; their `heads` is empty.
        displacement_s: (B,) seconds over which the "vel" maps are displacements; None where they are m/s.
        lidar2bev: (B, 4, 4) LiDAR frame -> frame of all maps, both augmented; None where it is the LiDAR frame.
    """

    bev: dict[str, BevMap]
    heads: list[dict[str, Tensor]] = field(default_factory=list)
    depth_logits: Tensor | None = None
    queries: QueryPredictions | None = None
    displacement_s: Tensor | None = None
    lidar2bev: Tensor | None = None


class Detector(Protocol):
    """A detector is an `nn.Module` with these three methods and this property."""

    @property
    def bev_channels(self) -> dict[str, int]:
        """Channels of every map in `DetectorOutput.bev`; adapters are built from them beforehand."""
        ...

    def __call__(self, batch: Batch) -> DetectorOutput: ...

    def loss(self, output: DetectorOutput, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms whose sum is the detection loss; every `batch.boxes` entry must be present."""
        ...

    def decode(self, output: DetectorOutput) -> list[Boxes3D]:
        """Detections of every sample, in the LiDAR frame (with the batch's BEV augmentation in it)."""
        ...


def labelled_boxes(batch: Batch) -> list[Boxes3D]:
    """The boxes of every sample.

    Raises:
        DataError: a sample has none.
    """
    boxes = [sample for sample in batch.boxes if sample is not None]
    if len(boxes) < len(batch.boxes):
        unlabelled = next(t for t, b in zip(batch.tokens, batch.boxes, strict=True) if b is None)
        raise DataError(f"no boxes for sample {unlabelled}; train on labelled samples or give pseudo labels")
    return boxes
