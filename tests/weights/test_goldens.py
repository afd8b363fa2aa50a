"""Every golden weight goes through the importer as a file of its peer; what it writes gives the golden's numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distillbev.classes import CLASSES
from distillbev.data.schema import Batch
from distillbev.distill.distiller import Distiller
from distillbev.distill.settings import released_bevdepth4d
from distillbev.distill.tap import Tap
from distillbev.grid import BevGrid
from distillbev.models.attention import SpatialCrossAttention, TemporalSelfAttention, find_sight
from distillbev.models.bev_encoder import BevEncoder, BevEncoderConfig, LssNeck, LssNeckConfig
from distillbev.models.bevdet import BevDet, BevDetConfig
from distillbev.models.bevformer import BevFormerConfig, BevFormerEncoder, EncoderConfig
from distillbev.models.center_head import CenterHead, CenterHeadConfig
from distillbev.models.centerpoint import CenterPoint, CenterPointConfig
from distillbev.models.depth_net import (
    DepthAggregation,
    MegviiDepthNet,
    MegviiDepthNetConfig,
    ReleaseDepthNetConfig,
)
from distillbev.models.history import FrameFusion, HistoryConfig
from distillbev.models.image_encoder import ImageEncoderConfig, ResNetConfig
from distillbev.models.image_pyramid import ImagePyramidConfig
from distillbev.models.lidar_query_teacher import (
    LidarQueryTeacher,
    LidarQueryTeacherConfig,
    QueryEncoderConfig,
)
from distillbev.models.lift import DepthBins, DepthLift, LiftConfig
from distillbev.models.pillars import (
    DynamicPillars,
    DynamicPillarsConfig,
    HardPillars,
    HardPillarsConfig,
    Slots,
)
from distillbev.models.planar_motion import PlanarMotion
from distillbev.models.query_head import QueryHead, QueryHeadConfig
from distillbev.models.second import SecondConfig, SecondFpnConfig
from distillbev.models.voxels import SparseVoxelsConfig
from distillbev.weights.convert import import_weights
from distillbev.weights.rename import turn_code

GOLDEN = Path(__file__).parents[1] / "golden"
VIEW, HEAD = "img_view_transformer.", "pts_bbox_head."
LAYER = f"{HEAD}transformer.encoder.layers.0.attentions."
PILLARS = "pts_voxel_encoder."
# Folder, what its names begin with, and what they begin with in a file of the peer. Together they hold every weight.
PARTS = [
    ("a_centerpoint_pillar02", "pts_", "pts_"),
    ("a_centerpoint_pillar02", "variant_two_pfn.", PILLARS),
    ("a_centerpoint_pillar02", "variant_avg_dist.", PILLARS),
    ("a_centerpoint_pillar02", "variant_v1x.", PILLARS),
    ("b_centerpoint_voxel01", "", ""),
    ("c1_lift_splat", "", VIEW),
    ("c2_bev_encoder", "backbone.", "img_bev_encoder_backbone."),
    ("c2_bev_encoder", "neck.", "img_bev_encoder_neck."),
    ("c2_bev_encoder", "neck_plain.", "img_bev_encoder_neck."),
    ("c3_bevdepth_depthnet_megvii", "", "model.backbone."),
    ("c4_bevdepth_depthnet_fork", "vt.", VIEW),
    ("c4_bevdepth_depthnet_fork", "repro.", VIEW),
    ("c5_bevdet4d_align", "", ""),
    ("c6_bevdet_forward", "", ""),
    ("d1_temporal_self_attention", "", f"{LAYER}0."),
    ("d2_spatial_cross_attention", "", f"{LAYER}1."),
    ("d3_encoder", "", HEAD),
    ("d5_head", "", HEAD),
    ("d6_lidar_query_teacher", "", ""),
    ("e_distill_loss_script_setting", "", ""),
    ("e2_distill_loss_variants", "fgd.", ""),
    ("e2_distill_loss_variants", "all.", ""),
    ("e2_distill_loss_variants", "linfengzhang.", ""),
    ("f_bevdet_head_huang", "", HEAD),
    ("h_mvp_dynamic_pillar", "dyn5.", PILLARS),
    ("h_mvp_dynamic_pillar", "dyn5_avg_dist.", PILLARS),
    ("h_mvp_dynamic_pillar", "mvp17.", PILLARS),
    ("h_mvp_dynamic_pillar", "mvp17_two_layer.", PILLARS),
]
COMPLETE = {("a_centerpoint_pillar02", "pts_"), ("b_centerpoint_voxel01", ""), ("c6_bevdet_forward", "")}


def read(golden: str, name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / golden / f"{name}.safetensors")


def peer_file(folder: Path, golden: str, old: str, new: str) -> Path:
    """Weights of a golden as its peer would save them; adapters beside a student, as in the release's files."""
    weights = {new + n.removeprefix(old): w for n, w in read(golden, "weights").items() if n.startswith(old)}
    if golden.startswith("e"):
        weights |= read("c6_bevdet_forward", "weights")
    torch.save({"state_dict": weights, "meta": {"mmdet3d_version": "0.17.1"}}, folder / "peer.pth")
    return folder / "peer.pth"


