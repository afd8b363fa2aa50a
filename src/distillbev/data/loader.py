"""Batches in order, made by worker processes or without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..errors import DistillBevError
from .collate import collate
from .frames import FrameDataset
from .sampling import FrameGroup, TrainingBatches, balance_classes, batches_in_order
from .schema import Batch


class BatchLoader:
    """Iterates over batches; errors of ours come out of the workers as they were raised there."""

    def __init__(self, loader: DataLoader[Batch | DistillBevError], num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for item in self._loader:
            if isinstance(item, DistillBevError):
                raise item
            yield item


def make_loader(
    dataset: FrameDataset, batches: TrainingBatches | list[list[tuple[int, int]]], workers: int = 0
) -> BatchLoader:
    """A loader that gives the batches in the order asked for, whatever the number of worker processes."""
    if workers > 0:
        dataset.fill_cache()
    loader = DataLoader(
        cast(Dataset[Batch | DistillBevError], _ErrorsAsValues(dataset)),
        batch_sampler=cast(Iterable[list[int]], batches),  # torch's types know plain indices only
        num_workers=workers,
        collate_fn=_collate_or_error,
        worker_init_fn=_start_worker if workers else None,
    )
    return BatchLoader(loader, len(batches))


def make_training_loader(
    dataset: FrameDataset,
    groups: tuple[list[int], list[int]],
    per_step: tuple[int, int],
    steps: int,
    first_step: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    class_balanced: bool = False,
) -> BatchLoader:
    """The batches of a training run: `accumulate` of them for each step from `first_step` on.

    Args:
        dataset: its seed also orders the frames.
        groups: labelled and unlabelled frames, as `frames_of_splits` gives them.
        per_step: labelled and unlabelled samples of one step, over all processes and parts.
        class_balanced: repeat labelled frames so that every class is seen in equally many.
    """
    labelled, unlabelled = groups
    if class_balanced:
        tokens = [dataset.frames[index].token for index in labelled]
        min_points = dataset.config.min_points_in_box
        labels = [dataset.nuscenes.labels_in(token, min_points) for token in tokens]
        labelled = [labelled[index] for index in balance_classes(labels, dataset.seed)]
    batches = TrainingBatches(
        [FrameGroup(labelled, per_step[0]), FrameGroup(unlabelled, per_step[1])],
        dataset.seed,
        steps,
        first_step,
        accumulate,
        rank,
        world_size,
    )
    return make_loader(dataset, batches, workers)


def make_inference_loader(
    dataset: FrameDataset, batch_size: int, workers: int = 0, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Every frame once, in order; of several processes each takes its share of the very same batches."""
    return make_loader(dataset, batches_in_order(len(dataset), batch_size)[rank::world_size], workers)


class _ErrorsAsValues(Dataset["Batch | DistillBevError"]):
    """torch rewrites exceptions that leave a worker; values pass unchanged."""

    def __init__(self, dataset: FrameDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, frame_and_draw: tuple[int, int]) -> Batch | DistillBevError:
        try:
            return self.dataset[frame_and_draw]
        except DistillBevError as error:
            return error


def _collate_or_error(pieces: list[Batch | DistillBevError]) -> Batch | DistillBevError:
    for piece in pieces:
        if isinstance(piece, DistillBevError):
            return piece
    try:
        return collate(cast(list[Batch], pieces))
    except DistillBevError as error:
        return error


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    Image.core.set_blocks_max(
        8
    )  # Pillow keeps memory for the next image; asking anew costs a tenth of the time
