"""Published checkpoints read as plain tensors: nothing in the file is run, averaged weights are preferred."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError

AVERAGES = ("state_dict_ema", "model_ema", "ema")  # where trainers put averaged weights beside the raw ones
STATES = ("state_dict", "model_state", "model")
WRAPPERS = ("module.", "model.")  # what data parallelism and lightning put before every name
# Plain numbers of numpy, which training logs leave in checkpoints; the function that makes them, in numpy 1 and 2.
NUMBERS = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


@dataclass(frozen=True)
class Published:
    """Weights as their authors named them."""

    tensors: dict[str, Tensor]
    choice: str  # which weights of the file these are, in words
    version: str | None  # of mmdetection3d, where the file tells it
    config: str | None = None  # the text of the configuration that trained it, where the file holds it


def read_published(path: Path) -> Published:
    """Reads `.safetensors`, or what torch.save wrote, to the CPU.

    Raises:
        CheckpointError: the file is absent or damaged, holds more than plain data, or has no weights.
    """
    try:
        if path.suffix == ".safetensors":
            return Published(load_file(path), "the file's only weights", None)
        with torch.serialization.safe_globals(NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a published checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: a folder; expected a published checkpoint, one file") from None
    except UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path}: not readable ({reason}); expected a whole checkpoint, so download it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dictionary of tensors")
    tensors, choice = _choose(content)
    for wrapper in WRAPPERS * 2:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    if not tensors:
        raise CheckpointError(
            f"{path}: no tensors under {', '.join(map(str, list(content)[:5])) or 'anything'}; "
            f"expected them at the top or under {', '.join((*AVERAGES, *STATES))}"
        )
    meta = content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    version = meta.get("mmdet3d_version")
    if version is None and "mmengine_version" in meta:
        version = "1.1"  # the first that was built on mmengine
    config = meta.get("config", meta.get("cfg"))
    return Published(
        tensors,
        choice,
        version if isinstance(version, str) else None,
        config if isinstance(config, str) else None,
    )


def _refusal(path: Path, reason: str) -> str:
    code = re.search(r"GLOBAL ([\w.]+)", reason)
    if code is None:
        return f"{path}: not a checkpoint of torch; expected what torch.save or safetensors wrote"
    return (
        f"{path}: its pickle holds code ({code[1]}), which is not run; expected plain tensors, "
        "so save its state_dict alone where it comes from"
    )


def _choose(content: dict[str, object]) -> tuple[dict[str, Tensor], str]:
    """The best weights of a file, and which they are."""
    for key in AVERAGES:
        if found := _tensors(content.get(key)):
            return found, f"moving average (EMA), from {key!r}"
    state = next((key for key in STATES if _tensors(content.get(key))), None)
    tensors = _tensors(content if state is None else content[state])
    # mmcv and mmengine swap before they save: the plain names hold the average, the "ema" ones the raw weights.
    if "ema_state_dict" in content:
        return tensors, f"moving average (EMA), which mmengine saves as {state!r}"
    raw = {"ema_" + name.replace(".", "_") for name in tensors} & tensors.keys()
    if raw:
        kept = {name: value for name, value in tensors.items() if name not in raw}
        return kept, f"moving average (EMA), which mmcv saves under the plain names; {len(raw)} raw ones left"
    if "updates" in content:  # the hook of BEVDet and BEVDepth writes the average to a file of its own
        return tensors, f"moving average (EMA), from {state!r} of a file with 'updates'"
    return tensors, f"the file's only weights, from {state!r}" if state else "the file's only weights"


def _tensors(value: object) -> dict[str, Tensor]:
    if not isinstance(value, dict):
        return {}
    return {name: t for name, t in value.items() if isinstance(name, str) and isinstance(t, Tensor)}
