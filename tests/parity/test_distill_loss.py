"""The released imitation loss, number by number: tests/golden/e_distill_loss_script_setting/README.md."""

import math
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor, nn

from distillbev.boxes import Boxes3D
from distillbev.distill.attention import channel_attention, shared_attention, spatial_attention
from distillbev.distill.distiller import Distiller
from distillbev.distill.masks import Regions, false_positives, foreground_of_boxes, pad_boxes, split_regions
from distillbev.distill.settings import DistillConfig, released_bevdepth4d
from distillbev.grid import BevGrid
from distillbev.models.outputs import BevMap

GOLDEN = Path(__file__).parents[1] / "golden" / "e_distill_loss_script_setting"
TAPS = {"stage1": "backbone1", "stage2": "backbone2", "head": "head"}  # our names -> the reference's
TERMS = {
    "foreground": "fg_feat",
    "background": "bg_feat",
    "attention": "spatial",
    "false_positive": "fp_bg_feat",
}
CASES = ["main", "main_eval", "no_boxes", "outside", "overlap", "no_fp", "all_fp", "tiny", "other_scalars"]

inputs = load_file(GOLDEN / "inputs.safetensors")
weights = load_file(GOLDEN / "weights.safetensors")
outputs = load_file(GOLDEN / "outputs.safetensors")
gradients = load_file(GOLDEN / "gradients.safetensors")


def from_old_boxes(old: Tensor) -> Boxes3D:
    """Bottom centre, (w, l, h) and clockwise yaw -> gravity centre, (l, w, h) and counter-clockwise yaw."""
    x, y, z, w, l, h, yaw, vx, vy = old.unbind(1)  # noqa: E741
    boxes = torch.stack([x, y, z + h / 2, l, w, h, -yaw - math.pi / 2, vx, vy], dim=1)
    return Boxes3D(boxes, torch.zeros(len(old), dtype=torch.int64))


def config_of(case: str) -> DistillConfig:
    config = released_bevdepth4d()
    if case != "other_scalars":
        return config
    taps = []
    scalars = [(2e-3, 1e-2, 1e-3, None), (5e-3, 3e-2, 2e-3, 0.4), (8e-3, 7e-2, 6e-3, None)]
    for tap, (foreground, background, attention, share) in zip(config.taps, scalars, strict=True):
        false_positive = tap.false_positive
        if false_positive is not None:
            false_positive = replace(false_positive, weight=0.2, channel_temperature=0.3)
        taps.append(
            replace(
                tap,
                attention=replace(tap.attention, temperature=0.9, student_share=share),
                foreground=replace(tap.foreground, weight=foreground),
                background=replace(tap.background, weight=background),
                attention_imitation=replace(tap.attention_imitation, weight=attention),
                false_positive=false_positive,
            )
        )
    regions = replace(config.regions, teacher_threshold=0.3, target_threshold=0.05)
    return replace(config, taps=tuple(taps), regions=regions)


def load_reference_weights(distiller: Distiller) -> None:
    for i, tap in enumerate(distiller.taps):
        prefix = f"channel_wise_adaptations.{i}."
        if i < 2:
            parts = ["conv1", "norm1", None, "conv2", "norm2", None, "conv3", "norm3", None]
            state = {
                f"layers.{k}.{key.rsplit('.', 1)[1]}": value
                for k, part in enumerate(parts)
                for key, value in weights.items()
                if part is not None and key.startswith(f"{prefix}1.{part}.")
            }
        else:
            state = {f"conv.{name}": weights[prefix + name] for name in ("weight", "bias")}
        tap.adapter.load_state_dict(state)
        smooth = {name: weights[f"spatial_wise_adaptations.{i}.{name}"] for name in ("weight", "bias")}
        tap.smooth.load_state_dict(smooth)


