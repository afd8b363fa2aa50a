import pytest
import torch

from distillbev.errors import ConfigError
from distillbev.models.bev_encoder import (
    BevEncoder,
    BevEncoderConfig,
    BevResNetConfig,
    LssNeck,
    LssNeckConfig,
    TopDownNeck,
    TopDownNeckConfig,
    build_bev_encoder,
    build_bev_neck,
    neck_reduction,
)
from distillbev.models.second import SecondFpnConfig


@pytest.mark.parametrize(
    "neck",
    [
        LssNeckConfig(out_channels=5),
        LssNeckConfig(out_channels=5, extra_upsample=None),
        TopDownNeckConfig(out_channels=5),
    ],
)
@pytest.mark.parametrize("strides", [(2, 2, 2), (1, 2, 2)])
def test_maps_have_the_sizes_that_the_configuration_promises(strides, neck) -> None:
    config = BevEncoderConfig(channels=(4, 6, 8), blocks=(1, 2, 1), strides=strides)
    encoder = BevEncoder(config, in_channels=3)
    stages = encoder(torch.randn(2, 3, 16, 32))
    rows = 16
    for stage, stride, channels in zip(stages, strides, encoder.out_channels, strict=True):
        rows //= stride
        assert stage.shape == (2, channels, rows, 2 * rows)
    joined = build_bev_neck(neck, encoder.out_channels)(stages)
    reduction = neck_reduction(config, neck)
    assert joined.shape == (2, 5, 16 / reduction, 32 / reduction)


@pytest.mark.parametrize("broken", [{"channels": (8, 16)}, {"strides": (2, 2, 0)}, {"blocks": (0, 1, 1)}])
def test_stages_that_make_no_sense_are_refused(broken) -> None:
    with pytest.raises(ConfigError, match="expected"):
        BevEncoderConfig(**broken)


def test_the_top_down_neck_adds_coarse_maps_to_the_fine_one() -> None:
    neck = TopDownNeck((1, 1, 1), 1, upsample="nearest")
    captured = []
    neck.smooth.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        for lateral, factor in zip(neck.laterals, (1.0, 10.0, 100.0), strict=True):
            lateral.weight.fill_(factor)
            lateral.bias.zero_()
    coarse = torch.tensor([[1.0, 2.0]]).view(1, 1, 1, 2)
    neck([torch.ones(1, 1, 4, 8), torch.ones(1, 1, 2, 4), coarse])
    assert captured[0][0, 0, 0].tolist() == [111.0] * 4 + [211.0] * 4


def test_the_lss_neck_ends_rectified_only_with_the_extra_norm() -> None:
    torch.manual_seed(0)
    stages = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 2, 2)]
    assert float(LssNeck(LssNeckConfig(out_channels=6), (4, 8))(stages).detach().min()) < 0
    assert (
        float(LssNeck(LssNeckConfig(out_channels=6, extra_norm_act=True), (4, 8))(stages).detach().min()) == 0
    )


def test_the_lss_neck_does_not_see_the_middle_stage() -> None:
    neck = LssNeck(LssNeckConfig(out_channels=6), (4, 5, 8)).eval()
    fine, coarse = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 2, 2)
    first, second = (neck([fine, torch.randn(1, 5, 4, 4), coarse]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("strides", "upsample"), [((2, 2, 2), (1, 2, 4, 8)), ((1, 2, 4), (0.5, 0.5, 1, 4))])
def test_all_stages_side_by_side_have_the_size_that_the_configuration_promises(strides, upsample) -> None:
    config = BevResNetConfig(channels=(4, 6, 8), blocks=(1, 2, 1), strides=strides)
    neck = SecondFpnConfig(channels=(2, 3, 4, 5), upsample=upsample)
    entering = torch.randn(2, 3, 16, 32)
    encoder = build_bev_encoder(config, in_channels=3)
    stages = encoder(entering)
    assert stages[0] is entering
    rows = 16
    for stage, stride, channels in zip(stages, config.stage_strides, encoder.out_channels, strict=True):
        rows //= stride
        assert stage.shape == (2, channels, rows, 2 * rows)
    joined = build_bev_neck(neck, encoder.out_channels)(stages)
    reduction = neck_reduction(config, neck)
    assert joined.shape == (2, 14, 16 / reduction, 32 / reduction)


def test_factors_that_bring_the_stages_to_several_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"to strides \(1.0, 1.0, 2.0, 1.0\); choose factors"):
        neck_reduction(BevResNetConfig(), SecondFpnConfig(channels=(1,) * 4, upsample=(1, 2, 2, 8)))
    with pytest.raises(ConfigError, match="for 3 stages of strides"):
        neck_reduction(BevEncoderConfig(), SecondFpnConfig(channels=(1,) * 4, upsample=(1, 2, 4, 8)))