@pytest.mark.parametrize(("golden", "old", "new"), PARTS)
def test_every_golden_key_is_carried_or_told(golden: str, old: str, new: str, tmp_path: Path) -> None:
    path, complete = peer_file(tmp_path, golden, old, new), (golden, old) in COMPLETE
    report = import_weights(path, tmp_path / "w.safetensors", lax=not complete)
    keys = torch.load(path)["state_dict"].keys()
    carried = [*report.used, *(theirs for theirs, _ in report.renamed)]
    adapters = [theirs for theirs, _ in report.adapters]
    told = [n.removeprefix("model.") for n in keys]  # what lightning puts before names is no part of them
    assert sorted([*carried, *adapters, *report.needless, *report.unused]) == sorted(told)
    assert len(carried) == len(load_file(tmp_path / "w.safetensors"))
    older = {"channel_wise_adaptations.0.weight", "channel_wise_adaptations.0.bias"}
    assert set(report.unused) == (older if old == "linfengzhang." else set())
    if adapters:
        assert len(adapters) == len(load_file(tmp_path / "w.adapters.safetensors"))


def test_the_parts_hold_every_golden_weight() -> None:
    folders = {path.parent.name for path in GOLDEN.glob("*/weights.safetensors")}
    assert folders == {golden for golden, _, _ in PARTS}
    for golden in folders:
        prefixes = tuple(old for name, old, _ in PARTS if name == golden)
        assert all(name.startswith(prefixes) for name in read(golden, "weights"))


class Imported:
    """What the importer wrote of one golden part, and the golden's tensors."""

    def __init__(self, folder: Path, golden: str, old: str = "") -> None:
        new = next(new for name, begins, new in PARTS if (name, begins) == (golden, old))
        lax = (golden, old) not in COMPLETE
        import_weights(peer_file(folder, golden, old, new), folder / "w.safetensors", lax=lax)
        self.weights = load_file(folder / "w.safetensors")
        beside = folder / "w.adapters.safetensors"
        self.adapters = load_file(beside) if beside.exists() else {}
        self.inputs, self.outputs = read(golden, "inputs"), read(golden, "outputs")

    def load(self, module: nn.Module, prefix: str) -> None:
        """The part under a prefix into a module, strictly."""
        part = {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}
        module.load_state_dict(part)
        module.eval()


