"""The page of the demo: table, differences, curves, pictures, and the maps that guided the student."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor

from ..classes import CLASSES
from ..data.frames import Frame, FrameDataset
from ..data.points import load_points
from ..data.samples import NuScenes
from ..data.schema import Sample
from ..distill.distiller import Distiller
from ..report.camera_views import camera_mosaic
from ..report.page import PALETTE, interval_chart, line_chart, page, picture, read_curve, swatch, table
from ..report.paint import BoxLayer, annotated_boxes
from ..report.top_view import bev_picture
from ..scoring import SHOWN_SCORE, confident, extent_of
from ..train.checkpoint import read_weights
from ..train.inference import detect, load_trained
from ..train.loop import ADAPTERS_FILE, build_objective
from .arms import LABELLED
from .outcome import Outcome, run_of
from .plan import Arm, DemoPlan

COLOURS = dict(zip(Arm, PALETTE, strict=False))
# In the order of the codes that `Distiller.guides` gives.
REGIONS = {
    "left alone": "#98a2b3",
    "background": "#1c2430",
    "false positive of the teacher": "#ff725c",
    "object": "#6cc5b0",
}
TRUTH, BEFORE, AFTER = (80, 220, 120), (255, 96, 96), (255, 190, 30)


def demo_page(
    plan: DemoPlan, out: Path, outcome: Outcome, samples: Sequence[Sample], seconds: Mapping[str, float]
) -> str:
    """One self-contained HTML page about a finished demo.

    Args:
        plan: what was run.
        out: folder of the demo.
        outcome: the arms' scores.
        samples: the held-out samples.
        seconds: wall time of each stage.
    """
    colours = {str(arm): colour for arm, colour in COLOURS.items()}
    labelled, unlabelled = (
        scenes * plan.key_frames_per_scene for scenes in (plan.labelled_scenes, plan.unlabelled_scenes)
    )
    sections = [
        "<h1>A camera detector, taught by a LiDAR detector</h1>",
        f"<p>A LiDAR detector learned from <b>{labelled} labelled frames</b>. Camera-only students of one "
        f"architecture, with one budget, order and seed, then learned with and without its help; "
        f"<b>{unlabelled} further frames</b> have no labels. All are scored on {len(samples)} frames of "
        f"{plan.held_out_scenes} scenes that no training has seen. At run time the students see cameras only.</p>",
        "<h2>Scores on the held-out scenes</h2>",
        _score_table(outcome),
        f"<p class=soft>95 % intervals over scenes ({plan.held_out_scenes} scenes drawn anew 1,000 times); "
        f"{_seeds(plan)}</p>",
        "<h2>Who deserves the credit</h2>",
        interval_chart(
            [
                (f"{d.second} − {d.first}", d.mean_ap.mean, (d.mean_ap.low, d.mean_ap.high), d.mean_ap.values)
                for d in outcome.differences
            ],
            {f"{d.second} − {d.first}": colours[str(d.second)] for d in outcome.differences},
            "difference in mAP; bar: 95 % over scenes, paired; small dots: single seeds",
        ),
        "<ul>" + "".join(f"<li>{html.escape(str(d))}</li>" for d in outcome.differences) + "</ul>",
        "<h2>By class</h2>",
        _class_table(outcome),
        "<h2>Training</h2>",
        line_chart(_curves(plan, out, "heatmap"), "step", "detection loss: heat maps", colours),
        line_chart(_curves(plan, out, "gradient_norm"), "step", "gradient norm before clipping", colours),
        _term_chart(plan, out),
        *_pictures(plan, out, samples),
        *_guidance(plan, out),
        "<h2>Time</h2>",
        table(["stage", "seconds"], [[html.escape(name), f"{value:.0f}"] for name, value in seconds.items()]),
        f"<h2>Plan</h2><pre>{html.escape((out / 'plan.yaml').read_text())}</pre>",
    ]
    return page("distillbev demo", sections)


def _seeds(plan: DemoPlan) -> str:
    if len(plan.seeds) == 1:
        return "one seed, so the intervals say nothing about how another seed would do."
    return f"means over {len(plan.seeds)} seeds ({', '.join(map(str, plan.seeds))})."


def _score_table(outcome: Outcome) -> str:
    errors = [f"m{name[0].upper()}E" for name in next(iter(outcome.arms.values())).errors]  # mATE and so on
    head = ["arm", "what it is", "mAP", "95 %", "NDS", *errors]
    rows = [
        [
            swatch(COLOURS[arm]) + f"<b>{arm}</b>",
            f"<small>{html.escape(arm.meaning)}</small>",
            f"<b>{result.mean_ap.mean:.3f}</b>",
            f"{result.mean_ap.low:.3f} – {result.mean_ap.high:.3f}",
            f"{result.nds.mean:.3f}",
            *(f"{value:.2f}" for value in result.errors.values()),
        ]
        for arm, result in outcome.arms.items()
    ]
    return table(head, rows, text_columns=2)


def _class_table(outcome: Outcome) -> str:
    rows = [
        [swatch(COLOURS[arm]) + str(arm), *(f"{result.class_ap[name].mean:.3f}" for name in CLASSES)]
        for arm, result in outcome.arms.items()
    ]
    rows += [
        [f"{d.second} − {d.first}", *(f"{d.class_ap[name].mean:+.3f}" for name in CLASSES)]
        for d in outcome.differences
    ]
    return table(["AP", *(name.replace("_", "<br>") for name in CLASSES)], rows)


def _curves(plan: DemoPlan, out: Path, key: str) -> dict[str, list[tuple[float, float]]]:
    return {
        str(arm): read_curve(run_of(out, arm, plan.seeds[0]) / "metrics.jsonl", key)
        for arm in plan.arms
        if arm is not Arm.TEACHER
    }


def _term_chart(plan: DemoPlan, out: Path) -> str:
    """Gradient norms of the terms at the student's BEV map, of the arm that uses all of them."""
    arm = next((arm for arm in (Arm.DISTILLED_UNLABELLED, Arm.DISTILLED) if arm in plan.arms), None)
    if arm is None:
        return ""
    log = run_of(out, arm, plan.seeds[0]) / "metrics.jsonl"
    first = next((line for line in log.read_text().splitlines() if '"gradient/' in line), "{}")
    keys = [key for key in json.loads(first) if key.startswith("gradient/")]
    series = {key.removeprefix("gradient/"): read_curve(log, key) for key in keys}
    return line_chart(series, "step", f"gradient norm of each term at the lifted map ({arm})")


