"""Whole files under the peers' names come out as weights of our detectors, every key accounted for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillbev.errors import CheckpointError
from distillbev.weights.convert import convert, import_weights
from distillbev.weights.read import Published
from distillbev.weights.rename import turn_code, turn_weight

GOLDEN = Path(__file__).parents[1] / "golden"
PILLARS, VOXELS, BEVDET = (
    GOLDEN / name / "weights.safetensors"
    for name in ("a_centerpoint_pillar02", "b_centerpoint_voxel01", "c6_bevdet_forward")
)


@pytest.mark.parametrize(
    ("path", "source", "needless"),
    [(VOXELS, "CenterPoint with voxels", 0), (BEVDET, "BEVDet", 4)],
    ids=["voxels", "bevdet"],
)
def test_every_golden_key_is_carried_or_told(path: Path, source: str, needless: int, tmp_path: Path) -> None:
    report = import_weights(path, tmp_path / "ours.safetensors")
    found, written = load_file(path), load_file(tmp_path / "ours.safetensors")
    assert report.source == source
    assert (len(report.needless), report.unused) == (needless, [])
    assert len(report.used) + len(report.renamed) == len(written) == len(found) - needless
    ours = dict(report.renamed)
    reordered = {name for name, _ in report.reordered}
    assert len(reordered) == 24  # six tasks, two branches, weight and bias
    for name in ours.keys() - reordered:
        assert torch.equal(found[name], written[ours[name]])
    for name in reordered:
        assert torch.equal(turn_weight(name, found[name]), written[ours[name]])


def test_a_key_without_a_name_of_ours_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    with pytest.raises(CheckpointError, match=r"24 of 438 keys .*variant_avg_dist.*--lax"):
        import_weights(PILLARS, out)
    assert not out.exists()
    report = import_weights(PILLARS, out, lax=True)
    assert len(report.unused) == 24
    assert all(name.startswith("variant_") for name in report.unused)
    assert f"unused    {report.unused[0]}" in str(report)


def test_kernels_of_spconv_1_come_out_as_those_of_spconv_2() -> None:
    second = load_file(VOXELS)
    first = {n: w.permute(1, 2, 3, 4, 0).contiguous() if w.ndim == 5 else w for n, w in second.items()}
    expected = convert(Published(second, "", None)).state
    converted = convert(Published(first, "", None))
    state, report = converted.state, converted.report
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    kernels = [n for n, change in report.reordered if "spconv" in change]
    assert len(kernels) == sum(w.ndim == 5 for w in second.values()) > 10


def test_boxes_from_version_1_on_keep_their_rows() -> None:
    weights = load_file(BEVDET)
    converted = convert(Published(weights, "", "1.0.0rc4"))
    state, report = converted.state, converted.report
    name = "task_heads.0.rot.1.weight"
    assert torch.equal(state[f"head.{name}"], weights[f"pts_bbox_head.{name}"])
    assert report.reordered == []
    assert "1.0.0rc4, as the file says" in report.boxes
    told = convert(Published(weights, "", "1.0.0rc4"), version="0.17.1")
    assert torch.equal(told.state[f"head.{name}"], -weights[f"pts_bbox_head.{name}"][[1, 0]])
    assert "as told" in told.report.boxes


def test_box_codes_of_both_versions_come_to_the_same_code_of_ours() -> None:
    yaw = torch.tensor(0.3)
    old_yaw = -yaw - torch.pi / 2
    ours = torch.tensor([1.0, 2.0, 0.5, 4.0, 2.1, 1.5, yaw.sin(), yaw.cos(), 3.0, -1.0])
    old = torch.tensor([1.0, 2.0, 2.1, 4.0, 0.5, 1.5, old_yaw.sin(), old_yaw.cos(), 3.0, -1.0])
    new = torch.tensor([1.0, 2.0, 4.0, 2.1, 0.5, 1.5, yaw.sin(), yaw.cos(), 3.0, -1.0])
    torch.testing.assert_close(turn_code(old), ours)
    torch.testing.assert_close(turn_code(new, old_boxes=False), ours)


def queries() -> dict[str, Tensor]:
    head = "pts_bbox_head."
    return {
        "img_backbone.conv1.weight": torch.zeros(4, 3, 7, 7),
        head + "code_weights": torch.ones(10),
        head + "transformer.encoder.layers.0.attentions.0.value_proj.bias": torch.zeros(4),
        head + "transformer.encoder.layers.0.attentions.1.deformable_attention.value_proj.bias": torch.zeros(
            4
        ),
        head + "transformer.decoder.layers.0.attentions.0.attn.in_proj_bias": torch.zeros(4),
        head + "reg_branches.0.4.bias": torch.arange(10.0),
    }


def test_a_whole_bevformer_comes_out_under_our_names() -> None:
    converted = convert(Published(queries(), "", "0.17.1"))
    state, report = converted.state, converted.report
    assert sorted(state) == [
        "encoder.layers.0.spatial.value_proj.bias",
        "encoder.layers.0.temporal.value_proj.bias",
        "head.box_branches.0.4.bias",
        "head.layers.0.self_attention.in_proj_bias",
        "image_encoder.backbone.conv1.weight",
    ]
    assert state["head.box_branches.0.4.bias"].tolist() == [0, 1, 4, 3, 2, 5, -7, -6, 8, 9]
    assert report.needless == ["pts_bbox_head.code_weights"]


def test_keys_of_no_known_detector_are_told(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"keys of no known detector \(first: fc.weight\)"):
        import_weights(tmp_path / "w.safetensors", tmp_path / "ours.safetensors")
