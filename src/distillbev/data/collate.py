"""Several samples into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..errors import DataError
from .schema import Batch, PastFrames

T = TypeVar("T")


def collate(pieces: Sequence[Batch]) -> Batch:
    """Several batches into one, in order.

    Raises:
        DataError: the samples do not have the same number of cameras, or of earlier frames.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    for piece in pieces:
        if piece.cam2img.shape[1] != first.cam2img.shape[1]:
            raise DataError(
                f"sample {first.tokens[0]} has {first.cam2img.shape[1]} cameras, sample {piece.tokens[0]} "
                f"has {piece.cam2img.shape[1]}; a batch needs one rig: name the cameras that all samples have"
            )
    images = [sample for piece in pieces if piece.images is not None for sample in piece.images]
    points = [cloud for piece in pieces if piece.points is not None for cloud in piece.points]
    return Batch(
        tokens=[token for piece in pieces for token in piece.tokens],
        # torch's own collation, since it gathers in the memory that a worker shares with the process it serves.
        images=default_collate(images) if images else None,
        cam2img=torch.cat([piece.cam2img for piece in pieces]),
        cam2lidar=torch.cat([piece.cam2lidar for piece in pieces]),
        image_aug=torch.cat([piece.image_aug for piece in pieces]),
        bev_aug=torch.cat([piece.bev_aug for piece in pieces]),
        lidar2global=torch.cat([piece.lidar2global for piece in pieces]),
        points=points if first.points is not None else None,
        boxes=[boxes for piece in pieces for boxes in piece.boxes],
        past=_collate_past(pieces),
        scenes=_joined([piece.scenes for piece in pieces]),
        timestamps_us=_joined([piece.timestamps_us for piece in pieces]),
        lidar2ego=_stacked([piece.lidar2ego for piece in pieces]),
    )


def _collate_past(pieces: Sequence[Batch]) -> PastFrames | None:
    pasts = [piece.past for piece in pieces if piece.past is not None]
    counts = [len(piece.past.frames) if piece.past else 0 for piece in pieces]
    if len(set(counts)) > 1:
        raise DataError(
            f"samples {[token for piece in pieces for token in piece.tokens]} come with {counts} earlier "
            "frames; a batch needs as many for each"
        )
    if not pasts:
        return None
    frames = [collate(list(frames)) for frames in zip(*(past.frames for past in pasts), strict=True)]
    return PastFrames(frames, torch.cat([past.gaps_s for past in pasts]))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor, or None if one of them is absent."""
    known = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(known) if len(known) == len(tensors) else None


def _joined(lists: Sequence[list[T] | None]) -> list[T] | None:
    """One list, or None if one of them is absent."""
    known = [entries for entries in lists if entries is not None]
    return [entry for entries in known for entry in entries] if len(known) == len(lists) else None
