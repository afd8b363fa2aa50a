"""Times the detection metrics against nuscenes-devkit on the same synthetic boxes, and shows that they agree.

    python benchmarks/metrics.py --samples 600
    python benchmarks/metrics.py --samples 6019  # the size of nuScenes val; the devkit takes minutes

Both sides start from boxes in memory and end with all metrics: filtering, matching, curves, score. Reading
JSON is timed apart, for ours only. Seconds are of the processor, so that a busy machine changes little; give
OMP_NUM_THREADS=1 to count one core.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from distillbev.classes import CLASSES
from distillbev.evaluation.bootstrap import paired_bootstrap
from distillbev.evaluation.eval_boxes import ATTRIBUTES, EvalBoxes, GroundTruth, eval_boxes_from_columns
from distillbev.evaluation.metrics import DetectionEvalConfig, DetectionMetrics, compute_metrics, match_boxes
from distillbev.evaluation.results import read_results, write_results

SAMPLES_PER_SCENE = 40
TRUTHS_PER_SAMPLE = 31  # as nuScenes val, about
# Shares of the classes among the annotations of nuScenes, about, in the order of CLASSES.
CLASS_SHARES = np.array([0.42, 0.076, 0.014, 0.021, 0.013, 0.19, 0.011, 0.011, 0.084, 0.16])


def synthetic_boxes(num_samples: int, boxes_per_sample: int, seed: int) -> tuple[GroundTruth, EvalBoxes]:
    """Annotated boxes, three surer detections around each, and unsure false ones up to the wanted number."""
    rng = np.random.default_rng(seed)
    shares = CLASS_SHARES / CLASS_SHARES.sum()
    tokens = tuple(f"sample-{i}" for i in range(num_samples))
    ego_xy_m = rng.uniform(-1000, 1000, (num_samples, 2))

    def boxes(
        sample_index: np.ndarray, labels: np.ndarray, xy_m: np.ndarray, is_truth: bool
    ) -> dict[str, np.ndarray]:
        n = len(labels)
        half = rng.uniform(-np.pi, np.pi, n) / 2
        scores = np.full(n, -1.0) if is_truth else rng.beta(1, 6, n)
        return {
            "sample_index": sample_index,
            "centre_m": np.concatenate([xy_m, rng.normal(0, 0.3, (n, 1))], axis=1),
            "size_wlh_m": rng.uniform(0.5, 4.0, (n, 3)),
            "quat_wxyz": np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=-1),
            "velocity_m_s": rng.normal(0, 2, (n, 2)),
            "labels": labels,
            "scores": scores,
            "attributes": np.where(labels < 8, rng.integers(0, len(ATTRIBUTES), n), -1),
            "num_points": rng.poisson(4, n) if is_truth else np.full(n, -1),
        }

    num_truths = num_samples * TRUTHS_PER_SAMPLE
    truth_sample = np.repeat(np.arange(num_samples), TRUTHS_PER_SAMPLE)
    truth_labels = rng.choice(len(CLASSES), num_truths, p=shares)
    truth_xy = ego_xy_m[truth_sample] + rng.normal(0, 22, (num_truths, 2))
    truth = eval_boxes_from_columns(tokens, [boxes(truth_sample, truth_labels, truth_xy, True)], ego_xy_m)

    around = np.repeat(np.arange(num_truths), 3)
    near = boxes(
        truth_sample[around],
        truth_labels[around],
        truth_xy[around] + rng.normal(0, 0.7, (len(around), 2)),
        False,
    )
    near["scores"] = np.minimum(near["scores"] + rng.uniform(0, 0.5, len(around)), 1.0)
    num_false = max(boxes_per_sample - 3 * TRUTHS_PER_SAMPLE, 0)
    false_sample = np.repeat(np.arange(num_samples), num_false)
    false_xy = ego_xy_m[false_sample] + rng.normal(0, 22, (len(false_sample), 2))
    false = boxes(false_sample, rng.choice(len(CLASSES), len(false_sample), p=shares), false_xy, False)
    found = eval_boxes_from_columns(tokens, [near, false], ego_xy_m)
    found = found[np.argsort(found.sample_index, kind="stable")]

    racks = truth[np.zeros(len(truth), dtype=bool)]
    scenes = tuple(f"scene-{i // SAMPLES_PER_SCENE}" for i in range(num_samples))
    lidar2global = np.tile(np.eye(4), (num_samples, 1, 1))
    lidar2global[:, :2, 3] = ego_xy_m
    visibility = rng.integers(1, 5, len(truth))
    return GroundTruth(truth, racks, scenes, lidar2global, ego_xy_m, visibility), found


def devkit_boxes(boxes: EvalBoxes, ego_xy_m: np.ndarray):
    """The same boxes as the devkit holds them."""
    from nuscenes.eval.common.data_classes import EvalBoxes as OfficialBoxes
    from nuscenes.eval.detection.data_classes import DetectionBox

    official = OfficialBoxes()
    for token in boxes.tokens:
        official.add_boxes(token, [])
    for row, index in enumerate(boxes.sample_index.tolist()):
        x, y, z = boxes.centre_m[row].tolist()
        box = DetectionBox(
            boxes.tokens[index],
            (x, y, z),
            tuple(boxes.size_wlh_m[row].tolist()),
            tuple(boxes.quat_wxyz[row].tolist()),
            tuple(boxes.velocity_m_s[row].tolist()),
            (x - ego_xy_m[index, 0], y - ego_xy_m[index, 1], z),
            int(boxes.num_points[row]),
            CLASSES[boxes.labels[row]],
            float(boxes.scores[row]),
            ATTRIBUTES[boxes.attributes[row]] if boxes.attributes[row] >= 0 else "",
        )
        official.boxes[boxes.tokens[index]].append(box)
    return official


class _NoRacks:
    """Stands for the devkit's tables: all that its filter asks for are bicycle racks, and there are none."""

    def get(self, table: str, token: str) -> dict:
        assert table == "sample", table
        return {"anns": []}


