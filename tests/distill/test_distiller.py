import copy
import pickle
from dataclasses import replace as replace_fields

import msgspec
import pytest
import torch
from msgspec.structs import replace
from torch import nn
from toys import (
    ALL_TERMS,
    BOTH,
    GRID,
    LABELLED,
    STAGE,
    ToyNetwork,
    ToyOutput,
    ToyStudent,
    ToyTeacher,
    boxes_of,
    imitation,
    make_batch,
    make_distiller,
    total,
)

from distillbev.boxes import Boxes3D
from distillbev.distill.adapters import IdentityAdapterConfig, LayeredAdapterConfig
from distillbev.distill.attention import AttentionConfig
from distillbev.distill.balance import gradient_norms
from distillbev.distill.distiller import Distiller
from distillbev.distill.masks import ContextConfig, RegionConfig
from distillbev.distill.settings import (
    AffinityTermConfig,
    AttentiveCells,
    DistillConfig,
    FalsePositiveConfig,
    PseudoLabelConfig,
    RelationTermConfig,
    TapConfig,
    TermConfig,
    clean,
    released_bevdepth4d,
    released_bevformer,
)
from distillbev.distill.teacher import TeacherCacheConfig
from distillbev.distill.terms import ChannelStandardiseConfig, LayerNormConfig
from distillbev.errors import ConfigError, DataError
from distillbev.models.outputs import DetectorOutput, QueryPredictions

BY_COMPONENT = FalsePositiveConfig(weight=1.0, source="union", scale="component")
ATTENTIVE = AffinityTermConfig(weight=1.0, cells=AttentiveCells())
RELATION = RelationTermConfig(weight=1.0)


def test_any_two_networks_with_named_maps_give_detection_and_imitation_terms() -> None:
    losses = make_distiller()(make_batch(LABELLED))
    expected = {
        "heatmap",
        "imitate/head/foreground",
        "imitate/head/background",
        "imitate/head/false_positive",
        "imitate/head/attention",
        "imitate/stage0/foreground",
    }
    assert set(losses) == expected
    assert all(loss.isfinite() and loss > 0 and loss.requires_grad for loss in losses.values())


def test_networks_that_give_plain_tuples_are_joined_by_two_callables() -> None:
    class Bare(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.inner = ToyNetwork(channels, seed=channels)

        def forward(self, batch):
            output = self.inner(batch)
            return (output.bev["head"], output.bev["stage0"])

    config = DistillConfig(
        taps=(TapConfig(student="deep", teacher="top", foreground=TermConfig(weight=1.0)),)
    )
    distiller = Distiller.from_probe(
        Bare(8),
        Bare(4),
        config,
        make_batch(LABELLED),
        teacher_maps=lambda maps: {"top": maps[0]},
        student_maps=lambda maps: {"deep": maps[1]},
    )
    losses = distiller(make_batch(LABELLED))
    assert set(losses) == {"imitate/deep/foreground"}
    assert losses["imitate/deep/foreground"] > 0  # 8 x 8 cells brought to the teacher's 16 x 16


def test_training_moves_student_and_adapters_and_leaves_the_teacher_as_it_was() -> None:
    distiller = make_distiller()
    before = copy.deepcopy(distiller.teacher.state_dict())
    student_before = copy.deepcopy(distiller.student.state_dict())
    adapters_before = [parameter.clone() for parameter in distiller.taps.parameters()]
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.train()
    for step in range(2):
        optimizer.zero_grad()
        total(distiller(make_batch(LABELLED, seed=step))).backward()
        optimizer.step()
    after = distiller.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # batch-norm statistics included
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert not distiller.teacher.training
    changed = [not torch.equal(student_before[n], v) for n, v in distiller.student.state_dict().items()]
    assert sum(changed) >= 6
    moved = zip(adapters_before, distiller.taps.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in moved)


def test_teacher_is_outside_parameters_and_state_but_moves_along() -> None:
    distiller = make_distiller()
    alone = ToyStudent(4, seed=2)
    assert distiller.student.state_dict().keys() == alone.state_dict().keys()
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "taps"}
    teacher_parameters = set(map(id, distiller.teacher.parameters()))
    assert not teacher_parameters & set(map(id, distiller.parameters()))
    assert distiller.train() is distiller and not distiller.teacher.training
    distiller.to(torch.float64)
    assert next(distiller.teacher.parameters()).dtype == torch.float64


