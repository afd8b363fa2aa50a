"""The released imitation loss with other settings: tests/golden/e2_distill_loss_variants/README.md.

What we offer is a configuration. Where the release errs, a function here puts its error into our regions, so that
the rest of the case can be compared. What we left out is listed with its reason.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace as replace_fields
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor, nn

from distillbev.boxes import Boxes3D
from distillbev.distill.attention import shared_attention
from distillbev.distill.distiller import Distiller
from distillbev.distill.masks import (
    ContextConfig,
    Regions,
    cells_in_boxes,
    false_positives,
    foreground_of_boxes,
    one_over_component,
    pad_boxes,
    split_regions,
)
from distillbev.distill.settings import (
    AffinityTermConfig,
    AttentiveCells,
    DistillConfig,
    FalsePositiveConfig,
    released_bevdepth4d,
    released_bevformer,
)
from distillbev.grid import BevGrid
from distillbev.models.outputs import BevMap

GOLDEN = Path(__file__).parents[1] / "golden" / "e2_distill_loss_variants"
inputs = load_file(GOLDEN / "inputs.safetensors")
weights = load_file(GOLDEN / "weights.safetensors")
outputs = load_file(GOLDEN / "outputs.safetensors")
gradients = load_file(GOLDEN / "gradients.safetensors")

TERMS = {
    "foreground": "fg_feat",
    "background": "bg_feat",
    "attention": "spatial",
    "false_positive": "fp_bg_feat",
    "affinity": "affinity",
}
BATCH_SIZE = 2


def with_regions(config: DistillConfig, **changes: object) -> DistillConfig:
    return replace(config, regions=replace(config.regions, **changes))


def with_tap(config: DistillConfig, **changes: object) -> DistillConfig:
    return replace(config, taps=(replace(config.taps[0], **changes),))


def with_false_positives(**changes: object) -> DistillConfig:
    return with_tap(SCRIPT, false_positive=replace(SCRIPT.taps[0].false_positive, **changes))


def with_affinity(config: DistillConfig, cells: object) -> DistillConfig:
    # The release sums this one term over the batch where all others are means.
    return with_tap(config, affinity=AffinityTermConfig(weight=0.02 * BATCH_SIZE, cells=cells))


SCRIPT = replace(released_bevdepth4d(), taps=(released_bevdepth4d().taps[2],))
BASE = with_tap(SCRIPT, false_positive=None)
CONTEXT = {"context": ContextConfig(), "object_scale": "inverse_box_area"}
BLOB = {"shape": "gaussian", "combined_scale": False}
BOXES = FalsePositiveConfig(weight=0.05, source="boxes", channel_temperature=0.5)

OFFERED = {
    "head_only_script": SCRIPT,
    "scale_separate": with_regions(SCRIPT, combined_scale=False),
    "no_attention": with_tap(BASE, attention=None, attention_imitation=None),
    "bevformer_script": released_bevformer(),
    "fp_gt_threshold": with_regions(SCRIPT, target_threshold=0.6),
    "fp_student": with_false_positives(source="student"),
    "fp_teacher_selected_student": with_false_positives(source="teacher_selected_student"),
    "fp_teacher_plus_selected": with_false_positives(source="union"),
    "context": with_regions(BASE, **CONTEXT),
    "affinity_foreground": with_affinity(BASE, "foreground"),
    "affinity_foreground_fp": with_affinity(SCRIPT, "foreground_and_false_positive"),
    "affinity_attention_topk": with_affinity(BASE, AttentiveCells(top=30)),
    "affinity_attention_threshold": with_affinity(BASE, AttentiveCells(top=None, above=0.006 * 16 * 16)),
}


def _count(region: Tensor) -> Tensor:
    return region.sum(dim=(1, 2, 3), keepdim=True)


def divided_by_cells_outside_boxes(run: "Run") -> Regions:
    """With blobs for foreground the background is still divided by the number of cells outside boxes."""
    boxes = cells_in_boxes(run.padded, run.valid, run.grid, "corner").any(dim=1, keepdim=True)
    share = _count(run.regions.background) / _count(~boxes)
    return replace_fields(run.regions, background_scale=run.regions.background_scale * share)


def ring_counted_half(run: "Run") -> Regions:
    """With a context ring and false positives, cells of the ring count half in the number of object cells."""
    assert run.foreground.weight is not None
    objects = run.foreground.mask * run.foreground.weight
    return divided_by_the_rest_of(run, run.regions, objects)


def divided_by_the_rest_of(run: "Run", regions: Regions, objects: Tensor) -> Regions:
    rest = math.prod(run.grid.shape) - _count(objects) - _count(regions.false_positive)
    return replace_fields(regions, background_scale=1 / rest)


def sizes_by_queueing(run: "Run") -> Regions:
    """A component's size is the number of times that its cells were queued, not their number."""
    region = run.regions.false_positive
    scale = torch.zeros(region.shape)
    for sample, cells in enumerate(region[:, 0].tolist()):
        left = {(y, x) for y, row in enumerate(cells) for x, inside in enumerate(row) if inside}
        for seed in sorted(left):
            queue, found, queued = deque([seed] if seed in left else []), [], 0
            while queue:
                y, x = cell = queue.popleft()
                queued += 1
                if cell in left:
                    left.remove(cell)
                    found.append(cell)
                queue.extend(n for n in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)) if n in left)
            for y, x in found:
                scale[sample, 0, y, x] = 1 / queued
    return replace_fields(run.regions, false_positive_scale=scale)