def our_points(golden: dict[str, Tensor], *names: str) -> list[Tensor]:
    """Points whose last column, the time, is negative before the key sweep."""
    return [torch.cat([golden[name][..., :-1], -golden[name][..., -1:]], dim=-1) for name in names]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert float((actual.detach() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def old_maps(heads: list[dict[str, Tensor]]) -> Iterator[tuple[int, str, Tensor]]:
    """Task, name and map in the old box convention: width first, clockwise yaw."""
    for task, maps in enumerate(heads):
        for name, value in maps.items():
            if name == "dim":
                value = value[:, [1, 0, 2]]
            elif name == "rot":
                value = -value[:, [1, 0]]
            yield task, name, value


def test_centerpoint_with_pillars(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "a_centerpoint_pillar02", "pts_")
    detector = CenterPoint(
        CenterPointConfig(
            grid=BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-4.8, 4.8), cell_m=0.2),
            pillars=HardPillarsConfig(channels=(8,)),
            backbone=SecondConfig(channels=(8, 12, 16)),
            neck=SecondFpnConfig(channels=(10, 10, 10)),
            head=CenterHeadConfig(shared_channels=12, branch_channels=10),
        )
    )
    golden.load(detector, "")
    bev = detector.neck(
        detector.backbone(detector.pillars(our_points(golden.inputs, "points.0", "points.1")))
    )
    for task, name, value in old_maps(detector.head(bev)):
        close(value, golden.outputs[f"head.task{task}.{name}"])


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("two_pfn", HardPillarsConfig(channels=(8, 8))),
        ("avg_dist", HardPillarsConfig(channels=(8,), reduction="mean", with_distance=True)),
        ("v1x", HardPillarsConfig(channels=(8,), offset_axes="xyz")),
    ],
)
def test_variants_of_hard_pillars(variant: str, config: HardPillarsConfig, tmp_path: Path) -> None:
    golden = Imported(tmp_path, "a_centerpoint_pillar02", f"variant_{variant}.")
    grid = BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-4.8, 4.8), cell_m=0.2)
    pillars = HardPillars(config, grid)
    golden.load(pillars, "pillars.")
    coors, (rows, columns) = golden.inputs["coors"], grid.shape
    cells = (coors[:, 0] * rows + coors[:, 2]) * columns + coors[:, 3]
    (voxels,) = our_points(golden.inputs, "voxels")
    features = pillars.encode(Slots(voxels, golden.inputs["num_points"], cells))
    close(features, golden.outputs[f"variant_{variant}.pillar_features"])


def test_centerpoint_with_voxels(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "b_centerpoint_voxel01")
    detector = CenterPoint(
        CenterPointConfig(
            grid=BevGrid(x_range_m=(-4.0, 4.0), y_range_m=(-3.2, 3.2), cell_m=0.1),
            pillars=SparseVoxelsConfig(channels=(4, 6, 8, 10), out_channels=10),
            backbone=SecondConfig(channels=(8, 12), layers=(5, 5), strides=(1, 2)),
            neck=SecondFpnConfig(channels=(10, 10), upsample=(1.0, 2.0)),
            head=CenterHeadConfig(shared_channels=8, branch_channels=8),
        )
    )
    golden.load(detector, "")
    bev = detector.neck(
        detector.backbone(detector.pillars(our_points(golden.inputs, "points.0", "points.1")))
    )
    for task, name, value in old_maps(detector.head(bev)):
        close(value, golden.outputs[f"head.task{task}.{name}"], 1e-4)


def test_lift(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "c1_lift_splat")
    lift = DepthLift(LiftConfig(channels=5, depth=DepthBins(1.0, 13.0, 1.0)), 6, BevGrid(), 16)
    golden.load(lift, "lift.")
    depth_logits, context = lift.look(golden.inputs["x"])
    close(depth_logits.flatten(0, 1), golden.outputs["depth_logits"])
    close(context.flatten(0, 1), golden.outputs["context"])


