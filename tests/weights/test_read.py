"""Published files are read as plain tensors, and what cannot be read is told in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbev.errors import CheckpointError
from distillbev.weights.read import read_published

RAW, AVERAGE = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a.b": RAW}, "state_dict_ema": {"module.a.b": AVERAGE}},
        {"state_dict": {"a.b": AVERAGE}, "ema_state_dict": {"module.a.b": RAW, "steps": torch.tensor(3)}},
        {"state_dict": {"a.b": AVERAGE, "ema_a_b": RAW}},
        {"state_dict": {"a.b": AVERAGE}, "updates": 9},
    ],
)
def test_averaged_weights_are_taken_and_told(content: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    published = read_published(tmp_path / "w.pth")
    assert list(published.tensors) == ["a.b"]
    assert torch.equal(published.tensors["a.b"], AVERAGE)
    assert published.choice.startswith("moving average (EMA)")


def test_weights_without_an_average_are_told_as_such_with_their_version(tmp_path: Path) -> None:
    torch.save({"meta": {"mmdet3d_version": "0.17.1"}, "state_dict": {"a": RAW}}, tmp_path / "w.pth")
    published = read_published(tmp_path / "w.pth")
    assert published.choice == "the file's only weights, from 'state_dict'"
    assert published.version == "0.17.1"


def test_what_trainers_leave_beside_the_weights_is_read_or_passed_over(tmp_path: Path) -> None:
    meta = {"mmengine_version": "0.7.2", "cfg": "voxel_size = 1", "best_score": np.float64(0.3)}
    torch.save({"state_dict": {"a": RAW}, "meta": meta}, tmp_path / "w.pth")
    published = read_published(tmp_path / "w.pth")
    assert (published.version, published.config) == ("1.1", "voxel_size = 1")
    torch.save({"state_dict": {"model.module.a": RAW, "model.module.b": RAW}}, tmp_path / "w.pth")
    assert list(read_published(tmp_path / "w.pth").tensors) == ["a", "b"]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_published(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": nn.Linear(1, 1)}, tmp_path / "w.pth")
    assert "holds code (torch.nn.modules.linear.Linear)" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_told(suffix: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(1000)}, whole)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.read_bytes()[:900])
    assert "download it again" in refusal(path)


def test_an_absent_file_a_folder_and_a_file_without_tensors_are_told(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "w.pth")
    assert "a folder" in refusal(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    assert "no tensors under epoch" in refusal(tmp_path / "w.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    assert "expected" in refusal(tmp_path / "text.pth")
