"""Whole files under the peers' names come out as weights of our detectors, every key accounted for."""

import re
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from distillbev.classes import CLASSES
from distillbev.errors import CheckpointError
from distillbev.grid import BevGrid
from distillbev.models.bev_encoder import BevEncoderConfig, LssNeckConfig
from distillbev.models.bevdet import BevDet, BevDetConfig
from distillbev.models.bevformer import BevFormer, BevFormerConfig, EncoderConfig
from distillbev.models.center_head import CenterHeadConfig
from distillbev.models.centerpoint import CenterPoint, CenterPointConfig
from distillbev.models.depth_net import MegviiDepthNetConfig, ReleaseDepthNetConfig
from distillbev.models.history import HistoryConfig
from distillbev.models.image_encoder import MEAN_RGB, STD_RGB, ImageEncoderConfig, ResNetConfig
from distillbev.models.image_pyramid import ImagePyramidConfig
from distillbev.models.lidar_query_teacher import (
    LidarQueryTeacher,
    LidarQueryTeacherConfig,
    QueryEncoderConfig,
)
from distillbev.models.lift import DepthBins, LiftConfig
from distillbev.models.nms import RotatedNms
from distillbev.models.pillars import DynamicPillarsConfig, HardPillarsConfig
from distillbev.models.query_head import QueryHeadConfig
from distillbev.models.second import SecondConfig, SecondFpnConfig
from distillbev.models.voxels import SparseVoxelsConfig, split_by_origin, undo_shares
from distillbev.recipes import RECIPES
from distillbev.train.inference import load_trained
from distillbev.weights.convert import convert, import_weights
from distillbev.weights.fit import SCALES_OF_BEVDET, infer_config, misfit
from distillbev.weights.pixels import PIXELS, pixels_of_config, turn_stem
from distillbev.weights.read import Published
from distillbev.weights.rename import CLASSES_OF_MMDET3D, recognise, turn_code, widen_origins
from distillbev.weights.runs import run_of

GOLDEN = Path(__file__).parents[1] / "golden"
PILLARS, VOXELS, BEVDET = (
    GOLDEN / name / "weights.safetensors"
    for name in ("a_centerpoint_pillar02", "b_centerpoint_voxel01", "c6_bevdet_forward")
)


def test_a_key_without_a_name_of_ours_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    with pytest.raises(CheckpointError, match=r"24 of 438 keys .*variant_avg_dist.*--lax"):
        import_weights(PILLARS, out)
    assert not out.exists()
    report = import_weights(PILLARS, out, lax=True)
    assert len(report.unused) == 24
    assert all(name.startswith("variant_") for name in report.unused)
    assert f"unused    {report.unused[0]}" in str(report)


def test_kernels_of_spconv_1_come_out_as_those_of_spconv_2() -> None:
    second = load_file(VOXELS)
    first = {n: w.permute(1, 2, 3, 4, 0).contiguous() if w.ndim == 5 else w for n, w in second.items()}
    expected = convert(Published(second, "", None)).state
    converted = convert(Published(first, "", None))
    state, report = converted.state, converted.report
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    kernels = [n for n, change in report.reordered if "spconv" in change]
    assert len(kernels) == sum(w.ndim == 5 for w in second.values()) > 10


def test_boxes_from_version_1_on_keep_their_rows() -> None:
    weights = load_file(BEVDET)
    converted = convert(Published(weights, "", "1.0.0rc4"))
    state, report = converted.state, converted.report
    name = "task_heads.0.rot.1.weight"
    assert torch.equal(state[f"head.{name}"], weights[f"pts_bbox_head.{name}"])
    assert report.reordered == []
    assert "1.0.0rc4, as the file says" in report.boxes
    told = convert(Published(weights, "", "1.0.0rc4"), version="0.17.1")
    assert torch.equal(told.state[f"head.{name}"], -weights[f"pts_bbox_head.{name}"][[1, 0]])
    assert "as told" in told.report.boxes