def test_bev_encoder_and_neck(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "c2_bev_encoder", "backbone.")
    encoder = BevEncoder(BevEncoderConfig(channels=(8, 16, 32)), in_channels=8)
    golden.load(encoder, "bev_encoder.")
    stages = encoder(golden.inputs["x"])
    for i, stage in enumerate(stages):
        close(stage, golden.outputs[f"eval.backbone{i}"])
    for old, normed, output in (("neck.", True, "eval.head"), ("neck_plain.", False, "eval.head_plain")):
        neck = LssNeck(LssNeckConfig(out_channels=16, extra_norm_act=normed), encoder.out_channels)
        Imported(tmp_path, "c2_bev_encoder", old).load(neck, "bev_neck.")
        close(neck(stages), golden.outputs[output])


def test_depth_net_of_megvii(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "c3_bevdepth_depthnet_megvii")
    net = MegviiDepthNet(MegviiDepthNetConfig(mid_channels=16), 12, 6, 12)
    aggregation = DepthAggregation(6)
    golden.load(net, "lift.depth_net.")
    golden.load(aggregation, "lift.aggregation.")
    depth, context = net(golden.inputs["x"], golden.outputs["cam_params"])
    close(depth, golden.outputs["depth_logits"])
    close(context, golden.outputs["context"])
    volume = golden.outputs["depth"][:, None] * golden.outputs["context"][:, :, None]
    close(aggregation(volume), golden.outputs["agg_out"])


def test_both_depth_nets_of_bevdet(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "c4_bevdepth_depthnet_fork", "vt.")
    config = LiftConfig(
        channels=4, depth=DepthBins(1.0, 13.0, 1.0), depth_net=ReleaseDepthNetConfig(mid_channels=6)
    )
    lift = DepthLift(config, 8, BevGrid(), 16)
    golden.load(lift, "lift.")
    numbers = golden.outputs["cam_params"].unflatten(0, (2, 3))
    depth_logits, context = lift.look(golden.inputs["x"], numbers)
    close(depth_logits.flatten(0, 1), golden.outputs["depth_logits"])
    close(context.flatten(0, 1), golden.outputs["context"])

    golden = Imported(tmp_path, "c4_bevdepth_depthnet_fork", "repro.")
    config = MegviiDepthNetConfig(mid_channels=8, deform_groups=1, modulated=True)
    net = MegviiDepthNet(config, 8, 4, 12, num_camera_numbers=45)
    golden.load(net, "lift.depth_net.")
    depth, context = net(golden.inputs["x"].flatten(0, 1), golden.outputs["repro.cam_params"])
    close(depth, golden.outputs["repro.depth_logits"])
    close(context, golden.outputs["repro.context"])


def test_two_frames_of_bevdet4d(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "c5_bevdet4d_align")
    fusion = FrameFusion(HistoryConfig(), 4, BevGrid())
    golden.load(fusion, "fusion.")
    for frame in ("cur", "adj"):
        close(fusion.refine(golden.outputs[f"lss.{frame}"]), golden.outputs[f"pre.{frame}"])


def test_a_whole_bevdet(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "c6_bevdet_forward")
    detector = BevDet(
        BevDetConfig(
            grid=BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 16.0), cell_m=0.8),
            image_encoder=ImageEncoderConfig(backbone=ResNetConfig(base_width=4), out_channels=16),
            lift=LiftConfig(
                channels=4, depth=DepthBins(1.0, 19.0, 1.5), corner_aligned_pixels=True, truncate_cells=True
            ),
            bev_encoder=BevEncoderConfig(channels=(8, 16, 32)),
            bev_neck=LssNeckConfig(out_channels=8),
            head=CenterHeadConfig(shared_channels=8, branch_channels=8),
        )
    )
    golden.load(detector, "")
    image_aug, cam2img, cam2lidar = (torch.eye(4).repeat(1, 2, 1, 1) for _ in range(3))
    image_aug[..., :3, :3] = golden.inputs["post_rots"]
    image_aug[..., :2, 2] += golden.inputs["post_trans"][..., :2]
    cam2img[..., :3, :3] = image_aug[..., :3, :3] @ golden.inputs["intrins"]
    cam2lidar[..., :3, :3] = golden.inputs["rots"]
    cam2lidar[..., :3, 3] = golden.inputs["trans"]
    still = torch.eye(4)[None]
    batch = Batch(
        ["golden"], golden.inputs["imgs"], cam2img, cam2lidar, image_aug, still, still.double(), None, [None]
    )
    heads = detector(batch).heads
    assert heads is not None
    for task, name, value in old_maps(heads):
        close(value, golden.outputs[f"eval.task{task}.{name}"], 1e-3)  # the golden's own tolerance


