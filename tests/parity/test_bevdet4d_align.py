"""Two frames, aligned and joined, and velocities as displacements, against golden c5_bevdet4d_align.

Its cells are 0.8 m by 1.0 m, ours are square: y is measured in units of 1.25 m here, by the BEV augmentation,
which every pose goes through. Both frames are lifted with the present cameras, as the reference does.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distillbev.boxes import Boxes3D
from distillbev.data.schema import Batch, PastFrames
from distillbev.geometry import pose_matrix, quaternion_to_rotation
from distillbev.grid import BevGrid
from distillbev.models.bev_encoder import BevEncoderConfig, TopDownNeckConfig
from distillbev.models.bevdet import BevDet, BevDetConfig
from distillbev.models.history import (
    HistoryConfig,
    PastMap,
    motion_to_past,
    scale_velocities,
    source_cells,
    warp_map,
)
from distillbev.models.image_encoder import ImageEncoderConfig, PlainCnnConfig
from distillbev.models.lift import DepthBins, LiftConfig
from distillbev.models.outputs import DetectorOutput

GOLDEN = Path(__file__).parents[1] / "golden" / "c5_bevdet4d_align"
INPUTS, OUTPUTS, GRADIENTS, WEIGHTS = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients", "weights")
)
GRID = BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 9.6), cell_m=0.8)
TO_SQUARE = torch.diag(torch.tensor([1.0, 0.8, 1.0, 1.0]))
FORWARD, BACKWARD = 1e-5, 1e-4  # the golden's own tolerances, relative to the largest entry
POSES_M, VELOCITIES_M_S = 1e-3, 1e-3
PREFIXES = {
    "img_backbone.": "image_encoder.",
    "img_view_transformer.depthnet.": "lift.depth_and_context.",
    "pre_process_net.layers.0.": "fusion.blocks.",
}


class StandIn(nn.Module):
    """The golden's image encoder: one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, kernel_size=8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def our_name(name: str) -> str:
    for old, new in PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(name)


def model() -> BevDet:
    config = BevDetConfig(
        grid=GRID,
        image_encoder=ImageEncoderConfig(
            backbone=PlainCnnConfig(widths=(4, 4, 4, 4), convs=(1, 1, 1, 1)), out_channels=6, output_stride=8
        ),
        lift=LiftConfig(
            channels=4,
            depth=DepthBins(start_m=1, stop_m=15, step_m=1),
            corner_aligned_pixels=True,
            truncate_cells=True,
        ),
        history=HistoryConfig(lower_corners=True),
        bev_encoder=BevEncoderConfig(channels=(4,), blocks=(1,), strides=(1,)),
        bev_neck=TopDownNeckConfig(out_channels=4),
    )
    detector = BevDet(config)
    detector.image_encoder = StandIn()  # pyright: ignore[reportAttributeAccessIssue]
    geometry = ("img_view_transformer.dx", "img_view_transformer.bx", "img_view_transformer.nx")
    left_out = (*geometry, "img_view_transformer.frustum")  # ours follows from the configuration
    weights = {our_name(name): w for name, w in WEIGHTS.items() if name not in left_out}
    missing, unknown = detector.load_state_dict(weights, strict=False)
    assert not unknown
    assert all(name.startswith(("bev_encoder", "bev_neck", "head")) for name in missing)
    return detector.eval()


def matrices(rotation: Tensor, place: Tensor) -> Tensor:
    made = torch.eye(4).repeat(*place.shape[:-1], 1, 1)
    made[..., :3, :3] = rotation
    made[..., :3, 3] = place
    return made


def bev_aug() -> Tensor:
    """(2, 4, 4): camera poses with the augmentation over those without it."""
    plain = matrices(INPUTS["pose.rots_noaug"], INPUTS["pose.trans_noaug"])
    augmented = matrices(INPUTS["rots"], INPUTS["trans"])
    made = (augmented.double() @ torch.linalg.inv(plain.double()))[:, 0].float()
    made[:, :3, 3] = 0  # it turns, scales and mirrors; what is left is rounding
    return made