def test_box_codes_of_both_versions_come_to_the_same_code_of_ours() -> None:
    yaw = torch.tensor(0.3)
    old_yaw = -yaw - torch.pi / 2
    ours = torch.tensor([1.0, 2.0, 0.5, 4.0, 2.1, 1.5, yaw.sin(), yaw.cos(), 3.0, -1.0])
    old = torch.tensor([1.0, 2.0, 2.1, 4.0, 0.5, 1.5, old_yaw.sin(), old_yaw.cos(), 3.0, -1.0])
    new = torch.tensor([1.0, 2.0, 4.0, 2.1, 0.5, 1.5, yaw.sin(), yaw.cos(), 3.0, -1.0])
    torch.testing.assert_close(turn_code(old), ours)
    torch.testing.assert_close(turn_code(new, old_boxes=False), ours)


def queries() -> dict[str, Tensor]:
    head = "pts_bbox_head."
    return {
        "img_backbone.conv1.weight": torch.zeros(4, 3, 7, 7),
        head + "code_weights": torch.ones(10),
        head + "transformer.encoder.layers.0.attentions.0.value_proj.bias": torch.zeros(4),
        head + "transformer.encoder.layers.0.attentions.1.deformable_attention.value_proj.bias": torch.zeros(
            4
        ),
        head + "transformer.decoder.layers.0.attentions.0.attn.in_proj_bias": torch.zeros(4),
        head + "reg_branches.0.4.bias": torch.arange(10.0),
        head + "cls_branches.0.6.bias": torch.arange(10.0),
    }


def test_a_whole_bevformer_comes_out_under_our_names() -> None:
    converted = convert(Published(queries(), "", "0.17.1"))
    state, report = converted.state, converted.report
    assert sorted(state) == [
        "encoder.layers.0.spatial.value_proj.bias",
        "encoder.layers.0.temporal.value_proj.bias",
        "head.box_branches.0.4.bias",
        "head.class_branches.0.6.bias",
        "head.layers.0.self_attention.in_proj_bias",
        "image_encoder.backbone.conv1.weight",
    ]
    assert state["head.box_branches.0.4.bias"].tolist() == [0, 1, 4, 3, 2, 5, -7, -6, 8, 9]
    theirs = [
        "car",
        "truck",
        "construction_vehicle",
        "bus",
        "trailer",
        "barrier",
        "motorcycle",
        "bicycle",
        "pedestrian",
        "traffic_cone",
    ]
    rows = state["head.class_branches.0.6.bias"].int().tolist()
    assert [theirs[row] for row in rows] == list(CLASSES)
    assert report.needless == ["pts_bbox_head.code_weights"]


def test_keys_of_no_known_detector_are_told(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"keys of no known detector \(first: fc.weight\)"):
        import_weights(tmp_path / "w.safetensors", tmp_path / "ours.safetensors")


def det3d_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The golden voxel detector as tianweiy's code names it, with biases before its norms."""
    named = {}
    for name, value in weights.items():
        name = re.sub(r"pts_middle_encoder\.(conv_input)", r"backbone.\1", name)
        name = re.sub(r"pts_middle_encoder\.conv_out", "backbone.extra_conv", name)
        if stage := re.match(r".*encoder_layer(\d)\.(\d)\.(.*)", name):
            i, block, rest = int(stage[1]), int(stage[2]), stage[3]
            name = (
                f"backbone.conv{i + 1}.{rest}"
                if block == 2
                else f"backbone.conv{i}.{block + 3 * (i > 1)}.{rest}"
            )
        if stage := re.match(r"pts_backbone\.blocks\.(\d)\.(\d+)\.(.*)", name):
            name = f"neck.blocks.{stage[1]}.{int(stage[2]) + 1}.{stage[3]}"
        name = name.replace("pts_neck.", "neck.").replace("pts_bbox_head.task_heads.", "bbox_head.tasks.")
        name = name.replace("pts_bbox_head.shared_conv.conv", "bbox_head.shared_conv.0")
        name = name.replace("pts_bbox_head.shared_conv.bn", "bbox_head.shared_conv.1").replace(
            ".heatmap.", ".hm."
        )
        name = re.sub(r"(tasks\.\d\.\w+)\.1\.", r"\1.3.", name)
        name = re.sub(r"(tasks\.\d\.\w+)\.0\.conv", r"\1.0", name)
        named[re.sub(r"(tasks\.\d\.\w+)\.0\.bn", r"\1.1", name)] = value
    for name in list(named):
        convolution = re.match(r"(backbone\.conv\d\.\d\.)conv(\d)\.weight", name)
        norm = f"{convolution[1]}bn{convolution[2]}" if convolution else None
        if re.match(r"bbox_head\.(shared_conv|tasks\.\d\.\w+)\.0\.weight", name):
            norm = name.replace(".0.weight", ".1")
        if norm is not None:
            mean = named[f"{norm}.running_mean"]
            bias = torch.linspace(-1, 1, len(mean))
            named[name.replace("weight", "bias")], named[f"{norm}.running_mean"] = bias, mean + bias
    return named


