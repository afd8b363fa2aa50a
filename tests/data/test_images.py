from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillbev.data.images import load_image
from distillbev.data.samples import NuScenes
from distillbev.data.schema import CameraFrame
from distillbev.errors import DataError


def front_camera(root: Path) -> CameraFrame:
    return NuScenes(root).sample("scene-a-sample-0").cameras[0]


def test_decoding_keeps_at_least_the_resolution_asked_for(tiny_root: Path):
    camera = front_camera(tiny_root)
    assert load_image(camera).reduction == 1
    assert load_image(camera, scale=0.6).image.size == (160, 90)
    half = load_image(camera, scale=0.5)
    assert (half.image.size, half.reduction) == ((80, 45), 2)
    assert load_image(camera, scale=0.3).reduction == 2
    assert load_image(camera, scale=0.5, exact=True).image.size == (160, 90)


def test_scaled_decoding_shows_the_same_picture(tiny_root: Path):
    camera = front_camera(tiny_root)
    half = np.asarray(load_image(camera, scale=0.5).image, dtype=float)
    full = np.asarray(load_image(camera).image.reduce(2), dtype=float)
    assert np.abs(half - full).mean() < 3


def test_an_absent_image_is_named(spoilt_root: Path):
    camera = front_camera(spoilt_root)
    camera.path.unlink()
    with pytest.raises(DataError, match=r"scene-a-CAM_FRONT-0\.jpg: no such image.*copy it again"):
        load_image(camera)


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("keep_bytes", [0, 40, 1500])
def test_a_truncated_image_is_named_with_its_size(spoilt_root: Path, keep_bytes: int, scale: float | None):
    camera = front_camera(spoilt_root)
    camera.path.write_bytes(camera.path.read_bytes()[:keep_bytes])
    with pytest.raises(
        DataError, match=rf"scene-a-CAM_FRONT-0\.jpg \({keep_bytes} bytes\): unreadable image"
    ):
        load_image(camera, scale)


def test_an_image_of_another_size_than_the_table_says_is_refused(spoilt_root: Path):
    camera = front_camera(spoilt_root)
    Image.new("RGB", (80, 45)).save(camera.path)
    with pytest.raises(DataError, match=r"the image is 80x45 pixels, sample_data\.json says 160x90"):
        load_image(camera)
    assert load_image(replace(camera, size_wh_px=(80, 45))).image.size == (80, 45)
