"""What a distillation is: taps, terms, weights, and what to do with frames that nobody labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ..classes import CLASSES
from ..config import Config
from ..errors import ConfigError
from .adapters import AdapterConfig, ConvAdapterConfig, LayeredAdapterConfig
from .attention import AttentionConfig
from .balance import BalanceConfig
from .masks import FalsePositiveScale, FalsePositiveSource, RegionConfig
from .relation import RelationConfig
from .response import ResponseConfig
from .teacher import TeacherCacheConfig
from .terms import ChannelStandardiseConfig, NormaliseConfig, Reduction


class TermConfig(Config, frozen=True):
    """A term's weight, and the training step from which it counts."""

    weight: float
    start_step: int = 0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(
                f"a term of weight {self.weight}; choose a positive weight, or None to leave it out"
            )


class FalsePositiveConfig(TermConfig, frozen=True):
    """Imitation where an object is seen and nobody annotated one.

    Attributes:
        source: who sees it. The teacher by its heat map ("heat") or by the boxes it decodes ("boxes", for heads
            without heat maps); others of the release by heat maps, see `false_positives`.
        scale: one over the cells of the whole region, as published, or of each connected component.
        channel_temperature: Tc of the channel attention that this term carries in the release, None for none.
    """

    source: FalsePositiveSource = "heat"
    scale: FalsePositiveScale = "region"
    channel_temperature: float | None = 0.5


class AttentionTermConfig(TermConfig, frozen=True):
    """The student's mean response should match the teacher's; `signed` as published, else of magnitudes."""

    signed: bool = True


class AttentiveCells(Config, frozen=True):
    """The cells that the tap's attention puts forward, one of two rules.

    `top`: attention above the sample's top-th largest; `above`: attention above this number (its mean is 1).
    """

    top: int | None = 30
    above: float | None = None

    def __post_init__(self) -> None:
        if (self.top is None) == (self.above is None):
            raise ConfigError(f"attentive cells by top={self.top} and above={self.above}; give one of them")
        if self.top is not None and self.top < 2:
            raise ConfigError(f"top={self.top} leaves no cell above it; choose 2 or more")


class AffinityTermConfig(TermConfig, frozen=True):
    """Inner products between the features of chosen cells should match the teacher's."""

    cells: Literal["foreground", "foreground_and_false_positive"] | AttentiveCells = "foreground"


class RelationTermConfig(TermConfig, frozen=True):
    """Similarities inside every box should match the teacher's."""

    relation: RelationConfig = RelationConfig()


class TapConfig(Config, frozen=True):
    """A pair of maps, one of the student and one of the teacher, and how the one imitates the other."""

    student: str = "head"
    teacher: str = "head"
    adapter: AdapterConfig = ConvAdapterConfig()
    normalise: NormaliseConfig | None = None
    attention: AttentionConfig | None = AttentionConfig()
    foreground: TermConfig | None = None
    background: TermConfig | None = None
    false_positive: FalsePositiveConfig | None = None
    attention_imitation: AttentionTermConfig | None = None
    affinity: AffinityTermConfig | None = None
    relation: RelationTermConfig | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise ConfigError(
                f"tap {self.student!r} has no term; give foreground, background, false_positive, "
                "attention_imitation, affinity or relation, or leave the tap out"
            )
        if self.affinity and isinstance(self.affinity.cells, AttentiveCells) and self.attention is None:
            raise ConfigError(
                f"tap {self.student!r}: affinity at attentive cells needs attention; set one, or choose other cells"
            )

    @property
    def terms(self) -> dict[str, TermConfig]:
        """The terms that this tap has, by the name under which they are logged."""
        terms = {
            "foreground": self.foreground,
            "background": self.background,
            "false_positive": self.false_positive,
            "attention": self.attention_imitation,
            "affinity": self.affinity,
            "relation": self.relation,
        }
        return {name: term for name, term in terms.items() if term is not None}

    def is_on(self, term: TermConfig | None, step: int | None) -> bool:
        """Whether a term counts at this step."""
        return term is not None and (term.start_step == 0 or (step is not None and step >= term.start_step))


class PseudoLabelConfig(Config, frozen=True):
    """What the teacher's detections are worth on frames that nobody labelled.

    Attributes:
        score_threshold: the score above which a detection counts, one for all classes or one by class name
            (a class that is not named is never taken).
        as_targets: they are the targets of the student's detection loss.
        imitate: such frames take part in imitation, with the detections as boxes.
    """

    score_threshold: float | dict[str, float] = 0.3
    as_targets: bool = True
    imitate: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.score_threshold, dict):
            for name in self.score_threshold:
                if name not in CLASSES:
                    raise ConfigError(
                        f"score_threshold names {name!r}, which is no class; classes are {', '.join(CLASSES)}"
                    )

    @property
    def thresholds(self) -> list[float]:
        """One threshold per class, in the order of `CLASSES`."""
        if isinstance(self.score_threshold, dict):
            return [self.score_threshold.get(name, float("inf")) for name in CLASSES]
        return [self.score_threshold] * len(CLASSES)


