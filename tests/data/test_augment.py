from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from distillbev.boxes import box_corners
from distillbev.data.augment import (
    BevAugConfig,
    BevAugmentation,
    ImageAugConfig,
    ImageAugmentation,
    augment_boxes,
    augment_points,
    plain_image_augmentation,
)
from distillbev.data.images import DecodedImage, load_image
from distillbev.data.schema import CameraFrame
from distillbev.errors import ConfigError
from distillbev.geometry import transform_points

GOLDEN = Path(__file__).parents[1] / "golden" / "c1_lift_splat"
SOURCE_WH = (401, 225)  # odd, so that scaled decoding leaves a ragged edge
SEEDS = st.integers(0, 2**32 - 1)


def test_image_matrices_equal_the_reference():
    golden = load_file(GOLDEN / "inputs.safetensors")
    for sample, camera in np.ndindex(*golden["aug.resize"].shape):
        left, top, right, bottom = golden["aug.crop"][sample, camera].tolist()
        matrix = ImageAugmentation(
            scale=float(golden["aug.resize"][sample, camera]),
            left=left,
            top=top,
            size_wh_px=(right - left, bottom - top),
            flip=bool(golden["aug.flip"][sample, camera]),
            rotation_deg=float(golden["aug.rotate_deg"][sample, camera]),
        ).matrix
        np.testing.assert_allclose(matrix[:2, :2], golden["post_rots"][sample, camera, :2, :2], atol=1e-5)
        np.testing.assert_allclose(matrix[:2, 2], golden["post_trans"][sample, camera, :2], atol=2e-5)


def golden_bev_aug(golden: dict[str, np.ndarray], sample: int) -> BevAugmentation:
    """The reference turns clockwise; its "horizontal" flip negates y."""
    return BevAugmentation(
        rotation_rad=-float(golden["bda.rot"][sample]),
        scale=float(golden["bda.scale"][sample]),
        flip_x=bool(golden["bda.flip_v"][sample]),
        flip_y=bool(golden["bda.flip_h"][sample]),
    )


def test_bev_matrices_move_the_cameras_as_the_reference_does():
    golden = load_file(GOLDEN / "inputs.safetensors")
    for sample, camera in np.ndindex(2, 3):
        cam2lidar = np.eye(4)
        cam2lidar[:3, :3] = golden["cam2lidar.rots"][sample, camera]
        cam2lidar[:3, 3] = golden["cam2lidar.trans"][sample, camera]
        moved = golden_bev_aug(golden, sample).matrix @ cam2lidar
        np.testing.assert_allclose(moved[:3, :3], golden["rots"][sample, camera], atol=1e-5)
        np.testing.assert_allclose(moved[:3, 3], golden["trans"][sample, camera], atol=1e-5)


def test_boxes_move_as_in_the_reference():
    golden = load_file(GOLDEN / "inputs.safetensors")
    expected = load_file(GOLDEN / "outputs.safetensors")["boxes_after"]

    def convert(old: np.ndarray) -> np.ndarray:
        """x, y, z bottom, w, l, h, clockwise yaw from -y -> our convention."""
        new = np.array(old, dtype=np.float64)
        new[:, 3], new[:, 4] = old[:, 4], old[:, 3]
        new[:, 2] += new[:, 5] / 2
        new[:, 6] = -old[:, 6] - np.pi / 2
        return new

    for sample in range(2):
        moved = augment_boxes(golden_bev_aug(golden, sample).matrix, convert(golden["boxes_before"][sample]))
        wanted = convert(expected[sample])
        columns = [0, 1, 2, 3, 4, 5, 7, 8]
        np.testing.assert_allclose(moved[:, columns], wanted[:, columns], atol=1e-5)
        np.testing.assert_allclose(np.exp(1j * moved[:, 6]), np.exp(1j * wanted[:, 6]), atol=1e-5)


def image_with_dot(x_px: float, y_px: float, radius_px: float) -> Image.Image:
    """A soft white dot at a continuous position on black."""
    columns, rows = np.arange(SOURCE_WH[0]) + 0.5, np.arange(SOURCE_WH[1]) + 0.5
    squared = (columns[None] - x_px) ** 2 + (rows[:, None] - y_px) ** 2
    grey = 255 * np.exp(-squared / (2 * radius_px**2))
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2).round().astype(np.uint8))


def centre_of_light(image: np.ndarray) -> np.ndarray:
    light = np.where(image[..., 0] > 12, image[..., 0].astype(np.float64), 0)
    rows, columns = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
    return np.array([(light * columns).sum(), (light * rows).sum()]) / light.sum()