def test_attentions_of_bevformer(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "d1_temporal_self_attention")
    temporal = TemporalSelfAttention(32, heads=4, points=4)
    golden.load(temporal, "encoder.layers.0.temporal.")
    query, grid = golden.inputs["tsa.query"], golden.outputs["tsa.ref_2d"][:1, :, 0]
    out = query + temporal(query, golden.inputs["tsa.query_pos"], (query, query), (grid, grid), (8, 10))
    close(out, golden.outputs["tsa.noprev.expected"], 1e-4)

    golden = Imported(tmp_path, "d2_spatial_cross_attention")
    spatial = SpatialCrossAttention(32, heads=4, levels=2, points=8, anchors=4)
    golden.load(spatial, "encoder.layers.0.spatial.")
    query, value = golden.inputs["sca.query"], golden.inputs["sca.value"].permute(2, 0, 1, 3)
    seen = (golden.outputs[f"geom.{name}"].transpose(0, 1) for name in ("reference_points_cam", "bev_mask"))
    shapes = [(int(h), int(w)) for h, w in golden.inputs["sca.spatial_shapes"]]
    out = query + spatial(query, value, shapes, find_sight(*seen))
    close(out, golden.outputs["sca.batch.expected"], 1e-4)


def test_the_encoder_of_bevformer(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "d3_encoder")
    encoder = BevFormerEncoder(
        BevFormerConfig(
            grid=BevGrid(x_range_m=(-20.0, 20.0), y_range_m=(-16.0, 16.0), cell_m=4.0),
            image_encoder=ImagePyramidConfig(strides=(8, 16)),
            num_cameras=4,
            channels=32,
            encoder=EncoderConfig(layers=2, heads=4, ffn_channels=64),
        )
    )
    golden.load(encoder, "encoder.")
    signals = golden.inputs["frame0.can_bus"][None]
    shift = golden.outputs["frame0.encoder_in.shift"] * torch.tensor([40.0, 32.0])
    motion = PlanarMotion(signals[:, 17].deg2rad(), shift, signals)
    features = [golden.inputs[f"frame0.feat.{level}"] for level in (0, 1)]
    height, width = golden.inputs["img_shape"].tolist()
    bev = encoder(features, golden.inputs["frame0.lidar2img"], (height, width), motion)
    close(bev.flatten(2).transpose(1, 2), golden.outputs["frame0.bev"], 1e-4)


def test_the_query_head_of_bevformer(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "d5_head")
    config = QueryHeadConfig(classes=CLASSES[:5], num_queries=14, layers=3, heads=4, ffn_channels=64)
    grid = BevGrid(x_range_m=(-20.0, 20.0), y_range_m=(-16.0, 16.0), cell_m=4.0)
    head = QueryHead(config, 32, grid, (-5.0, 3.0))
    golden.load(head, "head.")
    predictions = head(golden.inputs["bev_embed"].transpose(1, 2).unflatten(2, (8, 10)))
    close(predictions.class_logits, golden.outputs["all_cls_scores"], 1e-4)
    close(predictions.boxes, turn_code(golden.outputs["all_bbox_preds"]), 1e-4)


