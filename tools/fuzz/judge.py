"""What became of a spoilt world: an error of ours, an equal or another sample, or a fault of the package."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reading import WrongError, attempt, difference, read_all, read_plainly, require
from spoil import SPOILERS, Spoilt, World, make_world

from distillbev.data.check import check_dataset
from distillbev.data.instance_masks import MaskFiles, WorldMasks
from distillbev.data.samples import NuScenes
from distillbev.evaluation.results import read_results

MEMORY_BYTES = 3 * 2**30  # of a process, above what is in use before the first case
SECONDS = 60.0  # a case takes a tenth of one, on a machine that does nothing else


class TooSlowError(BaseException):
    """Not an Exception, so that nothing takes it for one of Pillow's."""


def read_dataset(world: World) -> str:
    """Reads the spoilt world from JSON and through an index, and examines it."""
    found, error = attempt(lambda: read_all(world.root))
    indexed, index_error = attempt(lambda: read_all(world.root, use_index=True))
    require((error is None) == (index_error is None), f"JSON: {error}; index: {index_error}")
    faults = [
        f"{finding.what}: {finding.examples}"
        for finding in check_or_errors(world.root)
        if finding.severity == "error"
    ]
    if error is not None:
        require(bool(faults), f"reading stops, and the check finds nothing: {error}")
        return "error"
    where = difference(found, indexed)
    require(where is None, f"the index reads otherwise: {where}")
    return "equal" if difference(found, world.sound) is None else "different"


def check_or_errors(root: Path) -> list[Any]:
    """Findings; an error of ours stands for one."""
    findings, error = attempt(lambda: check_dataset(root, files_per_channel=None))
    if error is not None:
        return [argparse.Namespace(severity="error", what=error, examples="")]
    for finding in findings:
        require("\n" not in f"{finding.what}{finding.examples}", f"a finding of several lines: {finding}")
    return findings


def read_spoilt_index(world: World, hostile: bool) -> str:
    """Through the index; one whose author made the checksums fit is as good as other tables."""
    found, error = attempt(lambda: read_all(world.root, use_index=None))
    if error is not None:
        return "error"
    if difference(found, world.sound) is None:
        return "equal"
    if hostile:
        return "different"
    faults = [finding for finding in check_or_errors(world.root) if finding.severity == "error"]
    require(bool(faults), f"the check finds nothing wrong with the index: {difference(found, world.sound)}")
    return "found by the check"


def read_masks(world: World) -> str:
    """Both as masks of a world and as mask files."""
    nuscenes = NuScenes(world.root, use_index=False)
    samples = [nuscenes.sample(token) for token in nuscenes.sample_tokens()]

    def read_both() -> list[Any]:
        folder = world.root / "instance_masks"
        return [
            m
            for read in (WorldMasks(world.root), MaskFiles(folder))
            for sample in samples
            for m in read(sample)
        ]

    found, error = attempt(read_both)
    if error is not None:
        return "error"
    for masks in found:
        require(masks.masks.dtype == bool, "masks that are no masks")
        require(bool(((masks.scores >= 0) & (masks.scores <= 1)).all()), "a score out of range")
    content = [(masks.masks, masks.labels, masks.scores) for masks in found]
    return outcome_of(world, "masks", content)


def read_a_results_file(world: World) -> str:
    found, error = attempt(lambda: read_results(world.root / "results.json", world.truth)[0])
    if error is not None:
        return "error"
    numbers = (found.centre_m, found.size_wlh_m, found.quat_wxyz, found.scores)
    require(all(np.isfinite(column).all() for column in numbers), "a number in the results is not finite")
    return outcome_of(world, "results", (*numbers, found.velocity_m_s, found.labels, found.attributes))


def outcome_of(world: World, subject: str, content: Any) -> str:
    """Compares with what the sound files gave, which is read before the first of them is spoilt."""
    sound = world.sound_content.setdefault(subject, content)
    return "equal" if difference(content, sound) is None else "different"


def judge(world: World, spoilt: Spoilt) -> str:
    if spoilt.subject == "masks":
        return read_masks(world)
    if spoilt.subject == "results":
        return read_a_results_file(world)
    if spoilt.subject != "dataset":
        return read_spoilt_index(world, spoilt.subject == "hostile index")
    outcome = read_dataset(world)
    if spoilt.harmless and outcome != "equal":
        raise WrongError(f"this cannot matter, and does: {attempt(lambda: read_all(world.root))[1]}")
    if outcome == "different":
        where = difference(read_all(world.root), read_plainly(world.root), exact=False)
        require(where is None, f"a plain reading differs at {where}")
    return outcome


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Outcome:
    """What became of one case. A fault is anything but "error", "equal", "different" and "found by the check"."""

    kind: str
    what: str
    outcome: str
    told: str = ""


GOOD = ("error", "equal", "different", "found by the check")


def try_case(world: World, seed: int, number: int) -> Outcome:
    """Spoils the world as the seed and number of a case say, reads it, mends it."""
    rng = np.random.default_rng([seed, number])
    weights = np.array([weight for _, weight in SPOILERS], dtype=float)
    spoil = SPOILERS[int(rng.choice(len(SPOILERS), p=weights / weights.sum()))][0]
    kind, what, told = spoil.__name__.removeprefix("spoil_"), "", ""
    try:
        with time_limit(SECONDS):
            spoilt = spoil(world, rng)
            what = spoilt.what
            outcome = judge(world, spoilt)
    except TooSlowError:
        outcome = "too slow"
    except WrongError as error:
        outcome, told = "wrong", str(error)
    except Exception:
        outcome, told = "traceback", traceback.format_exc()
    finally:
        world.mend()
    return Outcome(kind, what, outcome, told)


def prepare_world(folder: Path) -> World:
    """A world, with what its sound masks and results give."""
    world = make_world(folder)
    assert read_masks(world) == "equal"
    world.write("results.json", world.results)
    assert read_a_results_file(world) == "equal"
    world.mend()
    return world


def try_cases(seed: int, numbers: list[int], tell_all: bool) -> list[Outcome]:
    """Tries cases in a world of its own, in memory where there is a place for it."""
    logging.disable(logging.WARNING)
    in_memory = Path("/dev/shm")
    outcomes = []
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        world = prepare_world(Path(name))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
        for number in numbers:
            outcome = try_case(world, seed, number)
            outcomes.append(outcome)
            if outcome.outcome not in GOOD or tell_all:
                print(
                    f"--only {number}: {outcome.kind}: {outcome.what}: {outcome.outcome}\n{outcome.told}",
                    flush=True,
                )
    return outcomes
