"""BEV encoder and neck against golden c2_bev_encoder, in both modes, with and without the extra norm."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distillbev.models.bev_encoder import BevEncoder, BevEncoderConfig, LssNeck, LssNeckConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "c2_bev_encoder"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
REFINE = {"up2.1": "refine.0", "up2.2": "refine.1", "up2.4": "refine.3", "up2.5": "refine.4"}


def our_name(name: str) -> str:
    """A golden's key within its module -> ours."""
    for old, new in REFINE.items():
        name = name.replace(old, new)
    return name


def weights_of(prefix: str) -> dict[str, Tensor]:
    return {
        our_name(name.removeprefix(prefix)): value
        for name, value in WEIGHTS.items()
        if name.startswith(prefix)
    }


def modules(train: bool) -> tuple[BevEncoder, LssNeck, LssNeck]:
    encoder = BevEncoder(BevEncoderConfig(channels=(8, 16, 32)), in_channels=8)
    neck = LssNeck(LssNeckConfig(out_channels=16, extra_norm_act=True), encoder.out_channels)
    plain = LssNeck(LssNeckConfig(out_channels=16), encoder.out_channels)
    for module, prefix in ((encoder, "backbone."), (neck, "neck."), (plain, "neck_plain.")):
        module.load_state_dict(weights_of(prefix))
        module.train(train)
    return encoder, neck, plain


def run(encoder: BevEncoder, neck: LssNeck, plain: LssNeck, x: Tensor) -> dict[str, Tensor]:
    stages = encoder(x)
    maps = {f"backbone{i}": stage for i, stage in enumerate(stages)}
    return {**maps, "head": neck(stages), "head_plain": plain(stages)}


def scalar_of(maps: dict[str, Tensor]) -> Tensor:
    taps = ("backbone1", "backbone2", "head")
    return torch.stack([(maps[tap] * INPUTS[f"grad.{tap}"]).sum() for tap in taps]).sum()


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((actual.detach() - expected).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_map_is_the_reference_s(mode: str) -> None:
    maps = run(*modules(train=mode == "train"), INPUTS["x"])
    for name, value in maps.items():
        assert_relative(value, OUTPUTS[f"{mode}.{name}"], 1e-5, name)


def test_running_statistics_after_one_step_are_the_reference_s() -> None:
    encoder, neck, plain = modules(train=True)
    run(encoder, neck, plain, INPUTS["x"])
    states = {
        "backbone": encoder.state_dict(),
        "neck": neck.state_dict(),
        "neck_plain": plain.state_dict(),
    }
    seen = 0
    for name, expected in OUTPUTS.items():
        if name.startswith("train.after."):
            module, key = name.removeprefix("train.after.").split(".", 1)
            assert_relative(states[module][our_name(key)], expected, 1e-5, name)
            seen += 1
    assert seen == sum(name.endswith(("running_mean", "running_var")) for name in WEIGHTS)


def test_gradients_are_the_reference_s() -> None:
    encoder, neck, plain = modules(train=False)
    x = INPUTS["x"].clone().requires_grad_()
    scalar_of(run(encoder, neck, plain, x)).backward()
    parameters = {f"backbone.{n}": p for n, p in encoder.named_parameters()}
    parameters |= {f"neck.{n}": p for n, p in neck.named_parameters()}
    expected = {our_name(n): g for n, g in GRADIENTS.items() if n not in ("x", "train.x")}
    assert expected.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert_relative(parameter.grad, expected[name], 1e-4, name)
    assert x.grad is not None
    assert_relative(x.grad, GRADIENTS["x"], 1e-4, "x")
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_the_input_s_gradient_in_training_is_the_reference_s() -> None:
    x = INPUTS["x"].clone().requires_grad_()
    scalar_of(run(*modules(train=True), x)).backward()
    assert x.grad is not None
    assert_relative(x.grad, GRADIENTS["train.x"], 1e-4, "train.x")