def test_the_lidar_teacher_with_a_query_head(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "d6_lidar_query_teacher")
    ground = {"x_range_m": (-12.8, 12.8), "y_range_m": (-12.8, 12.8)}
    teacher = LidarQueryTeacher(
        LidarQueryTeacherConfig(
            grid=BevGrid(**ground, cell_m=3.2),
            voxel_grid=BevGrid(**ground, cell_m=0.8),
            points=HardPillarsConfig(channels=(24,)),
            backbone=SecondConfig(channels=(16, 24), layers=(1, 1), strides=(1, 2)),
            channels=32,
            encoder=QueryEncoderConfig(layers=2, heads=8, ffn_channels=64),
            head=QueryHeadConfig(classes=CLASSES[:4], num_queries=9, layers=2, ffn_channels=64),
        )
    )
    teacher.points = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]: the golden begins behind it
    golden.load(teacher, "")
    predictions = teacher.head(teacher.encoder(teacher.neck(teacher.backbone(golden.inputs["pts_bev"]))))
    close(predictions.class_logits, golden.outputs["all_cls_scores"], 1e-4)
    centres_differ = predictions.boxes[..., 3:], turn_code(golden.outputs["all_bbox_preds"])[..., 3:]
    close(*centres_differ, 1e-4)


def test_adapters_of_the_release(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "e_distill_loss_script_setting")
    taps = {"stage1": "backbone1", "stage2": "backbone2", "head": "head"}
    channels = [
        {ours: golden.inputs[f"main.{whose}.{theirs}"].shape[1] for ours, theirs in taps.items()}
        for whose in ("student", "teacher")
    ]
    distiller = Distiller(
        nn.Identity(),
        nn.Identity(),
        released_bevdepth4d(),
        student_channels=channels[0],
        teacher_channels=channels[1],
    )
    distiller.load_state_dict(golden.adapters)
    for tap, name in zip(distiller.taps, taps.values(), strict=True):
        assert isinstance(tap, Tap)
        rows, columns = golden.inputs[f"main.teacher.{name}"].shape[-2:]
        adapted = tap.adapt(golden.inputs[f"main.student.{name}"], (rows, columns))
        close(adapted, golden.outputs[f"main.{name}.adapted_student"])


def test_the_head_of_bevdet(tmp_path: Path) -> None:
    golden = Imported(tmp_path, "f_bevdet_head_huang")
    grid = BevGrid(x_range_m=(-12.8, 12.8), y_range_m=(-9.6, 12.8), cell_m=0.8)
    head = CenterHead(CenterHeadConfig(shared_channels=8, branch_channels=8), 6, grid)
    golden.load(head, "head.")
    for task, name, value in old_maps(head(golden.inputs["feat"])):
        close(value, golden.outputs[f"fwd.task{task}.{name}"])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dyn5", DynamicPillarsConfig(channels=(8,))),
        ("dyn5_avg_dist", DynamicPillarsConfig(channels=(8,), reduction="mean", with_distance=True)),
        ("mvp17", DynamicPillarsConfig(channels=(8,), point_features=17, virtual_flag_column=15)),
        (
            "mvp17_two_layer",
            DynamicPillarsConfig(channels=(8, 10), point_features=17, virtual_flag_column=15),
        ),
    ],
)
def test_dynamic_pillars_of_the_release_s_teachers(
    name: str, config: DynamicPillarsConfig, tmp_path: Path
) -> None:
    golden = Imported(tmp_path, "h_mvp_dynamic_pillar", f"{name}.")
    pillars = DynamicPillars(config, BevGrid(x_range_m=(-6.4, 6.4), y_range_m=(-4.0, 4.0), cell_m=0.2))
    golden.load(pillars, "pillars.")
    cloud = name.split("_")[0]
    features, _ = pillars.encode(our_points(golden.inputs, f"{cloud}.points.0", f"{cloud}.points.1"))
    close(features, golden.outputs[f"{name}.eval.voxel_features"])