def error_of_a_dot(
    seed: int, rotation_deg: tuple[float, float], path: Path | None, exact: bool
) -> np.ndarray | None:
    """Pixels from where the matrix puts a painted dot to where it is seen, through a file if there is a path.

    None where the dot would lie near the source image's border.
    """
    rng = np.random.default_rng(seed)
    config = ImageAugConfig(
        resize_range=(-0.15, 0.3), crop_bottom_range=(0.0, 0.1), rotation_deg=rotation_deg
    )
    augmentation = config.draw(rng, SOURCE_WH, (176, 96))
    # A place of the network's image, well inside, and where it comes from.
    target = np.append(rng.uniform([40, 30], [136, 66]), 1.0)
    source = np.linalg.solve(augmentation.matrix[:3, :3], target)
    if not ((source[:2] > 20) & (source[:2] < np.array(SOURCE_WH) - 20)).all():
        return None
    image = image_with_dot(source[0], source[1], radius_px=6)
    decoded = DecodedImage(image, SOURCE_WH, 1, exact=False)
    if path is not None:
        image.save(path, quality=98)
        eye = np.eye(4)
        camera = CameraFrame("CAM", path, 0, SOURCE_WH, eye, eye, eye)
        decoded = load_image(camera, scale=augmentation.scale, exact=exact)
        assert not exact or decoded.reduction == 1
    return centre_of_light(augmentation.apply(decoded)) - target[:2]


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from([None, "jpeg", "exact"]))
def test_a_painted_dot_lands_where_the_matrix_says(tmp_path_factory, seed: int, through: str | None):
    path = tmp_path_factory.mktemp("dot") / "dot.jpg" if through else None
    error = error_of_a_dot(seed, (0.0, 0.0), path, exact=through == "exact")
    assume(error is not None)
    assert np.abs(error).max() < 0.15


def test_a_turned_dot_is_off_by_half_a_pixel_at_most_and_not_at_all_on_average():
    errors = [error_of_a_dot(seed, (-25.0, 25.0), None, exact=False) for seed in range(200)]
    errors = np.array([error for error in errors if error is not None])
    assert len(errors) > 150
    assert np.abs(errors).max() < 0.5
    assert np.abs(errors.mean(axis=0)).max() < 0.02


def test_the_plain_setting_fits_the_width_and_keeps_the_bottom():
    plain = plain_image_augmentation((1600, 900), (704, 256))
    assert (plain.scale, plain.left, plain.top) == (0.44, 0, 396 - 256)
    published = plain_image_augmentation((1600, 900), (704, 256), resize_offset=0.04)
    assert (published.scale, published.left, published.top) == (pytest.approx(0.48), 32, 432 - 256)


@pytest.mark.parametrize("source_wh", [(480, 640), (640, 480), (1600, 900), (1600, 200)])
def test_a_whole_image_fits_whatever_its_shape_and_is_centred(source_wh: tuple[int, int]):
    target_wh = (256, 96)
    plain = plain_image_augmentation(source_wh, target_wh, fit="whole")
    left, top = plain.matrix[:2, 2]
    right, bottom = (plain.matrix @ [*source_wh, 1, 1])[:2]
    assert left >= 0 and top >= 0 and right <= target_wh[0] and bottom <= target_wh[1]
    assert right - left > target_wh[0] - 1.5 or bottom - top > target_wh[1] - 1.5  # it touches two edges
    assert abs(left - (target_wh[0] - right)) <= 1.5


def test_a_whole_image_is_moved_within_the_black_around_it():
    rng = np.random.default_rng(0)
    config = ImageAugConfig(resize_range=(0, 0), rotation_deg=(0, 0), flip_probability=0)
    lefts = [config.draw(rng, (480, 640), (256, 96), "whole").matrix[0, 2] for _ in range(50)]
    assert 0 <= min(lefts) < 40 and 130 < max(lefts) <= 256 - 72


def test_what_the_image_does_not_cover_is_black():
    source = DecodedImage(Image.new("RGB", (100, 40), (200, 200, 200)), (100, 40), 1, exact=False)
    image = plain_image_augmentation((100, 40), (50, 30)).apply(source)
    assert image.shape == (30, 50, 3)
    assert (image[:10] == 0).all()
    assert (image[10:] == 200).all()
    beside = ImageAugmentation(scale=1.0, left=500, top=0, size_wh_px=(8, 8)).apply(source)
    assert (beside == 0).all()


