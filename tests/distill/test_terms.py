import pytest
import torch
from torch import Tensor, nn

from distillbev.distill.masks import Regions
from distillbev.distill.terms import (
    ChannelStandardise,
    ChannelStandardiseConfig,
    Reduction,
    affinity_term,
    attention_term,
    background_term,
    false_positive_term,
    foreground_term,
    layer_norm,
)


def by_loops(error: Tensor, region: Tensor, scale: Tensor, attention: Tensor, channels: Tensor) -> Tensor:
    """The readable twin of a region's term: cell by cell, channel by channel."""
    B, C, Y, X = error.shape
    scale = scale.expand(B, 1, Y, X)
    sums = torch.zeros(B)
    for b in range(B):
        for c in range(C):
            for i in range(Y):
                for j in range(X):
                    if region[b, 0, i, j]:
                        weight = scale[b, 0, i, j] * attention[b, 0, i, j] * channels[b, c, 0, 0]
                        sums[b] += error[b, c, i, j] * weight
    return sums


def random_case() -> tuple[Tensor, Regions, Tensor, Tensor]:
    torch.manual_seed(0)
    B, C, Y, X = 2, 3, 4, 5
    which = torch.randint(0, 3, (B, 1, Y, X))
    regions = Regions(
        foreground=which == 0,
        background=which == 1,
        false_positive=which == 2,
        foreground_scale=torch.rand(B, 1, Y, X),
        background_scale=torch.rand(B, 1, 1, 1),
        false_positive_scale=torch.rand(B, 1, 1, 1),
    )
    return torch.rand(B, C, Y, X), regions, torch.rand(B, 1, Y, X), torch.rand(B, C, 1, 1)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_region_terms_are_their_sums_over_cells_and_channels(reduction: Reduction) -> None:
    error, regions, attention, channels = random_case()
    ones = torch.ones_like(channels)
    share = 1 if reduction == "sum" else 1 / error.shape[1]
    cases = [
        (foreground_term(error, regions, attention, reduction), "foreground", ones),
        (background_term(error, regions, attention, reduction), "background", ones),
        (false_positive_term(error, regions, attention, None, reduction), "false_positive", ones),
        (false_positive_term(error, regions, attention, channels, reduction), "false_positive", channels),
    ]
    for term, name, weights in cases:
        region, scale = getattr(regions, name), getattr(regions, f"{name}_scale")
        expected = by_loops(error, region, scale, attention, weights) * share
        torch.testing.assert_close(term, expected)


def test_mean_reduction_does_not_depend_on_the_number_of_channels_or_cells() -> None:
    error, regions, attention, _ = random_case()
    wide = error.repeat(1, 4, 1, 1)
    torch.testing.assert_close(
        foreground_term(wide, regions, attention, "mean"), foreground_term(error, regions, attention, "mean")
    )
    teacher, student = torch.rand(2, 1, 3, 4, 4).unbind(0)
    large = [maps.repeat(1, 1, 2, 2) for maps in (teacher, student)]
    keep = nn.Identity()
    torch.testing.assert_close(
        attention_term(*large, keep, True, "mean"), attention_term(teacher, student, keep, True, "mean")
    )
    torch.testing.assert_close(
        attention_term(*large, keep, True, "sum"), 4 * attention_term(teacher, student, keep, True, "sum")
    )


def test_signed_and_absolute_attention_terms_agree_on_rectified_maps_only() -> None:
    teacher, student = torch.randn(2, 1, 3, 4, 4).unbind(0)
    keep = nn.Identity()

    def both(a: Tensor, b: Tensor) -> list[Tensor]:
        return [attention_term(a, b, keep, signed, "sum") for signed in (True, False)]

    torch.testing.assert_close(*both(teacher.relu(), student.relu()))
    signed, absolute = both(teacher, student)
    assert signed != absolute


