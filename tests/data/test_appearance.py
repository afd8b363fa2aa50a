"""Colours and hidden squares: against slow twins, by hand, and through the loader."""

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbev.data.appearance import (
    MEAN_BYTES,
    ColourAugConfig,
    Colours,
    GridMask,
    GridMaskConfig,
    shift_hue_and_saturation,
    shift_hue_and_saturation_by_loop,
)
from distillbev.data.augment import BevAugConfig, ImageAugConfig
from distillbev.data.frames import FrameDataset, frames_of_splits
from distillbev.data.samples import NuScenes
from distillbev.data.settings import DataConfig, PastConfig
from distillbev.errors import ConfigError
from distillbev.models.image_encoder import normalise_images

SEEDS = st.integers(0, 2**32 - 1)
PLAIN = DataConfig(image_size_px=(96, 48), load_points=False)


def image_of(seed: int, height: int = 7, width: int = 11) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    image[:, 0] = image[0, 0]  # a grey row
    image[1, 1] = image[0, 1]  # two channels alike
    image[:, 2] = 0
    return image


def drawn(seed: int, **settings: object) -> Colours:
    config = msgspec.structs.replace(ColourAugConfig(probability=1.0), **settings)
    return config.draw(np.random.default_rng(seed))


@given(SEEDS, st.floats(-180, 180), st.floats(0, 2), st.floats(-40, 40))
@settings(max_examples=60, deadline=None)
def test_hue_and_saturation_shift_as_pixel_by_pixel_through_hsv(
    seed: int, hue_deg: float, saturation: float, brightness: float
) -> None:
    # Brighter or darker than bytes can be, too, but not so that the value is zero, where HSV ends.
    rgb = image_of(seed).reshape(3, -1).astype(np.float32) + np.float32(round(brightness) + 0.25)
    fast = shift_hue_and_saturation(rgb, hue_deg, saturation)
    slow = shift_hue_and_saturation_by_loop(rgb, hue_deg, saturation)
    np.testing.assert_allclose(fast, slow, atol=2e-3)


def test_a_third_of_a_turn_makes_red_green_and_half_the_saturation_makes_it_pale() -> None:
    red = np.array([[200], [0], [0]], dtype=np.uint8)[:, None]
    assert Colours(hue_deg=120).apply(red).ravel().tolist() == [0, 200, 0]
    assert Colours(saturation=0.5).apply(red).ravel().tolist() == [200, 100, 100]
    assert Colours(hue_deg=-60, saturation=0.5).apply(red).ravel().tolist() == [200, 100, 200]


def test_contrast_stands_before_or_behind_and_only_the_end_is_cut_off() -> None:
    bright = np.full((3, 1, 1), 250, dtype=np.uint8)
    assert Colours(brightness=30, contrast=0.5).apply(bright).ravel().tolist() == [140, 140, 140]
    assert Colours(brightness=30).apply(bright).ravel().tolist() == [255, 255, 255]
    assert Colours(brightness=-30).apply(bright - np.uint8(250)).ravel().tolist() == [0, 0, 0]
    # A saturation beyond 1 scales with what stands before it, so that the order does not show; the cut-off would.
    pixel = np.array([200, 40, 120], dtype=np.uint8)[:, None, None]
    before, behind = (Colours(contrast=0.5, saturation=1.5, contrast_first=first) for first in (True, False))
    assert before.apply(pixel).ravel().tolist() == behind.apply(pixel).ravel().tolist() == [100, 0, 40]


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_colours_of_a_pixel_depend_on_that_pixel_alone(seed: int) -> None:
    image, colours = image_of(seed), drawn(seed)
    whole = colours.apply(image)
    order = np.random.default_rng(seed).permutation(77)
    shuffled = colours.apply(image.reshape(3, -1)[:, order].reshape(image.shape))
    np.testing.assert_array_equal(shuffled.reshape(3, -1), whole.reshape(3, -1)[:, order])


