from pathlib import Path

import pytest
from tiny_nuscenes import write_tiny_nuscenes

from distillbev.data.samples import NuScenes

REAL_FRAME = Path(__file__).parents[2] / "shared" / "data" / "nuscenes-one-frame"


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset that no test changes."""
    return write_tiny_nuscenes(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def spoilt_root(tmp_path: Path) -> Path:
    """A small dataset of one's own, to break."""
    return write_tiny_nuscenes(tmp_path / "tiny")


@pytest.fixture
def tiny(tiny_root: Path) -> NuScenes:
    return NuScenes(tiny_root)


@pytest.fixture(scope="session")
def real() -> NuScenes:
    """One frame of the real dataset, which may not be part of this project."""
    if not REAL_FRAME.is_dir():
        pytest.skip(f"the real nuScenes frame is not there ({REAL_FRAME.name})")
    return NuScenes(REAL_FRAME)
