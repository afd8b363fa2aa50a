"""The frozen teacher: what the distiller looks at, and a memory for frames that return unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..boxes import Boxes3D
from ..config import Config
from ..data.schema import Batch
from ..errors import ConfigError
from ..models.outputs import BevMap, QueryPredictions
from .masks import class_heat
from .response import scale_velocity_maps

FetchMaps = Callable[[Any], Mapping[str, BevMap]]
ValueT = TypeVar("ValueT")

HALF_MAX = torch.finfo(torch.float16).max


def maps_of(output: Any) -> Mapping[str, BevMap]:
    """The named maps of a detector's output."""
    return output.bev


def take_samples(value: ValueT, indices: list[int]) -> ValueT:
    """Some samples of a network's output: tensors by their first axis, however nested."""
    if isinstance(value, Tensor):
        return value[indices]  # pyright: ignore[reportReturnType]
    if isinstance(value, QueryPredictions):  # decoder layers come first there
        return QueryPredictions(value.class_logits[:, indices], value.boxes[:, indices])  # pyright: ignore
    if isinstance(value, list | tuple):
        return type(value)(take_samples(part, indices) for part in value)  # pyright: ignore
    if isinstance(value, dict):
        return {key: take_samples(part, indices) for key, part in value.items()}  # pyright: ignore
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{key: take_samples(part, indices) for key, part in parts.items()})
    return value


def take_from_batch(batch: Batch, indices: list[int]) -> Batch:
    """Some samples of a batch, whose lists hold one entry per sample."""

    def take(value: Any) -> Any:
        return [value[i] for i in indices] if isinstance(value, list) else value[indices]

    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(
        batch, **{name: take(value) for name, value in fields.items() if value is not None}
    )


@dataclass
class TeacherView:
    """What the teacher says about a batch: maps, the highest class score of each cell, detections, head maps.

    Velocities in head maps are m/s, whatever the teacher's own are.
    """

    bev: dict[str, BevMap]
    heat: Tensor | None = None  # (B, 1, Y, X) in [0, 1]
    detections: list[Boxes3D] | None = None
    heads: list[dict[str, Tensor]] | None = None


class TeacherCacheConfig(Config, frozen=True):
    """Keeps the teacher's answers in memory, in half precision, for frames without BEV augmentation.

    Once `max_gib` is reached nothing more is taken in: frames return in rounds, so dropping old ones would
    drop each just before it is needed.
    """

    max_gib: float = 2.0

    def __post_init__(self) -> None:
        if self.max_gib <= 0:
            raise ConfigError(f"max_gib={self.max_gib} holds nothing; choose a positive size, or cache=None")


class TeacherCache:
    """Answers by token, on the CPU. Maps lose what half precision loses, scores and boxes nothing."""

    def __init__(self, config: TeacherCacheConfig) -> None:
        self.max_bytes = int(config.max_gib * 2**30)
        self.num_bytes = 0
        self.entries: dict[str, TeacherView] = {}

    def get(self, token: str, detections: bool) -> TeacherView | None:
        """The answer for a frame, None if it is not there, or lacks the detections that are asked for."""
        entry = self.entries.get(token)
        return None if entry is None or (detections and entry.detections is None) else entry

    def put(self, token: str, view: TeacherView) -> TeacherView:
        """Takes in the answer for one frame, (1, ...) tensors, if there is room; gives it back as kept."""
        bev = {name: BevMap(_halved(level.features), level.grid) for name, level in view.bev.items()}
        heads = None
        if view.heads is not None:
            heads = [{name: _halved(maps) for name, maps in task.items()} for task in view.heads]
        heat = None if view.heat is None else view.heat.cpu()
        detections = None if view.detections is None else [boxes.to("cpu") for boxes in view.detections]
        size = sum(level.features.nbytes for level in bev.values()) + (0 if heat is None else heat.nbytes)
        size += sum(maps.nbytes for task in heads or [] for maps in task.values())
        if token in self.entries:
            size = 0  # the same maps, now with detections
        entry = TeacherView(bev, heat, detections, heads)
        if self.num_bytes + size <= self.max_bytes:
            self.entries[token] = entry
            self.num_bytes += size
        return entry


