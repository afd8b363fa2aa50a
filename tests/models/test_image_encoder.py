import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file
from torch import nn

from distillbev.errors import CheckpointError, ConfigError, DataError
from distillbev.models.image_encoder import (
    FpnNeck,
    ImageEncoder,
    ImageEncoderConfig,
    PlainCnnConfig,
    ResNet,
    ResNetConfig,
    TimmBackbone,
    TimmConfig,
    load_backbone_weights,
    normalise_images,
)
from distillbev.models.second import SecondFpn, SecondFpnConfig

SMALL = ResNetConfig(depth=18, base_width=4)


@pytest.mark.parametrize(
    ("depth", "parameters"), [(18, 11_176_512), (34, 21_284_672), (50, 23_508_032), (101, 42_500_160)]
)
def test_resnets_have_the_published_sizes(depth, parameters: int) -> None:
    with torch.device("meta"):
        backbone = ResNet(ResNetConfig(depth=depth))
    assert (
        sum(p.numel() for p in backbone.parameters()) == parameters
    )  # the public ones, less their classifier


def test_resnet_keys_are_those_of_public_checkpoints() -> None:
    keys = ResNet(ResNetConfig(base_width=4)).state_dict().keys()
    for key in (
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.bias",
        "layer3.5.bn3.num_batches_tracked",
        "layer4.2.conv3.weight",
    ):
        assert key in keys


@pytest.mark.parametrize(
    ("backbone", "strides"), [(SMALL, (4, 8, 16, 32)), (PlainCnnConfig(widths=(4, 4, 8, 8)), (2, 4, 8, 16))]
)
def test_stages_have_the_strides_they_say_and_odd_sizes_round_up(backbone, strides) -> None:
    encoder = ImageEncoder(ImageEncoderConfig(backbone=backbone, out_channels=6)).backbone
    assert encoder.strides == strides
    stages = encoder(torch.randn(1, 3, 65, 96))
    for stage, stride, channels in zip(stages, strides, encoder.out_channels, strict=True):
        assert stage.shape == (1, channels, -(-65 // stride), -(-96 // stride))


def test_weights_of_the_caffe_style_halve_in_the_first_convolution_of_a_stage() -> None:
    pytorch, caffe = (ResNet(ResNetConfig(base_width=2, stride_on=on)) for on in ("3x3", "1x1"))
    caffe.load_state_dict(pytorch.state_dict())
    strides = [
        (conv.stride[0] for conv in (block.conv1, block.conv2))
        for block in (net.layer3[0] for net in (pytorch, caffe))
    ]
    assert [tuple(pair) for pair in strides] == [(1, 2), (2, 1)]
    images = torch.rand(1, 3, 64, 96)
    mine, theirs = pytorch.eval()(images), caffe.eval()(images)
    assert [m.shape for m in mine] == [t.shape for t in theirs]
    assert torch.equal(mine[0], theirs[0]) and not torch.equal(mine[1], theirs[1])
    with pytest.raises(ConfigError, match="only 50 and 101"):
        ResNetConfig(depth=18, stride_on="1x1")


@pytest.mark.parametrize("stride", [8, 16])
def test_the_encoder_gives_one_map_per_camera_at_the_stride_asked_for(stride: int) -> None:
    encoder = ImageEncoder(ImageEncoderConfig(backbone=SMALL, out_channels=6, output_stride=stride))
    images = torch.randint(0, 256, (2, 3, 3, 64, 96), dtype=torch.uint8)
    assert encoder(images).shape == (2, 3, 6, 64 // stride, 96 // stride)


def test_a_stride_that_the_backbone_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"output_stride=12.*\[2, 4, 8, 16\]"):
        ImageEncoder(ImageEncoderConfig(backbone=PlainCnnConfig(), output_stride=12))
    with pytest.raises(ConfigError, match="one entry"):
        PlainCnnConfig(widths=(8, 16), convs=(1,))


def test_bytes_are_normalised_and_floats_were_before() -> None:
    grey = torch.full((2, 3, 4, 4), 128, dtype=torch.uint8)
    expected = torch.tensor([(128 - 123.675) / 58.395, (128 - 116.28) / 57.12, (128 - 103.53) / 57.375])
    torch.testing.assert_close(normalise_images(grey)[1, :, 2, 3], expected)
    floats = torch.randn(2, 3, 4, 4)
    assert normalise_images(floats) is floats


def test_the_neck_adds_the_coarse_map_to_the_fine_one_also_when_it_rounded_up() -> None:
    neck = FpnNeck((1, 1), 1)
    with torch.no_grad():
        for layer in (*neck.laterals, neck.smooth):
            layer.weight.zero_()
            layer.bias.zero_()
        neck.laterals[0].weight.fill_(1.0)
        neck.laterals[1].weight.fill_(1.0)
        neck.smooth.weight[0, 0, 1, 1] = 1.0
    fine, coarse = torch.zeros(1, 1, 3, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert neck([fine, coarse])[0, 0].tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_public_weights_load_whole_and_their_classifier_is_named_as_left_out(
    tmp_path: Path, suffix: str
) -> None:
    source = ResNet(SMALL)
    state = {**source.state_dict(), "fc.weight": torch.zeros(10, 32), "fc.bias": torch.zeros(10)}
    path = tmp_path / f"resnet{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    encoder = ImageEncoder(ImageEncoderConfig(backbone=SMALL, out_channels=4, weights=str(path)))
    report = encoder.load_backbone_weights()
    assert report is not None and report.endswith("left out fc.bias, fc.weight")
    assert f"{len(source.state_dict())} tensors" in report
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_computing_blocks_again_changes_neither_gradients_nor_batch_statistics() -> None:
    torch.manual_seed(0)
    plain = ResNet(SMALL)
    again = ResNet(replace(SMALL, checkpoint_blocks=True))
    again.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 96)
    for backbone in (plain, again):
        sum(stage.square().mean() for stage in backbone(images)).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(parameter.grad, expected.grad, rtol=1e-5, atol=1e-7), name
    for name, expected in plain.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(again.get_buffer(name), expected), name


def test_a_backbone_starts_from_the_one_inside_a_student(tmp_path: Path) -> None:
    student = torch.nn.Module()
    student.image_encoder = ImageEncoder(ImageEncoderConfig(backbone=SMALL, out_channels=4))
    save_file(student.state_dict(), tmp_path / "weights.safetensors")
    backbone = ResNet(SMALL)
    load_backbone_weights(backbone, tmp_path / "weights.safetensors")
    for key, value in student.image_encoder.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key


def test_without_a_file_nothing_is_loaded() -> None:
    assert ImageEncoder(ImageEncoderConfig(backbone=SMALL)).load_backbone_weights() is None


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    save_file(ResNet(ResNetConfig(depth=18, base_width=8)).state_dict(), path)
    backbone = ResNet(SMALL)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"0 keys missing, 0 unknown, \d+ of another shape \(first: conv1"
    ):
        load_backbone_weights(backbone, path)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_absent_damaged_and_executable_files_are_refused(tmp_path: Path) -> None:
    backbone = ResNet(SMALL)
    with pytest.raises(CheckpointError, match="no such file"):
        load_backbone_weights(backbone, tmp_path / "absent.pth")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(CheckpointError, match="not readable"):
            load_backbone_weights(backbone, tmp_path / name)
    torch.save(backbone, tmp_path / "module.pth")  # a pickled object, not a state dict
    with pytest.raises(CheckpointError, match="not readable"):
        load_backbone_weights(backbone, tmp_path / "module.pth")


def test_a_timm_that_cannot_be_imported_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ConfigError, match="torchvision::nms does not exist; install the extra `timm`"):
        TimmBackbone(TimmConfig())


