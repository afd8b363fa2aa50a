"""The LiDAR teacher with a query head against golden d6_lidar_query_teacher, behind the point encoder."""

from pathlib import Path

import pytest
import torch
from old_queries import assert_gradient, ground_truth, our_boxes, our_name, turn_code, turn_weight
from safetensors.torch import load_file
from torch import Tensor

from distillbev.classes import CLASSES
from distillbev.grid import BevGrid
from distillbev.models.lidar_query_teacher import (
    LidarQueryTeacher,
    LidarQueryTeacherConfig,
    QueryEncoderConfig,
    sine_position,
)
from distillbev.models.outputs import QueryPredictions
from distillbev.models.pillars import HardPillarsConfig
from distillbev.models.query_head import QueryHeadConfig
from distillbev.models.second import SecondConfig
from distillbev.models.voxels import SparseVoxelsConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "d6_lidar_query_teacher"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-8.0, 8.0), y_range_m=(-8.0, 8.0), cell_m=2.0)
HEAD = "pts_bbox_head."
UNUSED = HEAD + "transformer.level_embeds"  # never reaches the reference's encoder


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def name_of(old: str) -> str:
    if old.startswith("pts_backbone."):
        return old.removeprefix("pts_")
    if old.startswith("pts_neck."):
        return old.removeprefix("pts_")
    old = old.removeprefix(HEAD)
    if old.startswith("transformer.encoder."):
        return "encoder." + our_name(old, "cross_attention", "none")
    if old.startswith("bev_embedding."):
        return "encoder." + old
    return "head." + our_name(old, "self_attention", "cross_attention")


def model() -> LidarQueryTeacher:
    """Everything behind the point encoder; the golden starts with its map, so any encoder of 24 channels
    does."""
    config = LidarQueryTeacherConfig(
        grid=GRID,
        voxel_grid=GRID.coarser(0.5),
        points=HardPillarsConfig(channels=(24,)),
        backbone=SecondConfig(channels=(16, 24), layers=(1, 1), strides=(1, 2)),
        channels=32,
        encoder=QueryEncoderConfig(layers=2, heads=8, ffn_channels=64),
        head=QueryHeadConfig(
            classes=CLASSES[:4],
            num_queries=9,
            layers=2,
            ffn_channels=64,
            skip_boxes_of_unknown_velocity=True,
            max_detections=12,
        ),
    )
    teacher = LidarQueryTeacher(config).eval()
    state = {name_of(old): turn_weight(old, weight) for old, weight in WEIGHTS.items() if old != UNUSED}
    missing, unexpected = teacher.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("points.") for name in missing)
    return teacher


def test_backbone_neck_and_encoder_are_the_reference_s() -> None:
    teacher = model()
    stages = teacher.backbone(INPUTS["pts_bev"])
    for i, stage in enumerate(stages):
        close(stage, OUTPUTS[f"second.{i}"])
    levels = teacher.neck(stages)
    for i, level in enumerate(levels):
        close(level, OUTPUTS[f"fpn.{i}"])
    close(sine_position((8, 8), 32), OUTPUTS["encoder_in.query_pos"][:, 0])
    bev = teacher.encoder(levels)
    close(bev.flatten(2).transpose(1, 2), OUTPUTS["bev_embed"])
    teacher.encoder.layers = teacher.encoder.layers[:1]
    close(teacher.encoder(levels).flatten(2).permute(2, 0, 1), OUTPUTS["encoder.layer0"])


def test_backbone_and_neck_in_training_are_the_reference_s() -> None:
    teacher = model().train()
    for i, level in enumerate(teacher.neck(teacher.backbone(INPUTS["pts_bev"]))):
        close(level, OUTPUTS[f"train_mode.fpn.{i}"])


def test_the_head_s_answers_and_all_gradients_are_the_reference_s() -> None:
    teacher = model()
    canvas = INPUTS["pts_bev"].clone().requires_grad_()
    bev = teacher.encoder(teacher.neck(teacher.backbone(canvas)))
    predictions = teacher.head(bev)
    close(predictions.class_logits, OUTPUTS["all_cls_scores"])
    close(predictions.boxes, turn_code(OUTPUTS["all_bbox_preds"]))
    (
        (bev.flatten(2).transpose(1, 2) * INPUTS["cotangent.bev_embed"]).sum()
        + (predictions.class_logits * INPUTS["cotangent.all_cls_scores"]).sum()
        + (predictions.boxes * turn_code(INPUTS["cotangent.all_bbox_preds"])).sum()
    ).backward()
    assert_gradient(canvas.grad, GRADIENTS["pts_bev"])
    parameters = {n: p for n, p in teacher.named_parameters() if not n.startswith("points.")}
    for key, expected in GRADIENTS.items():
        if key.startswith("weight."):
            old = key.removeprefix("weight.")
            assert_gradient(parameters.pop(name_of(old)).grad, turn_weight(old, expected), old)
    assert not parameters
    assert f"weight.{UNUSED}" not in GRADIENTS


def test_losses_and_detections_are_the_reference_s() -> None:
    head = model().head
    predictions = QueryPredictions(OUTPUTS["all_cls_scores"], turn_code(OUTPUTS["all_bbox_preds"]))
    class_terms, box_terms = head.loss_per_layer(predictions, ground_truth(INPUTS, 2))
    for layer, prefix in enumerate(("d0.", "")):
        close(class_terms[layer], OUTPUTS[f"loss.{prefix}loss_cls"][0])
        close(box_terms[layer], OUTPUTS[f"loss.{prefix}loss_bbox"])
    for b, found in enumerate(head.decode(predictions)):
        assert found.scores is not None
        close(found.scores, OUTPUTS[f"decode.scores.{b}"])
        assert torch.equal(found.labels, OUTPUTS[f"decode.labels.{b}"])
        close(found.boxes, our_boxes(OUTPUTS[f"decode.boxes_bottom.{b}"]))


@pytest.mark.parametrize(("point_features", "published"), [(5, 27_642_251), (23, 27_650_027)])
def test_the_size_is_the_published_one_but_for_embeddings_that_reach_nothing(
    point_features: int, published: int
) -> None:
    """LiDARFormer, and MVPFormer with its wider points."""
    config = LidarQueryTeacherConfig(points=SparseVoxelsConfig(point_features=point_features))
    with torch.device("meta"):
        teacher = LidarQueryTeacher(config)
    level_embeddings = 4 * 256  # see the golden's notes
    assert sum(p.numel() for p in teacher.parameters()) + level_embeddings == published
    assert teacher.config.grid.shape == (200, 200)
    assert teacher.points.out_channels == 256
