"""A published checkpoint to our safetensors, with an account of every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..train.checkpoint import save_weights
from .read import Published, read_published
from .rename import Source, recognise, turn_kernel, turn_weight


@dataclass
class Report:
    """What became of every key of a file."""

    source: str
    choice: str  # which weights of the file were taken
    boxes: str  # which box convention the file was taken to have, and why
    used: list[str] = field(default_factory=list)  # name as it was
    renamed: list[tuple[str, str]] = field(default_factory=list)  # theirs, ours
    reordered: list[tuple[str, str]] = field(
        default_factory=list
    )  # theirs, what was done; also in one of above
    needless: list[str] = field(default_factory=list)  # follows from our configuration, or nothing reads it
    unused: list[str] = field(default_factory=list)  # no name of ours

    def __str__(self) -> str:
        lines = [f"source: {self.source}", f"weights: {self.choice}", f"boxes: {self.boxes}"]
        lines += [f"used     {name}" for name in self.used]
        lines += [f"renamed  {theirs} -> {ours}" for theirs, ours in self.renamed]
        lines += [f"reordered {name}: {change}" for name, change in self.reordered]
        lines += [f"needless {name}" for name in self.needless]
        lines += [f"unused   {name}" for name in self.unused]
        lines.append(
            f"{len(self.used) + len(self.renamed)} keys carried ({len(self.renamed)} renamed, "
            f"{len(self.reordered)} reordered), {len(self.needless)} needless, {len(self.unused)} unused"
        )
        return "\n".join(lines)


def import_weights(path: Path, out: Path, lax: bool = False, version: str | None = None) -> Report:
    """Converts a published checkpoint and writes it as safetensors.

    Args:
        path: `.pth`, or whatever torch.save wrote, or `.safetensors`; nothing in it is run.
        out: the new file; its metadata say where the weights come from.
        lax: leave out keys that have no name of ours, rather than refuse the file.
        version: of the mmdetection3d that trained it, as in "1.0.0"; as the file says if not given.

    Raises:
        CheckpointError: the file is absent, damaged, holds code, is of no known architecture, has keys
            without a name of ours (unless `lax`), or `out` cannot be written.
    """
    published = read_published(path)
    try:
        state, report = convert(published, version)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if report.unused and not lax:
        raise CheckpointError(
            f"{path}: {len(report.unused)} of {len(published.tensors)} keys have no name in our {report.source} "
            f"(first: {', '.join(report.unused[:3])}); expected none, --lax leaves them out"
        )
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: not a name of what is written; end it in .safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(
        state,
        out,
        {"from": path.name, "source": report.source, "weights": report.choice, "boxes": report.boxes},
    )
    return report


def convert(published: Published, version: str | None = None) -> tuple[dict[str, Tensor], Report]:
    """Weights under our names, in our layouts and box convention, and what became of every key.

    Raises:
        CheckpointError: no known architecture has such keys, or two keys come to one name.
    """
    source = recognise(list(published.tensors))
    old_boxes, reason = _box_convention(version, published.version)
    report = Report(source.title, published.choice, reason)
    state: dict[str, Tensor] = {}
    for name, value in sorted(published.tensors.items()):
        ours = _name(source, name)
        if ours is None:
            (report.needless if source.is_needless(name) else report.unused).append(name)
            continue
        if ours in state:
            raise CheckpointError(
                f"two keys come to {ours}, one of them {name}; expected one file of one model"
            )
        turned = turn_weight(name, value, old_boxes)
        laid = turn_kernel(turned)
        if turned is not value:
            report.reordered.append((name, "rows to our box code"))
        if laid is not turned:
            report.reordered.append((name, "kernel of spconv 1 to spconv 2's layout"))
        state[ours] = laid
        if ours == name:
            report.used.append(name)
        else:
            report.renamed.append((name, ours))
    return state, report


def _name(source: Source, name: str) -> str | None:
    return None if source.is_needless(name) else source.rename(name)


def _box_convention(given: str | None, found: str | None) -> tuple[bool, str]:
    """Whether boxes are those before mmdetection3d 1.0, and how that is known."""
    version = given or found
    if version is None:
        return True, "before mmdetection3d 1.0 (the file names no version; --mmdet3d says otherwise)"
    major = version.split(".")[0]
    if not major.isdigit():
        raise CheckpointError(f"mmdetection3d version {version!r}; expected one like 0.17.1 or 1.0.0")
    origin = "as told" if given else "as the file says"
    if int(major) < 1:
        return True, f"before mmdetection3d 1.0 ({version}, {origin})"
    return False, f"from mmdetection3d 1.0 on ({version}, {origin})"
