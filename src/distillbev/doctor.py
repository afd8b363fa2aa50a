"""What this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OPTIONAL = {
    "simplejpeg": ("faster JPEG decoding", "pip install 'distillbev[fast]'"),
    "tensorboard": ("TensorBoard logs", "pip install 'distillbev[log]'"),
    "timm": (
        "image backbones beyond our ResNets",
        "pip install 'distillbev[timm]' with a torchvision that fits torch",
    ),
}
REQUIRED = ("torch", "numpy", "PIL", "safetensors", "msgspec", "yaml", "rich", "typer", "embreex")
INSTALL = "pip install -e . (or: make setup)"
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and how to mend it if it is not well."""

    subject: str
    found: str
    mend: str | None = None
    fatal: bool = False


def examine() -> list[Finding]:
    """Looks at interpreter, packages, devices, memory and disk; changes nothing."""
    findings = [
        Finding("python", platform.python_version()),
        _package("distillbev", None, INSTALL, fatal=False),
    ]
    findings += [_package(name, None, INSTALL, fatal=True) for name in REQUIRED]
    findings += [_package(name, use, mend, fatal=False) for name, (use, mend) in OPTIONAL.items()]
    findings += [_accelerator(), Finding("cpu cores", str(os.cpu_count())), _memory(), _disk()]
    return findings


def _package(module: str, use: str | None, mend: str, fatal: bool) -> Finding:
    name = DISTRIBUTIONS.get(module, module)
    try:
        importlib.import_module(module)
    # A torchvision of another build than torch raises RuntimeError on import, not ImportError.
    except Exception as error:
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"broken: {error}"
        suffix = f" (optional: {use})" if use else ""
        return Finding(name, " ".join(reason.split()) + suffix, mend, fatal)
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "there, but not installed by pip", mend)


def _accelerator() -> Finding:
    try:
        import torch
    except Exception:  # however it is broken, its own line says so
        return Finding("gpu", "unknown without torch")
    if not torch.cuda.is_available():
        return Finding("gpu", "none; everything runs on the CPU (the tiny recipes are made for it)")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", f"{', '.join(names)}; bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")


def _memory() -> Finding:
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    low = gigabytes < 6
    return Finding("memory", f"{gigabytes:.0f} GB", "the demo wants 6 GB" if low else None)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding("free disk here", f"{free:.0f} GB", "the demo wants 2 GB" if free < 2 else None)
