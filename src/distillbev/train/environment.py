"""What a run ran on: versions, devices, code state, data fingerprint."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "numpy", "pillow", "safetensors", "msgspec", "embreex", "rich", "typer")


def describe_environment(data_root: Path) -> dict[str, object]:
    """Versions, hardware, git state and a fingerprint of the dataset's tables, for `environment.json`."""
    import torch

    return {
        "distillbev": metadata.version("distillbev"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": git_state(),
        "data_fingerprint": data_fingerprint(data_root),
    }


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> str | None:
    """Commit of the source tree, with `-dirty` where it has changes; None outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def data_fingerprint(root: Path) -> str:
    """SHA-256 over names and contents of the small tables, names and sizes of the large ones."""
    digest = hashlib.sha256()
    for path in sorted(root.glob("v1.0-*/*.json")):
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name}:{size}\n".encode())
        if size < 1 << 20:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