def _pictures(plan: DemoPlan, out: Path, samples: Sequence[Sample]) -> list[str]:
    """Ground truth, student alone and distilled student, on frames with many boxes."""
    after = next(
        (
            arm
            for arm in (Arm.DISTILLED_UNLABELLED, Arm.TARGETS_UNLABELLED, Arm.DISTILLED)
            if arm in plan.arms
        ),
        None,
    )
    if after is None or Arm.ALONE not in plan.arms:
        return []
    nuscenes = NuScenes(out / "world")
    step = max(1, len(samples) // 3)
    shown = samples[step // 2 :: step][:3]
    tokens = [sample.token for sample in shown]
    found = {}
    extent_m = 25.6
    for arm in (Arm.ALONE, after):
        experiment, detector = load_trained(run_of(out, arm, plan.seeds[0]))
        extent_m = extent_of(experiment)
        found[arm] = detect(experiment, detector, nuscenes, tokens, show_progress=False)
    sections = [
        "<h2>What they see</h2>",
        f"<p class=soft>Held-out frames; detections with a score of at least {SHOWN_SCORE}.</p>",
    ]
    for sample in shown:
        truth = _truth(sample, extent_m)
        layers = {
            arm: [truth, BoxLayer(confident(found[arm][sample.token], SHOWN_SCORE), str(arm), colour)]
            for arm, colour in ((Arm.ALONE, BEFORE), (after, AFTER))
        }
        mosaic = camera_mosaic(sample, layers[after], tile_width_px=420)
        sections.append(picture(mosaic, f"{sample.scene}: ground truth and {after}"))
        points = load_points(sample)
        views = [picture(bev_picture(points, layers[arm], extent_m, 520), str(arm)) for arm in layers]
        sections.append(f'<div class="row">{"".join(views)}</div>')
    return sections


def _truth(sample: Sample, extent_m: float) -> BoxLayer:
    assert sample.annotations is not None, "held-out samples are annotated"
    boxes = annotated_boxes(sample.annotations)
    visible = torch.from_numpy(sample.annotations.num_lidar_points > 0)
    near = (boxes.boxes[:, :2].abs() < extent_m).all(dim=1)
    return BoxLayer(boxes[visible & near & (boxes.labels >= 0)], "ground truth", TRUTH)


def _guidance(plan: DemoPlan, out: Path) -> list[str]:
    """Regions, scale and attention of one labelled frame, as the distilled student was led by them."""
    arm = next((arm for arm in (Arm.DISTILLED_UNLABELLED, Arm.DISTILLED) if arm in plan.arms), None)
    if arm is None:
        return []
    run = run_of(out, arm, plan.seeds[0])
    experiment, detector = load_trained(run)
    objective = build_objective(experiment)
    assert isinstance(objective, Distiller), "this arm imitates"
    objective.student.load_state_dict(detector.state_dict())
    objective.load_state_dict(read_weights(run / ADAPTERS_FILE), strict=False)
    nuscenes = NuScenes(out / "world")
    token = nuscenes.sample_tokens(LABELLED)[0]
    dataset = FrameDataset(nuscenes, [Frame(token)], experiment.data)
    guides = objective.eval().guides(dataset[0, 0])
    sections = [
        "<h2>What guided the student</h2>",
        "<p class=soft>One labelled frame from above, forward is up. Regions: "
        f"{' '.join(swatch(colour) + name + ' &nbsp;' for name, colour in REGIONS.items())}. "
        "Scale and attention weigh the squared error of each cell; brighter is more.</p>",
    ]
    for name, maps in guides.items():
        figures = [
            picture(_region_image(value) if title == "regions" else _heat_image(value), f"{name}: {title}")
            for title, value in maps.items()
        ]
        sections.append(f'<div class="row">{"".join(figures)}</div>')
    return sections


def _region_image(codes: torch.Tensor, size_px: int = 300) -> Image.Image:
    """(Y, X) region codes, in the order of REGIONS -> picture with y up."""
    colours = np.array([ImageColor.getrgb(colour) for colour in REGIONS.values()], dtype=np.uint8)
    return Image.fromarray(colours[codes.long().numpy()[::-1]]).resize(
        (size_px, size_px), Image.Resampling.NEAREST
    )


def _heat_image(values: torch.Tensor, size_px: int = 300) -> Image.Image:
    """(Y, X) -> picture with y up, from dark blue over red to yellow."""
    array = values.float().numpy()[::-1]
    top = np.quantile(array, 0.995) or array.max() or 1.0
    level = np.clip(array / max(top, 1e-12), 0, 1)
    stops = np.array([[13, 8, 60], [120, 28, 109], [230, 90, 60], [252, 230, 120]], dtype=np.float64)
    colours = np.stack([np.interp(level, np.linspace(0, 1, 4), stops[:, c]) for c in range(3)], axis=-1)
    return Image.fromarray(colours.astype(np.uint8)).resize((size_px, size_px), Image.Resampling.NEAREST)