def test_big_images_are_changed_in_parts_as_in_one() -> None:
    image, colours = image_of(0, 100, 300), drawn(1, exchange_channels=False)
    expected = np.rint(colours.change(image.reshape(3, -1).astype(np.float32)).clip(0, 255))
    np.testing.assert_array_equal(colours.apply(image).reshape(3, -1), expected)


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_no_change_leaves_every_byte_and_grey_stays_grey(seed: int) -> None:
    image = image_of(seed)
    for same in (drawn(seed, probability=0.0), Colours(hue_deg=360.0), Colours(brightness=0.2)):
        np.testing.assert_array_equal(same.apply(image), image)
    grey = np.broadcast_to(image[:1], image.shape)
    changed = drawn(seed).apply(grey)
    assert (changed == changed[:1]).all()


def test_each_change_is_drawn_as_often_and_as_widely_as_told() -> None:
    rng = np.random.default_rng(0)
    many = [ColourAugConfig().draw(rng) for _ in range(4000)]
    spans = {
        "brightness": (-32, 32, 0),
        "contrast": (0.5, 1.5, 1),
        "saturation": (0.5, 1.5, 1),
        "hue_deg": (-18, 18, 0),
    }
    for name, (low, high, neutral) in spans.items():
        values = np.array([getattr(colours, name) for colours in many])
        changed = values[values != neutral]
        assert abs(len(changed) / len(many) - 0.5) < 0.03, name
        assert (
            low <= changed.min() < low + 0.02 * (high - low)
            and high - 0.02 * (high - low) < changed.max() <= high
        )
    assert abs(np.mean([colours.contrast_first for colours in many]) - 0.5) < 0.03
    exchanged = [colours.channels for colours in many if colours.channels != (0, 1, 2)]
    assert abs(len(exchanged) / len(many) - 0.5 * 5 / 6) < 0.03  # one order in six is the old one
    assert len(set(exchanged)) == 5


