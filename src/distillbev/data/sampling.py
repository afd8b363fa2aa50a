"""Which frames each training step sees: shuffled, shared out to processes, balanced over the classes.

A step's frames are a pure function of the seed and the step's number, whatever the workers, the ranks or the
step from which a run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ..errors import ConfigError, DataError


@dataclass(frozen=True)
class FrameGroup:
    """Frames (indices into a dataset, repeats allowed) of which each step takes `per_step`."""

    frames: Sequence[int]
    per_step: int


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The (frame, draw) pairs of each training step, as a pure function of seed and step.

    Every group is shuffled anew for each pass over it. A step's samples are dealt out, one after the other,
    to the processes and to the parts of the step that each of them accumulates: together they see what a
    single process would see at once. Iterating gives the parts of the steps from `first_step` on.

    Raises:
        ConfigError: an empty group, or a batch that cannot be shared evenly.
    """

    def __init__(
        self,
        groups: Sequence[FrameGroup],
        seed: int,
        steps: int,
        first_step: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.groups = [group for group in groups if group.per_step > 0]
        for group in self.groups:
            if not group.frames:
                raise ConfigError(
                    f"a step takes {group.per_step} frames of a group that has none; check the splits"
                )
        self.batch_size = sum(group.per_step for group in self.groups)
        shares = accumulate * world_size
        if self.batch_size == 0 or self.batch_size % shares:
            raise ConfigError(
                f"a step of {self.batch_size} frames cannot be shared evenly by {world_size} processes in "
                f"{accumulate} parts each; make the frames per step a multiple of {shares}"
            )
        self.seed = seed
        self.steps = steps
        self.first_step = first_step
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # group -> the pass in use and its order

    def __len__(self) -> int:
        return max(self.steps - self.first_step, 0) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.steps):
            for part in range(self.accumulate):
                yield self.part(step, part)

    def part(self, step: int, part: int = 0) -> list[tuple[int, int]]:
        """What this process loads for one part of one step."""
        frames = [
            self._frame(number, step * group.per_step + i)
            for number, group in enumerate(self.groups)
            for i in range(group.per_step)
        ]
        pieces = [(frame, step * self.batch_size + i) for i, frame in enumerate(frames)]
        return pieces[part * self.world_size + self.rank :: self.accumulate * self.world_size]

    def _frame(self, number: int, position: int) -> int:
        frames = self.groups[number].frames
        this_pass, offset = divmod(position, len(frames))
        if number not in self._orders or self._orders[number][0] != this_pass:
            order = np.random.default_rng([self.seed, number, this_pass]).permutation(len(frames))
            self._orders[number] = (this_pass, order)
        return int(frames[self._orders[number][1][offset]])


def batches_in_order(num_frames: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Every frame once, in order; the last batch may be smaller."""
    return [
        [(index, index) for index in range(start, min(start + batch_size, num_frames))]
        for start in range(0, num_frames, batch_size)
    ]


def balance_classes(labels_of_frames: Sequence[set[int]], seed: int) -> list[int]:
    """Frame indices, repeated so that every class that occurs is drawn through equally many frames.

    Source: class-balanced grouping and sampling (arXiv:1908.09492), section 3.1, in the form that the
    reference uses: of the N frame-class pairs each of K classes gives N/K frames, drawn with replacement.

    Args:
        labels_of_frames: the classes whose boxes each frame holds.
        seed: of the drawing.

    Raises:
        DataError: no frame holds a box.
    """
    frames_of_class: dict[int, list[int]] = {}
    for frame, labels in enumerate(labels_of_frames):
        for label in labels:
            frames_of_class.setdefault(label, []).append(frame)
    if not frames_of_class:
        raise DataError("no frame holds a box of any detection class; nothing to balance")
    rng = np.random.default_rng(seed)
    num_pairs = sum(map(len, frames_of_class.values()))
    balanced: list[int] = []
    for label in sorted(frames_of_class):
        frames = frames_of_class[label]
        # The reference's own arithmetic: where N/K is a whole number, rounding may take one off.
        repeats = (1 / len(frames_of_class)) / (len(frames) / num_pairs)
        balanced += rng.choice(frames, int(len(frames) * repeats)).tolist()
    return balanced
