"""Weights and training state on disk: safetensors and JSON only, each checkpoint complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError


def save_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors to one safetensors file, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask wants it; safetensors lets only the owner read
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary, metadata
        )
    except SafetensorError as error:  # a full disk comes out as this
        raise CheckpointError(
            f"{path}: cannot be written ({error}); make room or mend the permissions, then run again"
        ) from None
    temporary.chmod(mode)
    os.replace(temporary, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads one safetensors file to the CPU.

    Raises:
        CheckpointError: the file is absent or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected weights that a run wrote") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not readable as safetensors ({error}); copy or train it again"
        ) from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads weights strictly: every key and every shape must agree.

    Raises:
        CheckpointError: the file belongs to another architecture; says how they differ.
    """
    found, expected = read_weights(path), model.state_dict()
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    reshaped = [key for key in expected if key in found and expected[key].shape != found[key].shape]
    if missing or surplus or reshaped:
        parts = [f"{len(missing)} keys are missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(surplus)} are unknown (first: {surplus[0]})"] if surplus else []
        if reshaped:
            key = reshaped[0]
            parts.append(
                f"{len(reshaped)} differ in shape (first: {key}, found {tuple(found[key].shape)}, "
                f"expected {tuple(expected[key].shape)})"
            )
        raise CheckpointError(
            f"{path}: weights of another architecture than {type(model).__name__} as configured: "
            f"{'; '.join(parts)}; use the experiment.yaml of the run that wrote them"
        )
    model.load_state_dict(found)


class Checkpoint:
    """One folder `step-NNNNNNN` with model, optimizer and average."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = int(folder.name.removeprefix("step-"))

    @staticmethod
    def latest(checkpoints: Path) -> Checkpoint | None:
        """The newest complete checkpoint; unfinished ones (hidden folders) do not count."""
        folders = sorted(checkpoints.glob("step-" + "[0-9]" * 7))
        return Checkpoint(folders[-1]) if folders else None

    @staticmethod
    def save(
        checkpoints: Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor] | None,
        keep: int,
    ) -> None:
        """Writes a checkpoint beside the others, makes it visible in one rename, drops the oldest."""
        final, part = checkpoints / f"step-{step:07d}", checkpoints / f".step-{step:07d}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_weights(model.state_dict(), part / "model.safetensors")
        if average is not None:
            save_weights(average, part / "average.safetensors")
        state = optimizer.state_dict()["state"]
        tensors = {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
        save_weights(tensors, part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        for old in sorted(checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor] | None:
        """Puts model and optimizer back as they were; returns the averaged weights, if any.

        Raises:
            CheckpointError: a file of it is absent, damaged, or belongs to another architecture.
        """
        try:
            return self._restore(model, optimizer)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}, or delete {self.folder} to go on from the checkpoint before"
            ) from None

    def _restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor] | None:
        load_weights(model, self.folder / "model.safetensors")
        tensors = read_weights(self.folder / "optimizer.safetensors")
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        average = self.folder / "average.safetensors"
        return read_weights(average) if average.exists() else None