def frame(images: Tensor, lidar2global: Tensor) -> Batch:
    """One frame of the golden; cameras are the present ones' in both."""
    image_aug, cam2img = torch.eye(4).repeat(2, 2, 1, 1), torch.eye(4).repeat(2, 2, 1, 1)
    image_aug[..., :3, :3] = INPUTS["post_rots"][:, :2]
    image_aug[..., :2, 2] += INPUTS["post_trans"][:, :2, :2]
    cam2img[..., :3, :3] = image_aug[..., :3, :3] @ INPUTS["intrins"][:, :2]
    return Batch(
        tokens=["first", "second"],
        images=images,
        cam2img=cam2img,
        cam2lidar=TO_SQUARE @ matrices(INPUTS["rots"], INPUTS["trans"])[:, :2],
        image_aug=image_aug,
        bev_aug=TO_SQUARE.repeat(2, 1, 1),
        lidar2global=lidar2global,
        points=None,
        boxes=[None, None],
    )


def two_frames() -> tuple[Batch, Tensor, Tensor]:
    """The batch and its images, present and adjacent, as leaves.

    The frames lie apart by the golden's own motion, already augmented, so that its rounding is not ours.
    """
    images = INPUTS["imgs"].unflatten(1, (2, 2))  # per camera: present, adjacent
    present, adjacent = (images[:, :, i].clone().requires_grad_() for i in range(2))
    batch = frame(present, torch.eye(4, dtype=torch.float64).repeat(2, 1, 1))
    past = frame(adjacent, torch.linalg.inv(OUTPUTS["cur2adj"].double()))
    batch.past = PastFrames([past], torch.tensor([[0.5], [0.5]]))
    return batch, present, adjacent


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    assert float((actual.detach() - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


def square(now2past: Tensor) -> Tensor:
    return TO_SQUARE @ now2past @ torch.linalg.inv(TO_SQUARE)


def test_the_motion_between_the_frames_is_the_reference_s() -> None:
    poses = {name.removeprefix("pose."): value.double().numpy() for name, value in INPUTS.items()}

    def pose(name: str) -> Tensor:
        rotation = quaternion_to_rotation(poses[f"{name}_q"])
        return torch.from_numpy(
            np.stack([pose_matrix(t, r) for t, r in zip(poses[f"{name}_t"], rotation, strict=True)])
        )

    lidar2ego = pose("lidar2ego")  # of the present frame, for both
    past = PastMap(torch.zeros(2, 1, *GRID.shape), pose("adj_ego2global") @ lidar2ego, bev_aug())
    batch = frame(torch.zeros(2, 2, 3, 32, 80), pose("ego2global") @ lidar2ego)
    batch.bev_aug = bev_aug()
    torch.testing.assert_close(motion_to_past(past, batch), OUTPUTS["cur2adj"], atol=POSES_M, rtol=0)


def test_cells_read_where_the_reference_s_read() -> None:
    cells = source_cells(square(OUTPUTS["cur2adj"]), GRID, lower_corners=True)
    rows, columns = GRID.shape
    normalised = cells / cells.new_tensor([columns - 1, rows - 1]) * 2 - 1
    assert_relative(normalised, OUTPUTS["grid"], FORWARD)


def test_the_warp_and_its_gradient_are_the_reference_s() -> None:
    features = INPUTS["shift.feat"].clone().requires_grad_()
    moved = warp_map(features, square(OUTPUTS["cur2adj"]), GRID, lower_corners=True)
    assert_relative(moved, OUTPUTS["shift.out"], FORWARD)
    (moved * INPUTS["shift.grad_out"]).sum().backward()
    assert features.grad is not None
    assert_relative(features.grad, GRADIENTS["shift.feat"], BACKWARD)


def test_both_frames_maps_are_the_reference_s_alone_and_joined() -> None:
    detector, (batch, *_) = model(), two_frames()
    seen: list[tuple[Any, Any]] = []
    assert detector.fusion is not None
    detector.fusion.blocks.register_forward_hook(lambda _m, given, out: seen.append((given[0], out)))
    output = detector(batch)
    for which, (lifted, refined) in zip(("cur", "adj"), seen, strict=True):
        assert_relative(lifted, OUTPUTS[f"lss.{which}"], FORWARD, which)
        assert_relative(refined, OUTPUTS[f"pre.{which}"], FORWARD, which)
    joined = output.bev["lifted"].features
    assert_relative(joined[:, 4:], OUTPUTS["pre.adj_shifted"], FORWARD)
    assert_relative(joined, OUTPUTS["concat"], FORWARD)


def test_gradients_are_the_reference_s_and_the_adjacent_images_get_none() -> None:
    detector, (batch, present, adjacent) = model(), two_frames()
    (detector(batch).bev["lifted"].features * INPUTS["grad_out"]).sum().backward()
    expected = GRADIENTS["imgs"].unflatten(1, (2, 2))
    assert present.grad is not None
    assert_relative(present.grad, expected[:, :, 0], BACKWARD, "imgs")
    assert adjacent.grad is None and not expected[:, :, 1].any()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
    compared = [name for name in GRADIENTS if name not in ("imgs", "shift.feat")]
    for name in compared:
        gradient = gradients[our_name(name)]
        assert gradient is not None, name
        assert_relative(gradient, GRADIENTS[name], BACKWARD, name)
    assert len(compared) == 18


def ground_truth(sample: int) -> Boxes3D:
    """Boxes in the LiDAR frame with velocities over ground (m/s), NaN where unknown."""
    boxes7, velocity = INPUTS[f"velo.{sample}.boxes7"], INPUTS[f"velo.{sample}.object_global"].double()
    ego, lidar = (
        torch.from_numpy(quaternion_to_rotation(INPUTS[f"pose.{name}_q"][sample].double().numpy()))
        for name in ("ego2global", "lidar2ego")
    )
    along = torch.nn.functional.pad(velocity, (0, 1)) @ ego @ lidar  # rows: global -> ego -> LiDAR
    in_lidar = along[:, :2].float()
    in_lidar[INPUTS[f"velo.{sample}.object_is_nan"]] = torch.nan
    return Boxes3D(torch.cat([boxes7, in_lidar], dim=1), torch.zeros(len(boxes7), dtype=torch.int64))


def gaps() -> Tensor:
    """(2,) seconds as the model takes them: the second sample's scene has only begun."""
    fusion = model().fusion
    assert fusion is not None
    return fusion.gap_s(torch.stack([INPUTS["velo.0.used_dt"], torch.tensor(0.0)])[:, None])


@pytest.mark.parametrize("sample", [0, 1])
def test_targets_are_the_reference_s_displacements_where_it_knows_them(sample: int) -> None:
    """Where it does not, its target is the car's own velocity; ours asks for nothing."""
    torch.testing.assert_close(gaps()[sample], INPUTS[f"velo.{sample}.used_dt"])
    boxes = ground_truth(sample)
    known = ~INPUTS[f"velo.{sample}.object_is_nan"]
    targets = scale_velocities([boxes], gaps()[sample : sample + 1])[0].boxes[:, 7:]
    expected = OUTPUTS[f"velo.{sample}.target_abs_dis"][:, 7:]
    torch.testing.assert_close(targets[known], expected[known], atol=VELOCITIES_M_S, rtol=0)
    per_second = OUTPUTS[f"velo.{sample}.target_abs_vel"][:, 7:]
    torch.testing.assert_close(boxes.boxes[known, 7:], per_second[known], atol=VELOCITIES_M_S, rtol=0)
    assert targets[~known].isnan().all() and int((~known).sum()) == 1


def test_detections_are_the_reference_s_in_metres_per_second() -> None:
    """A head that gives the golden's displacements, one peak each."""
    detector = model()
    grid = detector.head.grid
    heads = [
        {name: torch.zeros(2, width, *grid.shape) for name, width in task.items()}
        for task in detector.head.map_channels
    ]
    for task in heads:
        task["heatmap"] -= 20
    cells = [(2, 3), (8, 8), (14, 20), (20, 5), (21, 28)]
    for sample in range(2):
        displacement = INPUTS[f"velo.{sample}.pred_displacement"]
        for i, (row, column) in enumerate(cells):
            heads[0]["heatmap"][sample, 0, row, column] = 5.0 - i
            heads[0]["vel"][sample, :, row, column] = displacement[i]
    output = DetectorOutput(bev={}, heads=heads, displacement_s=gaps())
    for sample, boxes in enumerate(detector.decode(output)):
        expected = OUTPUTS[f"velo.{sample}.decoded_abs_dis"]
        assert_relative(boxes.boxes[:, 7:], expected, FORWARD)
    output.displacement_s = (
        None  # a head of velocities; the reference divides all the same at a scene's start
    )
    expected = INPUTS["velo.1.pred_displacement"]
    torch.testing.assert_close(detector.decode(output)[1].boxes[:, 7:], expected)
