"""The LiDAR teacher with object queries as a detector, from points to boxes."""

import msgspec.structs
import pytest
import torch

from distillbev.boxes import Boxes3D
from distillbev.data.schema import Batch
from distillbev.distill.distiller import Distiller
from distillbev.distill.inheritance import inherit_head
from distillbev.distill.settings import released_bevformer
from distillbev.errors import ConfigError, DataError
from distillbev.grid import BevGrid
from distillbev.models.bevformer import BevFormer, BevFormerConfig, EncoderConfig
from distillbev.models.image_encoder import PlainCnnConfig
from distillbev.models.image_pyramid import ImagePyramidConfig
from distillbev.models.lidar_query_teacher import (
    LidarQueryTeacher,
    LidarQueryTeacherConfig,
    QueryEncoderConfig,
    sine_position,
)
from distillbev.models.query_head import QueryHeadConfig
from distillbev.models.second import SecondConfig
from distillbev.models.voxels import SparseVoxelsConfig

CONFIG = LidarQueryTeacherConfig(
    grid=BevGrid(x_range_m=(-8.0, 8.0), y_range_m=(-4.0, 4.0), cell_m=1.0),
    voxel_grid=BevGrid(x_range_m=(-8.0, 8.0), y_range_m=(-4.0, 4.0), cell_m=0.25),
    points=SparseVoxelsConfig(channels=(4, 4, 8, 8), out_channels=8),
    backbone=SecondConfig(channels=(8, 8), layers=(1, 1), strides=(1, 2)),
    levels=2,
    channels=16,
    encoder=QueryEncoderConfig(layers=1, heads=2, points=2, ffn_channels=16),
    head=QueryHeadConfig(num_queries=5, layers=2, heads=2, ffn_channels=16, max_detections=7),
    norm_momentum=0.1,
)


def batch(samples: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([14.0, 7.0, 4.0, 255.0, 0.0])
    points = [(torch.rand(400, 5, generator=generator) - 0.5) * scale for _ in range(samples)]
    boxes = Boxes3D(torch.tensor([[2.0, 1.0, -0.5, 4.5, 1.9, 1.6, 0.3, 2.0, 1.0]]), torch.tensor([0]))
    none = torch.zeros(samples, 0, 4, 4)
    eye = torch.eye(4).expand(samples, 4, 4)
    return Batch(
        tokens=[f"sample{i}" for i in range(samples)],
        images=None,
        cam2img=none,
        cam2lidar=none,
        image_aug=none,
        bev_aug=eye,
        lidar2global=eye.double(),
        points=points,
        boxes=[boxes] * samples,
    )


def test_points_become_a_map_on_the_student_s_grid_and_boxes() -> None:
    torch.manual_seed(0)
    teacher = LidarQueryTeacher(CONFIG).eval()
    output = teacher(batch())
    assert output.bev["head"].features.shape == (2, 16, 8, 16)
    assert output.bev["head"].grid == CONFIG.grid
    assert teacher.bev_channels == {"head": 16}
    assert [len(found) <= 7 for found in teacher.decode(output)] == [True, True]


def test_a_step_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    teacher = LidarQueryTeacher(CONFIG).train()
    torch.stack(list(teacher.loss(teacher(batch()), batch()).values())).sum().backward()
    assert not [n for n, p in teacher.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_a_bevformer_imitates_its_map_and_starts_with_its_head() -> None:
    torch.manual_seed(0)
    teacher = LidarQueryTeacher(CONFIG)
    student = BevFormer(
        BevFormerConfig(
            grid=CONFIG.grid,
            image_encoder=ImagePyramidConfig(
                backbone=PlainCnnConfig(widths=(4, 8), convs=(1, 1)), strides=(4,)
            ),
            num_cameras=1,
            channels=16,
            encoder=EncoderConfig(layers=1, heads=2, ffn_channels=16),
            head=CONFIG.head,
        )
    )
    report = inherit_head(student, teacher)
    assert not report.left
    for name, weight in student.head.state_dict().items():
        assert torch.equal(weight, teacher.head.state_dict()[name])
    frame = batch()
    forward = torch.eye(4)
    forward[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    frame.images = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    frame.cam2lidar = forward.expand(2, 1, 4, 4)
    frame.cam2img = torch.diag(torch.tensor([8.0, 8.0, 1.0, 1.0])).expand(2, 1, 4, 4)
    distiller = Distiller(teacher, student, released_bevformer())
    terms = distiller(frame)
    assert any(name.startswith("imitate/head/") for name in terms) and "class" in terms
    torch.stack([term.sum() for term in terms.values()]).sum().backward()
    assert student.encoder.bev_embedding.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_codes_of_cells_tell_rows_from_columns_on_a_map_that_is_not_square() -> None:
    code = sine_position((3, 5), 8).unflatten(0, (3, 5))
    assert torch.equal(code[0, :, :4], code[0, :1, :4].expand(5, -1))  # the first half knows the row alone
    assert torch.equal(code[:, 2, 4:], code[:1, 2, 4:].expand(3, -1))
    assert len({tuple(cell.tolist()) for cell in code.flatten(0, 1)}) == 15


def test_bad_input_is_told_in_one_line() -> None:
    with pytest.raises(DataError, match="no LiDAR points"):
        frame = batch()
        frame.points = None
        LidarQueryTeacher(CONFIG)(frame)
    with pytest.raises(ConfigError, match="same ground"):
        msgspec.structs.replace(CONFIG, voxel_grid=BevGrid(cell_m=0.4))
    with pytest.raises(ConfigError, match="channels"):
        msgspec.structs.replace(CONFIG, channels=18)
