"""All detectors there are: what an experiment may name, and the module that each configuration describes.

A new detector is a file beside this one and a line in each of the unions below.
"""

from __future__ import annotations

from .bevdet import BevDet, BevDetConfig
from .bevformer import BevFormer, BevFormerConfig
from .centerpoint import CenterPoint, CenterPointConfig
from .lidar_query_teacher import LidarQueryTeacher, LidarQueryTeacherConfig

StudentConfig = BevDetConfig | BevFormerConfig
TeacherConfig = CenterPointConfig | LidarQueryTeacherConfig
Student = BevDet | BevFormer
Teacher = CenterPoint | LidarQueryTeacher


def build_student(config: StudentConfig) -> Student:
    """A camera detector with fresh weights."""
    return BevDet(config) if isinstance(config, BevDetConfig) else BevFormer(config)


def build_teacher(config: TeacherConfig) -> Teacher:
    """A LiDAR detector with fresh weights."""
    return CenterPoint(config) if isinstance(config, CenterPointConfig) else LidarQueryTeacher(config)