def test_a_mirrored_picture_is_the_picture_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    source = DecodedImage(Image.fromarray(pixels), (60, 40), 1, exact=False)
    mirrored = ImageAugmentation(scale=1.0, left=0, top=0, size_wh_px=(60, 40), flip=True).apply(source)
    np.testing.assert_array_equal(mirrored, pixels[:, ::-1])


def test_the_same_generator_draws_the_same_augmentation_within_its_ranges():
    config = ImageAugConfig()
    draws = [config.draw(np.random.default_rng(3), (1600, 900), (704, 256)) for _ in range(2)]
    assert draws[0] == draws[1]
    rng = np.random.default_rng(0)
    many = [config.draw(rng, (1600, 900), (704, 256)) for _ in range(300)]
    assert all(0.38 <= aug.scale <= 0.55 and abs(aug.rotation_deg) <= 5.4 for aug in many)
    assert all(aug.top + 256 == int(900 * aug.scale) for aug in many)
    assert 100 < sum(aug.flip for aug in many) < 200
    bev = [BevAugConfig().draw(rng) for _ in range(300)]
    assert all(abs(aug.rotation_rad) <= 0.3925 and 0.95 <= aug.scale <= 1.05 for aug in bev)
    assert 100 < sum(aug.flip_x for aug in bev) < 200
    assert 100 < sum(aug.flip_y for aug in bev) < 200


bev_augmentations = st.builds(
    BevAugmentation, st.floats(-3, 3), st.floats(0.5, 2), flip_x=st.booleans(), flip_y=st.booleans()
)


@given(bev_augmentations, SEEDS)
def test_corners_of_a_moved_box_are_the_moved_corners(bev_aug: BevAugmentation, seed: int):
    rng = np.random.default_rng(seed)
    box = np.concatenate([rng.uniform(-50, 50, 3), rng.uniform(0.3, 9, 3), rng.uniform(-3, 3, 3)])[None]
    moved = box_corners(augment_boxes(bev_aug.matrix, box))[0]
    expected = transform_points(bev_aug.matrix, box_corners(box)[0])
    if bev_aug.flip_x != bev_aug.flip_y:  # a mirror swaps left and right
        expected = expected[[1, 0, 3, 2, 5, 4, 7, 6]]
    np.testing.assert_allclose(moved, expected, atol=1e-9)


@given(bev_augmentations, SEEDS)
def test_boxes_come_back_through_the_inverse(bev_aug: BevAugmentation, seed: int):
    rng = np.random.default_rng(seed)
    boxes = np.concatenate(
        [rng.uniform(-50, 50, (4, 3)), rng.uniform(0.3, 9, (4, 3)), rng.uniform(-3, 3, (4, 3))], 1
    )
    boxes[1, 7:9] = np.nan
    back = augment_boxes(np.linalg.inv(bev_aug.matrix), augment_boxes(bev_aug.matrix, boxes))
    np.testing.assert_allclose(back, boxes, atol=1e-9)


def test_points_move_and_keep_their_other_columns():
    points = np.array([[1, 2, 3, 40, -0.1]], dtype=np.float32)
    moved = augment_points(BevAugmentation(np.pi / 2, 2.0, flip_y=True).matrix, points)
    np.testing.assert_allclose(moved, [[-4, -2, 6, 40, -0.1]], atol=1e-6)
    np.testing.assert_allclose(points, [[1, 2, 3, 40, -0.1]])


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (BevAugConfig, {"scale": (0.0, 1.0)}),
        (BevAugConfig, {"rotation_rad": (1.0, -1.0)}),
        (BevAugConfig, {"flip_x_probability": 1.5}),
        (ImageAugConfig, {"resize_range": (0.2, float("nan"))}),
        (ImageAugConfig, {"flip_probability": -0.1}),
    ],
)
def test_impossible_settings_are_refused(config: type, values: dict):
    with pytest.raises(ConfigError, match=next(iter(values))):
        config(**values)


def test_a_scale_that_reaches_zero_is_refused():
    with pytest.raises(ConfigError, match=r"1600x900 would be scaled by -0\.060"):
        plain_image_augmentation((1600, 900), (704, 256), resize_offset=-0.5)


@pytest.mark.parametrize("count", [0, 1, 8191, 8192, 20000])
def test_many_points_move_as_each_of_them(count: int):
    points = np.random.default_rng(count).normal(size=(count, 5)).astype(np.float32)
    matrix = BevAugmentation(rotation_rad=0.3, scale=1.02, flip_x=True).matrix
    moved = augment_points(matrix, points)
    np.testing.assert_allclose(moved[:, :3], transform_points(matrix, points[:, :3]), atol=1e-5)
    np.testing.assert_array_equal(moved[:, 3:], points[:, 3:])