def test_labels_of_unlabelled_frames_are_never_read() -> None:
    distiller = make_distiller().eval()
    labels: list[Boxes3D | None] = [LABELLED[0], None]
    losses = distiller(make_batch(labels))
    assert distiller.teacher.labels_seen == [None, None]
    taught = distiller.student.taught
    assert taught[0] is LABELLED[0]
    assert len(taught[1]) == 1 and taught[1].labels.tolist() == [0] and taught[1].scores is None
    detected = distiller.teacher.decode(ToyOutput({}, [{"heatmap": torch.zeros(1)}]))[0].boxes[:1]
    torch.testing.assert_close(taught[1].boxes, detected)
    assert all(loss.isfinite() for loss in losses.values())


def test_thresholds_may_differ_by_class() -> None:
    def taught_labels(threshold: float | dict[str, float]) -> list[int]:
        config = DistillConfig(pseudo_labels=PseudoLabelConfig(score_threshold=threshold))
        distiller = make_distiller(config)
        distiller(make_batch([LABELLED[0], None]))
        return distiller.student.taught[1].labels.tolist()

    assert taught_labels(0.3) == [0]
    assert taught_labels(0.1) == [0, 5]
    assert taught_labels({"pedestrian": 0.1, "car": 0.95}) == [5]
    assert taught_labels({"pedestrian": 0.1}) == [5]
    with pytest.raises(ConfigError, match="'person', which is no class"):
        PseudoLabelConfig(score_threshold={"person": 0.1})


def test_without_taps_the_teacher_only_labels_and_runs_only_where_labels_lack() -> None:
    distiller = make_distiller(DistillConfig())
    distiller.teacher.labels_seen = ["untouched"]
    assert set(distiller(make_batch(LABELLED))) == {"heatmap"}
    assert distiller.teacher.labels_seen == ["untouched"]
    assert set(distiller(make_batch([None, None]))) == {"heatmap"}
    assert distiller.teacher.labels_seen == [None, None]


def test_unlabelled_frames_can_be_kept_out_of_targets() -> None:
    config = replace(BOTH, pseudo_labels=PseudoLabelConfig(as_targets=False))
    distiller = make_distiller(config).eval()
    mixed = distiller(make_batch([None, LABELLED[1]]))
    assert distiller.student.taught == [LABELLED[1]]
    expected = make_distiller(config).eval()(make_batch([LABELLED[0], LABELLED[1]]))
    assert "heatmap" in mixed and mixed["heatmap"] != expected["heatmap"]
    assert set(imitation(distiller(make_batch([None, None])))) == set(distiller(make_batch([None, None])))


def test_unlabelled_frames_can_be_kept_out_of_imitation() -> None:
    config = replace(BOTH, pseudo_labels=PseudoLabelConfig(imitate=False))
    distiller = make_distiller(config).eval()
    batch = make_batch([LABELLED[0], None])
    mixed = imitation(distiller(batch))
    other_images = batch.images.clone()
    other_images[1] = 255 - other_images[1]
    changed = imitation(distiller(replace_fields(batch, images=other_images)))
    for name in mixed:
        torch.testing.assert_close(mixed[name], changed[name])
    all_in = imitation(make_distiller(BOTH).eval()(batch))
    assert all_in["imitate/head/background"] != mixed["imitate/head/background"]


def test_batch_of_which_nothing_is_used_is_refused_by_its_tokens() -> None:
    config = replace(BOTH, pseudo_labels=PseudoLabelConfig(imitate=False, as_targets=False))
    with pytest.raises(DataError, match=r"token0-0.*as_targets"):
        make_distiller(config)(make_batch([None, None]))


