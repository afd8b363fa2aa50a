"""What the arms scored on the held-out scenes: means over seeds, intervals over scenes, differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from ..data.schema import Sample
from ..evaluation.bootstrap import BootstrapResult, bootstrap
from ..evaluation.eval_boxes import ground_truth_boxes
from ..evaluation.metrics import ERRORS, DetectionMetrics, compute_metrics, match_boxes
from ..evaluation.results import read_results
from ..scoring import RESULTS_FILE
from ..train.experiment import Experiment
from .plan import Arm, DemoPlan

REPEATS = 1000

# (second, first, what the difference says)
COMPARISONS = (
    (Arm.DISTILLED, Arm.ALONE, "imitation and the teacher's head, on few labels"),
    (Arm.ALONE_TEACHER_HEAD, Arm.ALONE, "the teacher's head as a start"),
    (Arm.DISTILLED, Arm.ALONE_TEACHER_HEAD, "imitation by itself, on few labels"),
    (Arm.TARGETS_UNLABELLED, Arm.ALONE, "unlabelled frames: teacher's boxes as targets"),
    (Arm.DISTILLED_UNLABELLED, Arm.ALONE, "unlabelled frames: targets and imitation"),
    (Arm.DISTILLED_UNLABELLED, Arm.TARGETS_UNLABELLED, "imitation, on top of targets"),
    (Arm.DISTILLED_UNLABELLED, Arm.ALONE_ALL_LABELS, "against labels on every frame"),
)


@dataclass(frozen=True)
class Spread:
    """A number over seeds and scenes.

    `values`: one per seed on the whole held-out set; `mean` of these; `low`, `high`: 95 % of the mean over
    seeds when the scenes are drawn anew (the seeds stay). With one seed it says nothing about other seeds.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float], resampled: Sequence[NDArray[np.float64]]) -> Spread:
        low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
        return Spread(tuple(values), float(np.mean(values)), float(low), float(high))


@dataclass(frozen=True)
class ArmOutcome:
    """One arm over its seeds; errors are means over seeds, in the order of ERRORS."""

    arm: Arm
    mean_ap: Spread
    nds: Spread
    class_ap: dict[str, Spread]
    errors: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """`second` minus `first`, paired by seed and by drawn scenes."""

    second: Arm
    first: Arm
    meaning: str
    mean_ap: Spread
    class_ap: dict[str, Spread]

    def __str__(self) -> str:
        d = self.mean_ap
        return (
            f"{self.second} - {self.first}: {d.mean:+.3f} mAP [{d.low:+.3f}, {d.high:+.3f}] over scenes, "
            f"{len(d.values)} seed{'s' if len(d.values) > 1 else ''} ({self.meaning})"
        )


@dataclass(frozen=True)
class Outcome:
    """All arms that ran, and the differences between those of them that belong together."""

    arms: dict[Arm, ArmOutcome]
    differences: tuple[Difference, ...]


def run_of(out: Path, arm: Arm, seed: int) -> Path:
    """The run folder of an arm; the teacher has one for all seeds."""
    return out / "runs" / (str(arm) if arm is Arm.TEACHER else f"{arm}-seed{seed}")


def seeds_of(plan: DemoPlan, arm: Arm) -> tuple[int, ...]:
    return plan.seeds[:1] if arm is Arm.TEACHER else plan.seeds


def evaluation_of(run: Path, split: str) -> Path:
    return run / f"evaluation-{split}"


def measure(plan: DemoPlan, out: Path, experiment: Experiment, samples: Sequence[Sample]) -> Outcome:
    """Scores every arm's results file on the held-out samples."""
    ground_truth = ground_truth_boxes(samples)
    scored: dict[Arm, list[BootstrapResult]] = {}
    metrics: dict[Arm, list[DetectionMetrics]] = {}
    for arm in plan.arms:
        for seed in seeds_of(plan, arm):
            results = evaluation_of(run_of(out, arm, seed), plan.held_out_split) / RESULTS_FILE
            boxes, _ = read_results(results, ground_truth)
            matches = match_boxes(ground_truth, boxes, experiment.evaluation)
            # One seed of draws for all: differences are then taken on the same scenes.
            scored.setdefault(arm, []).append(bootstrap(matches, REPEATS, seed=0))
            metrics.setdefault(arm, []).append(compute_metrics(matches))
    arms = {arm: _arm_outcome(arm, scored[arm], metrics[arm]) for arm in plan.arms}
    differences = tuple(
        _difference(second, first, meaning, scored[second], scored[first])
        for second, first, meaning in COMPARISONS
        if second in scored and first in scored
    )
    return Outcome(arms, differences)


def _arm_outcome(arm: Arm, scored: list[BootstrapResult], metrics: list[DetectionMetrics]) -> ArmOutcome:
    return ArmOutcome(
        arm=arm,
        mean_ap=Spread.of([s.mean_ap.value for s in scored], [s.mean_ap.resampled for s in scored]),
        nds=Spread.of([s.nds.value for s in scored], [s.nds.resampled for s in scored]),
        class_ap={
            name: Spread.of(
                [s.class_ap[name].value for s in scored], [s.class_ap[name].resampled for s in scored]
            )
            for name in CLASSES
        },
        errors={name: float(np.mean([m.mean_errors[name] for m in metrics])) for name in ERRORS},
    )


def _difference(
    second: Arm, first: Arm, meaning: str, ours: list[BootstrapResult], theirs: list[BootstrapResult]
) -> Difference:
    pairs = list(zip(ours, theirs, strict=True))
    return Difference(
        second=second,
        first=first,
        meaning=meaning,
        mean_ap=Spread.of(
            [a.mean_ap.value - b.mean_ap.value for a, b in pairs],
            [a.mean_ap.resampled - b.mean_ap.resampled for a, b in pairs],
        ),
        class_ap={
            name: Spread.of(
                [a.class_ap[name].value - b.class_ap[name].value for a, b in pairs],
                [a.class_ap[name].resampled - b.class_ap[name].resampled for a, b in pairs],
            )
            for name in CLASSES
        },
    )
