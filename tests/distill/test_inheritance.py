import pytest
import torch
from torch import nn

from distillbev.distill.inheritance import inherit_head
from distillbev.errors import ConfigError
from distillbev.grid import BevGrid
from distillbev.models.center_head import CenterHead, CenterHeadConfig

GRID = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-6.4, 6.4))

OTHER_TASKS = (("car", "truck"), ("pedestrian",), ("bus",), ("trailer",), ("bicycle",), ("barrier",))


class Detector(nn.Module):
    def __init__(self, bev_channels: int, **settings: object) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, bev_channels, 1)
        self.head = CenterHead(CenterHeadConfig(**settings), bev_channels, GRID)


def test_branches_are_copied_and_a_shared_convolution_of_other_width_stays_whole() -> None:
    student, teacher = Detector(8), Detector(12)
    nn.init.constant_(teacher.head.shared_conv.bn.weight, 3.0)
    backbone = student.backbone.weight.clone()
    shared = {name: tensor.clone() for name, tensor in student.head.shared_conv.state_dict().items()}
    report = inherit_head(student, teacher)
    mine, theirs = student.head.state_dict(), teacher.head.state_dict()
    for name in mine:
        if name.startswith("shared_conv"):
            assert name in report.left and torch.equal(mine[name], shared[name.removeprefix("shared_conv.")])
        else:
            assert name in report.copied and torch.equal(mine[name], theirs[name])
    assert len(report.copied) + len(report.left) == len(mine)
    assert torch.equal(student.backbone.weight, backbone)
    assert "entries copied" in str(report) and "shape (64, 8, 3, 3)" in str(report)


def test_shared_convolution_of_equal_width_is_inherited_too() -> None:
    student, teacher = Detector(8), Detector(8)
    report = inherit_head(student, teacher)
    assert not report.left
    maps = torch.randn(1, 8, 16, 16)
    mine, theirs = student.head.eval()(maps), teacher.head.eval()(maps)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(mine, theirs, strict=True) for name in a)


def test_heads_of_other_tasks_are_refused_unless_allowed() -> None:
    student, teacher = Detector(8), Detector(8, tasks=OTHER_TASKS)
    before = {name: tensor.clone() for name, tensor in student.head.state_dict().items()}
    with pytest.raises(ConfigError, match=r"the teacher's .*another class's weights"):
        inherit_head(student, teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.head.state_dict().items())
    report = inherit_head(student, teacher, strict=False)
    assert report.copied and report.left


def test_one_branch_of_other_width_is_refused_before_anything_is_copied() -> None:
    student, teacher = Detector(8), Detector(8, branch_channels=32)
    before = {name: tensor.clone() for name, tensor in student.head.state_dict().items()}
    with pytest.raises(ConfigError, match=r"head entry 'task_heads.* cannot be inherited"):
        inherit_head(student, teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.head.state_dict().items())


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing of the teacher's head fits"):
        inherit_head(nn.Linear(2, 2), nn.Linear(3, 3), strict=False)
