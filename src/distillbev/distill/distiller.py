"""A student that learns from its own targets and from a frozen teacher's maps.

Source: DistillBEV (ICCV 2023). The imitation loss is a squared error between a teacher map Z and an adapted
student map S, weighted cell by cell with a region, the region's scale and an attention map.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..boxes import Boxes3D
from ..data.schema import Batch
from ..errors import ConfigError, DataError
from ..grid import BevGrid
from ..models.outputs import BevMap
from ..models.processes import num_processes, total_over_processes
from .balance import GradientBalance, gradient_norms
from .masks import (
    Regions,
    cells_in_boxes,
    class_heat,
    false_positives,
    foreground_of_boxes,
    heat_on_grid,
    pad_boxes,
    split_regions,
    target_heat,
)
from .response import response_terms
from .settings import DistillConfig, PseudoLabelConfig
from .tap import Tap
from .teacher import (
    FetchMaps,
    HeldTeacher,
    TeacherCache,
    TeacherView,
    maps_of,
    named_map,
    take_from_batch,
    take_samples,
)


class Distiller(nn.Module):
    """Trains any student to imitate any teacher; both give named BEV maps over the same ground.

    Only the student and the taps are parameters. The teacher stands outside the module tree: in eval mode,
    without gradient, absent from `state_dict`; `.to()` moves it along.

    Args:
        teacher, student: modules called with a batch. Their outputs hold `.bev` (name -> BevMap), or
            `teacher_maps` and `student_maps` fetch such a mapping. A student with `loss(output, batch)` adds
            its detection loss; a teacher with `decode(output)` can label unlabelled frames; `output.heads`
            with a "heatmap" gives the false-positive region.
        teacher_channels, student_channels: channels of the tapped maps by name; the modules' own
            `bev_channels` if not given. `Distiller.from_probe` measures them.

    Raises:
        ConfigError: a tap names a map that does not exist, or the channels cannot be told.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        config: DistillConfig,
        *,
        teacher_channels: Mapping[str, int] | None = None,
        student_channels: Mapping[str, int] | None = None,
        teacher_maps: FetchMaps = maps_of,
        student_maps: FetchMaps = maps_of,
    ) -> None:
        super().__init__()
        self.config = config
        self.student = student
        self.student_maps = student_maps
        self.taps = nn.ModuleList()
        for tap in config.taps:
            in_channels = _channels_of(student, student_channels, tap.student, "student")
            out_channels = _channels_of(teacher, teacher_channels, tap.teacher, "teacher")
            self.taps.append(Tap(tap, in_channels, out_channels))
        self.balance = None
        if config.balance is not None:
            if getattr(student, "loss", None) is None:
                raise ConfigError(
                    f"balance weighs terms against the student's own loss, but {type(student).__name__} has no "
                    "loss(output, batch); give it one, or set balance=None"
                )
            self.balance = GradientBalance(list(config.weights), config.balance)
        sources = {tap.false_positive.source for tap in config.taps if tap.false_positive}
        self._decode_all = "boxes" in sources
        self._with_student_heat = bool(sources & {"student", "teacher_selected_student", "union"})
        self._held = HeldTeacher(
            teacher,
            teacher_maps,
            names=tuple({tap.teacher: None for tap in config.taps}),
            with_heat=bool(sources & {"heat", "teacher_selected_student", "union"}),
            cache=TeacherCache(config.cache) if config.cache is not None else None,
            with_heads=config.response is not None,
        )
        self._last: tuple[dict[str, Tensor], list[Tensor]] | None = None

    @classmethod
    def from_probe(
        cls,
        teacher: nn.Module,
        student: nn.Module,
        config: DistillConfig,
        batch: Batch,
        *,
        teacher_maps: FetchMaps = maps_of,
        student_maps: FetchMaps = maps_of,
    ) -> Distiller:
        """A distiller for modules that cannot tell their channels: both look at a batch once."""
        return cls(
            teacher,
            student,
            config,
            teacher_channels=probe_channels(teacher, batch, teacher_maps),
            student_channels=probe_channels(student, batch, student_maps),
            teacher_maps=teacher_maps,
            student_maps=student_maps,
        )

    @property
    def teacher(self) -> nn.Module:
        return self._held.module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        # `to`, `cuda`, `float` and the like all come through here; the teacher goes where the student goes.
        self._held.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, batch: Batch, step: int | None = None) -> dict[str, Tensor]:
        """Weighted terms whose sum is to be minimised: the student's detection loss and imitation.

        Args:
            batch: `boxes` of None mark unlabelled samples; the teacher's detections stand in for them.
            step: the training step; needed only where a term has a start step.

        Returns:
            The student's own terms, "imitate/<student map>/<term>" for every tap, and "imitate/response/<term>".

        Raises:
            ConfigError: a map is absent, or maps of a tap cover different ground.
            DataError: no sample of the batch is labelled and unlabelled ones are not used.
        """
        self._last = None
        output = self.student(batch)
        losses = self.losses(output, batch, step)
        self._last = losses, self._watched(output)
        return losses

    def _watched(self, output: Any) -> list[Tensor]:
        """The student's maps at which gradients are compared: the one that all terms share, else the tapped."""
        maps = self.student_maps(output)
        names = ["lifted"] if "lifted" in maps else [tap.student for tap in self.config.taps]
        return [maps[name].features for name in names]

    def losses(self, output: Any, batch: Batch, step: int | None = None) -> dict[str, Tensor]:
        """The same for a student output that is at hand."""
        if self.config.has_schedule and step is None:
            raise ConfigError(
                "a term has a start_step, imitation fades or is balanced, so the training step must be given: "
                "distiller(batch, step)"
            )
        pseudo = self.config.pseudo_labels
        labelled = [boxes is not None for boxes in batch.boxes]
        imitates = bool(self.taps) or self.config.response is not None
        used = all(labelled) or pseudo.as_targets or (pseudo.imitate and imitates)
        if not used and not any(labelled):
            raise DataError(
                f"samples {batch.tokens} are unlabelled and pseudo_labels uses no unlabelled frame; "
                "switch on as_targets or imitate, or feed labelled frames"
            )

        need_detections = self._decode_all or (not all(labelled) and bool(used))
        view = TeacherView({})
        if imitates or need_detections:
            view = self._held.look(batch, detections=need_detections)
        boxes = self._boxes(batch, view)
        own = self._detection_losses(output, batch, boxes, labelled)
        takes_part = torch.tensor([known or pseudo.imitate for known in labelled])
        terms: dict[str, Tensor] = {}
        if self.taps:
            regions = self.regions(boxes, view, step, self._student_heat(output))
            terms |= self.imitation(self.student_maps(output), view.bev, regions, boxes, takes_part, step)
        if self.config.response is not None:
            seconds = getattr(output, "displacement_s", None)
            responses = response_terms(output.heads, view.heads or [], self.config.response, seconds)
            for name, per_sample in responses.items():
                terms[f"imitate/response/{name}"] = mean_over(takes_part, per_sample)

        fade, weights = self.config.fade(step), self.config.weights
        losses = {name: fade * weights[name] * term for name, term in terms.items()}
        if self.balance is not None:
            assert step is not None
            factors = self.balance(own, terms, self._watched(output), step)
            losses = {name: factors[name] * loss for name, loss in losses.items()}
        return own | losses

    @torch.no_grad()
    def _student_heat(self, output: Any) -> Tensor | None:
        """(B, 1, Y, X) highest class score of the student, if a tap asks for it."""
        if not self._with_student_heat:
            return None
        heat = class_heat(getattr(output, "heads", []))
        if heat is None:
            raise ConfigError(
                "a tap asks for false positives from the student's heat map, but its head has none; "
                'choose source="boxes", or leave false_positive out'
            )
        return heat

    def _boxes(self, batch: Batch, view: TeacherView) -> list[Boxes3D]:
        """Ground truth where there is one, the teacher's confident detections elsewhere."""
        boxes = []
        for i, known in enumerate(batch.boxes):
            if known is not None:
                boxes.append(known)
            elif view.detections is not None:
                boxes.append(confident(view.detections[i], self.config.pseudo_labels))
            else:
                boxes.append(Boxes3D.empty(batch.bev_aug.device))
        return boxes

    def _detection_losses(
        self, output: Any, batch: Batch, boxes: list[Boxes3D], labelled: list[bool]
    ) -> dict[str, Tensor]:
        loss = getattr(self.student, "loss", None)
        if loss is None:
            return {}
        if all(labelled) or self.config.pseudo_labels.as_targets:
            return dict(loss(output, replace(batch, boxes=boxes)))
        keep = [i for i, known in enumerate(labelled) if known]
        return dict(loss(take_samples(output, keep), take_from_batch(batch, keep))) if keep else {}

    @torch.no_grad()
    def regions(
        self,
        boxes: list[Boxes3D],
        view: TeacherView,
        step: int | None = None,
        student_heat: Tensor | None = None,
    ) -> list[Regions]:
        """The regions of every tap, on the grid of its teacher map; computed once for each grid."""
        config = self.config.regions
        padded, valid = pad_boxes(boxes)
        found: dict[tuple[BevGrid, str | None, str], Regions] = {}
        of_taps = []
        for tap in self.config.taps:
            grid = named_map(view.bev, tap.teacher, "teacher").grid
            is_on = tap.is_on(tap.false_positive, step)
            source = tap.false_positive.source if tap.false_positive and is_on else None
            scale = tap.false_positive.scale if tap.false_positive else "region"
            if (grid, source, scale) not in found:
                targets = cells = None
                if source not in (None, "boxes") or config.halo == "ignored":
                    targets = target_heat(padded, valid, grid)
                if source == "boxes":
                    cells = self._teacher_cells(view, grid)
                elif source is not None:
                    heats = [None if h is None else heat_on_grid(h, grid) for h in (view.heat, student_heat)]
                    assert targets is not None
                    cells = false_positives(source, config, targets, *heats)
                foreground = foreground_of_boxes(padded, valid, grid, config)
                found[grid, source, scale] = split_regions(foreground, config, targets, cells, scale)
            of_taps.append(found[grid, source, scale])
        return of_taps

    def _teacher_cells(self, view: TeacherView, grid: BevGrid) -> Tensor:
        """(B, 1, Y, X) cells inside the teacher's detections above tau."""
        assert view.detections is not None
        config = self.config.regions
        kept = [d[d.scores > config.teacher_threshold] for d in view.detections if d.scores is not None]
        padded, valid = pad_boxes(kept)
        return cells_in_boxes(padded, valid, grid, config.sample).any(dim=1, keepdim=True)

    def imitation(
        self,
        student_maps: Mapping[str, BevMap],
        teacher_maps: Mapping[str, BevMap],
        regions: Sequence[Regions],
        boxes: Sequence[Boxes3D],
        takes_part: Tensor | None = None,
        step: int | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted terms of the taps, averaged over the samples that take part ((B,) bool, else all)."""
        losses: dict[str, Tensor] = {}
        for config, tap, where in zip(self.config.taps, self.taps, regions, strict=True):
            student = named_map(student_maps, config.student, "student")
            teacher = named_map(teacher_maps, config.teacher, "teacher")
            if not student.grid.covers_same_ground(teacher.grid):
                raise ConfigError(
                    f"tap {config.student!r}: the student's map covers x {student.grid.x_range_m}, "
                    f"y {student.grid.y_range_m} and the teacher's x {teacher.grid.x_range_m}, "
                    f"y {teacher.grid.y_range_m}; give both detectors the same range"
                )
            terms = tap(student.features, teacher, where, boxes, self.config.reduction, step)
            for name, per_sample in terms.items():
                losses[f"imitate/{config.student}/{name}"] = mean_over(takes_part, per_sample)
        return losses

    @torch.no_grad()
    def guides(self, batch: Batch, sample: int = 0) -> dict[str, dict[str, Tensor]]:
        """What leads imitation on one sample, for pictures: by tap, (Y, X) maps on the CPU.

        "regions": 0 ignored, 1 background, 2 false positive, 3 object; "scale" of each cell's region;
        "attention". All terms count as started; call it in eval mode.
        """
        output = self.student(batch)
        unlabelled = any(boxes is None for boxes in batch.boxes)
        view = self._held.look(batch, detections=self._decode_all or unlabelled)
        boxes = self._boxes(batch, view)
        regions = self.regions(boxes, view, step=sys.maxsize, student_heat=self._student_heat(output))
        maps = self.student_maps(output)
        guides = {}
        for config, tap, where in zip(self.config.taps, self.taps, regions, strict=True):
            teacher = view.bev[config.teacher].features
            assert isinstance(tap, Tap), tap
            size = (teacher.shape[2], teacher.shape[3])
            attention = tap.attention(teacher, tap.adapt(maps[config.student].features, size))
            scale = (
                where.foreground * where.foreground_scale
                + where.background * where.background_scale
                + where.false_positive * where.false_positive_scale
            )
            codes = where.background + 2 * where.false_positive + 3 * where.foreground
            named = {"regions": codes, "scale": scale, "attention": attention}
            guides[config.student] = {name: value[sample, 0].float().cpu() for name, value in named.items()}
        return guides

    def last_gradient_norms(self) -> dict[str, float]:
        """Gradient norm of each term of the last forward pass, before its backward pass frees the graph.

        Taken at the student's map "lifted", which all terms share, or at its tapped maps where there is none.
        """
        return {} if self._last is None else gradient_norms(*self._last)


def mean_over(takes_part: Tensor | None, per_sample: Tensor) -> Tensor:
    """Mean of the (B,) values of the samples that take part; of all where None."""
    if takes_part is None:
        return per_sample.mean()
    part = takes_part.to(per_sample)
    return (per_sample * part).sum() * num_processes() / total_over_processes(part.sum()).clamp(min=1)


def confident(detections: Boxes3D, config: PseudoLabelConfig) -> Boxes3D:
    """Detections above the threshold of their class, as targets (without scores)."""
    assert detections.scores is not None, "a teacher's detections have scores"
    thresholds = detections.scores.new_tensor(config.thresholds)[detections.labels]
    kept = detections[detections.scores > thresholds]
    return Boxes3D(kept.boxes, kept.labels)


@torch.no_grad()
def probe_channels(module: nn.Module, batch: Batch, fetch: FetchMaps = maps_of) -> dict[str, int]:
    """Channels of every map that a module gives, found by calling it once in eval mode."""
    was_training = module.training
    try:
        return {name: level.features.shape[1] for name, level in fetch(module.eval()(batch)).items()}
    finally:
        module.train(was_training)


def _channels_of(module: nn.Module, given: Mapping[str, int] | None, name: str, whose: str) -> int:
    channels = given if given is not None else getattr(module, "bev_channels", None)
    if channels is None:
        raise ConfigError(
            f"tap {name!r}: the channels of the {whose}'s maps are unknown; give {whose}_channels, let "
            f"{type(module).__name__} have bev_channels, or use Distiller.from_probe"
        )
    if name not in channels:
        raise ConfigError(f"tap {name!r}: the {whose} has no such map; its maps are {', '.join(channels)}")
    return channels[name]