class Run:
    """One golden case through the distiller, with the stored target heat map."""

    def __init__(self, case: str) -> None:
        source = "main" if case == "main_eval" else case
        geometry = inputs[f"{source}.geometry"].tolist()
        size, voxel_m, x_min, y_min, _, x_max, y_max, _ = geometry
        ranges = ((round(x_min, 6), round(x_max, 6)), (round(y_min, 6), round(y_max, 6)))

        def read(whose: str, name: str) -> BevMap:
            features = inputs[f"{source}.{whose}.{TAPS[name]}"].clone()
            cells = features.shape[-1]
            grid = BevGrid(x_range_m=ranges[0], y_range_m=ranges[1], cell_m=voxel_m * size / cells)
            return BevMap(features, grid)

        self.student = {name: read("student", name) for name in TAPS}
        self.teacher = {name: read("teacher", name) for name in TAPS}
        for level in self.student.values():
            level.features.requires_grad_()
        channels = [
            {name: level.features.shape[1] for name, level in maps.items()}
            for maps in (self.student, self.teacher)
        ]
        self.config = config_of(case)
        self.distiller = Distiller(
            nn.Identity(),
            nn.Identity(),
            self.config,
            student_channels=channels[0],
            teacher_channels=channels[1],
        )
        load_reference_weights(self.distiller)
        self.distiller.train(case != "main_eval")
        batch_size = len(self.teacher["head"].features)
        boxes = [from_old_boxes(inputs[f"{source}.boxes.{i}"]) for i in range(batch_size)]
        padded, valid = pad_boxes(boxes)
        logits = inputs[f"{source}.teacher_heatmap_logits"]
        heat = logits.sigmoid().clamp(1e-4, 1 - 1e-4).amax(dim=1, keepdim=True)
        targets = inputs[f"{source}.gt_heatmap"].amax(dim=1, keepdim=True)
        self.regions: dict[str, Regions] = {}
        self.box_scale: dict[str, Tensor] = {}
        for name, level in self.teacher.items():
            foreground = foreground_of_boxes(padded, valid, level.grid, self.config.regions)
            self.box_scale[name] = foreground.scale
            found = None
            if name == "head":
                found = false_positives("heat", self.config.regions, targets, heat)
            self.regions[name] = split_regions(foreground, self.config.regions, false_positive=found)
        regions = list(self.regions.values())
        terms = self.distiller.imitation(self.student, self.teacher, regions, boxes)
        self.losses = {name: self.config.weights[name] * term for name, term in terms.items()}


@pytest.mark.parametrize("case", [case for case in CASES if case != "main_eval"])
def test_regions_are_the_reference_cells_exactly(case: str) -> None:
    run = Run(case)
    for name, theirs in TAPS.items():
        regions = run.regions[name]
        assert torch.equal(regions.foreground.float(), outputs[f"{case}.{theirs}.foreground"])
        assert torch.equal(regions.background.float(), outputs[f"{case}.{theirs}.background"])
    assert torch.equal(run.regions["head"].false_positive.float(), outputs[f"{case}.head.fp_region"])


@pytest.mark.parametrize("case", [case for case in CASES if case != "main_eval"])
def test_scales_and_attention_match_the_reference(case: str) -> None:
    run = Run(case)
    for i, (name, theirs) in enumerate(TAPS.items()):
        regions, prefix = run.regions[name], f"{case}.{theirs}"
        torch.testing.assert_close(run.box_scale[name], outputs[f"{prefix}.fg_scale"], rtol=1e-5, atol=0)
        torch.testing.assert_close(regions.foreground_scale, outputs[f"{prefix}.scale"], rtol=1e-5, atol=0)
        tap, Z = run.distiller.taps[i], run.teacher[name].features
        S = tap.adapt(run.student[name].features, run.teacher[name].grid.shape)
        config = run.config.taps[i]
        assert config.attention is not None
        expected = {
            "attention_teacher": spatial_attention(Z, config.attention),
            "attention_student": spatial_attention(S, config.attention),
            "attention": shared_attention(Z, S, config.attention),
            "channel_attention": channel_attention(Z, 0.3 if case == "other_scalars" else 0.5),
        }
        for key, value in expected.items():
            torch.testing.assert_close(value, outputs[f"{prefix}.{key}"], rtol=1e-5, atol=1e-8)
        if case == "main":
            adapted = outputs[f"{prefix}.adapted_student"]
            # Of the greatest value: near zero a convolution's rounding depends on the processor.
            assert float((S.detach() - adapted).abs().max()) <= 1e-5 * float(adapted.abs().max())
    fp_scale = run.regions["head"].false_positive * run.regions["head"].false_positive_scale
    torch.testing.assert_close(fp_scale, outputs[f"{case}.head.fp_scale"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_every_term_and_the_total_match_the_reference(case: str) -> None:
    losses = Run(case).losses
    assert len(losses) == 10
    for name, loss in losses.items():
        _, tap, term = name.split("/")
        expected = outputs[f"{case}.loss.kd_{TERMS[term]}_loss_{TAPS[tap]}_{TAPS[tap]}"]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(losses.values()), outputs[f"{case}.loss.total"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_gradients_match_the_reference(case: str) -> None:
    run = Run(case)
    sum(run.losses.values()).backward()
    for name, theirs in TAPS.items():
        expected = gradients[f"{case}.student.{theirs}"]
        limit = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(run.student[name].features.grad, expected, rtol=0, atol=limit)
    if case != "main":
        return
    for i, tap in enumerate(run.distiller.taps):
        parts = ["conv1", "norm1", "", "conv2", "norm2", "", "conv3", "norm3"]
        for name, parameter in tap.named_parameters():
            root, *middle, kind = name.split(".")
            if root == "smooth":
                key = f"spatial_wise_adaptations.{i}.{kind}"
            elif i == 2:
                key = f"channel_wise_adaptations.2.{kind}"
            else:
                key = f"channel_wise_adaptations.{i}.1.{parts[int(middle[-1])]}.{kind}"
            expected = gradients[f"main.param.{key}"]
            before_norm = ".conv" in key and kind == "bias"
            limit = 1e-6 if before_norm else 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=limit, msg=key)
