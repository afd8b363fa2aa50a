from pathlib import Path

import numpy as np
import pytest

from distillbev.classes import CLASSES
from distillbev.data.object_pasting import (
    LabelledCloud,
    ObjectPastingConfig,
    build_database,
    footprints_overlap,
    paste_objects,
    points_in_box,
    read_database,
)
from distillbev.data.settings import DataConfig
from distillbev.errors import ConfigError, DataError

CAR = CLASSES.index("car")


def box(x: float, y: float, yaw: float = 0.0) -> np.ndarray:
    return np.array([x, y, 0, 4, 2, 2, yaw, 1, 0], dtype=np.float64)


def cloud_around(*boxes: np.ndarray) -> LabelledCloud:
    """Seven points in each box, and one far from all; 17 columns that count up."""
    places = [box[:3] + offset for box in boxes for offset in 0.1 * np.arange(7)[:, None]]
    points = np.zeros((len(places) + 1, 17), dtype=np.float32)
    points[:-1, :3] = np.array(places).reshape(-1, 3)
    points[-1, :3] = 80
    points[:, 16] = np.arange(len(points))
    return LabelledCloud(points, np.array(boxes).reshape(-1, 9), np.full(len(boxes), CAR))


def test_the_database_gives_back_every_object_with_its_points(tmp_path: Path) -> None:
    clouds = [cloud_around(box(10, 0), box(0, 10, 1.0)), cloud_around(box(-10, 0))]
    build_database(iter(clouds), tmp_path / "database", min_points=5)
    database = read_database(tmp_path / "database")
    assert len(database) == 3
    np.testing.assert_array_equal(database.points_of(0), clouds[0].points[:7])
    np.testing.assert_array_equal(database.points_of(2), clouds[1].points[:7])
    assert not list(tmp_path.glob(".*"))


def test_objects_with_too_few_points_are_left_out(tmp_path: Path) -> None:
    build_database([cloud_around(box(10, 0))], tmp_path / "database", min_points=8)
    assert len(read_database(tmp_path / "database")) == 0


def test_pasted_objects_collide_with_nothing_and_replace_the_points_below_them(tmp_path: Path) -> None:
    build_database([cloud_around(box(10, 0)), cloud_around(box(0, 10))], tmp_path / "database", 5)
    database = read_database(tmp_path / "database")
    frame = cloud_around(box(11, 0.5))  # in the way of the first object
    in_the_way = np.zeros((1, 17), dtype=np.float32)
    in_the_way[0, 1] = 10.5
    frame = LabelledCloud(np.concatenate([frame.points, in_the_way]), frame.boxes, frame.labels)
    result, pasted = paste_objects(frame, database, {"car": 3}, np.random.default_rng(0))
    assert pasted.tolist() == [1]
    assert result.labels.tolist() == [CAR, CAR]
    np.testing.assert_array_equal(result.points[-7:], database.points_of(1))
    assert len(result.points) == len(frame.points) - 1 + 7
    assert points_in_box(result.points, database.boxes[1]).sum() == 7


def test_a_frame_that_has_enough_gets_nothing(tmp_path: Path) -> None:
    build_database([cloud_around(box(10, 0))], tmp_path / "database", 5)
    frame = cloud_around(box(-10, 0), box(-20, 0))
    _, pasted = paste_objects(
        frame, read_database(tmp_path / "database"), {"car": 2}, np.random.default_rng(0)
    )
    assert len(pasted) == 0


def test_turned_footprints_overlap_where_their_areas_do() -> None:
    first = np.array([box(0, 0)])
    second = np.array([box(3.5, 0), box(0, 2.5), box(0, 2.5, np.pi / 2), box(4, 0), box(3.5, 2.5, np.pi / 4)])
    expected = [True, False, True, False, False]
    assert footprints_overlap(first, second)[0].tolist() == expected
    assert footprints_overlap(second, first)[:, 0].tolist() == expected


def test_pasting_is_refused_beside_images_and_with_unknown_classes() -> None:
    with pytest.raises(ConfigError, match="load_images=false"):
        DataConfig(object_pasting=ObjectPastingConfig())
    with pytest.raises(ConfigError, match="lorry"):
        ObjectPastingConfig(counts={"lorry": 2})


def test_a_damaged_database_is_told_in_one_line(tmp_path: Path) -> None:
    build_database([cloud_around(box(10, 0))], tmp_path / "database", 5)
    (tmp_path / "database" / "labels.npy").write_bytes(b"")
    with pytest.raises(DataError, match="delete the folder"):
        read_database(tmp_path / "database")
