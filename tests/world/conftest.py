from pathlib import Path

import pytest
from world.small_world import SMALL

from distillbev.world import simulate


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "sim"
    simulate(SMALL, out, processes=1, progress=False)
    return out
