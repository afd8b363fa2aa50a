"""A whole file of Megvii's BEVDepth, under its own names and shapes, goes through the command; what comes out computes
what a twin written by hand from those names computes. The depth net itself is held to a golden (test_goldens.py).

Names, shapes and the order of what is done with them are facts of the public code and of its configurations.
"""

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from distillbev.cli import app
from distillbev.data.schema import Batch, PastFrames
from distillbev.errors import CheckpointError
from distillbev.geometry import pose_matrix, rotation_about_z
from distillbev.models.bevdet import BevDet, BevDetConfig
from distillbev.models.depth_net import MegviiDepthNet
from distillbev.models.detectors import build_student
from distillbev.recipes import RECIPES
from distillbev.train.inference import load_trained
from distillbev.weights.convert import convert, import_weights
from distillbev.weights.fit import infer_config, misfit
from distillbev.weights.read import Published

TASKS = ((1,), (2,), (2,), (1,), (2,), (2,))
MAPS = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
BUFFERS = {"voxel_size": (3,), "voxel_coord": (3,), "voxel_num": (3,), "frustum": (112, 16, 44, 4)}


class Shapes(dict[str, tuple[int, ...]]):
    """Name -> shape of a file, layer by layer."""

    def norm(self, name: str, channels: int) -> None:
        for entry in ("weight", "bias", "running_mean", "running_var"):
            self[f"{name}.{entry}"] = (channels,)
        self[f"{name}.num_batches_tracked"] = ()

    def conv(self, name: str, out: int, entering: int, window: int, bias: bool = False) -> None:
        self[f"{name}.weight"] = (out, entering, window, window)
        if bias:
            self[f"{name}.bias"] = (out,)

    def block(self, name: str, entering: int, widths: list[tuple[int, int]]) -> None:
        """Convolutions of (channels, window) with norms, and a projection where the channels change."""
        before = entering
        for i, (channels, window) in enumerate(widths, start=1):
            self.conv(f"{name}.conv{i}", channels, before, window)
            self.norm(f"{name}.bn{i}", channels)
            before = channels
        if before != entering:
            self.conv(f"{name}.downsample.0", before, entering, 1)
            self.norm(f"{name}.downsample.1", before)

    def neck(self, name: str, entering: list[int], channels: int, factors: tuple[float, ...]) -> None:
        """Transposed kernels (in, out, k, k) from factor 1 on, plain ones below."""
        for i, (width, factor) in enumerate(zip(entering, factors, strict=True)):
            window = round(max(factor, 1 / factor))
            sides = (width, channels) if factor >= 1 else (channels, width)
            self[f"{name}.deblocks.{i}.0.weight"] = (*sides, window, window)
            self.norm(f"{name}.deblocks.{i}.1", channels)