@pytest.mark.parametrize(
    "config",
    [
        BOTH,
        replace(BOTH, reduction="sum", regions=RegionConfig(combined_scale=True, object_scale="box_area")),
        replace(BOTH, taps=(replace(ALL_TERMS, normalise=ChannelStandardiseConfig()),)),
        replace(BOTH, regions=RegionConfig(shape="gaussian", halo="ignored")),
        replace(BOTH, regions=RegionConfig(shape="gaussian_in_box", combined_scale=True)),
        replace(BOTH, regions=RegionConfig(context=ContextConfig(), object_scale="inverse_box_area")),
        replace(BOTH, taps=(replace(ALL_TERMS, normalise=LayerNormConfig(), attention=None),)),
        replace(BOTH, taps=(replace(ALL_TERMS, false_positive=BY_COMPONENT, affinity=ATTENTIVE),)),
        replace(BOTH, taps=(replace(STAGE, affinity=AffinityTermConfig(weight=1.0), relation=RELATION),)),
        replace(BOTH, taps=(replace(ALL_TERMS, attention=AttentionConfig(standardise=True, cap=5.0)),)),
    ],
)
def test_losses_and_gradients_are_finite_without_boxes_and_when_boxes_cover_everything(
    config: DistillConfig,
) -> None:
    everywhere = boxes_of([0.0, 1.6, 0.0, 40.0, 40.0, 2.0, 0.0, 0.0, 0.0])
    for boxes in (
        [Boxes3D.empty(), Boxes3D.empty()],
        [everywhere, everywhere],
        [everywhere, Boxes3D.empty()],
    ):
        distiller = make_distiller(config)
        losses = distiller(make_batch(boxes))
        assert all(loss.isfinite() for loss in losses.values())
        total(losses).backward()
        gradients = [parameter.grad for parameter in distiller.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("flat", [0.0, 3e4])
def test_flat_and_huge_teacher_maps_give_finite_losses(flat: float) -> None:
    for normalise in (None, ChannelStandardiseConfig(), LayerNormConfig()):
        tap = replace(ALL_TERMS, normalise=normalise, attention=AttentionConfig(standardise=True))
        distiller = make_distiller(replace(BOTH, taps=(tap,)))
        nn.init.zeros_(distiller.teacher.stem[1].weight)
        nn.init.constant_(distiller.teacher.stem[1].bias, flat)
        assert all(loss.isfinite() for loss in distiller(make_batch(LABELLED)).values())


def test_losses_are_fp32_under_autocast_and_for_a_bf16_student() -> None:
    full = make_distiller().eval()(make_batch(LABELLED))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = make_distiller().eval()(make_batch(LABELLED))
    distiller = make_distiller().eval()
    distiller.student.to(torch.bfloat16)
    low = distiller(make_batch(LABELLED))
    for name in imitation(full):
        for losses in (mixed, low):
            assert losses[name].dtype == torch.float32
            torch.testing.assert_close(losses[name], full[name], rtol=0.1, atol=1e-3)
    total(low).backward()


def test_cached_answers_are_the_online_ones_within_half_precision() -> None:
    config = replace(BOTH, cache=TeacherCacheConfig())
    labels: list[Boxes3D | None] = [LABELLED[0], None, None]
    online, cached = make_distiller().eval(), make_distiller(config).eval()
    cached(make_batch(labels))
    assert len(cached._held.cache.entries) == 3
    cached.teacher.labels_seen = ["untouched"]
    second, expected = cached(make_batch(labels)), online(make_batch(labels))
    assert cached.teacher.labels_seen == ["untouched"]
    for name in expected:
        torch.testing.assert_close(second[name], expected[name], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(cached.student.taught[1].boxes, online.student.taught[1].boxes, rtol=0, atol=0)


def test_cache_is_passed_by_for_augmented_frames_and_fills_what_is_missing() -> None:
    distiller = make_distiller(replace(BOTH, cache=TeacherCacheConfig())).eval()
    batch = make_batch(LABELLED)
    batch.bev_aug[0, 0, 0] = -1.0
    first = distiller(batch)
    assert set(distiller._held.cache.entries) == {"token0-1"}
    again = distiller(batch)
    assert len(distiller.teacher.labels_seen) == 1  # the augmented one alone ran
    for name in first:
        torch.testing.assert_close(again[name], first[name], rtol=2e-3, atol=1e-6)
    distiller(replace_fields(batch, boxes=[None, None]))  # detections were not kept at first
    assert distiller._held.cache.entries["token0-1"].detections is not None
    assert distiller._held.cache.entries["token0-1"].detections is not None


def test_cache_stops_at_its_bound() -> None:
    distiller = make_distiller(replace(BOTH, cache=TeacherCacheConfig(max_gib=8e3 / 2**30))).eval()
    for seed in range(3):
        distiller(make_batch(LABELLED, seed=seed))
    cache = distiller._held.cache
    assert len(cache.entries) == 1 and 0 < cache.num_bytes <= 8e3


def test_gradient_norms_are_those_of_backward_and_leave_the_graph_alive() -> None:
    distiller = make_distiller()
    output = distiller.student(make_batch(LABELLED))
    losses = distiller.losses(output, make_batch(LABELLED))
    features = output.bev["head"].features
    norms = gradient_norms(losses, [features])
    assert norms["imitate/stage0/foreground"] == 0  # does not pass through the head map
    features.retain_grad()
    losses["imitate/head/background"].backward(retain_graph=True)
    assert norms["imitate/head/background"] == pytest.approx(float(features.grad.norm()), rel=1e-5)

    losses = distiller(make_batch(LABELLED))
    last = distiller.last_gradient_norms()
    assert set(last) == set(losses) and all(norm > 0 for norm in last.values())
    total(losses).backward()


def test_term_starts_at_its_step_and_false_positives_are_background_before() -> None:
    late = replace(ALL_TERMS.false_positive, start_step=10)
    config = DistillConfig(taps=(replace(ALL_TERMS, false_positive=late),))
    before = make_distiller(config).eval()(make_batch(LABELLED), step=9)
    after = make_distiller(config).eval()(make_batch(LABELLED), step=10)
    none = replace(config, taps=(replace(ALL_TERMS, false_positive=None),))
    without = make_distiller(none).eval()(make_batch(LABELLED))
    assert "imitate/head/false_positive" not in before and "imitate/head/false_positive" in after
    torch.testing.assert_close(before["imitate/head/background"], without["imitate/head/background"])
    with pytest.raises(ConfigError, match="step must be given"):
        make_distiller(config)(make_batch(LABELLED))


def test_overall_weight_scales_imitation_and_nothing_else() -> None:
    one = make_distiller(BOTH).eval()(make_batch(LABELLED))
    three = make_distiller(replace(BOTH, weight=3.0)).eval()(make_batch(LABELLED))
    for name in one:
        factor = 3 if name.startswith("imitate/") else 1
        torch.testing.assert_close(three[name], factor * one[name])


def test_a_batch_twice_over_gives_the_same_loss() -> None:
    once, twice = make_batch(LABELLED), make_batch(LABELLED * 2)
    twice.images = once.images.repeat(2, 1, 1, 1, 1)
    distiller = make_distiller().eval()
    first, second = distiller(once), distiller(twice)
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_student_equal_to_its_teacher_has_nothing_to_imitate() -> None:
    tap = replace(ALL_TERMS, adapter=IdentityAdapterConfig(), attention_imitation=None)
    network = ToyTeacher(8, seed=1).eval()
    distiller = Distiller.from_probe(
        copy.deepcopy(network), network, DistillConfig(taps=(tap,)), make_batch(LABELLED)
    )
    assert all(loss == 0 for loss in distiller.eval()(make_batch(LABELLED)).values())


def test_false_positives_may_come_from_the_boxes_of_a_teacher_without_heat_maps() -> None:
    boxes_source = replace(ALL_TERMS, false_positive=FalsePositiveConfig(weight=1.0, source="boxes"))
    distiller = make_distiller(DistillConfig(taps=(boxes_source,)))
    view = distiller._held.look(make_batch(LABELLED), detections=True)
    assert view.heat is None
    regions = distiller.regions(LABELLED, view)[0]
    cell = GRID.cell_coordinates(torch.tensor([-2.0, 1.0])).floor().long().tolist()
    assert regions.false_positive[0, 0, cell[1], cell[0]]
    assert not (regions.false_positive & regions.foreground).any()


def test_false_positives_may_be_those_of_the_student_and_teach_it_no_way_around() -> None:
    by_student = replace(ALL_TERMS, false_positive=FalsePositiveConfig(weight=1.0, source="student"))
    distiller = make_distiller(DistillConfig(taps=(by_student,)))
    batch = make_batch(LABELLED)
    nn.init.constant_(distiller.teacher.heat.bias, 9.0)  # what the teacher sees does not matter
    nn.init.constant_(distiller.student.heat.bias, -3.0)
    output = distiller.student(batch)
    heat = output.heads[0]["heatmap"]
    losses = distiller.losses(output, batch)
    view = distiller._held.look(batch, detections=False)
    assert view.heat is None
    seen = heat.sigmoid().amax(dim=1, keepdim=True).detach()
    regions = distiller.regions(LABELLED, view, student_heat=seen)[0]
    assert regions.false_positive.any() and regions.background.any()
    assert not (regions.false_positive & (seen <= 0.1)).any()
    (gradient,) = torch.autograd.grad(losses["imitate/head/false_positive"], heat, allow_unused=True)
    assert gradient is None

    class Silent(ToyNetwork):
        def forward(self, batch):
            return replace_fields(super().forward(batch), heads=[])

    mute = Distiller.from_probe(
        ToyTeacher(8, seed=1), Silent(4, seed=2), DistillConfig(taps=(by_student,)), make_batch(LABELLED)
    )
    with pytest.raises(ConfigError, match="the student's heat map, but its head has none"):
        mute(make_batch(LABELLED))


def test_affinity_and_relation_are_terms_of_a_tap_and_pull_at_the_student() -> None:
    tap = replace(STAGE, affinity=AffinityTermConfig(weight=2.0), relation=RELATION)
    losses = make_distiller(DistillConfig(taps=(tap,), weight=0.5)).train()(make_batch(LABELLED))
    doubled = make_distiller(DistillConfig(taps=(tap,))).train()(make_batch(LABELLED))
    for name in ("imitate/stage0/affinity", "imitate/stage0/relation"):
        assert losses[name] > 0 and losses[name].requires_grad
        torch.testing.assert_close(2 * losses[name], doubled[name])


def test_taps_on_one_grid_share_their_regions() -> None:
    twin = replace(ALL_TERMS, student="stage0", adapter=LayeredAdapterConfig())
    distiller = make_distiller(DistillConfig(taps=(ALL_TERMS, twin)))
    view = distiller._held.look(make_batch(LABELLED), detections=False)
    first, second = distiller.regions(LABELLED, view)
    assert first is second


def test_guides_are_the_maps_that_weighed_the_last_error_of_a_sample() -> None:
    distiller = make_distiller(replace(BOTH, regions=RegionConfig(halo="ignored"))).eval()
    guides = distiller.guides(make_batch(LABELLED), sample=1)
    assert set(guides) == {"head", "stage0"}
    view = distiller._held.look(make_batch(LABELLED), detections=False)
    regions = distiller.regions(LABELLED, view)[0]
    maps = guides["head"]
    assert torch.equal(maps["regions"] == 3, regions.foreground[1, 0])
    assert torch.equal(maps["regions"] == 1, regions.background[1, 0])
    assert maps["regions"].unique().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(
        maps["scale"][regions.foreground[1, 0]], regions.foreground_scale[1][regions.foreground[1]]
    )
    assert maps["attention"].mean() == pytest.approx(1, rel=1e-5)
    assert guides["stage0"]["scale"].shape == (8, 8)


def test_unknown_map_is_named_with_the_maps_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"tap 'neck': the student has no such map; its maps are head, stage0"
    ):
        make_distiller(DistillConfig(taps=(replace(ALL_TERMS, student="neck"),)))
    with pytest.raises(
        ConfigError, match=r"tap 'neck': the teacher has no such map; its maps are head, stage0"
    ):
        make_distiller(DistillConfig(taps=(replace(ALL_TERMS, teacher="neck"),)))
    with pytest.raises(ConfigError, match=r"student_channels.*from_probe"):
        Distiller(ToyTeacher(8, seed=1), ToyStudent(4, seed=2), BOTH)


def test_maps_over_different_ground_are_refused() -> None:
    teacher = ToyTeacher(8, seed=1, grid=replace(GRID, x_range_m=(0.0, 12.8)))
    distiller = Distiller.from_probe(teacher, ToyStudent(4, seed=2), BOTH, make_batch(LABELLED))
    with pytest.raises(ConfigError, match=r"tap 'head': .*same range"):
        distiller(make_batch(LABELLED))


def test_teacher_without_what_is_asked_of_it_is_refused() -> None:
    class Silent(ToyNetwork):
        def forward(self, batch):
            return replace_fields(super().forward(batch), heads=[])

    with pytest.raises(ConfigError, match='source="boxes"'):
        Distiller.from_probe(Silent(8, seed=1), ToyStudent(4, seed=2), BOTH, make_batch(LABELLED))(
            make_batch(LABELLED)
        )
    with pytest.raises(ConfigError, match="has no decode"):
        Distiller.from_probe(
            ToyNetwork(8, seed=1), ToyStudent(4, seed=2), DistillConfig(), make_batch(LABELLED)
        )(make_batch([None, None]))


def test_settings_refuse_what_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="has no term"):
        TapConfig()
    with pytest.raises(ConfigError, match="affinity at attentive cells needs attention"):
        replace(STAGE, attention=None, affinity=ATTENTIVE).__post_init__()
    for cells in ({"top": 30, "above": 2.0}, {"top": None}, {"top": 1}):
        with pytest.raises(ConfigError, match="above"):
            AttentiveCells(**cells)
    with pytest.raises(ConfigError, match="tapped once"):
        DistillConfig(taps=(ALL_TERMS, ALL_TERMS))
    with pytest.raises(ConfigError, match="choose a positive weight"):
        TermConfig(weight=0)