def test_affinity_of_two_cells_is_the_distance_of_their_inner_products_by_hand() -> None:
    teacher = torch.tensor([[[[1.0, 0.0, 9.0]], [[0.0, 2.0, 9.0]]]])  # (1, 2, 1, 3)
    student = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 1.0, 0.0]]]])
    cells = torch.tensor([[[[True, True, False]]]])
    # Inner products: teacher (1, 0; 0, 4), student (1, 1; 1, 2). SmoothL1 of 0, 1, 1, 2: 0, 0.5, 0.5, 1.5.
    assert affinity_term(teacher, student, cells, "sum").tolist() == [2.5 / 4]
    # Means over two channels halve the differences to 0, 0.5, 0.5, 1: 0, 0.125, 0.125, 0.5.
    assert affinity_term(teacher, student, cells, "mean").tolist() == [0.75 / 4]
    assert affinity_term(teacher, student, cells & False, "sum").tolist() == [0.0]


def test_affinity_does_not_change_when_all_channels_are_turned_together_or_cells_change_places() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 4, 3, 5).unbind()
    cells = torch.rand(2, 1, 3, 5) > 0.4
    turned = torch.einsum("dc,bcyx->bdyx", torch.linalg.qr(torch.randn(4, 4)).Q, student)
    once = affinity_term(teacher, student, cells, "sum")
    torch.testing.assert_close(affinity_term(teacher, turned, cells, "sum"), once)
    flipped = [maps.flip(2, 3) for maps in (teacher, student, cells)]
    torch.testing.assert_close(affinity_term(*flipped, "sum"), once)
    wide = [maps.repeat(1, 3, 1, 1) for maps in (teacher, student)]
    mean = affinity_term(teacher, student, cells, "mean")
    torch.testing.assert_close(affinity_term(*wide, cells, "mean"), mean)


def test_affinity_has_the_gradient_of_finite_differences() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 1, 3, 2, 3, dtype=torch.float64).unbind()
    cells = torch.tensor([[[[True, True, False], [True, False, True]]]])
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: affinity_term(teacher, s, cells, "sum"), student)


def test_z_scores_do_not_depend_on_the_range_of_a_teacher_s_channel() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 8, 8)
    other = maps * torch.tensor([5.0, 0.2, 40.0])[:, None, None] - 3
    for statistics in ("batch", "running"):
        config = ChannelStandardiseConfig(statistics=statistics)
        scores, of_other = (ChannelStandardise(3, config)(teacher) for teacher in (maps, other))
        torch.testing.assert_close(scores, of_other, rtol=0, atol=1e-3)


def test_standardised_channels_have_mean_zero_deviation_one_and_stay_in_bounds() -> None:
    torch.manual_seed(0)
    maps = torch.randn(4, 3, 16, 16) * torch.tensor([1.0, 50.0, 0.01])[:, None, None] + 7
    scores = ChannelStandardise(3, ChannelStandardiseConfig(statistics="batch", clamp=10.0))(maps)
    torch.testing.assert_close(scores.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores[:, :2].std(dim=(0, 2, 3)), torch.ones(2), rtol=0, atol=1e-2)
    maps[0, 0, 0, 0] = 1e6
    assert ChannelStandardise(3, ChannelStandardiseConfig())(maps).abs().max() <= 3


def test_running_statistics_become_those_of_all_batches_and_stand_still_in_eval() -> None:
    torch.manual_seed(0)
    standardise = ChannelStandardise(2, ChannelStandardiseConfig(clamp=100.0))
    batches = [torch.randn(2, 2, 8, 8) * 3 + shift for shift in (0.0, 1.0, 2.0)]
    for batch in batches:
        standardise(batch)
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches]).mean(dim=0)
    torch.testing.assert_close(standardise.mean, means)
    standardise.eval()
    constant = torch.full((1, 2, 8, 8), 5.0)
    expected = (5.0 - means) / (standardise.variance + 1e-5).sqrt()
    torch.testing.assert_close(standardise(constant)[0, :, 0, 0], expected)
    torch.testing.assert_close(standardise.mean, means)


def test_layer_norm_makes_every_cell_mean_zero_deviation_one() -> None:
    normed = layer_norm(torch.randn(2, 16, 3, 3) * 20 + 5)
    torch.testing.assert_close(normed.mean(dim=1), torch.zeros(2, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.std(dim=1, correction=0), torch.ones(2, 3, 3), rtol=1e-4, atol=0)
    assert layer_norm(torch.zeros(1, 4, 2, 2)).isfinite().all()
