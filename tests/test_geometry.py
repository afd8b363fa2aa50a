import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distillbev.boxes import box_corners, transform_boxes
from distillbev.geometry import (
    invert_rigid,
    pose_matrix,
    project_to_image,
    quaternion_to_rotation,
    rotation_about_z,
    rotation_to_quaternion,
    transform_points,
    wrap_angle,
    yaw_of_rotation,
)

angles = st.floats(-10, 10)
metres = st.floats(-100, 100)
components = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(c * c for c in q) > 0.01)


@given(components)
def test_quaternion_and_rotation_are_a_round_trip(components):
    quat = np.array(components) / np.linalg.norm(components)
    back = rotation_to_quaternion(quaternion_to_rotation(quat))
    np.testing.assert_allclose(back * np.sign(back @ quat), quat, atol=1e-9)


@given(components, metres, metres, metres)
def test_inverse_of_a_rigid_motion_undoes_it(components, x, y, z):
    quat = np.array(components) / np.linalg.norm(components)
    motion = pose_matrix(np.array([x, y, z]), quaternion_to_rotation(quat))
    points = np.array([[1.0, 2.0, 3.0], [-4.0, 5.0, 60.0]])
    np.testing.assert_allclose(
        transform_points(invert_rigid(motion), transform_points(motion, points)), points, atol=1e-9
    )


@given(angles)
def test_wrapped_angle_points_the_same_way_and_lies_in_half_open_range(angle):
    wrapped = wrap_angle(np.array(angle))
    assert -np.pi < wrapped <= np.pi
    np.testing.assert_allclose([np.cos(wrapped), np.sin(wrapped)], [np.cos(angle), np.sin(angle)], atol=1e-9)


def test_quarter_turn_takes_forward_to_left():
    quarter = rotation_about_z(np.pi / 2)
    np.testing.assert_allclose(quarter @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(yaw_of_rotation(quarter), np.pi / 2)


def test_point_on_the_optical_axis_lands_on_the_principal_point():
    cam2img = np.eye(4)
    cam2img[:3, :3] = [[100, 0, 32], [0, 100, 24], [0, 0, 1]]
    pixels, depth = project_to_image(cam2img, np.array([[0, 0, 5.0], [1, -1, 10.0]]))
    np.testing.assert_allclose(pixels, [[32, 24], [42, 14]])
    np.testing.assert_allclose(depth, [5, 10])


def test_corners_of_a_turned_box_by_hand():
    box = np.array([[10, 0, 1, 4, 2, 2, np.pi / 2, 0, 0]])
    corners = box_corners(box)[0]
    np.testing.assert_allclose(
        corners[0], [9, 2, 0], atol=1e-12
    )  # front left, bottom: forward is +y, left is -x
    np.testing.assert_allclose(corners[6], [11, -2, 2], atol=1e-12)  # rear right, top


@given(angles, metres, metres, angles, st.floats(-30, 30), st.floats(-30, 30))
def test_corners_move_with_the_box_under_any_turn_and_shift(turn, x, y, yaw, vx, vy):
    box = np.array([[3.0, -2.0, 0.5, 4.0, 1.8, 1.5, yaw, vx, vy]])
    motion = pose_matrix(np.array([x, y, 1.0]), rotation_about_z(turn))
    moved = transform_boxes(motion, box)
    np.testing.assert_allclose(
        box_corners(moved)[0], transform_points(motion, box_corners(box)[0]), atol=1e-8
    )
    np.testing.assert_allclose(np.hypot(*moved[0, 7:9]), np.hypot(vx, vy), atol=1e-9)
