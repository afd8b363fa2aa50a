"""A whole run as one frozen value: what is trained, on what, and how."""

import math
from typing import Literal

from msgspec.structs import replace

from ..config import Config
from ..data.settings import DataConfig
from ..distill.settings import DistillConfig
from ..errors import ConfigError
from ..evaluation.metrics import DetectionEvalConfig
from ..models.bevdet import BevDetConfig
from ..models.detectors import StudentConfig, TeacherConfig
from .schedule import ScheduleConfig


class OptimConfig(Config, frozen=True):
    """AdamW with gradient clipping; one step sees `labelled_per_step` + `unlabelled_per_step` samples.

    `accumulate` splits a step's samples into that many forward passes; `ema_decay` keeps an average of the
    weights, which is then what is evaluated and saved as the result. What looks at the sensor first, a
    student's image backbone or a teacher's point encoder, learns at `backbone_lr_factor` times the rate of all
    else.
    """

    steps: int = 800
    labelled_per_step: int = 2
    unlabelled_per_step: int = 0
    accumulate: int = 1
    learning_rate: float = 2e-3
    backbone_lr_factor: float = 1.0
    weight_decay: float = 0.01
    clip_norm: float | None = 10.0
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decay: float | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    class_balanced: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 1 or more")
        for name in ("labelled_per_step", "unlabelled_per_step", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 0 or more")
        for name in ("learning_rate", "backbone_lr_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}; choose a number above 0")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm={self.clip_norm}; choose a norm above 0, or null for no clipping")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay}; choose a share between 0 and 1, or null for none")
        if self.labelled_per_step + self.unlabelled_per_step < 1:
            raise ConfigError("a step without samples; raise labelled_per_step or unlabelled_per_step")
        if self.accumulate > self.labelled_per_step + self.unlabelled_per_step:
            raise ConfigError(
                f"accumulate={self.accumulate} parts of fewer samples; choose at most one part each"
            )


class FaultConfig(Config, frozen=True):
    """What a run bears. It stops at what goes beyond, with what it has learned so far kept.

    `max_damaged_samples`: how many different samples may turn out to be unreadable; each is named in the log and
    replaced by the next one that is labelled like it. `max_dead_workers`: how often data workers that died
    (killed, or out of memory) are started anew; the batches are the same as without the death.
    """

    max_damaged_samples: int = 0
    max_dead_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("max_damaged_samples", "max_dead_workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 0 (stop at the first) or more")


class LogConfig(Config, frozen=True):
    """How often, in steps, the run writes down where it is."""

    log_every: int = 20
    checkpoint_every: int = 200
    gradient_norms_every: int | None = 100
    keep_checkpoints: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "gradient_norms_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; choose 1 or more")


class Experiment(Config, frozen=True):
    """Everything that a run depends on but the code.

    Without `student`, the teacher itself is trained. With `distill`, the student learns from the teacher whose
    weights lie in `teacher_weights`. `inherit_head` starts the student's head from the teacher's.
    With the task "depth" the student only learns how far away things are, from the LiDAR: it needs no labels,
    and its weights are where a detection run may start (`start_weights`).
    """

    name: str
    teacher: TeacherConfig | None = None
    student: StudentConfig | None = None
    distill: DistillConfig | None = None
    teacher_weights: str | None = None
    task: Literal["detection", "depth"] = "detection"
    start_weights: str | None = None
    inherit_head: bool = False
    data_root: str = ""
    labelled_splits: tuple[str, ...] = ("train",)
    unlabelled_splits: tuple[str, ...] = ()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()
    faults: FaultConfig = FaultConfig()
    evaluation: DetectionEvalConfig = DetectionEvalConfig()
    cache: bool = False  # keep what was read in memory; for worlds of a few hundred frames
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.student is None and self.teacher is None:
            raise ConfigError(f"experiment {self.name!r} trains nothing; give a teacher or a student")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 0 or more")
        if self.needs_teacher and self.teacher is None:
            raise ConfigError(
                f"experiment {self.name!r} learns from a teacher, but names none; set `teacher`"
            )
        if self.needs_teacher and isinstance(self.student, BevDetConfig) and self.student.frame == "ego":
            raise ConfigError(
                f"experiment {self.name!r}: the student's map lies in the ego frame, every teacher's in the LiDAR "
                'frame, so that cells differ; set student.frame="lidar", or train it without a teacher'
            )
        if self.distill is not None and self.student is None:
            raise ConfigError(f"experiment {self.name!r} has `distill` but no student; set `student`")
        if bool(self.optim.unlabelled_per_step) != bool(self.unlabelled_splits):
            raise ConfigError(
                f"unlabelled_per_step={self.optim.unlabelled_per_step} with unlabelled_splits="
                f"{list(self.unlabelled_splits)}; give both or neither"
            )
        lifts = isinstance(self.student, BevDetConfig) and self.student.depth_loss is not None
        if self.task == "depth" and not lifts:
            raise ConfigError(
                f"experiment {self.name!r} learns depth; choose a BevDet student and set `student.depth_loss`"
            )
        if self.unlabelled_splits and self.distill is None and self.task == "detection":
            raise ConfigError("unlabelled frames teach nothing without a teacher; set `distill` or drop them")

    @property
    def needs_teacher(self) -> bool:
        """Whether a trained teacher takes part in this run."""
        return self.distill is not None or self.inherit_head

    @property
    def training_data(self) -> DataConfig:
        """What training loads: no points where nobody looks at them, so that a rig without LiDAR will do."""
        lifts = isinstance(self.student, BevDetConfig) and self.student.depth_loss is not None
        looks_at_points = self.student is None or self.distill is not None or lifts
        return self.data if looks_at_points else replace(self.data, load_points=False)