def visible_by_drawing(mask: GridMask, height: int, width: int) -> np.ndarray:
    """Draws bar after bar on a canvas of one and a half the image, then cuts the image out of its middle."""
    canvas = np.zeros((height * 3 // 2, width * 3 // 2), dtype=bool)
    rows, columns = canvas.shape
    for number in range(rows // mask.period):
        for row in range(mask.bar):
            if mask.first_row + number * mask.period + row < rows:
                canvas[mask.first_row + number * mask.period + row] = True
    for number in range(columns // mask.period):
        for column in range(mask.bar):
            if mask.first_column + number * mask.period + column < columns:
                canvas[:, mask.first_column + number * mask.period + column] = True
    top, left = (rows - height) // 2, (columns - width) // 2
    return canvas[top : top + height, left : left + width]


@given(SEEDS, st.integers(3, 60), st.integers(3, 90))
@settings(max_examples=100, deadline=None)
def test_bars_lie_where_drawing_them_one_by_one_puts_them(seed: int, height: int, width: int) -> None:
    mask = GridMaskConfig(probability=1.0).draw(np.random.default_rng(seed), height)
    assert mask is not None and 2 <= mask.period < height and 1 <= mask.bar < mask.period
    np.testing.assert_array_equal(mask.visible(height, width), visible_by_drawing(mask, height, width))


def test_a_mask_of_small_squares_hides_a_quarter_and_is_nothing_once_normalised() -> None:
    images = np.full((2, 3, 80, 160), 200, dtype=np.uint8)
    masked = GridMask(period=8, bar=4, first_row=0, first_column=0).apply(images)
    hidden = masked[0, 0] != 200
    assert hidden.mean() == 0.25 and images.min() == 200
    assert masked[1, :, *np.argwhere(hidden)[0]].tolist() == list(MEAN_BYTES)
    nothing = normalise_images(torch.from_numpy(masked))[..., torch.from_numpy(hidden)]
    assert nothing.abs().max() < 0.01


def test_a_mask_is_drawn_as_often_as_told() -> None:
    rng = np.random.default_rng(0)
    masks = [GridMaskConfig().draw(rng, 900) for _ in range(2000)]
    assert abs(np.mean([mask is not None for mask in masks]) - 0.7) < 0.03


def dataset_of(nuscenes: NuScenes, **kwargs) -> FrameDataset:
    train = kwargs.pop("train", True)
    frames, _ = frames_of_splits(nuscenes, ["train"])
    return FrameDataset(nuscenes, frames, msgspec.structs.replace(PLAIN, **kwargs), seed=5, train=train)


def images_of(dataset: FrameDataset, index: int = 1, draw: int = 3) -> np.ndarray:
    images = dataset[index, draw].images
    assert images is not None
    return images[0].numpy()


def test_a_sample_looks_the_same_for_the_same_seed_and_draw_and_else_not(tiny: NuScenes) -> None:
    look = {"colour_aug": ColourAugConfig(probability=1.0), "grid_mask": GridMaskConfig(probability=1.0)}
    dataset, again = dataset_of(tiny, **look), dataset_of(tiny, **look)
    images_of(again, 0, 2)  # what was read before does not matter
    np.testing.assert_array_equal(images_of(dataset), images_of(again))
    assert (images_of(dataset) != images_of(dataset, draw=4)).any()


def test_every_camera_has_colours_of_its_own_and_all_one_mask(tiny: NuScenes) -> None:
    plain = images_of(dataset_of(tiny))
    coloured = images_of(dataset_of(tiny, colour_aug=ColourAugConfig(probability=1.0)))
    factors = [np.polyfit(a.ravel(), b.ravel(), 1)[0] for a, b in zip(plain, coloured, strict=True)]
    assert len({round(float(factor), 3) for factor in factors}) == len(plain)
    masked = images_of(dataset_of(tiny, grid_mask=GridMaskConfig(probability=1.0)))
    mean = np.array(MEAN_BYTES, dtype=np.uint8)[:, None, None]
    hidden = (masked == mean).all(axis=(0, 1))
    assert 0 < hidden.mean() < 1
    np.testing.assert_array_equal(masked, np.where(hidden, mean, plain))


def test_earlier_frames_have_colours_and_no_mask_even_where_the_present_stands_in(tiny: NuScenes) -> None:
    past = PastConfig(num_frames=2)
    look = {"colour_aug": ColourAugConfig(), "grid_mask": GridMaskConfig(probability=1.0)}
    coloured = dataset_of(tiny, past=past, colour_aug=look["colour_aug"])
    both = dataset_of(tiny, past=past, **look)
    for index in range(len(both)):
        expected, found = coloured[index, 7], both[index, 7]
        assert expected.past is not None and found.past is not None
        for before, after in zip(expected.past.frames, found.past.frames, strict=True):
            assert before.images is not None and after.images is not None
            assert torch.equal(before.images, after.images)
        assert expected.images is not None and found.images is not None
        assert not torch.equal(expected.images, found.images)


def test_colours_and_masks_move_nothing_and_leave_other_augmentation_as_it_was(tiny: NuScenes) -> None:
    moves = {"image_aug": ImageAugConfig(), "bev_aug": BevAugConfig()}
    moved = dataset_of(tiny, **moves)[1, 3]
    look = dataset_of(tiny, **moves, colour_aug=ColourAugConfig(), grid_mask=GridMaskConfig())[1, 3]
    for name in ("cam2img", "cam2lidar", "image_aug", "bev_aug"):
        assert torch.equal(getattr(moved, name), getattr(look, name))


def test_outside_training_images_are_as_they_are(tiny: NuScenes) -> None:
    look = {"colour_aug": ColourAugConfig(probability=1.0), "grid_mask": GridMaskConfig(probability=1.0)}
    np.testing.assert_array_equal(
        images_of(dataset_of(tiny, train=False, **look)), images_of(dataset_of(tiny, train=False))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColourAugConfig(contrast=(1.5, 0.5)), r"contrast=\(1.5, 0.5\)"),
        (lambda: ColourAugConfig(saturation=(-0.5, 0.5)), r"saturation=\(-0.5, 0.5\)"),
        (lambda: ColourAugConfig(brightness=-1.0), "brightness=-1.0; choose a number from 0 to 255"),
        (lambda: ColourAugConfig(hue_deg=float("nan")), "hue_deg=nan"),
        (lambda: ColourAugConfig(probability=1.1), "probability=1.1"),
        (lambda: GridMaskConfig(bar_share=2.0), "bar_share=2.0"),
    ],
)
def test_settings_outside_their_range_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
