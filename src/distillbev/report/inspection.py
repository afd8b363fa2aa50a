"""What a sample holds, as pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..data.points import load_points
from ..data.schema import Sample
from .camera_views import camera_mosaic
from .paint import BoxLayer, annotated_boxes
from .top_view import bev_picture


def inspect_sample(sample: Sample, out_dir: Path) -> list[Path]:
    """Draws what a sample holds, so that calibration and labels can be judged by eye before any training.

    Returns:
        The pictures written: on the cameras boxes, LiDAR points, and rings on the ground, which need neither;
        and the view from above, with the cameras' fields of view.

    Raises:
        DataError: an image or a point file is absent or damaged.
    """
    points = load_points(sample)
    layers, count = [], "not annotated"
    if sample.annotations is not None:
        layers = [BoxLayer(annotated_boxes(sample.annotations), "annotations")]
        count = f"{len(sample.annotations.boxes)} annotated boxes"
    title = f"{sample.scene}   {sample.token[:8]}   {count}"
    pictures: dict[str, Image.Image] = {}
    if sample.cameras:
        pictures["boxes.jpg"] = camera_mosaic(sample, layers, title=title)
    if sample.cameras and len(points):
        title_points = (
            f"{sample.scene}   {sample.token[:8]}   {len(points):,} LiDAR points, near warm, far cold"
        )
        pictures["points.jpg"] = camera_mosaic(sample, points=points, title=title_points)
    if sample.cameras:
        ground = f"{sample.scene}   {sample.token[:8]}   flat ground and horizon as the calibration has them"
        pictures["ground.jpg"] = camera_mosaic(sample, title=ground, ground=True)
    pictures["bev.png"] = bev_picture(points, layers, title=title, rig=sample)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures.items():
        paths.append(out_dir / f"{sample.scene}_{sample.token}_{name}")
        picture.save(paths[-1], quality=92)
    return paths
