"""Says in words which mix-up of conventions a set of detections suffers from.

Right mAP with mAOE about pi/2 and mASE about 0.7, or mAP 0 on one's own data, mostly comes from boxes in
another convention. Each known mix-up is undone on trial; the one that makes detections fit is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from ..geometry import Array, invert_rigid, wrap_angle
from .eval_boxes import EvalBoxes, GroundTruth
from .matching import UNMATCHED, match, order_by_score
from .metrics import DetectionEvalConfig, filter_boxes

Fault = Literal[
    "placement",
    "origin",
    "ego_motion",
    "time",
    "height",
    "size_order",
    "heading",
    "heading_sense",
    "velocity",
]
MIN_PAIRS = 10  # fewer pairs prove nothing


@dataclass(frozen=True)
class Finding:
    """One fault, named, and told in one sentence with its evidence and how to mend it."""

    fault: Fault
    message: str


@dataclass(frozen=True)
class _Pairs:
    """Matched boxes, in the LiDAR frame of their samples: centre (M, 3), sizes w l h (M, 3), yaw (M,).

    Velocities (M, 2) are over ground; `given_velocity_m_s` is as it was given, not turned.
    """

    sample_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    centre_m: Array
    truth_centre_m: Array
    size_wlh_m: Array
    truth_size_wlh_m: Array
    yaw_rad: Array
    truth_yaw_rad: Array
    given_velocity_m_s: Array
    velocity_m_s: Array
    truth_velocity_m_s: Array

    def __len__(self) -> int:
        return len(self.labels)


def diagnose(
    ground_truth: GroundTruth, detections: EvalBoxes, config: DetectionEvalConfig | None = None
) -> tuple[Finding, ...]:
    """Looks for mixed-up conventions in the surest detections, as many as there are annotated boxes.

    Found are: mirrored or turned placement, boxes left in the LiDAR frame; a constant offset; an offset along
    the ego vehicle's way, or along each object's own; z of the bottom or the top; sizes in another order;
    headings in another convention, or right but for front and rear; velocities in another frame or unit. What
    lies behind a placement fault is judged with that fault undone, velocities not at all.

    Returns:
        findings, the gravest first; empty when nothing is wrong or fewer than MIN_PAIRS boxes match.
    """
    config = config or DetectionEvalConfig()
    truth = filter_boxes(ground_truth.boxes, ground_truth.racks, config)
    surest = detections[order_by_score(detections)[: len(truth)]]
    findings = []
    placement = _find_placement(truth, surest, ground_truth)
    if placement is not None:
        surest, finding = placement
        findings.append(finding)
    pairs = _pair(truth, surest, ground_truth)
    if len(pairs) >= MIN_PAIRS:
        checks = (
            _find_offset(pairs, ground_truth),
            _find_height(pairs),
            _find_size_order(pairs),
            _find_heading(pairs),
            None if placement else _find_velocity(pairs, ground_truth),
        )
        findings += [finding for finding in checks if finding is not None]
    return tuple(findings)


_PLACEMENTS: dict[str, Array] = {
    "mirrored left to right (x negated)": np.diag([-1.0, 1.0]),
    "mirrored front to back (y negated)": np.diag([1.0, -1.0]),
    "turned by half a turn": np.diag([-1.0, -1.0]),
    "turned by +90 degrees": np.array([[0.0, -1.0], [1.0, 0.0]]),
    "turned by -90 degrees": np.array([[0.0, 1.0], [-1.0, 0.0]]),
    "placed with x and y exchanged": np.array([[0.0, 1.0], [1.0, 0.0]]),
}


def _find_placement(
    truth: EvalBoxes, detections: EvalBoxes, ground_truth: GroundTruth
) -> tuple[EvalBoxes, Finding] | None:
    """The mix-up of axes or frames that, undone, matches far more boxes; with the mended boxes."""
    lidar2global = ground_truth.lidar2global[detections.sample_index]
    in_lidar = _moved(detections, invert_rigid(lidar2global))
    candidates = {"left in the LiDAR frame, not carried to the global one": _moved(detections, lidar2global)}
    for name, undo in _PLACEMENTS.items():
        # All of these are their own inverse but for the quarter turns.
        candidates[name] = _moved(_mapped(in_lidar, undo.T), lidar2global)
    now = _count_matches(truth, detections)
    counts = {name: _count_matches(truth, boxes) for name, boxes in candidates.items()}
    best = max(counts, key=lambda name: counts[name])
    if counts[best] < max(MIN_PAIRS, 2 * now):
        return None
    message = (
        f"boxes are {best}: undone, {counts[best]} of {len(detections)} detections lie within 2 m of their "
        f"box, as they are {now}; carry boxes through the same matrices as points (LiDAR frame: x right, y "
        "forward)"
    )
    return candidates[best], Finding("placement", message)


def _find_offset(pairs: _Pairs, ground_truth: GroundTruth) -> Finding | None:
    """A shift in the ground plane: constant in the LiDAR frame, or growing with the way or with the speed."""
    residual = (pairs.centre_m - pairs.truth_centre_m)[:, :2]
    constant = np.median(residual, axis=0)
    spread = _spread(residual - constant)
    way = _way_since_previous_sample(ground_truth)[pairs.sample_index]  # (M, 2), LiDAR frame
    share = _share_along(residual, way, least_m=0.2)
    if share is not None and abs(share) > 0.1:
        return Finding(
            "ego_motion",
            f"boxes are displaced along the ego vehicle's way, by {share:+.2f} of the way since the "
            "previous sample, so that fast scenes suffer most; use the ego pose of the key LiDAR sweep, "
            "not that of another time stamp",
        )
    seconds = _share_along(residual, pairs.truth_velocity_m_s, least_m=1.0)
    if seconds is not None and abs(seconds) > 0.05:
        where = "ahead of" if seconds > 0 else "behind"
        return Finding(
            "time",
            f"moving objects are placed {where} where they are, by {abs(seconds):.2f} s of their own motion; "
            "a sweep's time stamp, or the sign of the time channel, is wrong",
        )
    if np.linalg.norm(constant) < 0.25 or np.linalg.norm(constant) < spread:
        return None
    message = (
        f"boxes are displaced by the same ({constant[0]:+.2f}, {constant[1]:+.2f}) m in the LiDAR frame "
        f"(spread {spread:.2f} m); a wrong origin or a half-cell shift"
    )
    ego_xy = _ego_in_lidar(ground_truth)[pairs.sample_index].mean(axis=0)
    for sign in (1, -1):
        if np.linalg.norm(constant - sign * ego_xy) < 0.15:
            message += "; it equals the distance between LiDAR and ego origin: one was taken for the other"
    return Finding("origin", message)


def _share_along(residual: Array, motion: Array, least_m: float) -> float | None:
    """The factor that explains residuals (M, 2) by motions (M, 2, NaN unknown); None where it does not.

    It does if it leaves a far smaller spread than a constant offset and than nothing at all.
    """
    moving = np.linalg.norm(np.nan_to_num(motion), axis=1) > least_m
    if moving.sum() < MIN_PAIRS:
        return None
    residual, motion = residual[moving], motion[moving]
    share = float((residual * motion).sum() / np.square(motion).sum())
    without = min(_spread(residual - np.median(residual, axis=0)), _spread(residual))
    return share if _spread(residual - share * motion) < 0.7 * without else None


def _find_height(pairs: _Pairs) -> Finding | None:
    """z of another point of the box than its centre."""
    rise = (pairs.centre_m - pairs.truth_centre_m)[:, 2]
    in_heights = float(np.median(rise / pairs.truth_size_wlh_m[:, 2]))
    median = float(np.median(rise))
    if abs(median) < 0.15 or abs(median) < _spread(rise - median):
        return None
    if abs(abs(in_heights) - 0.5) < 0.12:
        where, mend = ("below", "add") if in_heights < 0 else ("above", "subtract")
        cause = (
            "z of the bottom centre was"
            if in_heights < 0
            else "z of the top, or half a height added twice, was"
        )
        return Finding(
            "height",
            f"boxes lie half a height {where} the truth: {cause} taken for the gravity centre; {mend} h/2",
        )
    return Finding(
        "height",
        f"boxes lie {median:+.2f} m off in height, all alike; another origin of z (ground, ego or LiDAR)?",
    )


def _find_size_order(pairs: _Pairs) -> Finding | None:
    """Sizes in another order than width, length, height."""
    truth = pairs.truth_size_wlh_m
    errors = {}
    for order in permutations(range(3)):
        sizes = pairs.size_wlh_m[:, list(order)]
        overlap = np.minimum(sizes, truth).prod(axis=1)
        errors[order] = float(np.mean(1 - overlap / (sizes.prod(axis=1) + truth.prod(axis=1) - overlap)))
    as_given = errors[0, 1, 2]
    best = min(errors, key=lambda order: errors[order])
    if as_given - errors[best] < 0.1 or errors[best] > 0.7 * as_given:
        return None
    names = ("width", "length", "height")
    told = ", ".join(
        f"{names[axis]} is what was given as {names[source]}"
        for axis, source in enumerate(best)
        if axis != source
    )
    return Finding(
        "size_order",
        f"sizes are in another order: {told} (scale error {as_given:.2f}, so corrected {errors[best]:.2f}); "
        "nuScenes files hold w, l, h, Boxes3D holds l, w, h",
    )


_HEADINGS: dict[str, Callable[[Array], Array]] = {
    "yaw + pi/2": lambda yaw: yaw + np.pi / 2,
    "yaw - pi/2": lambda yaw: yaw - np.pi / 2,
    "yaw + pi (front and rear exchanged)": lambda yaw: yaw + np.pi,
    "-yaw (turning clockwise)": lambda yaw: -yaw,
    "-yaw - pi/2 (the convention of mmdetection3d before 1.0)": lambda yaw: -yaw - np.pi / 2,
    "-yaw + pi/2 (sine and cosine exchanged)": lambda yaw: -yaw + np.pi / 2,
    "-yaw + pi (x mirrored)": lambda yaw: -yaw + np.pi,
}


def _find_heading(pairs: _Pairs) -> Finding | None:
    """Headings that fit under another convention, or whose axis fits while its sense is at chance."""
    sided = ~np.isin(pairs.labels, [CLASSES.index("barrier"), CLASSES.index("traffic_cone")])
    yaw, truth = pairs.yaw_rad[sided], pairs.truth_yaw_rad[sided]
    if len(yaw) < MIN_PAIRS:
        return None
    error = np.abs(wrap_angle(yaw - truth))
    as_given = float(error.mean())
    if as_given < 0.4:
        return None
    corrected = {
        name: float(np.abs(wrap_angle(turn(yaw) - truth)).mean()) for name, turn in _HEADINGS.items()
    }
    best = min(corrected, key=lambda name: corrected[name])
    if corrected[best] < 0.5 * as_given:
        return Finding(
            "heading",
            f"headings are in another convention: the true one is {best} in the LiDAR frame (orientation "
            f"error {as_given:.2f} rad, corrected {corrected[best]:.2f}); yaw is counter-clockwise from +x",
        )
    axis_error = float(np.minimum(error, np.pi - error).mean())
    reversed_share = float((error > np.pi / 2).mean())
    if axis_error < 0.3 and reversed_share > 0.2:
        return Finding(
            "heading_sense",
            f"heading axes fit ({axis_error:.2f} rad) but {reversed_share:.0%} point backwards: front and "
            "rear are not told apart; a target that is lost modulo pi, or a detector not trained long enough",
        )
    return None


def _find_velocity(pairs: _Pairs, ground_truth: GroundTruth) -> Finding | None:
    """Velocities of moving objects that fit in another frame or unit."""
    truth = pairs.truth_velocity_m_s
    moving = np.linalg.norm(np.nan_to_num(truth), axis=1) > 1.0
    moving &= np.isfinite(pairs.velocity_m_s).all(axis=1)
    if moving.sum() < MIN_PAIRS:
        return None
    given, truth = pairs.velocity_m_s[moving], truth[moving]
    # Samples are 0.5 s apart; unknown (NaN) at a scene's beginning.
    ego = _way_since_previous_sample(ground_truth)[pairs.sample_index][moving] / 0.5
    candidates = {
        "are negated": -given,
        "were left in the LiDAR frame": pairs.given_velocity_m_s[moving],
        "are mirrored (x negated)": given * [-1, 1],
        "have x and y exchanged": given[:, ::-1],
        "are metres per key frame (0.5 s), not per second": given / 0.5,
        "are metres per sweep (0.05 s), not per second": given / 0.05,
        "are relative to the ego vehicle, not over ground": given + ego,
    }
    as_given = _spread(given - truth)
    errors = {name: float(np.nanmedian(np.linalg.norm(v - truth, axis=1))) for name, v in candidates.items()}
    best = min(errors, key=lambda name: errors[name])
    if as_given < 0.5 or errors[best] > 0.5 * as_given:
        return None
    return Finding(
        "velocity",
        f"velocities {best} (error of moving objects {as_given:.2f} m/s, corrected {errors[best]:.2f}); "
        "nuScenes files hold metres per second over ground, global x and y",
    )


def _pair(truth: EvalBoxes, detections: EvalBoxes, ground_truth: GroundTruth) -> _Pairs:
    taken = match(truth, detections, (4.0,), order_by_score(detections))[0]
    rows = np.flatnonzero(taken != UNMATCHED)
    chosen, boxes = detections[rows], truth[taken[rows]]
    global2lidar = invert_rigid(ground_truth.lidar2global[chosen.sample_index])
    chosen, boxes = _moved(chosen, global2lidar), _moved(boxes, global2lidar)
    return _Pairs(
        chosen.sample_index,
        chosen.labels,
        chosen.centre_m,
        boxes.centre_m,
        chosen.size_wlh_m,
        boxes.size_wlh_m,
        chosen.yaw_rad(),
        boxes.yaw_rad(),
        chosen.velocity_m_s,
        *(np.einsum("nij,nj->ni", global2lidar[:, :2, :2], v.velocity_m_s) for v in (chosen, boxes)),
    )


def _count_matches(truth: EvalBoxes, detections: EvalBoxes) -> int:
    return int((match(truth, detections, (2.0,), order_by_score(detections)) != UNMATCHED).sum())


def _moved(boxes: EvalBoxes, a2b: Array) -> EvalBoxes:
    """Boxes through one (n, 4, 4) rigid motion each; upright again afterwards, velocities untouched."""
    centre = np.einsum("nij,nj->ni", a2b[:, :3, :3], boxes.centre_m) + a2b[:, :3, 3]
    return replace(boxes, centre_m=centre, quat_wxyz=_turned(boxes.yaw_rad(), a2b[:, :2, :2]))


def _mapped(boxes: EvalBoxes, matrix: Array) -> EvalBoxes:
    """Boxes with their x and y through a (2, 2) matrix."""
    centre = np.concatenate([boxes.centre_m[:, :2] @ matrix.T, boxes.centre_m[:, 2:]], axis=1)
    return replace(boxes, centre_m=centre, quat_wxyz=_turned(boxes.yaw_rad(), matrix[None]))


def _turned(yaw_rad: Array, matrix: Array) -> Array:
    """(n,) headings through (n or 1, 2, 2) matrices -> (n, 4) quaternions about z."""
    heading = np.einsum("nij,nj->ni", np.broadcast_to(matrix, (len(yaw_rad), 2, 2)), _direction(yaw_rad))
    half = np.arctan2(heading[:, 1], heading[:, 0]) / 2
    zero = np.zeros_like(half)
    return np.stack([np.cos(half), zero, zero, np.sin(half)], axis=-1)


def _direction(yaw_rad: Array) -> Array:
    return np.stack([np.cos(yaw_rad), np.sin(yaw_rad)], axis=-1)


def _ego_in_lidar(ground_truth: GroundTruth) -> Array:
    """(S, 2) the ego origin (its ground-plane part) in each LiDAR frame."""
    offset = ground_truth.ego_xy_m - ground_truth.lidar2global[:, :2, 3]
    return np.einsum("sij,si->sj", ground_truth.lidar2global[:, :2, :2], offset)


def _way_since_previous_sample(ground_truth: GroundTruth) -> Array:
    """(S, 2) the way of the ego vehicle since the sample before, LiDAR frame; NaN in a scene's first one."""
    way = np.full_like(ground_truth.ego_xy_m, np.nan)
    same = np.array(ground_truth.scenes[1:]) == np.array(ground_truth.scenes[:-1])
    way[1:][same] = np.diff(ground_truth.ego_xy_m, axis=0)[same]
    return np.einsum("sij,si->sj", ground_truth.lidar2global[:, :2, :2], way)


def _spread(residual: Array) -> float:
    """Median length of the (M,) or (M, k) residuals: a spread that outliers do not rule."""
    return float(np.median(np.abs(residual) if residual.ndim == 1 else np.linalg.norm(residual, axis=1)))
