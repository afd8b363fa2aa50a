"""One pair of maps, a student's and a teacher's, and all that is learned and asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..boxes import Boxes3D
from ..models.outputs import BevMap
from .adapters import build_adapter, resample
from .attention import channel_attention, shared_attention
from .masks import Regions
from .relation import relation_term
from .settings import AttentiveCells, TapConfig
from .terms import (
    ChannelStandardise,
    ChannelStandardiseConfig,
    LayerNormConfig,
    Reduction,
    affinity_term,
    attention_term,
    background_term,
    false_positive_term,
    foreground_term,
    layer_norm,
)


class Tap(nn.Module):
    """What one tap learns: the adapter and the 3x3 convolution of the attention term; teacher statistics."""

    def __init__(self, config: TapConfig, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.config = config
        self.adapter = build_adapter(config.adapter, student_channels, teacher_channels)
        self.smooth = nn.Conv2d(1, 1, kernel_size=3, padding=1) if config.attention_imitation else None
        self.standardise = None
        if isinstance(config.normalise, ChannelStandardiseConfig):
            self.standardise = ChannelStandardise(teacher_channels, config.normalise)

    def adapt(self, student: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C_student, Y', X') -> S (B, C, Y, X) in fp32."""
        parameter = next(self.adapter.parameters(), None)
        if parameter is not None:
            student = student.to(parameter.dtype)  # a bf16 student may meet an fp32 adapter
        return resample(self.adapter(student, size).float(), size)

    def attention(self, teacher: Tensor, adapted: Tensor) -> Tensor:
        """(B, 1, Y, X) attention of the maps that are compared, z-scores where these are taught."""
        return shared_attention(self._compared(teacher), adapted, self.config.attention)

    def forward(
        self,
        student: Tensor,
        teacher_map: BevMap,
        regions: Regions,
        boxes: Sequence[Boxes3D],
        reduction: Reduction,
        step: int | None,
    ) -> dict[str, Tensor]:
        """Unweighted terms of a batch, each (B,); a term that has not started is absent."""
        config = self.config
        teacher = teacher_map.features
        adapted = self.adapt(student, (teacher.shape[2], teacher.shape[3]))
        terms: dict[str, Tensor] = {}
        with torch.autocast(adapted.device.type, enabled=False):
            teacher = self._compared(teacher)
            attention = shared_attention(teacher, adapted, config.attention)
            if config.attention_imitation and config.is_on(config.attention_imitation, step):
                terms["attention"] = attention_term(
                    teacher, adapted, self._smooth, config.attention_imitation.signed, reduction
                )
            channels = None
            if config.false_positive and config.false_positive.channel_temperature is not None:
                channels = channel_attention(teacher, config.false_positive.channel_temperature)
            if isinstance(config.normalise, LayerNormConfig):
                teacher, adapted = layer_norm(teacher), layer_norm(adapted)
            error = (adapted - teacher) ** 2
            if config.is_on(config.foreground, step):
                terms["foreground"] = foreground_term(error, regions, attention, reduction)
            if config.is_on(config.background, step):
                terms["background"] = background_term(error, regions, attention, reduction)
            if config.is_on(config.false_positive, step):
                terms["false_positive"] = false_positive_term(error, regions, attention, channels, reduction)
            if config.affinity and config.is_on(config.affinity, step):
                cells = affinity_cells(config.affinity.cells, regions, attention)
                terms["affinity"] = affinity_term(teacher, adapted, cells, reduction)
            if config.relation and config.is_on(config.relation, step):
                relation = config.relation.relation
                terms["relation"] = relation_term(teacher, adapted, boxes, teacher_map.grid, relation)
        return terms

    def _compared(self, teacher: Tensor) -> Tensor:
        return teacher.float() if self.standardise is None else self.standardise(teacher)

    def _smooth(self, means: Tensor) -> Tensor:
        assert self.smooth is not None and self.smooth.bias is not None
        return functional.conv2d(means, self.smooth.weight.float(), self.smooth.bias.float(), padding=1)


def affinity_cells(
    which: Literal["foreground", "foreground_and_false_positive"] | AttentiveCells,
    regions: Regions,
    attention: Tensor,
) -> Tensor:
    """(B, 1, Y, X) bool cells that the affinity term compares."""
    if which == "foreground":
        return regions.foreground
    if which == "foreground_and_false_positive":
        return regions.foreground | regions.false_positive
    assert isinstance(which, AttentiveCells)
    if which.above is not None:
        return attention > which.above
    assert which.top is not None
    top = min(which.top, attention[0].numel())
    return attention > attention.flatten(1).topk(top, dim=1).values[:, -1, None, None, None]