def time_devkit(ground_truth: GroundTruth, detections: EvalBoxes, config: DetectionEvalConfig):
    """Seconds of the official filters and evaluation, and its metrics."""
    from nuscenes.eval.common.loaders import filter_eval_boxes
    from nuscenes.eval.detection.data_classes import DetectionConfig
    from nuscenes.eval.detection.evaluate import DetectionEval

    evaluation = DetectionEval.__new__(DetectionEval)
    evaluation.verbose = False
    evaluation.cfg = DetectionConfig(
        config.class_range_m,
        "center_distance",
        list(config.dist_ths_m),
        config.dist_th_tp_m,
        config.min_recall,
        config.min_precision,
        config.max_boxes_per_sample,
        int(config.mean_ap_weight),
    )
    truth = devkit_boxes(ground_truth.boxes, ground_truth.ego_xy_m)
    found = devkit_boxes(detections, ground_truth.ego_xy_m)
    start = time.process_time()
    evaluation.gt_boxes = filter_eval_boxes(_NoRacks(), truth, config.class_range_m)
    evaluation.pred_boxes = filter_eval_boxes(_NoRacks(), found, config.class_range_m)
    metrics, _ = evaluation.evaluate()
    return time.process_time() - start, metrics


def peak_memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def largest_difference(ours: DetectionMetrics, official) -> float:
    """Over AP of every class and threshold, every error, mAP and NDS."""
    ap = [[official.get_label_ap(name, t) for t in ours.config.dist_ths_m] for name in CLASSES]
    errors = [[official.get_label_tp(name, error) for error in ours.mean_errors] for name in CLASSES]
    return max(
        float(np.abs(ours.ap - np.array(ap)).max()),
        float(np.nanmax(np.abs(ours.tp_errors - np.array(errors)))),
        abs(ours.mean_ap - official.mean_ap),
        abs(ours.nds - official.nd_score),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=600, help="key frames (nuScenes val has 6,019)")
    parser.add_argument("--boxes", type=int, default=300, help="detections in each")
    parser.add_argument(
        "--bootstrap", type=int, default=0, metavar="REPEATS", help="also time a paired bootstrap"
    )
    parser.add_argument("--json", action="store_true", help="also time writing and reading the results file")
    parser.add_argument("--no-devkit", action="store_true", help="time ours alone")
    options = parser.parse_args()

    config = DetectionEvalConfig()
    ground_truth, found = synthetic_boxes(options.samples, options.boxes, seed=0)
    print(
        f"{platform.machine()}, {options.samples} samples, {len(ground_truth.boxes)} annotations, "
        f"{len(found)} detections"
    )
    before = peak_memory_gb()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        compute_metrics(match_boxes(ground_truth, found, config))
        seconds.append(time.process_time() - start)
    matches = match_boxes(ground_truth, found, config)
    metrics = compute_metrics(matches)
    ours = float(np.median(seconds))
    print(f"distillbev: {ours:.2f} s (median of 3; {min(seconds):.2f} to {max(seconds):.2f})")
    print(f"  peak memory {before:.2f} GB with the boxes, {peak_memory_gb():.2f} GB after the evaluation")
    print(f"  mAP {metrics.mean_ap:.4f}, NDS {metrics.nds:.4f}")

    if options.json:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            start = time.process_time()
            write_results(path, found)
            written = time.process_time()
            read_results(path, ground_truth)
            read = time.process_time()
            print(f"results file: written in {written - start:.1f} s, read in {read - written:.1f} s")
    if options.bootstrap:
        start = time.process_time()
        result = paired_bootstrap(matches, matches, repeats=options.bootstrap)
        elapsed = time.process_time() - start
        print(
            f"paired bootstrap: {options.bootstrap} draws in {elapsed:.1f} s, mAP difference {result.mean_ap}"
        )
    if not options.no_devkit:
        elapsed, official = time_devkit(ground_truth, found, config)
        print(f"nuscenes-devkit: {elapsed:.1f} s, {elapsed / ours:.0f} times as long")
        print(f"  largest difference in any number: {largest_difference(metrics, official):.1e}")
        print(f"  peak memory {peak_memory_gb():.2f} GB")


if __name__ == "__main__":
    main()
