"""The query decoder, its pairing, losses and decoding against golden d5_head, values and gradients."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from old_queries import assert_gradient, ground_truth, our_boxes, our_name, turn_code, turn_weight
from safetensors.torch import load_file
from torch import Tensor

from distillbev.classes import CLASSES
from distillbev.grid import BevGrid
from distillbev.models.outputs import QueryPredictions
from distillbev.models.query_head import (
    QueryHead,
    QueryHeadConfig,
    decode_boxes,
    encode_boxes,
    inverse_sigmoid,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "d5_head"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
CONFIG = QueryHeadConfig(
    classes=CLASSES[:5],
    num_queries=14,
    layers=3,
    heads=4,
    ffn_channels=64,
    code_weights=tuple(WEIGHTS["code_weights"].tolist()),
    skip_boxes_of_unknown_velocity=True,
    max_detections=20,
    centre_range_m=(-12.0, -9.0, -4.5, 12.0, 9.0, 3.0),
)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def name_of(old: str) -> str:
    return our_name(old, "self_attention", "cross_attention")


def head(config: QueryHeadConfig = CONFIG) -> QueryHead:
    grid = BevGrid(x_range_m=(-20.0, 20.0), y_range_m=(-16.0, 16.0), cell_m=4.0)
    module = QueryHead(config, 32, grid, (-5.0, 3.0)).eval()
    weights = {old: weight for old, weight in WEIGHTS.items() if old != "code_weights"}
    module.load_state_dict({name_of(old): turn_weight(old, weight) for old, weight in weights.items()})
    return module


def bev() -> Tensor:
    return INPUTS["bev_embed"].transpose(1, 2).unflatten(2, (8, 10)).clone().requires_grad_()


def golden_predictions() -> QueryPredictions:
    return QueryPredictions(
        OUTPUTS["all_cls_scores"].clone().requires_grad_(),
        turn_code(OUTPUTS["all_bbox_preds"]).requires_grad_(),
    )


def test_the_decoder_is_the_reference_s_with_gradients() -> None:
    module, features = head(), bev()
    predictions = module(features)
    close(predictions.class_logits, OUTPUTS["all_cls_scores"])
    close(predictions.boxes, turn_code(OUTPUTS["all_bbox_preds"]))
    (
        (predictions.class_logits * INPUTS["cotangent.all_cls_scores"]).sum()
        + (predictions.boxes * turn_code(INPUTS["cotangent.all_bbox_preds"])).sum()
    ).backward()
    assert features.grad is not None
    assert_gradient(features.grad.flatten(2).transpose(1, 2), GRADIENTS["forward.bev_embed"])
    parameters = dict(module.named_parameters())
    for old in WEIGHTS:
        if old != "code_weights":
            expected = turn_weight(old, GRADIENTS[f"forward.weight.{old}"])
            assert_gradient(parameters.pop(name_of(old)).grad, expected, old)
    assert not parameters


def test_the_first_layer_is_the_reference_s_step_by_step() -> None:
    module, layer = head(), head().layers[0]
    position, query = module.query_embedding.weight.expand(3, -1, -1).chunk(2, dim=-1)
    reference = module.reference_points(position).sigmoid()
    close(reference, OUTPUTS["init_reference"])
    placed = query + position
    query = query + layer.self_attention(placed, placed, query)[0]
    close(query.transpose(0, 1), OUTPUTS["layer0.self_attn"])
    query = layer.norms[0](query)
    query = query + layer.cross_attention(
        query + position, INPUTS["bev_embed"], [(8, 10)], reference[..., :2]
    )
    close(query.transpose(0, 1), OUTPUTS["layer0.cross_attn"])
    query = layer.norms[1](query)
    out = layer.norms[2](query + layer.feed_forward(query))
    close(out.transpose(0, 1), OUTPUTS["layer0.out"])


def test_costs_and_pairs_are_the_reference_s() -> None:
    module, predictions = head(), golden_predictions()
    targets = [module.targets(boxes) for boxes in ground_truth(INPUTS, 3)]
    for b in (0, 2):
        class_cost, box_cost = module.pair_costs(
            predictions.class_logits[-1:, b], predictions.boxes[-1:, b], *targets[b]
        )
        close(class_cost[0].detach(), OUTPUTS[f"assign.cls_cost.{b}"])
        close(box_cost[0].detach(), OUTPUTS[f"assign.reg_cost.{b}"])
    assert torch.equal(module.pair(predictions, targets), OUTPUTS["assign.gt_index_per_query"])


def test_losses_of_every_layer_are_the_reference_s_with_gradients() -> None:
    module, predictions = head(), golden_predictions()
    boxes = ground_truth(INPUTS, 3)
    class_terms, box_terms = module.loss_per_layer(predictions, boxes)
    for layer, prefix in enumerate(("d0.", "d1.", "")):
        close(class_terms[layer], OUTPUTS[f"loss.{prefix}loss_cls"][0])
        close(box_terms[layer], OUTPUTS[f"loss.{prefix}loss_bbox"])
    terms = module.loss(predictions, boxes)
    total = torch.stack(list(terms.values())).sum()
    close(total, class_terms.sum() + box_terms.sum())
    total.backward()
    assert_gradient(predictions.class_logits.grad, GRADIENTS["loss.all_cls_scores"])
    assert_gradient(predictions.boxes.grad, turn_code(GRADIENTS["loss.all_bbox_preds"]))


@pytest.mark.parametrize(
    ("prefix", "threshold"),
    [("", None), ("thr.", "coder.score_threshold"), ("thr_high.", "coder.score_threshold_high")],
)
def test_decoding_is_the_reference_s(prefix: str, threshold: str | None) -> None:
    config = replace(CONFIG, score_threshold=None if threshold is None else float(INPUTS[threshold]))
    for b, found in enumerate(head(config).decode(golden_predictions())):
        assert found.scores is not None
        close(found.scores, OUTPUTS[f"decode.{prefix}scores.{b}"])
        assert torch.equal(found.labels, OUTPUTS[f"decode.{prefix}labels.{b}"])
        close(found.boxes, our_boxes(OUTPUTS[f"decode.{prefix}boxes_bottom.{b}"]))
        close(found.boxes, our_boxes(OUTPUTS[f"decode.{prefix}boxes_gravity.{b}"], bottom=False))


def test_the_code_and_the_inverse_sigmoid_are_the_reference_s() -> None:
    boxes = our_boxes(INPUTS["util.boxes"], bottom=False)
    code = turn_code(OUTPUTS["util.normalized"])
    close(encode_boxes(boxes), code)
    close(decode_boxes(code), our_boxes(OUTPUTS["util.denormalized"], bottom=False))
    close(inverse_sigmoid(INPUTS["inverse_sigmoid.x"]), OUTPUTS["inverse_sigmoid.y"])
