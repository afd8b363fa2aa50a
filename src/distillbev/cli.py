"""The command line: each command is a thin function over one library function.

torch is imported inside the commands that need it, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from .errors import DistillBevError

if TYPE_CHECKING:
    from .data.findings import Finding

app = typer.Typer(
    help="Camera-only bird's-eye-view 3-D detectors that learn by imitating LiDAR detectors.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its panels double the time that --help takes
    context_settings={"max_content_width": 120},
    pretty_exceptions_enable=False,
)

DataRoot = Annotated[Path, typer.Option("--data", help="Folder of a nuScenes dataset, real or simulated.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Run = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
Split = Annotated[str, typer.Option("--split", help="Split of the dataset.")]
Sample = Annotated[
    str | None, typer.Option("--sample", help="Token of a key frame; the first one if not given.")
]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Change one setting, as in --set optim.steps=100; may be repeated.")
]


def main() -> None:
    """Runs a command; what the user caused is told in one line, without a traceback."""
    try:
        app()
    except DistillBevError as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; mend the path or its permissions, or make room")
    except SystemExit as end:
        if end.code == 130:  # typer makes it of ctrl-C
            typer.echo("interrupted; run the same command again to go on", err=True)
        raise


def fail(message: str) -> NoReturn:
    """Ends the program with one line, whatever the message."""
    typer.echo(f"error: {' '.join(message.splitlines())}", err=True)
    sys.exit(2)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder of the new dataset.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another world.")] = 0,
    scenes: Annotated[
        list[str], typer.Option("--scenes", help="SPLIT=COUNT, as in --scenes train=16; may be repeated.")
    ] = ["train=16", "val=4"],  # noqa: B006
    key_frames: Annotated[int, typer.Option(help="Key frames per scene (2 Hz).")] = 8,
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the six cameras, in pixels.")] = "352x198",
    overrides: Overrides = [],  # noqa: B006
    processes: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; one per core if not given.")
    ] = None,
) -> None:
    """Simulate a driving world and write it as a nuScenes dataset."""
    from .config import with_overrides
    from .world import SplitConfig, WorldConfig
    from .world import simulate as simulate_world

    config = WorldConfig(
        seed=seed,
        splits=tuple(SplitConfig(name=name, scenes=count) for name, count in map(_split_count, scenes)),
        key_frames_per_scene=key_frames,
        image_size_px=_image_size(image_size),
    )
    simulate_world(with_overrides(config, overrides), out, processes=processes)


@app.command()
def inspect(
    root: Annotated[Path, typer.Argument(help="Folder of a nuScenes dataset.")],
    sample: Sample = None,
    frames: Annotated[int, typer.Option(min=1, help="How many key frames, spread over the split.")] = 4,
    split: Annotated[
        str | None, typer.Option("--split", help="Split to draw from; all if not given.")
    ] = None,
    out: Out = Path("inspect"),
) -> None:
    """Draw boxes and points on the pixels and on the BEV, before any training."""
    from .data.samples import NuScenes
    from .report.inspection import inspect_sample
    from .scoring import spread_tokens

    nuscenes = NuScenes(root)
    tokens = [sample] if sample is not None else spread_tokens(nuscenes, split, frames)
    for token in tokens:
        for path in inspect_sample(nuscenes.sample(token), out):
            typer.echo(path)


@app.command()
def prepare(
    root: Annotated[Path, typer.Argument(help="Folder of a nuScenes dataset, or one of its v1.0-* folders.")],
    check: Annotated[
        bool, typer.Option("--check", help="Examine tables and files instead; 1 if faulty.")
    ] = False,
    files: Annotated[
        int, typer.Option(min=0, help="Of --check: files of each channel to decode, spread; 0 for all.")
    ] = 20,
) -> None:
    """Index the tables, so that opening takes no time; or find what is wrong with a dataset."""
    from .data.prepare import prepare as prepare_index

    if not check:
        typer.echo(prepare_index(root))
        return
    from .data.check import check_dataset

    _print_findings(check_dataset(root, files_per_channel=files or None))


@app.command("virtual-points")
def virtual_points(
    root: Annotated[Path, typer.Argument(help="Folder of a nuScenes dataset, real or simulated.")],
    masks: Annotated[
        Path | None,
        typer.Option(help="Mask files of a 2-D detector (docs/data.md); a world's own if not given."),
    ] = None,
    torchvision: Annotated[
        bool, typer.Option("--torchvision", help="Find masks with Mask R-CNN: 12-14 s per image on a CPU.")
    ] = False,
    degraded: Annotated[
        bool, typer.Option("--degraded", help="Give masks the errors of a 2-D detector.")
    ] = False,
    split: Annotated[str | None, typer.Option("--split", help="Split to prepare; all if not given.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; ROOT/virtual_points if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the pixels drawn.")] = 0,
    overrides: Overrides = [],  # noqa: B006
    processes: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; one per core if not given.")
    ] = None,
) -> None:
    """Prepare MVP's virtual points for a whole dataset; goes on where it was stopped."""
    from .config import with_overrides
    from .data.instance_masks import MaskErrors
    from .data.virtual_points import VirtualPointsConfig, prepare_folder

    config = VirtualPointsConfig(seed=seed, mask_errors=MaskErrors() if degraded else None)
    typer.echo(
        prepare_folder(
            root, with_overrides(config, overrides), masks, torchvision, split, out, processes, progress=True
        )
    )


