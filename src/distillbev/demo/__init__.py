"""The main job: simulate, train a teacher, distil students, score them on held-out scenes, report."""

from .plan import Arm, DemoPlan, choose_plan
from .run import run_demo

__all__ = ["Arm", "DemoPlan", "choose_plan", "run_demo"]
