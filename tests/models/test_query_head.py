"""The query head: which boxes count, what unknown velocity asks for, and that it can learn a scene."""

import math

import pytest
import torch
from msgspec.structs import replace

from distillbev.boxes import Boxes3D
from distillbev.classes import CLASSES
from distillbev.errors import ConfigError
from distillbev.grid import BevGrid
from distillbev.models.outputs import QueryPredictions
from distillbev.models.query_head import (
    QueryHead,
    QueryHeadConfig,
    decode_boxes,
    encode_boxes,
    passing_score,
    sigmoid_focal_loss,
)

CONFIG = QueryHeadConfig(
    num_queries=12, layers=2, heads=2, points=2, ffn_channels=32, dropout=0.0, max_detections=20
)
GRID = BevGrid(x_range_m=(-16.0, 16.0), y_range_m=(-12.0, 12.0), cell_m=2.0)
BOXES = Boxes3D(
    torch.tensor(
        [
            [3.0, -4.0, -0.5, 4.5, 1.9, 1.6, 0.3, 2.0, 1.0],
            [-9.0, 6.0, 0.0, 0.8, 0.7, 1.8, -2.8, 0.0, 0.5],
            [12.0, 9.0, -1.0, 10.0, 2.8, 3.4, 1.6, math.nan, math.nan],
        ]
    ),
    torch.tensor([0, 5, 2]),
)


def head(config: QueryHeadConfig = CONFIG) -> QueryHead:
    torch.manual_seed(0)
    return QueryHead(config, 16, GRID, (-5.0, 3.0))


def predictions(samples: int = 1, queries: int = 12) -> QueryPredictions:
    torch.manual_seed(1)
    return QueryPredictions(
        torch.randn(2, samples, queries, 10, requires_grad=True),
        torch.randn(2, samples, queries, 10, requires_grad=True),
    )


def test_a_code_gives_back_its_box() -> None:
    torch.testing.assert_close(decode_boxes(encode_boxes(BOXES.boxes)), BOXES.boxes, equal_nan=True)


def test_boxes_outside_the_map_without_extent_or_of_no_class_are_no_targets() -> None:
    rows = BOXES.boxes[:1].repeat(5, 1)
    rows[1, 0] = 16.0  # the upper border belongs to the next cell
    rows[2, 5] = 0.0
    codes, labels = head().targets(Boxes3D(rows, torch.tensor([3, 3, 3, -1, 9])))
    assert len(codes) == 2 and labels.tolist() == [3, 9]


def test_labels_follow_the_head_s_own_classes() -> None:
    config = replace(CONFIG, classes=("pedestrian", "car"))
    module = head(config)
    _, labels = module.targets(BOXES)
    assert labels.tolist() == [1, 0]
    found = module.decode(QueryPredictions(torch.randn(2, 1, 12, 2), torch.randn(2, 1, 12, 10)))[0]
    assert set(found.labels.tolist()) <= {CLASSES.index("pedestrian"), CLASSES.index("car")}


def test_unknown_velocity_asks_for_nothing_and_the_rest_of_the_box_still_counts() -> None:
    module, said = head(), predictions()
    module.loss(said, [BOXES])["box"].backward()
    assert said.boxes.grad is not None and said.boxes.grad.isfinite().all()
    row = module.pair(said, [module.targets(BOXES)])[-1, 0].tolist().index(2)
    assert (said.boxes.grad[-1, 0, row, :8] != 0).all()
    assert (said.boxes.grad[-1, 0, row, 8:] == 0).all()
    skipping, said = head(replace(CONFIG, skip_boxes_of_unknown_velocity=True)), predictions()
    skipping.loss(said, [BOXES])["box"].backward()
    assert said.boxes.grad is not None and (said.boxes.grad[-1, 0, row] == 0).all()


