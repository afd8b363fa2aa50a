"""Imitation of a frozen teacher: what is tapped, where and how strongly, and the module that does it."""

from .balance import gradient_norms
from .distiller import Distiller
from .inheritance import InheritanceReport, inherit_head
from .settings import (
    DistillConfig,
    PseudoLabelConfig,
    TapConfig,
    clean,
    released_bevdepth4d,
    released_bevformer,
)
from .teacher import TeacherCacheConfig

__all__ = [
    "DistillConfig",
    "Distiller",
    "InheritanceReport",
    "PseudoLabelConfig",
    "TapConfig",
    "TeacherCacheConfig",
    "clean",
    "gradient_norms",
    "inherit_head",
    "released_bevdepth4d",
    "released_bevformer",
]