def false_positives_transposed(run: "Run") -> Regions:
    """One mask is (x, y) where all others are (y, x); it may then overlap objects and is counted twice."""
    found = run.regions.false_positive.transpose(2, 3)
    regions = replace_fields(
        run.regions,
        false_positive=found,
        background=~(run.regions.foreground | found),
        false_positive_scale=1 / _count(found),
    )
    return divided_by_the_rest_of(run, regions, regions.foreground)


CONVERTED: dict[str, tuple[DistillConfig, Callable[["Run"], Regions]]] = {
    "fg_gauss": (with_regions(BASE, **BLOB), divided_by_cells_outside_boxes),
    "fg_gauss_in_gt": (with_regions(BASE, shape="gaussian_in_box"), divided_by_cells_outside_boxes),
    "context_fp": (with_regions(SCRIPT, **CONTEXT), ring_counted_half),
    "fp_dfs": (with_false_positives(scale="component"), sizes_by_queueing),
    "bevformer_fp_boxes": (with_tap(released_bevformer(), false_positive=BOXES), false_positives_transposed),
}

LEFT_OUT = {
    "config_defaults": "the channel mask and its term, which no published run used",
    "channel_mask_fp": "the channel mask and its term, which no published run used",
    "no_attention_fp": "attention in one term of a tap that has none, a slip",
    "scale_bg_only": "a scale without objects, off in every published run",
    "scale_off": "regions without scale, whose losses are larger by orders of magnitude",
    "plain_regions_only": "regions without scale, whose losses are larger by orders of magnitude",
    "avg_fg_scale": "a scale that is constantly 1 by a slip",
    "transpose_mask": "masks that do not lie where the maps do",
    "fg_extended_binary": "blobs made binary",
    "fg_gauss_plus_extended_binary": "a sum of two forms of foreground",
    "fg_gauss_plus_extended_binary_clamp": "equal to fg_extended_binary",
    "fg_gauss_1minus": "a background that reaches into objects",
    "fg_gauss_plus_binary_clamp": "a sum of two forms of foreground",
    "fg_negative_linear": "a foreground weight that depends on the background's",
    "non_empty": "a region of non-empty background",
    "non_empty_fp": "a region of non-empty background",
    "all_l2": "an older loss without regions",
    "all_l1": "an older loss without regions",
    "linfengzhang": "an older loss without regions",
}


def from_old_boxes(old: Tensor) -> Boxes3D:
    """Bottom centre, (w, l, h) and clockwise yaw -> gravity centre, (l, w, h) and counter-clockwise yaw."""
    x, y, z, w, l, h, yaw, vx, vy = old.unbind(1)  # noqa: E741
    boxes = torch.stack([x, y, z + h / 2, l, w, h, -yaw - math.pi / 2, vx, vy], dim=1)
    return Boxes3D(boxes, torch.zeros(len(old), dtype=torch.int64))