def test_det3d_s_names_and_biases_come_to_the_weights_that_mmdetection3d_s_come_to() -> None:
    weights = load_file(VOXELS)
    expected = convert(Published(weights, "", None)).state
    converted = convert(Published(det3d_names(weights), "", None))
    assert converted.source.title == "CenterPoint of det3d with voxels"
    assert converted.state.keys() == expected.keys()
    for name, value in converted.state.items():
        torch.testing.assert_close(value, expected[name])
    report = converted.report
    assert (report.unused, report.needless, len(report.folded)) == ([], [], 16 + 37)
    assert report.num_keys == len(weights) + 16 + 37


SMALL_HEAD = CenterHeadConfig(shared_channels=8, branch_channels=8)
SMALL_ENCODER = ImageEncoderConfig(backbone=ResNetConfig(depth=18, base_width=4), out_channels=16)
SMALL_BEVDET = BevDetConfig(
    image_encoder=SMALL_ENCODER,
    lift=LiftConfig(channels=4, depth=DepthBins(1.0, 13.0), corner_aligned_pixels=True, truncate_cells=True),
    bev_encoder=BevEncoderConfig(channels=(8, 16, 32)),
    bev_neck=LssNeckConfig(out_channels=8),
    head=SMALL_HEAD,
)
RELEASED = msgspec.structs.replace(
    SMALL_BEVDET,
    lift=msgspec.structs.replace(SMALL_BEVDET.lift, depth_net=ReleaseDepthNetConfig(mid_channels=6)),
    history=HistoryConfig(lower_corners=True),
    bev_neck=LssNeckConfig(out_channels=8, extra_norm_act=True),
)
SMALL_QUERIES = QueryHeadConfig(num_queries=7, layers=2, ffn_channels=16)
MODELS = [
    (CenterPoint, CenterPointConfig(pillars=HardPillarsConfig(channels=(8, 8)), head=SMALL_HEAD)),
    (
        CenterPoint,
        CenterPointConfig(
            pillars=DynamicPillarsConfig(channels=(8,), point_features=17, virtual_flag_column=15),
            backbone=SecondConfig(channels=(8, 12, 16)),
            neck=SecondFpnConfig(channels=(10, 10, 10)),
            head=SMALL_HEAD,
        ),
    ),
    (
        CenterPoint,
        CenterPointConfig(
            grid=BevGrid(cell_m=0.1),
            pillars=SparseVoxelsConfig(channels=(4, 6, 8, 10), out_channels=10),
            backbone=SecondConfig(channels=(12, 12), layers=(5, 5), strides=(1, 2)),
            neck=SecondFpnConfig(channels=(12, 12), upsample=(1.0, 2.0)),
            head=SMALL_HEAD,
        ),
    ),
    (BevDet, SMALL_BEVDET),
    (
        BevDet,
        msgspec.structs.replace(
            SMALL_BEVDET,
            head=CenterHeadConfig(
                tasks=(CLASSES_OF_MMDET3D,),
                nms=(RotatedNms(class_scale=SCALES_OF_BEVDET),),
                shared_channels=8,
                branch_channels=8,
            ),
        ),
    ),
    (BevDet, RELEASED),
    (
        BevDet,
        msgspec.structs.replace(
            SMALL_BEVDET,
            lift=msgspec.structs.replace(
                SMALL_BEVDET.lift, depth_net=MegviiDepthNetConfig(mid_channels=16), aggregate_depth=True
            ),
        ),
    ),
    (
        BevFormer,
        BevFormerConfig(
            grid=BevGrid(cell_m=102.4 / 8),
            image_encoder=ImagePyramidConfig(
                backbone=ResNetConfig(base_width=4, stride_on="1x1"), deformable_stages=(2, 3)
            ),
            channels=32,
            encoder=EncoderConfig(layers=2, ffn_channels=16),
            head=SMALL_QUERIES,
        ),
    ),
    (
        LidarQueryTeacher,
        LidarQueryTeacherConfig(
            grid=BevGrid(cell_m=102.4 / 8),
            points=SparseVoxelsConfig(
                channels=(4, 6, 8, 10),
                out_channels=10,
                point_features=17,
                by_origin=True,
                max_points=None,
                max_voxels=None,
                max_voxels_eval=None,
            ),
            backbone=SecondConfig(channels=(8, 12), layers=(1, 1), strides=(1, 2)),
            channels=32,
            encoder=QueryEncoderConfig(layers=1, ffn_channels=16),
            head=SMALL_QUERIES,
        ),
    ),
]


