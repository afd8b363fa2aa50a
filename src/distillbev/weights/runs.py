"""A finished run made of imported weights: the experiment that might have trained them."""

from __future__ import annotations

import re

from msgspec.structs import replace

from ..errors import ConfigError
from ..grid import BevGrid
from ..models.bev_encoder import BevResNetConfig
from ..models.bevdet import BevDetConfig
from ..models.bevformer import BevFormerConfig
from ..models.centerpoint import CenterPointConfig
from ..models.detectors import StudentConfig, TeacherConfig
from ..models.voxels import MVP_COLUMNS, SparseVoxelsConfig
from ..published import (
    bevdepth_r50,
    bevdepth_r50_megvii,
    bevdet4d_r50,
    bevdet_r50,
    bevformer_r50,
    centerpoint_pillar02,
    centerpoint_voxel01,
    lidarformer,
    mvp_pillar02,
    mvpformer,
)
from ..train.experiment import Experiment


def run_of(config: StudentConfig | TeacherConfig, recipe: Experiment | None = None) -> Experiment:
    """A detector alone, with the data of a recipe (the published one of its kind if not given).

    Settings of geometry that shapes do not tell are those of the code that published weights come from.
    """
    base = recipe or published_recipe(config)
    if not isinstance(config, StudentConfig):
        data = replace(base.data, load_images=False)
        return replace(base, student=None, distill=None, inherit_head=False, teacher=config, data=data)
    if isinstance(config, BevDetConfig):
        lift = replace(config.lift, corner_aligned_pixels=True, truncate_cells=True)
        history = config.history and replace(config.history, lower_corners=True)
        config = replace(config, lift=lift, history=history)
    return replace(base, student=config, teacher=None, teacher_weights=None, distill=None, inherit_head=False)


def published_recipe(config: StudentConfig | TeacherConfig) -> Experiment:
    """The full-size recipe that trains this kind of detector."""
    if isinstance(config, CenterPointConfig):
        if config.pillars.point_features == MVP_COLUMNS:
            return mvp_pillar02()
        return (
            centerpoint_voxel01()
            if isinstance(config.pillars, SparseVoxelsConfig)
            else centerpoint_pillar02()
        )
    if isinstance(config, BevFormerConfig):
        base = bevformer_r50()
        small = len(config.image_encoder.strides) == 1 and not config.image_encoder.deformable_stages
        return replace(base, data=replace(base.data, image_size_px=(800, 450))) if small else base
    if isinstance(config, BevDetConfig):
        return _published_bevdet(config)
    return mvpformer() if config.points.point_features == MVP_COLUMNS else lidarformer()


def _published_bevdet(config: BevDetConfig) -> Experiment:
    """Those in the ego frame look back to the key frame before, at images that fill the width."""
    in_ego_frame = bevdepth_r50_megvii()
    if isinstance(config.bev_encoder, BevResNetConfig):
        base = in_ego_frame
    elif config.lift.depth_net is not None:
        base = bevdepth_r50()
    else:
        base = bevdet4d_r50() if config.history else bevdet_r50()
    data = in_ego_frame.data if config.frame == "ego" else base.data
    past = data.past and config.history and replace(data.past, num_frames=config.history.num_frames)
    return replace(base, data=replace(data, past=past))


def with_ground(config: StudentConfig | TeacherConfig, text: str | None) -> StudentConfig | TeacherConfig:
    """A CenterPoint on the ground that an mmdetection configuration names, which shapes do not tell."""
    if not isinstance(config, CenterPointConfig) or text is None:
        return config
    size, ground = (_numbers(text, name) for name in ("voxel_size", "point_cloud_range"))
    if len(size) != 3 or len(ground) != 6 or size[0] != size[1]:
        return config
    try:
        grid = BevGrid(x_range_m=(ground[0], ground[3]), y_range_m=(ground[1], ground[4]), cell_m=size[0])
        return replace(config, grid=grid)
    except ConfigError:
        return config


def _numbers(text: str, name: str) -> list[float]:
    found = re.search(rf"\b{name}'?\s*[=:]\s*[\[(]([^\])]*)[\])]", text)
    try:
        return [float(number) for number in found[1].split(",")] if found else []
    except ValueError:
        return []