class ChannelsLastModel(nn.Module):
    """Stands in for a Swin of timm: maps are (B, H, W, C)."""

    feature_info = SimpleNamespace(channels=lambda: [5, 7], reduction=lambda: [8, 16])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        B, _, H, W = images.shape
        return [torch.randn(B, H // 8, W // 8, 5), torch.randn(B, H // 16, W // 16, 7)]


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = ModuleType("timm")
    names = ["swin_tiny", "convnext_tiny"]
    timm.is_model = names.__contains__  # type: ignore[attr-defined]
    timm.list_models = lambda: names  # type: ignore[attr-defined]
    timm.create_model = lambda name, pretrained, features_only: ChannelsLastModel()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)


@pytest.mark.usefixtures("fake_timm")
def test_an_unknown_timm_model_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match="no model 'swin_tny'; did you mean swin_tiny"):
        TimmBackbone(TimmConfig(name="swin_tny"))


@pytest.mark.usefixtures("fake_timm")
def test_maps_of_timm_come_channels_first_whatever_its_model_does() -> None:
    config = ImageEncoderConfig(backbone=TimmConfig(name="swin_tiny"), out_channels=6, output_stride=8)
    encoder = ImageEncoder(config)
    images = torch.zeros(1, 2, 3, 32, 48)
    assert [stage.shape[1:] for stage in encoder.backbone(images[0])] == [(5, 4, 6), (7, 2, 3)]
    assert encoder(images).shape == (1, 2, 6, 4, 6)


@pytest.mark.usefixtures("fake_timm")
def test_a_timm_model_that_takes_no_image_size_says_so() -> None:
    with pytest.raises(ConfigError, match=r"cannot build .swin_tiny. as a backbone: .*img_size"):
        TimmBackbone(TimmConfig(name="swin_tiny", image_size_px=(704, 256)))


def test_stages_side_by_side_have_the_stride_and_the_channels_that_the_encoder_says() -> None:
    neck = SecondFpnConfig(channels=(2, 3, 4, 5), upsample=(0.25, 0.5, 1, 2))
    config = ImageEncoderConfig(backbone=SMALL, out_channels=14, neck=neck)
    encoder = ImageEncoder(config)
    assert isinstance(encoder.neck, SecondFpn)
    assert encoder(torch.randn(1, 2, 3, 64, 96)).shape == (1, 2, 14, 4, 6)
    with pytest.raises(DataError, match="images of 96x48 pixels; this neck expects multiples of 32"):
        encoder(torch.randn(1, 2, 3, 48, 96))
    coarse = replace(config, out_channels=9, neck=SecondFpnConfig(channels=(4, 5), upsample=(1, 2)))
    assert ImageEncoder(coarse)(torch.randn(1, 1, 3, 64, 96)).shape == (1, 1, 9, 4, 6)
    with pytest.raises(ConfigError, match="brings the stages to stride 16; found output_stride=8"):
        ImageEncoder(replace(config, output_stride=8))
    with pytest.raises(ConfigError, match="which makes 14; found out_channels=512"):
        ImageEncoderConfig(neck=neck)