@pytest.mark.parametrize(("build", "config"), MODELS, ids=lambda value: type(value).__name__)
def test_shapes_tell_the_model_that_weights_are_for(build: type[nn.Module], config: object) -> None:
    state = build(config).state_dict()
    told = infer_config(state)
    assert told == config
    assert not misfit(state, told)


def released(config: BevDetConfig) -> dict[str, Tensor]:
    """Weights of a BEVDepth4D as distill-bev names them, adapters beside them."""
    rows = (
        ("image_encoder.backbone.", "img_backbone."),
        (r"image_encoder.neck.laterals.(\d).", r"img_neck.lateral_convs.\1.conv."),
        ("image_encoder.neck.smooth.", "img_neck.fpn_convs.0.conv."),
        ("lift.depth_net.context_conv.", "img_view_transformer.featnet."),
        ("lift.depth_net.reduce_conv.", "img_view_transformer.se.input_conv."),
        ("lift.depth_net.camera_norm.", "img_view_transformer.se.fc.0."),
        ("lift.depth_net.camera_gate.", "img_view_transformer.se.fc.1."),
        ("lift.depth_net.blocks.", "img_view_transformer.extra_depthnet.layers.0."),
        ("lift.depth_net.deform_norm.", "img_view_transformer.dcn.1."),
        ("lift.depth_net.deform.", "img_view_transformer.dcn.0."),
        ("lift.depth_net.depth_conv.", "img_view_transformer.depthnet."),
        ("fusion.blocks.", "pre_process_net.layers.0."),
        ("bev_encoder.", "img_bev_encoder_backbone."),
        ("bev_neck.refine.0.", "img_bev_encoder_neck.up2.1."),
        ("bev_neck.refine.1.", "img_bev_encoder_neck.up2.2."),
        ("bev_neck.refine.3.", "img_bev_encoder_neck.up2.4."),
        ("bev_neck.refine.4.", "img_bev_encoder_neck.up2.5."),
        ("bev_neck.conv.", "img_bev_encoder_neck.conv."),
        ("head.", "pts_bbox_head."),
    )
    named = {}
    for name, value in BevDet(config).state_dict().items():
        ours, theirs = next(row for row in rows if re.match(row[0], name))
        named[re.sub(ours, theirs, name, count=1)] = value
    named["img_view_transformer.frustum"] = torch.zeros(3)
    named["channel_wise_adaptations.2.weight"] = torch.zeros(12, 8, 1, 1)
    named["teacher_model.pts_neck.deblocks.0.0.weight"] = torch.zeros(3)
    return named