class DistillConfig(Config, frozen=True):
    """Everything that a student learns from its teacher. Without taps only the teacher's boxes are used.

    `fade_steps`: imitation and response fall to nothing over that many training steps (half a cosine), so that
    the student ends with its own task; None for constant weights.
    `balance`: weights say how strongly a term pulls at the student's map against the student's own loss.
    """

    taps: tuple[TapConfig, ...] = ()
    weight: float = 1.0
    response: ResponseConfig | None = None
    balance: BalanceConfig | None = None
    fade_steps: int | None = None
    regions: RegionConfig = RegionConfig()
    reduction: Reduction = "mean"
    pseudo_labels: PseudoLabelConfig = PseudoLabelConfig()
    cache: TeacherCacheConfig | None = None

    def __post_init__(self) -> None:
        names = [tap.student for tap in self.taps]
        if len(set(names)) < len(names):
            raise ConfigError(f"taps read the student's maps {names}; each may be tapped once")
        if self.weight <= 0:
            raise ConfigError(
                f"weight={self.weight}; choose a positive weight, or no taps to switch imitation off"
            )
        if self.fade_steps is not None and self.fade_steps < 1:
            raise ConfigError(f"fade_steps={self.fade_steps}; choose 1 or more, or null for constant weights")

    @property
    def has_schedule(self) -> bool:
        """Whether any term starts later than training does, fades, or is weighed anew now and then."""
        if self.fade_steps is not None or self.balance is not None:
            return True
        return any(term.start_step > 0 for tap in self.taps for term in tap.terms.values())

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term by the name under which it is logged."""
        weights = {
            f"imitate/{tap.student}/{name}": self.weight * term.weight
            for tap in self.taps
            for name, term in tap.terms.items()
        }
        for name, weight in [] if self.response is None else self.response.weights.items():
            weights[f"imitate/response/{name}"] = weight
        return weights

    def fade(self, step: int | None) -> float:
        """The share of imitation that is left at a training step."""
        if self.fade_steps is None or step is None:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(step / self.fade_steps, 1.0)))


def released_bevdepth4d() -> DistillConfig:
    """The launch script's settings for a BEVDepth4D student and a CenterPoint or MVP teacher, with quirks."""

    def tap(
        name: str, adapter: AdapterConfig, false_positive: FalsePositiveConfig | None = None
    ) -> TapConfig:
        return TapConfig(
            student=name,
            teacher=name,
            adapter=adapter,
            attention=AttentionConfig(temperature=0.5, student_share=1.0),
            foreground=TermConfig(weight=6e-3),
            background=TermConfig(weight=4e-2),
            false_positive=false_positive,
            attention_imitation=AttentionTermConfig(weight=2.5e-3),
        )

    layered = LayeredAdapterConfig(num_layers=3, upsample="align_corners")
    return DistillConfig(
        taps=(
            tap("stage1", layered),
            tap("stage2", layered),
            tap("head", ConvAdapterConfig(), FalsePositiveConfig(weight=6e-2, channel_temperature=0.5)),
        ),
        regions=RegionConfig(
            sample="corner", min_one_cell=False, object_scale="box_area", combined_scale=True
        ),
        reduction="sum",
    )


def released_bevformer() -> DistillConfig:
    """The launch script's settings for a BEVFormer student and a LiDARFormer or MVPFormer teacher."""
    return DistillConfig(
        taps=(
            TapConfig(
                attention=AttentionConfig(temperature=0.5, student_share=None),
                foreground=TermConfig(weight=5e-3),
                background=TermConfig(weight=4e-3),
                attention_imitation=AttentionTermConfig(weight=5e-4),
            ),
        ),
        regions=RegionConfig(min_one_cell=False, object_scale="box_area", combined_scale=True),
        reduction="sum",
    )


Z_SCORES = ChannelStandardiseConfig()
HALO_IGNORED = RegionConfig(halo="ignored")


def clean(
    taps: Sequence[str] = ("head",),
    *,
    weight: float = 0.1,
    normalise: NormaliseConfig | None = Z_SCORES,
    regions: RegionConfig = HALO_IGNORED,
) -> DistillConfig:
    """Imitation that keeps its size whatever the teacher, the channels and the objects are.

    Against the release: cell centres, every object covers a cell, the surroundings of objects are left alone,
    z-scored teacher channels, attention standardised before its softmax, errors averaged over channels. The
    false-positive term is on at the map before the head only, as published.
    """
    attention = AttentionConfig(standardise=True)
    return DistillConfig(
        taps=tuple(
            TapConfig(
                student=name,
                teacher=name,
                normalise=normalise,
                attention=attention,
                foreground=TermConfig(weight=1.0),
                background=TermConfig(weight=8.0),
                false_positive=FalsePositiveConfig(weight=8.0, channel_temperature=None)
                if name == "head"
                else None,
            )
            for name in taps
        ),
        weight=weight,
        regions=regions,
        reduction="mean",
    )