class Run:
    """One variant through the distiller, with the stored target heat map."""

    def __init__(self, case: str) -> None:
        config, convert = CONVERTED.get(case) or (OFFERED[case], None)
        self.config, (tap,) = config, config.taps
        prefix = "bevformer." if case.startswith("bevformer") else ""
        size, voxel_m, x_min, y_min, _, x_max, y_max, _ = inputs[f"{prefix}geometry"].tolist()
        self.student = inputs[f"{prefix}student.head"].clone().requires_grad_()
        teacher = inputs[f"{prefix}teacher.head"]
        self.grid = BevGrid(
            x_range_m=(round(x_min, 6), round(x_max, 6)),
            y_range_m=(round(y_min, 6), round(y_max, 6)),
            cell_m=voxel_m * size / teacher.shape[-1],
        )
        boxes = [from_old_boxes(inputs[f"{prefix}boxes.{i}"]) for i in range(BATCH_SIZE)]
        self.padded, self.valid = pad_boxes(boxes)
        self.foreground = foreground_of_boxes(self.padded, self.valid, self.grid, config.regions)
        self.by_teacher = self._false_positives(tap.false_positive)
        scale = "region" if tap.false_positive is None else tap.false_positive.scale
        self.regions = split_regions(
            self.foreground, config.regions, false_positive=self.by_teacher, false_positive_scale=scale
        )
        if convert is not None:
            self.regions = convert(self)

        distiller = Distiller(
            nn.Identity(),
            nn.Identity(),
            config,
            student_channels={"head": self.student.shape[1]},
            teacher_channels={"head": teacher.shape[1]},
        )
        for part, stored in (("adapter.conv", "channel"), ("smooth", "spatial")):
            for kind in ("weight", "bias"):
                parameter = dict(distiller.taps[0].named_parameters()).get(f"{part}.{kind}")
                if parameter is not None:
                    parameter.data.copy_(weights[f"fgd.{stored}_wise_adaptations.0.{kind}"])
        adapted = distiller.taps[0].adapt(self.student, self.grid.shape)
        self.attention = shared_attention(teacher, adapted, tap.attention)
        student_maps, teacher_maps = (
            {"head": BevMap(features, self.grid)} for features in (self.student, teacher)
        )
        terms = distiller.imitation(student_maps, teacher_maps, [self.regions], boxes)
        self.losses = {name: config.weights[name] * term for name, term in terms.items()}

    def _false_positives(self, config: FalsePositiveConfig | None) -> Tensor | None:
        regions = self.config.regions
        if config is None:
            return None
        if config.source == "boxes":
            found = []
            for i in range(BATCH_SIZE):
                boxes = from_old_boxes(inputs[f"bevformer.teacher_boxes.{i}"])
                found.append(boxes[inputs[f"bevformer.teacher_scores.{i}"] > regions.teacher_threshold])
            return cells_in_boxes(*pad_boxes(found), self.grid).any(dim=1, keepdim=True)
        teacher = inputs["teacher_heatmap_logits"].sigmoid().clamp(1e-4, 1 - 1e-4)
        heats = (inputs["gt_heatmap"], teacher, inputs["student_heatmap_prob"])
        return false_positives(config.source, regions, *(heat.amax(dim=1, keepdim=True) for heat in heats))


CASES = [*OFFERED, *CONVERTED]


def test_every_case_is_offered_or_left_out_for_a_reason() -> None:
    assert set(CASES) | set(LEFT_OUT) == {name.split(".")[0] for name in outputs}
    assert not set(CASES) & set(LEFT_OUT)


@pytest.mark.parametrize("case", CASES)
def test_regions_and_weights_of_variants_match_the_reference(case: str) -> None:
    run = Run(case)
    regions, stored = run.regions, outputs[f"{case}.head.foreground"]
    assert torch.equal(regions.foreground, stored > 0)
    if run.foreground.weight is not None:
        torch.testing.assert_close(run.foreground.mask * run.foreground.weight, stored, rtol=1e-5, atol=0)
    if f"{case}.head.fp_region" in outputs:
        assert torch.equal(regions.false_positive.float(), outputs[f"{case}.head.fp_region"])
    if f"{case}.head.fp_scale" in outputs:
        scale = regions.false_positive * regions.false_positive_scale
        torch.testing.assert_close(scale, outputs[f"{case}.head.fp_scale"], rtol=1e-5, atol=0)
    for name, ours in (("fg", "foreground"), ("bg", "background")):
        weight = getattr(regions, ours) * getattr(regions, f"{ours}_scale") * run.attention
        torch.testing.assert_close(weight, outputs[f"{case}.head.weight_{name}"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_variants_match_the_reference(case: str) -> None:
    run = Run(case)
    told = {name for name in outputs if name.startswith(f"{case}.loss.kd_")}
    assert {f"{case}.loss.kd_{TERMS[name.split('/')[2]]}_loss" for name in run.losses} == told
    for name, loss in run.losses.items():
        expected = outputs[f"{case}.loss.kd_{TERMS[name.split('/')[2]]}_loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    total = torch.stack(list(run.losses.values())).sum()
    torch.testing.assert_close(total, outputs[f"{case}.loss.total"], rtol=1e-5, atol=0)
    total.backward()
    expected = gradients[f"{case}.student.head"]
    torch.testing.assert_close(run.student.grad, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_false_positives_from_boxes_are_the_reference_ones_in_the_right_orientation() -> None:
    """The release forgets to transpose this one mask; transposed, ours are its cells."""
    run = Run("bevformer_fp_boxes")
    regions = split_regions(run.foreground, run.config.regions, false_positive=run.by_teacher)
    stored = outputs["bevformer_fp_boxes.head.fp_region"]
    assert torch.equal(regions.false_positive.float(), stored.transpose(2, 3))
    assert not (regions.false_positive & regions.foreground).any()


def test_true_component_sizes_are_at_most_the_release_s_and_move_the_term_by_a_fifth() -> None:
    run = Run("fp_dfs")
    region = run.regions.false_positive
    inflated = outputs["fp_dfs.head.fp_scale"]
    assert (one_over_component(region) >= inflated).all()
    share = float((one_over_component(region) / inflated)[region].mean())
    assert share > 1.2