def write(tensors: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": tensors}, folder / "w.pth")
    return folder / "w.pth"


def test_a_file_of_the_release_becomes_a_run_that_loads(tmp_path: Path) -> None:
    weights = released(RELEASED)
    report = import_weights(write(weights, tmp_path), tmp_path / "run")
    assert (report.source, report.unused) == ("BEVDepth of BEVDet", [])
    assert report.num_keys == len(weights)
    assert report.needless == ["img_view_transformer.frustum", "teacher_model.pts_neck.deblocks.0.0.weight"]
    experiment, detector = load_trained(tmp_path / "run")
    assert (experiment.name, experiment.student, experiment.teacher) == ("bevdepth_r50", RELEASED, None)
    stem = detector.get_parameter("image_encoder.backbone.conv1.weight")
    assert torch.equal(stem, weights["img_backbone.conv1.weight"])
    assert load_file(tmp_path / "run" / "adapters.safetensors").keys() == {"taps.2.adapter.conv.weight"}


def test_missing_keys_and_other_recipes_are_refused_in_one_line(tmp_path: Path) -> None:
    weights, out = released(RELEASED), tmp_path / "ours.safetensors"
    recipe = msgspec.structs.replace(RECIPES["bevdepth_r50"](), student=RELEASED)
    assert (
        import_weights(write(weights, tmp_path), out, experiment=recipe).model
        == "the student of bevdepth_r50"
    )
    with pytest.raises(CheckpointError, match="weights of a student, and the recipe 'lidarformer' has none"):
        import_weights(write(weights, tmp_path), out, experiment=RECIPES["lidarformer"]())
    other = msgspec.structs.replace(recipe, student=SMALL_BEVDET)
    with pytest.raises(
        CheckpointError, match=r"not the student of .*have no place in it .*differ in shape"
    ) as caught:
        import_weights(write(weights, tmp_path), out, experiment=other)
    assert "\n" not in str(caught.value)
    del weights["img_neck.lateral_convs.1.conv.bias"], weights["img_backbone.layer2.0.bn1.weight"]
    with pytest.raises(
        CheckpointError, match=r"2 keys are missing \(first: image_encoder.backbone.layer2.0.bn1"
    ):
        import_weights(write(weights, tmp_path), out, experiment=recipe)
    report = import_weights(write(weights, tmp_path), out, experiment=recipe, lax=True)
    assert "missing   image_encoder.neck.laterals.1.bias" in str(report)
    with pytest.raises(CheckpointError, match="no run can be made of parts"):
        import_weights(write(weights, tmp_path), tmp_path / "run", experiment=recipe, lax=True)


@pytest.mark.parametrize("name", PIXELS)
def test_a_turned_stem_sees_in_our_pixels_what_it_saw_in_theirs(name: str) -> None:
    pixels = PIXELS[name]
    rgb, kernel = torch.rand(2, 3, 24, 24) * 255, torch.randn(5, 3, 7, 7)
    theirs = rgb.flip(1) if pixels.bgr else rgb
    mean, spread = (torch.tensor(numbers)[:, None, None] for numbers in (pixels.mean, pixels.spread))
    seen = functional.conv2d((theirs - mean) / spread, kernel, padding=3)
    turned, constant = turn_stem(kernel, pixels)
    mean, spread = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN_RGB, STD_RGB))
    ours = functional.conv2d((rgb - mean) / spread, turned, padding=3)
    inside = slice(None) if name != "swapped" else slice(3, -3)  # beyond, each pads with its own zero
    assert bool(constant.any()) == (name == "swapped")
    difference = seen - (ours + constant[:, None, None])
    assert float(difference[..., inside, inside].abs().max()) < 1e-4 * float(seen.abs().max())


def test_pixels_are_those_told_then_the_file_s_then_the_source_s() -> None:
    weights = queries()
    weights["img_backbone.bn1.running_mean"] = torch.zeros(4)
    text = "img_norm_cfg = dict(\n    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)"
    assert pixels_of_config(text) is not None
    for file, given, expected in (
        (Published(weights, "", None), None, "RGB, ImageNet's mean and spread (as BEVFormer"),
        (Published(weights, "", None, text), None, "as the file's configuration says"),
        (Published(weights, "", None, text), "swapped", "as told"),
        (
            Published(weights | {"img_backbone.layer3.0.conv2.conv_offset.weight": torch.zeros(1)}, "", None),
            None,
            "BGR, ImageNet's mean, not scaled (as deformable backbones",
        ),
    ):
        assert expected in str(convert(file, None, given).report.pixels)
    with pytest.raises(CheckpointError, match="pixels 'bgra'; expected one of rgb, bgr, swapped"):
        convert(Published(weights, "", None), None, "bgra")


def test_an_unknown_file_is_told_with_what_comes_nearest() -> None:
    petr = [
        "img_backbone.conv1.weight",
        "pts_bbox_head.input_proj.weight",
        "pts_bbox_head.position_encoder.0.bias",
    ]
    with pytest.raises(CheckpointError, match="the nearest, BEVDet from version 2 on, knows 1 of 3"):
        recognise(petr)
    with pytest.raises(CheckpointError, match=r"image_encoder\.weights"):
        recognise(["conv1.weight", "layer1.0.conv1.weight", "fc.weight"])