@app.command("import-weights")
def import_weights(
    file: Annotated[Path, typer.Argument(help="Published checkpoint: .pth or .safetensors.")],
    out: Annotated[
        Path, typer.Argument(help="A new .safetensors file, or with --recipe the folder of a run.")
    ],
    recipe: Annotated[
        str | None, typer.Option(help="The model to hold them against; as their shapes tell if not given.")
    ] = None,
    lax: Annotated[
        bool,
        typer.Option("--lax", help="Write what there is: keys left out, missing or unfit are told only."),
    ] = False,
    mmdet3d: Annotated[
        str | None,
        typer.Option(help="Version of mmdetection3d that trained it; as the file says if not given."),
    ] = None,
    pixels: Annotated[
        str | None,
        typer.Option(
            help="Images it was trained on: rgb, bgr or swapped; as its authors had it if not given."
        ),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Convert published weights to ours, and report every key; nothing in the file is run."""
    from .recipes import experiment_from
    from .weights.convert import import_weights as convert_file

    experiment = recipe and experiment_from(recipe, Path(), None, None, overrides)
    typer.echo(
        convert_file(file, out, experiment=experiment or None, lax=lax, version=mmdet3d, pixels=pixels)
    )


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (see `recipes`), or an experiment.yaml.")],
    data: DataRoot,
    out: Out,
    teacher: Annotated[Path | None, typer.Option(help="Run folder of the trained teacher.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="Run folder whose weights the student starts from.")
    ] = None,
    seed: int | None = None,
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = True,
) -> None:
    """Train a teacher, a student, or a student that learns from a teacher."""
    import logging

    from .recipes import experiment_from
    from .train.loop import train as run_training

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun; the others tell faults only
    logging.getLogger("distillbev").setLevel(logging.INFO if first else logging.WARNING)
    experiment = experiment_from(recipe, data, teacher, seed, overrides, start)
    weights = run_training(experiment, out, resume=resume)
    if first:
        typer.echo(weights)


@app.command()
def evaluate(
    source: Annotated[
        Path, typer.Argument(help="Folder of a finished run, or an official results file of any detector.")
    ],
    data: DataRoot,
    split: Split = "val",
    out: Annotated[Path | None, typer.Option("--out", help="Folder; beside the source if not given.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="List all faults of a results file instead; 1 if faulty.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Score a trained detector or a results file: nuScenes metrics table, official results file."""
    from .scoring import check_file, evaluate_file, evaluate_run

    if source.is_dir():
        if check or overrides:
            fail(f"{source}: --check and --set are for results files; a run brings its own settings")
        scored = evaluate_run(source, data, split, out or source / f"evaluation-{split}")
        if scored is not None:  # the first of several processes tells
            typer.echo(scored.table)
        return
    if check:
        _print_findings(check_file(source, data, split))
        return
    folder = out or source.parent / f"{source.stem}-{split}"
    typer.echo(evaluate_file(source, data, split, folder, overrides).table)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A: a results file of any detector, or a run folder.")],
    second: Annotated[Path, typer.Argument(help="B: another one.")],
    data: DataRoot,
    split: Split = "val",
    out: Out = Path("comparison"),
    frames: Annotated[int, typer.Option(min=0, help="How many of the most different frames to show.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Draws of scenes for the intervals.")] = 1000,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Show two results side by side: tables with intervals, and a page with the frames that differ most."""
    from .scoring import compare_results

    typer.echo(compare_results(first, second, data, split, out, frames, repeats, overrides))
    typer.echo(f"\n{out / 'comparison.html'}")


@app.command()
def predict(
    run: Run,
    data: DataRoot,
    sample: Sample = None,
    out: Out = Path("prediction"),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score that is drawn.")] = 0.3,
) -> None:
    """Run a trained detector on one key frame; write its boxes and a picture."""
    from .scoring import predict_sample

    for path in predict_sample(run, data, sample, out, threshold):
        typer.echo(path)


@app.command()
def show(
    run: Run,
    data: DataRoot,
    split: Split = "val",
    frames: Annotated[int, typer.Option(min=1, help="How many key frames, spread over the split.")] = 6,
    out: Annotated[
        Path | None, typer.Option("--out", help="Page; report.html of the run if not given.")
    ] = None,
) -> None:
    """Write a page about a run: its settings, training curves, and detections beside the ground truth."""
    from .scoring import show_run

    typer.echo(show_run(run, data, split, frames, out or run / "report.html"))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="At most 5 minutes, worse numbers.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All arms, 3 seeds, 300 held-out frames.")] = False,
    large: Annotated[bool, typer.Option("--large", help="Bigger images and models, for a GPU.")] = False,
    arms: Annotated[str | None, typer.Option(help="Arms to run, with commas between them.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds.")] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
) -> None:
    """The main job: simulate, train a teacher, distil students, score them on held-out scenes, report."""
    from .demo import choose_plan, run_demo

    plan = choose_plan(quick=quick, full=full, large=large, arms=arms, seeds=seeds, first_seed=seed)
    run_demo(plan, out)


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing, and how to mend it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .doctor import examine

    findings = examine()
    table = Table("what", "found", "to mend")
    for finding in findings:
        table.add_row(*map(escape, (finding.subject, finding.found, finding.mend or "")))
    Console().print(table)
    if any(finding.fatal for finding in findings):
        raise typer.Exit(1)


@app.command()
def recipes() -> None:
    """List the recipes that `train` knows."""
    from rich.console import Console
    from rich.table import Table

    from .recipes import RECIPES

    table = Table("recipe", "what it trains")
    for name, recipe in RECIPES.items():
        table.add_row(name, (recipe.__doc__ or "").splitlines()[0])
    Console().print(table)


def _print_findings(findings: Iterable[Finding]) -> None:
    """A table of what is wrong; ends the command with 1 where that is an error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = list(findings)
    if not findings:
        typer.echo("nothing wrong was found")
        return
    table = Table("severity", "what", "count", "examples")
    for finding in findings:
        table.add_row(*map(escape, (finding.severity, finding.what, str(finding.count), finding.examples)))
    Console().print(table)
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(1)


def _split_count(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not name or not count.isdigit():
        raise typer.BadParameter(f"{text!r}; expected SPLIT=COUNT, as in train=16")
    return name, int(count)


def _image_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise typer.BadParameter(f"{text!r}; expected WIDTHxHEIGHT, as in 352x198")
    return int(width), int(height)