@pytest.mark.parametrize(
    "config", [released_bevdepth4d(), released_bevformer(), clean(("stage1", "head")), clean()]
)
def test_presets_survive_being_written_and_read(config: DistillConfig) -> None:
    assert msgspec.convert(msgspec.to_builtins(config), DistillConfig) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_published_adapters_have_the_published_number_of_parameters() -> None:
    student = {"stage1": 256, "stage2": 512, "head": 256}
    teacher = {"stage1": 128, "stage2": 256, "head": 384}

    def count(config: DistillConfig, student: dict[str, int], teacher: dict[str, int]) -> int:
        distiller = Distiller(
            nn.Identity(), nn.Identity(), config, student_channels=student, teacher_channels=teacher
        )
        return sum(parameter.numel() for parameter in distiller.parameters())

    assert count(released_bevdepth4d(), student, teacher) == 923_678
    assert count(released_bevformer(), {"head": 256}, {"head": 256}) == 65_802


def test_samples_are_taken_from_query_predictions_behind_their_layers() -> None:
    from distillbev.distill.teacher import take_samples

    queries = QueryPredictions(torch.rand(6, 3, 5, 10), torch.rand(6, 3, 5, 10))
    part = take_samples(DetectorOutput(bev={}, queries=queries), [2, 0])
    torch.testing.assert_close(part.queries.boxes, queries.boxes[:, [2, 0]])
    assert part.queries.class_logits.shape == (6, 2, 5, 10)