def test_the_generation_of_a_bevdet_is_told_by_its_keys(tmp_path: Path) -> None:
    old = load_file(BEVDET)
    new = {
        n.replace(".depthnet.", ".depth_net."): w
        for n, w in old.items()
        if not re.search(r"\.(.x|frustum)$", n)
    }
    converted = convert(Published(new, "", None))
    assert converted.source.title == "BEVDet from version 2 on" and converted.new_boxes
    assert "ego frame" in str(converted.report)
    import_weights(write(new, tmp_path), tmp_path / "run")
    experiment, detector = load_trained(tmp_path / "run")
    assert isinstance(detector, BevDet) and isinstance(experiment.student, BevDetConfig)
    assert (experiment.student.frame, experiment.student.lift.z_range_m) == ("ego", (-5.0, 3.0))
    assert experiment.data.image_resize_offset == 0 and experiment.data.past is None
    in_lidar = msgspec.structs.replace(
        experiment, student=msgspec.structs.replace(experiment.student, frame="lidar")
    )
    with pytest.raises(CheckpointError, match=r"found frame: lidar, and the BEV map of BEVDet .* ego frame"):
        import_weights(write(new, tmp_path), tmp_path / "other", experiment=in_lidar)
    assert converted.state.keys() == convert(Published(old, "", None)).state.keys()


def test_a_teacher_file_takes_its_ground_from_its_configuration(tmp_path: Path) -> None:
    text = "voxel_size = [0.075, 0.075, 0.2]\npoint_cloud_range = [-54, -54, -5.0, 54, 54, 3.0]\n"
    torch.save({"state_dict": load_file(VOXELS), "meta": {"config": text}}, tmp_path / "w.pth")
    import_weights(tmp_path / "w.pth", tmp_path / "run")
    experiment, detector = load_trained(tmp_path / "run")
    assert isinstance(detector, CenterPoint)
    assert detector.config.grid == BevGrid(x_range_m=(-54.0, 54.0), y_range_m=(-54.0, 54.0), cell_m=0.075)
    assert experiment.student is None and not experiment.data.load_images


def test_voxels_of_det3d_s_mvp_see_in_our_columns_what_they_saw_in_theirs() -> None:
    points = torch.randn(40, 17)
    points[:, 15] = torch.tensor([1.0, 0.0, -1.0, 1.0]).repeat(10)  # measured, copy, virtual
    points[points[:, 15] <= 0, 16] = 0  # classes come with the key frame
    measured = points[:, 15:16] > 0
    copy = (points[:, 15:16] == 0).float()
    own = points[:, [0, 1, 2, 3, 16]] * measured
    classified = torch.cat([points[:, [0, 1, 2, *range(4, 15), 16]], copy], dim=1) * ~measured
    share = measured.float().mean()
    theirs = torch.cat([own.mean(0) / share, classified.mean(0) / (1 - share)])
    ours = undo_shares(split_by_origin(points).mean(0, keepdim=True))[0]
    kernel = torch.randn(4, 3, 3, 3, 21)
    torch.testing.assert_close(widen_origins(kernel) @ ours, kernel @ theirs)
    with pytest.raises(CheckpointError, match="pillars of det3d's MVP"):
        infer_config({"pillars.pfn_layers.0.linear.weight": torch.zeros(32, 21)})
    plain = kernel[..., :5]
    assert widen_origins(plain) is plain


def test_a_temporal_student_in_the_ego_frame_tells_metres_per_second_from_the_key_frame_before() -> None:
    history = HistoryConfig(num_frames=2, lower_corners=True)
    state = BevDet(msgspec.structs.replace(SMALL_BEVDET, history=history)).state_dict()
    for ego_frame, velocity, step in ((False, "displacement", 3), (True, "per_second", 1)):
        told = infer_config(state, new_boxes=True, ego_frame=ego_frame)
        assert isinstance(told, BevDetConfig) and told.history is not None
        assert (told.history.num_frames, told.history.velocity) == (2, velocity)
        past = run_of(told).data.past
        assert past is not None and (past.num_frames, past.step) == (2, step)
