"""The variants of the released imitation loss that we offer: tests/golden/e2_distill_loss_variants/README.md."""

import math
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor, nn

from distillbev.boxes import Boxes3D
from distillbev.distill.distiller import DistillConfig, Distiller, released_bevdepth4d, released_bevformer
from distillbev.distill.masks import cells_in_boxes, foreground_of_boxes, pad_boxes, split_regions
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
}
HEAD = released_bevdepth4d().taps[2]
SCRIPT = replace(released_bevdepth4d(), taps=(HEAD,))


def without_fp(config: DistillConfig, **changes: object) -> DistillConfig:
    return replace(config, taps=(replace(config.taps[0], false_positive=None, **changes),))


CASES = {
    "head_only_script": SCRIPT,
    "scale_separate": replace(SCRIPT, regions=replace(SCRIPT.regions, combined_scale=False)),
    "fp_gt_threshold": replace(SCRIPT, regions=replace(SCRIPT.regions, target_threshold=0.6)),
    "no_attention": without_fp(SCRIPT, attention=None, attention_imitation=None),
    "fg_gauss": without_fp(
        replace(SCRIPT, regions=replace(SCRIPT.regions, shape="gaussian", combined_scale=False))
    ),
    "fg_gauss_in_gt": without_fp(replace(SCRIPT, regions=replace(SCRIPT.regions, shape="gaussian_in_box"))),
    "bevformer_script": released_bevformer(),
}
BLOBS = ("fg_gauss", "fg_gauss_in_gt")


def from_old_boxes(old: Tensor) -> Boxes3D:
    """Bottom centre, (w, l, h) and clockwise yaw -> gravity centre, (l, w, h) and counter-clockwise yaw."""
    x, y, z, w, l, h, yaw, vx, vy = old.unbind(1)  # noqa: E741
    boxes = torch.stack([x, y, z + h / 2, l, w, h, -yaw - math.pi / 2, vx, vy], dim=1)
    return Boxes3D(boxes, torch.zeros(len(old), dtype=torch.int64))


class Run:
    """One variant through the distiller, with the stored target heat map."""

    def __init__(self, case: str, config: DistillConfig) -> None:
        prefix = "bevformer." if case.startswith("bevformer") else ""
        size, voxel_m, x_min, y_min, _, x_max, y_max, _ = inputs[f"{prefix}geometry"].tolist()
        self.student = inputs[f"{prefix}student.head"].clone().requires_grad_()
        teacher = inputs[f"{prefix}teacher.head"]
        self.grid = BevGrid(
            x_range_m=(round(x_min, 6), round(x_max, 6)),
            y_range_m=(round(y_min, 6), round(y_max, 6)),
            cell_m=voxel_m * size / teacher.shape[-1],
        )
        self.padded, self.valid = pad_boxes([from_old_boxes(inputs[f"{prefix}boxes.{i}"]) for i in range(2)])
        foreground = foreground_of_boxes(self.padded, self.valid, self.grid, config.regions)
        heat = None
        if config.taps[0].false_positive is not None:
            heat = inputs["teacher_heatmap_logits"].sigmoid().clamp(1e-4, 1 - 1e-4).amax(dim=1, keepdim=True)
        targets = inputs["gt_heatmap"].amax(dim=1, keepdim=True)
        self.regions = split_regions(foreground, config.regions, targets, heat)
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
        tap = distiller.taps[0]
        self.attention = tap.attention(teacher, tap.adapt(self.student, self.grid.shape))
        maps = [{"head": BevMap(features, self.grid)} for features in (self.student, teacher)]
        self.losses = distiller.imitation(maps[0], maps[1], [self.regions])


@pytest.mark.parametrize("case", CASES)
def test_regions_and_weights_of_variants_match_the_reference(case: str) -> None:
    run = Run(case, CASES[case])
    regions, stored = run.regions, outputs[f"{case}.head.foreground"]
    assert torch.equal(regions.foreground, stored > 0)
    if f"{case}.head.fp_region" in outputs:
        assert torch.equal(regions.false_positive.float(), outputs[f"{case}.head.fp_region"])
    foreground = regions.foreground * regions.foreground_scale * run.attention
    torch.testing.assert_close(foreground, outputs[f"{case}.head.weight_fg"], rtol=1e-5, atol=1e-9)

    # Where the foreground is a blob, the release still divides the background by the number of cells outside boxes.
    background = regions.background * regions.background_scale * run.attention
    if case in BLOBS:
        boxes = cells_in_boxes(run.padded, run.valid, run.grid, "corner").any(dim=1, keepdim=True)
        outside = (~boxes).sum(dim=(1, 2, 3), keepdim=True)
        background = background * regions.background.sum(dim=(1, 2, 3), keepdim=True) / outside
    torch.testing.assert_close(background, outputs[f"{case}.head.weight_bg"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_variants_match_the_reference(case: str) -> None:
    run = Run(case, CASES[case])
    for name, loss in run.losses.items():
        term = name.removeprefix("imitate/head/")
        if case in BLOBS and term == "background":
            continue  # another divisor, see above
        expected = outputs[f"{case}.loss.kd_{TERMS[term]}_loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    if case in BLOBS:
        return
    total = torch.stack(list(run.losses.values())).sum()
    torch.testing.assert_close(total, outputs[f"{case}.loss.total"], rtol=1e-5, atol=0)
    total.backward()
    expected = gradients[f"{case}.student.head"]
    torch.testing.assert_close(run.student.grad, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_false_positives_from_boxes_are_the_reference_ones_in_the_right_orientation() -> None:
    """The release forgets to transpose this one mask; transposed, ours are its cells."""
    config = released_bevformer()
    run = Run("bevformer_script", config)
    found = []
    for i in range(2):
        boxes = from_old_boxes(inputs[f"bevformer.teacher_boxes.{i}"])
        found.append(boxes[inputs[f"bevformer.teacher_scores.{i}"] > config.regions.teacher_threshold])
    cells = cells_in_boxes(*pad_boxes(found), run.grid).any(dim=1, keepdim=True)
    foreground = foreground_of_boxes(run.padded, run.valid, run.grid, config.regions)
    regions = split_regions(foreground, config.regions, teacher_boxes=cells)
    stored = outputs["bevformer_fp_boxes.head.fp_region"]
    assert torch.equal(regions.false_positive.float(), stored.transpose(2, 3))
    assert not (regions.false_positive & regions.foreground).any()
