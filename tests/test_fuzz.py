"""A slice of `tools/fuzz`, which says what must hold."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "fuzz"))
import judge  # pyright: ignore[reportMissingImports]
import spoil  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        logging.disable(logging.WARNING)
        yield judge.prepare_world(folder)
        logging.disable(logging.NOTSET)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(number=st.integers(0, 10**9))
def test_spoilt_worlds_are_refused_or_read_as_a_plain_reading_does(small_world: Any, number: int):
    outcome = judge.try_case(small_world, 1, number)
    assert outcome.outcome in judge.GOOD, outcome


def test_the_judge_notices_a_wrong_sample(small_world: Any, monkeypatch: pytest.MonkeyPatch):
    rows = spoil.copied(small_world, "ego_pose")
    for row in rows:
        row["translation"][0] += 1.0
    small_world.write_table("ego_pose", rows)
    spoilt = spoil.Spoilt("the car is elsewhere")
    try:
        assert judge.judge(small_world, spoilt) == "different"
        monkeypatch.setattr(judge, "read_plainly", lambda root: small_world.sound)  # reads what is not there
        with pytest.raises(judge.WrongError, match="a plain reading differs"):
            judge.judge(small_world, spoilt)
        with pytest.raises(judge.WrongError, match="cannot matter, and does"):
            judge.judge(small_world, spoil.Spoilt("the same", harmless=True))
    finally:
        small_world.mend()