def peer_shapes(
    width: int = 64,
    image_neck: int = 128,
    mid: int = 512,
    channels: int = 80,
    frames: int = 2,
    trunk: int = 160,
    bev_neck: int = 64,
    head: int = 64,
    aggregated: bool = True,
) -> Shapes:
    """All names of a file; the defaults are the published sizes."""
    s = Shapes({f"model.backbone.{name}": shape for name, shape in BUFFERS.items()})
    image, lift, bev = "model.backbone.img_backbone", "model.backbone.depth_net", "model.head"
    s.conv(f"{image}.conv1", width, 3, 7)
    s.norm(f"{image}.bn1", width)
    entering = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        planes = width * 2**stage
        for i in range(blocks):
            s.block(f"{image}.layer{stage + 1}.{i}", entering, [(planes, 1), (planes, 3), (4 * planes, 1)])
            entering = 4 * planes
    levels = [4 * width * 2**stage for stage in range(4)]
    s.neck("model.backbone.img_neck", levels, image_neck, (0.25, 0.5, 1, 2))

    s.conv(f"{lift}.reduce_conv.0", mid, 4 * image_neck, 3, bias=True)
    s.norm(f"{lift}.reduce_conv.1", mid)
    s.conv(f"{lift}.context_conv", channels, mid, 1, bias=True)
    s.norm(f"{lift}.bn", 27)
    for whose in ("depth", "context"):
        for layer, entering in (("fc1", 27), ("fc2", mid)):
            s[f"{lift}.{whose}_mlp.{layer}.weight"] = (mid, entering)
            s[f"{lift}.{whose}_mlp.{layer}.bias"] = (mid,)
        for layer in ("conv_reduce", "conv_expand"):
            s.conv(f"{lift}.{whose}_se.{layer}", mid, mid, 1, bias=True)
    for i in range(3):
        s.block(f"{lift}.depth_conv.{i}", mid, [(mid, 3), (mid, 3)])
    for branch, window in (("aspp1", 1), ("aspp2", 3), ("aspp3", 3), ("aspp4", 3)):
        s.conv(f"{lift}.depth_conv.3.{branch}.atrous_conv", mid, mid, window)
        s.norm(f"{lift}.depth_conv.3.{branch}.bn", mid)
    s.conv(f"{lift}.depth_conv.3.global_avg_pool.1", mid, mid, 1)
    s.norm(f"{lift}.depth_conv.3.global_avg_pool.2", mid)
    s.conv(f"{lift}.depth_conv.3.conv1", mid, 5 * mid, 1)
    s.norm(f"{lift}.depth_conv.3.bn1", mid)
    s.conv(f"{lift}.depth_conv.4", mid, mid // 4, 3)
    s.conv(f"{lift}.depth_conv.4.conv_offset", 18, mid, 3, bias=True)
    s.conv(f"{lift}.depth_conv.5", 112, mid, 1, bias=True)
    if aggregated:
        of_rays = "model.backbone.depth_aggregation_net"
        for conv, norm in (("reduce_conv.0", "reduce_conv.1"), ("conv.0", "conv.1"), ("conv.3", "conv.4")):
            s.conv(f"{of_rays}.{conv}", channels, channels, 3)
            s.norm(f"{of_rays}.{norm}", channels)
        s.conv(f"{of_rays}.out_conv.0", channels, channels, 3, bias=True)

    s.conv(f"{bev}.trunk.conv1", trunk, channels * frames, 7)
    s.norm(f"{bev}.trunk.bn1", trunk)
    entering = trunk
    for stage in range(3):
        planes = trunk * 2**stage
        for i in range(2):
            s.block(f"{bev}.trunk.layer{stage + 1}.{i}", entering, [(planes, 3), (planes, 3)])
            entering = planes
    levels = [channels * frames, trunk, 2 * trunk, 4 * trunk]
    s.neck(f"{bev}.neck", levels, bev_neck, (1, 2, 4, 8))
    s.conv(f"{bev}.shared_conv.conv", head, 4 * bev_neck, 3)
    s.norm(f"{bev}.shared_conv.bn", head)
    for task, (classes,) in enumerate(TASKS):
        for name, rows in {**MAPS, "heatmap": classes}.items():
            s.conv(f"{bev}.task_heads.{task}.{name}.0.conv", head, head, 3)
            s.norm(f"{bev}.task_heads.{task}.{name}.0.bn", head)
            s.conv(f"{bev}.task_heads.{task}.{name}.1", rows, head, 3, bias=True)
    return s


SMALL = {"width": 4, "image_neck": 3, "mid": 16, "channels": 6, "trunk": 8, "bev_neck": 4, "head": 8}


def peer_weights(shapes: Shapes) -> dict[str, Tensor]:
    """Noise that keeps its size from layer to layer; spreads are positive."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("running_var", "weight")) and len(shape) == 1:
            noise = 0.8 + 0.4 * torch.rand(shape, generator=generator)
        elif len(shape) == 1:
            noise = 0.1 * noise
        elif len(shape) in (2, 4) and "frustum" not in name:
            noise = noise * math.sqrt(2 / math.prod(shape[1:]))
        weights[name] = torch.tensor(5) if shape == () else noise
    return weights


# The twin by hand; `w` are the file's own tensors, `name` begins with what stands in the file.


def convolve(x: Tensor, kernel: Tensor, stride: int = 1, bias: Tensor | None = None) -> Tensor:
    """A convolution as a matrix product over windows; a window larger than its stride is padded by its half."""
    window = kernel.shape[-1]
    padding = window // 2 if window > stride and window % 2 else 0
    patches = functional.unfold(x, window, padding=padding, stride=stride)  # (B, in * window^2, places)
    rows, columns = ((size + 2 * padding - window) // stride + 1 for size in x.shape[2:])
    out = (kernel.flatten(1) @ patches).unflatten(2, (rows, columns))
    return out if bias is None else out + bias[:, None, None]


def spread(x: Tensor, kernel: Tensor) -> Tensor:
    """A transposed convolution whose window is its stride: every cell becomes a square of its own."""
    window = kernel.shape[-1]
    squares = torch.einsum("bcyx,cokl->boykxl", x, kernel)
    return squares.reshape(x.shape[0], kernel.shape[1], window * x.shape[2], window * x.shape[3])


def normed(x: Tensor, w: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    mean, variance, weight, bias = (
        w[f"{name}.{entry}"][:, None, None] for entry in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def residual(x: Tensor, w: dict[str, Tensor], name: str, strides: tuple[int, ...]) -> Tensor:
    hidden = x
    for i, stride in enumerate(strides, start=1):
        hidden = normed(convolve(hidden, w[f"{name}.conv{i}.weight"], stride), w, f"{name}.bn{i}")
        hidden = hidden.relu() if i < len(strides) else hidden
    if f"{name}.downsample.0.weight" in w:
        x = convolve(x, w[f"{name}.downsample.0.weight"], max(strides))
        x = normed(x, w, f"{name}.downsample.1")
    return (hidden + x).relu()


def joined(stages: list[Tensor], w: dict[str, Tensor], name: str, factors: tuple[float, ...]) -> Tensor:
    levels = []
    for i, (stage, factor) in enumerate(zip(stages, factors, strict=True)):
        kernel = w[f"{name}.deblocks.{i}.0.weight"]
        sized = spread(stage, kernel) if factor >= 1 else convolve(stage, kernel, round(1 / factor))
        levels.append(normed(sized, w, f"{name}.deblocks.{i}.1", eps=1e-3).relu())
    return torch.cat(levels, dim=1)


def image_features(images: Tensor, w: dict[str, Tensor]) -> Tensor:
    name = "model.backbone.img_backbone"
    x = normed(convolve(images, w[f"{name}.conv1.weight"], 2), w, f"{name}.bn1").relu()
    x, stages = functional.max_pool2d(x, 3, stride=2, padding=1), []
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            x = residual(x, w, f"{name}.layer{stage + 1}.{i}", (1, stride, 1))
        stages.append(x)
    return joined(stages, w, "model.backbone.img_neck", (0.25, 0.5, 1, 2))


def along_rays(volume: Tensor, w: dict[str, Tensor]) -> Tensor:
    """(P, C, D, H, W) -> the same: every row of pixels is a picture of W by D."""
    name, rows = "model.backbone.depth_aggregation_net", []
    for row in volume.unbind(dim=3):
        x = row.transpose(2, 3)
        x = normed(convolve(x, w[f"{name}.reduce_conv.0.weight"]), w, f"{name}.reduce_conv.1").relu()
        y = normed(convolve(x, w[f"{name}.conv.0.weight"]), w, f"{name}.conv.1").relu()
        y = normed(convolve(y, w[f"{name}.conv.3.weight"]), w, f"{name}.conv.4").relu() + x
        y = convolve(y, w[f"{name}.out_conv.0.weight"], bias=w[f"{name}.out_conv.0.bias"])
        rows.append(y.transpose(2, 3))
    return torch.stack(rows, dim=3)


def pooled(
    rays: Tensor, cam2ego: Tensor, k: Tensor, ida: Tensor, bda: Tensor, size: tuple[int, int]
) -> Tensor:
    """(N, C, D, H, W) features of one sample -> (1, C, 128, 128) on the ground of the ego frame."""
    height, width = size
    d, v, u = torch.meshgrid(
        torch.arange(2.0, 58.0, 0.5, dtype=torch.float64),
        torch.linspace(0, height - 1, rays.shape[3], dtype=torch.float64),
        torch.linspace(0, width - 1, rays.shape[4], dtype=torch.float64),
        indexing="ij",
    )
    ground = torch.zeros(1, rays.shape[1], 128, 128)
    for camera, features in enumerate(rays):
        pixels = torch.stack([u, v, d, torch.ones_like(d)], dim=-1) @ torch.linalg.inv(ida[camera]).T
        x, y, depth, one = pixels.unbind(dim=-1)
        seen = torch.stack([x * depth, y * depth, depth, one], dim=-1)
        places = (seen @ (bda @ cam2ego[camera] @ torch.linalg.inv(k[camera])).T)[..., :3]
        scaled = (places - torch.tensor([-51.2, -51.2, -5.0])) / torch.tensor([0.8, 0.8, 8.0])
        assert (
            float((scaled - scaled.round()).abs().min()) > 1e-6
        )  # none so near a border that rounding decides
        column, row, layer = scaled.trunc().long().unbind(dim=-1)
        inside = (column >= 0) & (column < 128) & (row >= 0) & (row < 128) & (layer == 0)
        for channel, values in enumerate(features):
            ground[0, channel].index_put_((row[inside], column[inside]), values[inside], accumulate=True)
    return ground


def trunk_and_neck(bev: Tensor, w: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    name, stages = "model.head.trunk", [bev]
    x = normed(convolve(bev, w[f"{name}.conv1.weight"], 2), w, f"{name}.bn1").relu()
    for stage in range(3):
        for i in range(2):
            stride = 2 if stage > 0 and i == 0 else 1
            x = residual(x, w, f"{name}.layer{stage + 1}.{i}", (stride, 1))
        stages.append(x)
    return stages, joined(stages, w, "model.head.neck", (1, 2, 4, 8))


def head_map(bev: Tensor, w: dict[str, Tensor], task: int, name: str) -> Tensor:
    shared = "model.head.shared_conv"
    x = normed(convolve(bev, w[f"{shared}.conv.weight"]), w, f"{shared}.bn").relu()
    branch = f"model.head.task_heads.{task}.{name}"
    x = normed(convolve(x, w[f"{branch}.0.conv.weight"]), w, f"{branch}.0.bn").relu()
    return convolve(x, w[f"{branch}.1.weight"], bias=w[f"{branch}.1.bias"])


# One sample of two cameras, as the peer's loader tells it.

HEIGHT, WIDTH = 32, 64
LIDAR2EGO = torch.from_numpy(pose_matrix(np.array([0.94, 0.0, 1.84]), rotation_about_z(-1.55)))
BDA = torch.from_numpy(pose_matrix(np.zeros(3), np.diag([1.0, -1.0, 1.0]) @ (1.03 * rotation_about_z(0.2))))
EGO2GLOBAL = [
    torch.from_numpy(pose_matrix(np.array([600 + x, 1500.0, 0.1 * x]), rotation_about_z(0.6 + 0.05 * x)))
    for x in (3.1, 0.0)  # now, and a key frame before
]


def cameras() -> tuple[Tensor, Tensor, Tensor]:
    """`sensor2ego`, `intrin` and `ida` (2, 4, 4) of the peer; the last moves pixels, not pixels times depth."""
    sensor2ego, intrin, ida = (torch.eye(4, dtype=torch.float64).repeat(2, 1, 1) for _ in range(3))
    axes = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # forward, left, up of right, down, forward
    for i, heading in enumerate((0.13, 2.2)):
        pose = pose_matrix(np.array([1.5 - i, 0.3, 1.6]), rotation_about_z(heading) @ axes)
        sensor2ego[i] = torch.from_numpy(pose)
        intrin[i, :3, :3] = torch.tensor([[71.3, 0, 70], [0, 71.3, 40], [0, 0, 1]])
        ida[i, :2, :2] = 0.44 * torch.from_numpy(rotation_about_z(0.05))[:2, :2]
        ida[i, :2, 3] = torch.tensor([1.7, 10.3])
    return sensor2ego, intrin, ida


def our_batch(images: Tensor) -> Batch:
    """The same sample as we tell it; (2, 2, 3, H, W) images of both frames."""
    sensor2ego, intrin, ida = cameras()
    image_aug = ida.clone()
    image_aug[:, :2, 2], image_aug[:, :2, 3] = ida[:, :2, 3], 0
    frames = [
        Batch(
            tokens=["sample"],
            images=images[i : i + 1],
            cam2img=(image_aug @ intrin).float()[None],
            cam2lidar=(BDA @ torch.linalg.inv(LIDAR2EGO) @ sensor2ego).float()[None],
            image_aug=image_aug.float()[None],
            bev_aug=BDA.float()[None],
            lidar2global=(EGO2GLOBAL[i] @ LIDAR2EGO)[None],
            points=None,
            boxes=[None],
            lidar2ego=LIDAR2EGO[None],
        )
        for i in (0, 1)
    ]
    return replace(frames[0], past=PastFrames(frames[1:], torch.tensor([[0.5]])))


def camera_numbers() -> Tensor:
    """(2, 27), what the peer's depth net is told: the key frame's cameras, whichever frame it looks at."""
    sensor2ego, k, ida = cameras()
    picked = [k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2]]
    picked += [ida[:, i, j] for i in (0, 1) for j in (0, 1, 3)]
    picked += [BDA[i, j].expand(2) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 2))]
    return torch.cat([torch.stack(picked, dim=1), sensor2ego[:, :3].flatten(1)], dim=1).float()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def imported(folder: Path, weights: dict[str, Tensor], *options: str) -> tuple[BevDet, str]:
    """The detector of the run that the command makes of a file, and what the command said."""
    torch.save({"epoch": 19, "global_step": 7, "state_dict": weights}, folder / "19.pth")
    ended = CliRunner().invoke(app, ["import-weights", str(folder / "19.pth"), str(folder / "run"), *options])
    assert ended.exit_code == 0, ended.output
    detector = load_trained(folder / "run")[1]
    assert isinstance(detector, BevDet)
    return detector, ended.output


@torch.no_grad()
def test_an_imported_file_computes_what_its_authors_code_computes(tmp_path: Path) -> None:
    weights = peer_weights(peer_shapes(**SMALL))
    detector, said = imported(tmp_path, weights, "--pixels", "rgb")
    assert "0 unused" in said and "4 needless" in said and "note: its BEV map lies in the ego frame" in said
    assert detector.config.frame == "ego"

    images = torch.randn(2, 2, 3, HEIGHT, WIDTH)
    features = [image_features(frame, weights) for frame in images]
    for frame, expected in zip(images, features, strict=True):
        close(detector.image_encoder(frame[None])[0], expected)

    net = detector.lift.depth_net
    assert isinstance(net, MegviiDepthNet)
    sensor2ego, k, ida = cameras()
    maps = []
    for feature, ego2global in zip(features, EGO2GLOBAL, strict=True):
        depth, context = net(feature, camera_numbers())
        volume = along_rays(depth.softmax(dim=1)[:, None] * context[:, :, None], weights)
        sweep2key = torch.linalg.inv(EGO2GLOBAL[0]) @ ego2global @ sensor2ego
        maps.append(pooled(volume, sweep2key, k, ida, BDA, (HEIGHT, WIDTH)))
    assert all(int(ground.count_nonzero()) > 1000 for ground in maps)
    stages, bev = trunk_and_neck(torch.cat(maps, dim=1), weights)

    output = detector(our_batch(images))
    close(output.bev["lifted"].features, torch.cat(maps, dim=1), 1e-4)
    for i, stage in enumerate(stages):
        close(output.bev[f"stage{i}"].features, stage, 1e-4)
    close(output.bev["head"].features, bev, 1e-4)
    for task, ours in enumerate(output.heads):
        for name, found in ours.items():
            close(found, head_map(bev, weights, task, name), 1e-4)


def test_a_file_without_history_or_depth_refinement_says_so(tmp_path: Path) -> None:
    weights = peer_weights(peer_shapes(**SMALL, frames=1, aggregated=False))
    detector, said = imported(tmp_path, weights)
    assert (detector.config.history, detector.config.lift.aggregate_depth) == (None, False)
    assert "BGR, with mean and spread in the order of RGB (as BEVDepth of Megvii has it" in said
    assert load_trained(tmp_path / "run")[0].data.past is None
    weights["model.head.trunk.layer4.0.conv1.weight"] = torch.zeros(64, 32, 3, 3)
    torch.save({"state_dict": weights}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"deblocks\.4\.0\.weight, so its model cannot be told"):
        import_weights(tmp_path / "other.pth", tmp_path / "w.safetensors")


def test_the_whole_file_at_full_size_is_the_recipe_of_its_authors() -> None:
    """Names and shapes alone, on the meta device."""
    shapes = peer_shapes()
    with torch.device("meta"):
        weights = {name.removeprefix("model."): torch.empty(shape) for name, shape in shapes.items()}
        converted = convert(Published(weights, "", None), pixels="rgb")
        told = infer_config(converted.state, converted.new_boxes, converted.source.ego_frame)
        assert not misfit(converted.state, told)
        recipe = RECIPES["bevdepth_r50_megvii"]().student
        assert recipe is not None
        assert not misfit(converted.state, recipe)
        parameters = sum(p.numel() for p in build_student(recipe).parameters())
    assert converted.report.unused == []
    assert sorted(converted.report.needless) == sorted(f"backbone.{name}" for name in BUFFERS)
    not_learned = ("running_mean", "running_var", "num_batches_tracked", *BUFFERS)
    learned = (math.prod(shape) for name, shape in shapes.items() if not name.endswith(not_learned))
    assert sum(learned) == parameters == 76_615_550
    assert isinstance(recipe, BevDetConfig) and isinstance(told, BevDetConfig)
    assert recipe.history is not None
    as_trained = msgspec.structs.replace(
        recipe,
        lift=msgspec.structs.replace(recipe.lift, corner_aligned_pixels=True, truncate_cells=True),
        history=msgspec.structs.replace(recipe.history, lower_corners=True),
        depth_loss=None,
        head=told.head,
    )
    assert told == as_trained
    assert told.head.nms == recipe.head.nms


@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_the_twin_s_layers_are_those_of_torch(window: int) -> None:
    x, kernel = torch.randn(2, 3, 8, 16), torch.randn(3, 5, window, window)
    torch.testing.assert_close(spread(x, kernel), functional.conv_transpose2d(x, kernel, stride=window))
    kernel = torch.randn(5, 3, window, window)
    torch.testing.assert_close(
        convolve(x, kernel, window), functional.conv2d(x, kernel, stride=window), atol=1e-4, rtol=1e-4
    )
