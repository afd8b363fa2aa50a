"""A published checkpoint to our safetensors, with an account of every key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..config import write_config
from ..errors import CheckpointError
from ..models.bevdet import BevDetConfig
from ..models.detectors import StudentConfig, TeacherConfig
from ..train.checkpoint import save_weights
from ..train.experiment import Experiment
from ..train.loop import ADAPTERS_FILE, WEIGHTS_FILE
from .fit import Misfit, infer_config, misfit
from .pixels import Pixels, pixels_by_name, pixels_of_config, turn_stem
from .read import Published, read_published
from .rename import (
    BIAS_BEFORE_NORM,
    EGO_FRAME,
    TEACHER,
    Source,
    adapter_name,
    recognise,
    turn_classes,
    turn_deconv,
    turn_kernel,
    turn_weight,
    widen_origins,
)
from .runs import run_of, with_ground

FIRST_POINT_LAYER = re.compile(r"(pillars|points)\.(pfn_layers\.0\.(linear|0)|conv_input\.0)\.weight$")
# Input columns of that layer -> which of them is the time: of a pillar's points, of the means of voxels.
TIME_OF_COLUMNS = ({10: 4, 11: 4, 22: 16, 23: 16}, {5: 4, 23: 5})
CLASS_COLUMNS = (
    "it reads virtual points, whose columns 4 to 13 are classes; weights do not tell their order, "
    "ours is that of the detection challenge"
)
STEM, STEM_MEAN = "image_encoder.backbone.conv1.weight", "image_encoder.backbone.bn1.running_mean"


@dataclass
class Report:
    """What became of every key of a file, and what is left for the user to know."""

    source: str
    choice: str  # which weights of the file were taken
    boxes: str  # which box convention the file was taken to have, and why
    pixels: str | None = None  # how its images were normalised, and why
    remark: str | None = None  # of the source
    model: str = ""  # what the weights were held against
    used: list[str] = field(default_factory=list)  # name as it was
    renamed: list[tuple[str, str]] = field(default_factory=list)  # theirs, ours
    reordered: list[tuple[str, str]] = field(default_factory=list)  # theirs, what was done; of those above
    folded: list[tuple[str, str]] = field(default_factory=list)  # theirs, the entry of ours that took it in
    adapters: list[tuple[str, str]] = field(default_factory=list)  # theirs, ours; in a file of their own
    needless: list[str] = field(default_factory=list)  # follows from our configuration, or nothing reads it
    unused: list[str] = field(default_factory=list)  # no name of ours
    misfit: Misfit | None = None  # filled where `lax` let it pass

    @property
    def num_keys(self) -> int:
        """Of the file."""
        parts = (self.used, self.renamed, self.folded, self.adapters, self.needless, self.unused)
        return sum(map(len, parts))

    def __str__(self) -> str:
        heads = (
            ("source", self.source),
            ("weights", self.choice),
            ("boxes", self.boxes),
            ("pixels", self.pixels),
            ("note", self.remark),
            ("model", self.model),
        )
        lines = [f"used      {name}" for name in self.used]
        lines += [f"renamed   {theirs} -> {ours}" for theirs, ours in self.renamed]
        lines += [f"reordered {name}: {change}" for name, change in self.reordered]
        lines += [f"folded    {theirs} -> {ours}" for theirs, ours in self.folded]
        lines += [f"adapter   {theirs} -> {ours}" for theirs, ours in self.adapters]
        lines += [f"needless  {name}" for name in self.needless]
        lines += [f"unused    {name}" for name in self.unused]
        if self.misfit is not None:
            lines += [f"missing   {name}" for name in self.misfit.missing]
            lines += [f"surplus   {name}" for name in self.misfit.surplus]
            lines += [f"reshaped  {text}" for text in self.misfit.reshaped]
        lines += [f"{name}: {text}" for name, text in heads if text]  # last, where a terminal shows it
        lines.append(
            f"{len(self.used) + len(self.renamed)} keys carried ({len(self.renamed)} renamed, "
            f"{len(self.reordered)} reordered), {len(self.folded)} folded, {len(self.adapters)} of adapters, "
            f"{len(self.needless)} needless, {len(self.unused)} unused"
        )
        return "\n".join(lines)


@dataclass
class Converted:
    """Weights under our names, in our layouts and conventions, and what became of every key."""

    source: Source
    state: dict[str, Tensor]
    adapters: dict[str, Tensor]  # of distill-bev; as our `Distiller` names them
    new_boxes: bool  # whether the file's boxes were those from mmdetection3d 1.0 on
    report: Report


def import_weights(
    path: Path,
    out: Path,
    *,
    experiment: Experiment | None = None,
    lax: bool = False,
    version: str | None = None,
    pixels: str | None = None,
) -> Report:
    """Converts a published checkpoint, holds it against a model of ours and writes it.

    Args:
        path: `.pth`, or whatever torch.save wrote, or `.safetensors`; nothing in it is run.
        out: a new .safetensors file, whose metadata say where the weights come from, or a folder, which becomes
            that of a finished run (see `run_of`). Adapters go to a file beside the weights.
        experiment: whose student or teacher the weights are for; without one the model is inferred from shapes.
        lax: write what there is: keys without a name of ours are left out, keys that are missing or do not fit
            are told, not refused.
        version: of the mmdetection3d that trained it, as in "1.0.0"; as the file says if not given.
        pixels: how its images were normalised, a name of `pixels.PIXELS`; as the source had it if not given.

    Raises:
        CheckpointError: the file is absent, damaged, holds code, is of no known architecture, has keys without a
            name of ours, or does not fit the model (the last two unless `lax`), or `out` cannot be written.
    """
    if out.suffix not in ("", ".safetensors"):
        raise CheckpointError(
            f"{out}: not a name of what is written; end it in .safetensors, or name a folder"
        )
    published = read_published(path)
    try:
        converted = convert(published, version, pixels)
        config = _hold(converted, experiment, lax)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    report = converted.report
    told = {"from": path.name, "source": report.source, "weights": report.choice, "boxes": report.boxes}
    if report.pixels is not None:
        told["pixels"] = report.pixels
    weights, adapters = out, out.with_suffix(f".{ADAPTERS_FILE}")
    run = None
    if not out.suffix:
        if config is None or report.misfit:
            raise CheckpointError(
                f"{out}: no run can be made of parts; end the name in .safetensors to write them"
            )
        run = run_of(with_ground(config, published.config) if experiment is None else config, experiment)
        weights, adapters = out / WEIGHTS_FILE, out / ADAPTERS_FILE
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_weights(converted.state, weights, told)
    if converted.adapters:
        save_weights(converted.adapters, adapters, told)
    if run is not None:
        write_config(run, out / "experiment.yaml")
    return report


def convert(published: Published, version: str | None = None, pixels: str | None = None) -> Converted:
    """Weights under our names, in our layouts and conventions, and what became of every key.

    Args: `version` and `pixels` as `import_weights` has them.

    Raises:
        CheckpointError: no known architecture has such keys, or two keys come to one name.
    """
    tensors = published.tensors
    beside = {name for name in tensors if adapter_name(name) or name.startswith(TEACHER)}
    source = recognise([name for name in tensors if name not in beside])
    if pixels is not None and source.pixels is None:
        raise CheckpointError(
            f"pixels {pixels!r} for {source.title}, which sees no images; leave --pixels out"
        )
    new_boxes, reason = _box_convention(source, version, published.version)
    report = Report(source.title, published.choice, reason, remark=EGO_FRAME if source.ego_frame else None)
    made = Converted(source, {}, {}, new_boxes, report)
    # An older loss of distill-bev, whose other layers have no twin.
    older_loss = any(name.startswith("adaptation_layers.") for name in tensors)
    for name, value in sorted(tensors.items()):
        if name.startswith(TEACHER) or source.is_needless(name):
            report.needless.append(name)
        elif ours := adapter_name(name):
            if older_loss and name.startswith("channel_wise_adaptations."):
                report.unused.append(name)
            else:
                _put(made.adapters, ours, value, name)
                report.adapters.append((name, ours))
        elif ours := source.rename(name):
            turned = turn_weight(name, value, old_boxes=not new_boxes)
            sorted_rows = turn_classes(name, turned)
            laid = turn_kernel(sorted_rows)
            if turned is not value:
                report.reordered.append((name, "rows to our box code"))
            if sorted_rows is not turned:
                report.reordered.append((name, "rows to our order of classes"))
            if laid is not sorted_rows:
                report.reordered.append((name, "kernel of spconv 1 to spconv 2's layout"))
            if re.match(source.deconvs, name) and (plain := turn_deconv(laid)) is not laid:
                report.reordered.append((name, "1x1 kernel of a transposed convolution to a plain one's"))
                laid = plain
            widened = widen_origins(laid) if FIRST_POINT_LAYER.match(ours) else laid
            if widened is not laid:
                report.reordered.append((name, "21 columns of points to our 23"))
            _put(made.state, ours, widened, name)
            if ours == name:
                report.used.append(name)
            else:
                report.renamed.append((name, ours))
        else:
            report.unused.append(name)
    if source.kind == "teacher":
        _turn_time(made)
    if source.biases_before_norms:
        _fold_biases(made)
    if source.pixels is not None and STEM in made.state:
        _turn_stem(made, *_pixels(source, published, pixels, distilled=bool(report.adapters)))
    return made


def _put(state: dict[str, Tensor], ours: str, value: Tensor, theirs: str) -> None:
    if ours in state:
        raise CheckpointError(
            f"two keys come to {ours}, one of them {theirs}; expected one file of one model"
        )
    state[ours] = value


def _box_convention(source: Source, given: str | None, found: str | None) -> tuple[bool, str]:
    """Whether boxes are those from mmdetection3d 1.0 on, and how that is known."""
    if source.boxes is not None:
        return source.boxes == "new", f"{_era(source.boxes == 'new')} (as {source.title} has them)"
    version = given or found
    if version is None:
        return False, f"{_era(False)} (the file names no version; --mmdet3d says otherwise)"
    major = version.split(".")[0]
    if not major.isdigit():
        raise CheckpointError(f"mmdetection3d version {version!r}; expected one like 0.17.1 or 1.0.0")
    origin = "as told" if given else "as the file says"
    return int(major) >= 1, f"{_era(int(major) >= 1)} ({version}, {origin})"


def _era(new: bool) -> str:
    return "from mmdetection3d 1.0 on" if new else "before mmdetection3d 1.0"


def _turn_time(made: Converted) -> None:
    """Elsewhere the time of a point is how long ago it was measured, ours is negative before the key sweep."""
    theirs_of = {ours: theirs for theirs, ours in made.report.renamed}
    for name in [name for name in made.state if FIRST_POINT_LAYER.match(name)]:
        kernel = made.state[name].clone()
        column = TIME_OF_COLUMNS[kernel.ndim == 5].get(kernel.shape[-1])
        if column is not None:
            kernel[..., column] *= -1
            made.state[name] = kernel
            made.report.reordered.append((theirs_of[name], "sign of the points' time"))
        if kernel.shape[-1] in (22, 23):
            made.report.remark = CLASS_COLUMNS


def _fold_biases(made: Converted) -> None:
    """A norm that has learned the mean of conv(x) + bias is one that has learned the mean of conv(x), less the bias."""
    theirs_of = {ours: theirs for theirs, ours in made.report.renamed}
    for name in [name for name in made.state if re.match(BIAS_BEFORE_NORM, name)]:
        mean = re.sub(BIAS_BEFORE_NORM, r"\1.bn\2.running_mean", name)
        if mean in made.state:
            made.state[mean] = made.state[mean] - made.state.pop(name)
            made.report.renamed.remove((theirs_of[name], name))
            made.report.folded.append((theirs_of[name], mean))


def _pixels(source: Source, published: Published, given: str | None, distilled: bool) -> tuple[Pixels, str]:
    """How the images were normalised, and how that is known."""
    if given is not None:
        return pixels_by_name(given), "as told"
    # Its sizes differ in this; what other configurations say is not what their loaders do.
    if source.title == "BEVFormer":
        if published.config is not None and (found := pixels_of_config(published.config)):
            return found, "as the file's configuration says"
        deformable = any(name.endswith(".conv2.conv_offset.weight") for name in published.tensors)
        if deformable or distilled:
            whose = "deformable backbones" if deformable else "distill-bev"
            return pixels_by_name("bgr"), f"as {whose} had it; --pixels says otherwise"
    assert source.pixels is not None
    return pixels_by_name(source.pixels), f"as {source.title} has it; --pixels says otherwise"


def _turn_stem(made: Converted, pixels: Pixels, reason: str) -> None:
    made.report.pixels = f"{pixels.told} ({reason})"
    if pixels.is_ours:
        return
    made.state[STEM], constant = turn_stem(made.state[STEM], pixels)
    theirs = next(theirs for theirs, ours in made.report.renamed if ours == STEM)
    made.report.reordered.append((theirs, "channels and scale to our pixels"))
    if bool(constant.any()):
        if STEM_MEAN not in made.state:
            raise CheckpointError(
                f"no {STEM_MEAN}, which the mean of its pixels must go to; expected a ResNet's"
            )
        made.state[STEM_MEAN] = made.state[STEM_MEAN] - constant
        theirs = next(theirs for theirs, ours in made.report.renamed if ours == STEM_MEAN)
        made.report.reordered.append((theirs, "less what the mean of its pixels adds"))


def _hold(
    converted: Converted, experiment: Experiment | None, lax: bool
) -> StudentConfig | TeacherConfig | None:
    """The model that the weights are for; None where `lax` and too little is there to tell."""
    report, kind = converted.report, converted.source.kind
    if report.unused and not lax:
        raise CheckpointError(
            f"{len(report.unused)} of {report.num_keys} keys have no name in our {report.source} "
            f"(first: {', '.join(report.unused[:3])}); expected none, --lax leaves them out"
        )
    if experiment is not None:
        config = experiment.student if kind == "student" else experiment.teacher
        if config is None:
            raise CheckpointError(
                f"weights of a {kind}, and the recipe {experiment.name!r} has none; choose another"
            )
        report.model = f"the {kind} of {experiment.name}"
        hint = "choose the recipe of this architecture, or change a setting by --set"
        frame = "ego" if converted.source.ego_frame else "lidar"
        if isinstance(config, BevDetConfig) and config.frame != frame and not lax:
            raise CheckpointError(
                f"not {report.model}: found frame: {config.frame}, and the BEV map of {report.source} lies in the "
                f"{frame} frame; choose a recipe with student.frame: {frame}, or set it so"
            )
    else:
        try:
            config = infer_config(converted.state, converted.new_boxes, converted.source.ego_frame)
        except CheckpointError as error:
            if not lax:
                raise
            report.model = f"not told by the file ({error})"
            return None
        report.model = f"a {type(config).__name__.removesuffix('Config')} as the shapes tell"
        hint = "expected a whole detector; --recipe names the one meant, --lax writes what there is"
    found = misfit(converted.state, config)
    if found and not lax:
        raise CheckpointError(f"not {report.model}: {found}; {hint}")
    report.misfit = found or None
    return config