def test_a_sample_without_boxes_teaches_that_nothing_is_there() -> None:
    said = predictions()
    terms = head().loss(said, [Boxes3D.empty()])
    assert terms["box"] == 0 and terms["class"] > 0
    terms["class"].backward()
    assert said.class_logits.grad is not None and (said.class_logits.grad[-1] > 0).all()


def test_a_sample_s_pairs_do_not_depend_on_its_neighbours() -> None:
    module, said = head(), predictions(samples=2)
    targets = [module.targets(BOXES), module.targets(Boxes3D.empty())]
    together = module.pair(said, targets)
    alone = module.pair(QueryPredictions(said.class_logits[:, :1], said.boxes[:, :1]), targets[:1])
    assert torch.equal(together[:, :1], alone) and (together[:, 1] == -1).all()


def test_focal_loss_of_a_sure_and_right_answer_is_almost_nothing() -> None:
    loss = sigmoid_focal_loss(torch.tensor([8.0, -8.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert loss[:2].max() < 1e-6
    torch.testing.assert_close(loss[2], torch.tensor(0.25 * 0.25 * math.log(2)))


def test_a_threshold_that_nothing_passes_is_lowered_until_something_does() -> None:
    scores = torch.tensor([0.5, 0.4, 0.1])
    assert passing_score(scores, 0.3) == pytest.approx(0.4)
    assert 0.4 < passing_score(scores, 0.9) <= 0.5
    assert passing_score(torch.tensor([0.001]), 0.9) == 0.0


def test_a_head_learns_the_boxes_of_a_scene() -> None:
    module = head()
    bev = torch.randn(1, 16, *GRID.shape)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        torch.stack(list(module.loss(module(bev), [BOXES]).values())).sum().backward()
        optimizer.step()
    found = module.eval().decode(module(bev))[0]
    assert found.scores is not None
    best = found[:3]
    for label, box in zip(BOXES.labels, BOXES.boxes, strict=True):
        match = best.boxes[best.labels == label]
        assert len(match) == 1
        assert (match[0, :3] - box[:3]).abs().max() < 0.5
        assert (match[0, 3:6] / box[3:6]).log().abs().max() < 0.2


def test_the_groups_of_a_training_head_say_each_what_a_head_of_its_own_would() -> None:
    together = head(replace(CONFIG, groups=3))
    together.query_embedding.weight.data[12:24] = together.query_embedding.weight[:12]
    bev = torch.randn(2, 16, *GRID.shape)
    in_training, detecting = together(bev), together.eval()(bev)
    assert in_training.boxes.shape == (2, 2, 36, 10) and detecting.boxes.shape == (2, 2, 12, 10)
    for group in (slice(0, 12), slice(12, 24)):  # the third group, unlike them, is not heard
        torch.testing.assert_close(in_training.boxes[:, :, group], detecting.boxes)


def test_the_loss_of_groups_is_the_mean_of_theirs_and_only_the_first_detects() -> None:
    parts = [predictions(samples=2), predictions(samples=2)]
    parts[1] = QueryPredictions(parts[0].class_logits + 1.0, parts[0].boxes * 2)
    joined = QueryPredictions(
        torch.cat([part.class_logits for part in parts], dim=2),
        torch.cat([part.boxes for part in parts], dim=2),
    )
    detector, boxes = head(), [BOXES, BOXES[:1]]
    losses = [detector.loss(part, boxes) for part in parts]
    for name, loss in detector.loss(joined, boxes).items():
        torch.testing.assert_close(loss, (losses[0][name] + losses[1][name]) / 2)
    for of_joined, of_first in zip(detector.decode(joined), detector.decode(parts[0]), strict=True):
        torch.testing.assert_close(of_joined.boxes, of_first.boxes)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="classes"):
        QueryHeadConfig(classes=("car", "tram"))
    with pytest.raises(ConfigError, match="code_weights"):
        QueryHeadConfig(code_weights=(1.0,))
    with pytest.raises(ConfigError, match="divide"):
        QueryHead(CONFIG, 15, GRID, (-5.0, 3.0))
