"""Rewrites both lock files from the packages installed in .venv: `.venv/bin/python tools/lock.py`."""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CORE = ("distillbev", "setuptools")
# The devkit is the tests' oracle. It caps numpy below 2 but runs with it, so its own requirements are not followed.
ORACLE = ("nuscenes-devkit",)
DEV = (
    *("pytest", "pytest-xdist", "hypothesis", "ruff", "pyright", "simplejpeg"),
    *(
        "pyquaternion",
        "shapely",
        "matplotlib",
        "cachetools",
        "scikit-learn",
        "opencv-python-headless",
        "descartes",
    ),
    "tqdm",
)


def closure(names: tuple[str, ...], follow: bool = True) -> dict[str, str]:
    """Name -> version of the packages and all that they require here."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        package = metadata.distribution(name)
        found[name] = package.version.split("+")[0]  # without the label of a local build, as of a CPU torch
        requirements = map(Requirement, package.requires or [] if follow else [])
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def write(path: Path, head: str, versions: dict[str, str]) -> None:
    path.write_text(f"# {head}\n" + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)))


if __name__ == "__main__":
    core = closure(CORE)
    dev = {**closure(DEV), **closure(ORACLE, follow=False)}
    write(
        ROOT / "requirements.lock",
        "Exact versions of the core set.",
        {k: core[k] for k in core if k != "distillbev"},
    )
    write(
        ROOT / "requirements-dev.lock",
        "Exact versions of what the tests need besides requirements.lock.",
        {name: dev[name] for name in dev if name not in core},
    )
