import pytest
import torch

from distillbev.distill.attention import (
    AttentionConfig,
    attention_statistics,
    channel_attention,
    magnitude,
    shared_attention,
    spatial_attention,
)
from distillbev.errors import ConfigError


def test_attention_by_hand_on_two_cells() -> None:
    features = torch.tensor(
        [[[[1.0, -2.0]], [[-1.0, 0.0]]]]
    )  # magnitudes 1 and 1, then 2 and 0: means 1 and 1
    assert magnitude(features).flatten().tolist() == [1, 1]
    assert spatial_attention(features, AttentionConfig()).flatten().tolist() == [1, 1]
    features = torch.tensor([[[[0.0, 0.5 * torch.log(torch.tensor(3.0))]]]])
    attention = spatial_attention(features, AttentionConfig(temperature=0.5))
    torch.testing.assert_close(attention.flatten(), torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize("standardise", [False, True])
def test_attention_has_mean_one_over_cells_and_channels(standardise: bool) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 8, 12, 10) * 5
    config = AttentionConfig(standardise=standardise)
    shared = shared_attention(features, features.roll(1, 0), config)
    torch.testing.assert_close(shared.mean(dim=(1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(channel_attention(features, 0.5).mean(dim=(1, 2, 3)), torch.ones(3))


def test_standardised_attention_does_not_depend_on_the_range_of_the_map_and_cannot_collapse() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 8, 32, 32)
    features[0, :, 3, 4] = 1000.0
    raw, standard = AttentionConfig(), AttentionConfig(standardise=True)
    assert attention_statistics(spatial_attention(features, raw))["largest"] > 0.99 * 32 * 32
    assert attention_statistics(spatial_attention(features, standard))["largest"] < 0.5 * 32 * 32
    torch.testing.assert_close(
        spatial_attention(features, standard), spatial_attention(7 * features, standard), rtol=1e-4, atol=1e-5
    )


def test_half_precision_maps_and_huge_values_give_finite_fp32_attention() -> None:
    features = torch.full((1, 4, 8, 8), 6e4, dtype=torch.float16)
    features[0, :, 0, 0] = 0
    for config in (AttentionConfig(), AttentionConfig(standardise=True, cap=3.0)):
        attention = spatial_attention(features, config)
        assert attention.dtype == torch.float32 and attention.isfinite().all()
        assert attention.max() <= (config.cap or 64)


def test_attention_carries_no_gradient() -> None:
    features = torch.randn(1, 4, 8, 8, requires_grad=True)
    assert not shared_attention(features, features, AttentionConfig()).requires_grad
    assert not channel_attention(features, 0.5).requires_grad


def test_teacher_alone_is_heard_without_a_student_share_and_nobody_without_a_config() -> None:
    teacher, student = torch.randn(2, 1, 4, 8, 8).unbind(0)
    alone = AttentionConfig(student_share=None)
    assert torch.equal(shared_attention(teacher, student, alone), spatial_attention(teacher, alone))
    assert torch.equal(shared_attention(teacher, student, None), torch.ones(1, 1, 8, 8))
    with pytest.raises(ConfigError, match="student_share=0"):
        AttentionConfig(student_share=0)
