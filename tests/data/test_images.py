from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillbev.data import images
from distillbev.data.images import load_image, reduction_for
from distillbev.data.samples import NuScenes
from distillbev.data.schema import CameraFrame
from distillbev.errors import DataError


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth shapes, edges and grain, all of which JPEG treats differently."""
    y, x = np.mgrid[:height, :width]
    shades = np.stack([x % 97, y % 61, (x + y) % 43], axis=-1) * 2.0 + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(shades, 0, 255).astype(np.uint8))


def camera_with(path: Path, image: Image.Image, **options) -> CameraFrame:
    image.save(path, **options)
    return CameraFrame("CAM", path, 0, image.size, np.eye(4), np.eye(4), np.eye(4))


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


@pytest.mark.skipif(images.simplejpeg is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("size_wh", [(160, 90), (161, 91), (23, 9)])
@pytest.mark.parametrize("options", [{"subsampling": i} for i in range(3)] + [{"progressive": True}])
def test_simplejpeg_gives_the_pixels_of_pillow(tmp_path: Path, size_wh: tuple[int, int], options: dict):
    coloured = photo(np.random.default_rng(0), *size_wh)
    for picture in (coloured, coloured.convert("L")):
        camera = camera_with(tmp_path / "image.jpg", picture, **options)
        for scale in (None, 1.0, 0.5, 0.3, 0.2, 0.1):
            fast, slow = load_image(camera, scale), load_image(camera, scale, fast=False)
            assert fast.reduction == slow.reduction == reduction_for(size_wh, scale or 1.0)
            assert fast.image.size == tuple(-(-size // slow.reduction) for size in size_wh)
            np.testing.assert_array_equal(np.asarray(fast.image), np.asarray(slow.image))


@pytest.mark.skipif(images.simplejpeg is None, reason="simplejpeg is not installed")
def test_what_simplejpeg_cannot_decode_is_left_to_pillow(tmp_path: Path):
    picture = photo(np.random.default_rng(0), 64, 32)
    for name, other in [("image.png", picture), ("image.jpg", picture.convert("CMYK"))]:
        camera = camera_with(tmp_path / name, other)
        expected = np.asarray(load_image(camera, 0.5, fast=False).image)
        np.testing.assert_array_equal(np.asarray(load_image(camera, 0.5).image), expected)


@pytest.mark.skipif(images.simplejpeg is None, reason="simplejpeg is not installed")
def test_a_damaged_jpeg_fares_the_same_with_and_without_simplejpeg(tmp_path: Path):
    rng = np.random.default_rng(0)
    camera = camera_with(tmp_path / "image.jpg", photo(rng, 64, 32))
    content = np.frombuffer(camera.path.read_bytes(), dtype=np.uint8)

    def outcome(fast: bool) -> object:
        try:
            return np.asarray(load_image(camera, 0.5, fast=fast).image).tobytes()
        except DataError as error:
            return str(error)

    for _ in range(100):
        damaged = content.copy()
        damaged[rng.integers(len(content), size=2)] = rng.integers(256, size=2)
        camera.path.write_bytes(damaged.tobytes())
        assert outcome(fast=True) == outcome(fast=False)


def test_an_image_too_large_to_be_honest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    camera = camera_with(tmp_path / "image.jpg", photo(np.random.default_rng(0), 64, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"unreadable image.*decompression bomb"):
        load_image(camera)