class HeldTeacher:
    """Holds a teacher outside of every module tree: no parameters, no `state_dict`, always in eval mode."""

    def __init__(
        self,
        module: nn.Module,
        fetch: FetchMaps,
        names: Sequence[str],
        with_heat: bool,
        cache: TeacherCache | None,
        with_heads: bool = False,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.fetch = fetch
        self.names = names
        self.with_heat = with_heat
        self.with_heads = with_heads
        self.cache = cache

    @torch.no_grad()
    def look(self, batch: Batch, detections: bool) -> TeacherView:
        """Maps, and if asked for heat and detections, of every sample; no gradient, no label is read.

        Raises:
            ConfigError: the teacher lacks a named map, has no heat maps or cannot decode boxes.
        """
        batch = dataclasses.replace(batch, boxes=[None] * len(batch))
        if self.cache is None:
            return self._run(batch, detections)

        identity = torch.eye(4, device=batch.bev_aug.device)
        unchanged = (batch.bev_aug == identity).flatten(1).all(dim=1).tolist()
        known = [
            self.cache.get(token, detections) if keep else None
            for token, keep in zip(batch.tokens, unchanged, strict=True)
        ]
        if not any(unchanged):
            return self._run(batch, detections)
        # Frame by frame, and rounded as if remembered: a resumed run, whose memory is empty, must see the same.
        for i, entry in enumerate(known):
            if entry is None:
                answer = self._run(take_from_batch(batch, [i]), detections)
                known[i] = self.cache.put(batch.tokens[i], answer) if unchanged[i] else answer
        if not detections:
            known = [dataclasses.replace(entry, detections=None) for entry in known if entry is not None]
        return _join([entry for entry in known if entry is not None], batch.bev_aug.device)

    def _run(self, batch: Batch, detections: bool) -> TeacherView:
        self.module.eval()
        output = self.module(batch)
        maps = self.fetch(output)
        bev = {name: named_map(maps, name, "teacher") for name in self.names}
        heat = class_heat(getattr(output, "heads", [])) if self.with_heat else None
        if self.with_heat and heat is None:
            raise ConfigError(
                "a tap asks for false positives from the teacher's heat map, but its head has none; "
                'choose source="boxes", or leave false_positive out'
            )
        heads = heads_per_second(output) if self.with_heads else None
        if not detections:
            return TeacherView(bev, heat, heads=heads)
        decode = getattr(self.module, "decode", None)
        if decode is None:
            raise ConfigError(
                f"unlabelled frames need the teacher's detections, but {type(self.module).__name__} has no "
                "decode(output); give one that returns a Boxes3D per sample, or label the frames"
            )
        return TeacherView(bev, heat, decode(output), heads)


def heads_per_second(output: Any) -> list[dict[str, Tensor]]:
    """The head maps of a detector's output, velocities in m/s."""
    seconds = getattr(output, "displacement_s", None)
    return list(output.heads) if seconds is None else scale_velocity_maps(output.heads, 1 / seconds)


def named_map(maps: Mapping[str, BevMap], name: str, whose: str) -> BevMap:
    """The map of that name.

    Raises:
        ConfigError: there is none; names the maps that there are.
    """
    if name not in maps:
        raise ConfigError(f"tap {name!r}: the {whose} has no such map; its maps are {', '.join(maps)}")
    return maps[name]


def _join(samples: list[TeacherView], device: torch.device) -> TeacherView:
    """Answers for one sample each -> the answer for their batch, maps in fp32."""
    first = samples[0]
    bev = {}
    for name, level in first.bev.items():
        features = [sample.bev[name].features.to(device).float() for sample in samples]
        bev[name] = BevMap(torch.cat(features), level.grid)
    heats = [sample.heat.to(device) for sample in samples if sample.heat is not None]
    detections = [boxes.to(device) for sample in samples for boxes in sample.detections or []]
    heads = None
    if first.heads is not None:
        tasks = zip(*(sample.heads or [] for sample in samples), strict=True)
        heads = [
            {name: torch.cat([maps[name].to(device).float() for maps in task]) for name in task[0]}
            for task in tasks
        ]
    return TeacherView(
        bev,
        torch.cat(heats) if first.heat is not None else None,
        detections if first.detections is not None else None,
        heads,
    )


def _halved(features: Tensor) -> Tensor:
    return features.float().clamp(-HALF_MAX, HALF_MAX).half().cpu()
