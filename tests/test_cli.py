"""Whole commands, as a user types them: what they leave behind, and what they say when something is wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REAL_FRAME
from safetensors.torch import save_file
from tiny_nuscenes import edit_table

from distillbev import cli
from distillbev.config import read_config, write_config
from distillbev.demo.plan import DemoPlan
from distillbev.recipes import RECIPES
from distillbev.train.checkpoint import read_weights
from distillbev.train.experiment import Experiment

SHORT = ("optim.steps=2", "optim.labelled_per_step=1", "data.image_size_px=[64,32]", "optim.precision=fp32")
TASKS = ("teacher", "student", "distilled")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `distillbev ARGS` inside this process."""

    def run(*args: str | Path) -> Ended:
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["distillbev", *map(str, args)])
            cli.main()
        shown = capsys.readouterr()
        return Ended(int(ended.value.code or 0), shown.out, shown.err)

    return run


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def train_args(
    recipe: str, data: Path, out: Path, *more: str | Path, changes: tuple[str, ...] = ()
) -> list[str]:
    args = ["train", recipe, "--data", data, "--out", out, *more, *settings(*SHORT, *changes)]
    return [str(arg) for arg in args]


@pytest.fixture(scope="module")
def runs(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of two steps: teacher, student and distilled. No test changes them."""
    folder = tmp_path_factory.mktemp("runs")
    for args in (
        train_args("tiny_centerpoint", tiny_root, folder / "teacher"),
        train_args("tiny_bevdet", tiny_root, folder / "student", changes=("log.checkpoint_every=1",)),
        train_args(
            "tiny_bevdet_from_centerpoint", tiny_root, folder / "distilled", "--teacher", folder / "teacher"
        ),
    ):
        cli.app(args, standalone_mode=False)
    return folder


@pytest.fixture
def student(runs: Path, tmp_path: Path) -> Path:
    """A finished student's run of one's own, to break."""
    return Path(shutil.copytree(runs / "student", tmp_path / "student"))


def unfinish(run: Path) -> None:
    """As if the run had been killed after its last checkpoint."""
    (run / "weights.safetensors").unlink()


def told(ended: Ended, *parts: str | Path) -> bool:
    """Whether the command ended with one line for the user that holds all these parts."""
    assert ended.code == 2, ended
    assert ended.err.startswith("error: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.err + ended.out
    missing = [str(part) for part in parts if str(part) not in ended.err]
    assert not missing, (missing, ended.err)
    return True


# Commands that work


def test_help_of_every_command_answers_without_torch():
    code = """
import sys
from distillbev.cli import app
for name in ("", *(c.name or c.callback.__name__ for c in app.registered_commands)):
    try:
        app([name, "--help"] if name else ["--help"])
    except SystemExit as end:
        assert end.code == 0, name
heavy = {"torch", "numpy", "PIL", "msgspec"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in (
        "simulate",
        "inspect",
        "train",
        "evaluate",
        "predict",
        "show",
        "demo",
        "doctor",
        "recipes",
    ):
        assert command in done.stdout


def test_recipes_lists_every_recipe(command: Command):
    shown = command("recipes")
    assert shown.code == 0
    assert all(name in shown.out for name in RECIPES)


@pytest.mark.parametrize("task", TASKS)
def test_a_finished_run_is_complete(runs: Path, task: str):
    run = runs / task
    assert read_config(run / "experiment.yaml", Experiment).optim.steps == 2
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert all(tensor.isfinite().all() for tensor in read_weights(run / "weights.safetensors").values())


@pytest.mark.parametrize("task", TASKS)
def test_a_run_can_be_evaluated_and_leaves_the_official_results(
    command: Command, runs: Path, tiny_root: Path, tmp_path: Path, task: str
):
    shown = command("evaluate", runs / task, "--data", tiny_root, "--out", tmp_path / "scores")
    assert shown.code == 0, shown.err
    assert "mAP" in shown.out and "NDS" in shown.out
    results = json.loads((tmp_path / "scores" / "results_nusc.json").read_text())
    assert set(results["results"]) == {f"scene-a-sample-{i}" for i in range(3)}
    assert results["meta"]["use_lidar"] == (task == "teacher")
    assert "mean_ap" in (tmp_path / "scores" / "metrics_summary.json").read_text()


def test_a_prediction_is_boxes_and_two_pictures(
    command: Command, runs: Path, tiny_root: Path, tmp_path: Path
):
    shown = command(
        "predict", runs / "distilled", "--data", tiny_root, "--sample", "scene-b-sample-1", "--out", tmp_path
    )
    assert shown.code == 0, shown.err
    written = [Path(line) for line in shown.out.splitlines()]
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert {path.name for path in written} == {
        f"scene-b-sample-1{ending}" for ending in (".json", "_cameras.jpg", "_bev.png")
    }
    scores = [box["score"] for box in json.loads((tmp_path / "scene-b-sample-1.json").read_text())]
    assert scores == sorted(scores, reverse=True)


def test_show_writes_one_page_that_needs_nothing_else(
    command: Command, runs: Path, tiny_root: Path, tmp_path: Path
):
    shown = command(
        "show",
        runs / "student",
        "--data",
        tiny_root,
        "--frames",
        "1",
        "--out",
        tmp_path / "new" / "page.html",
    )
    assert shown.code == 0, shown.err
    page = (tmp_path / "new" / "page.html").read_text()
    assert "tiny_bevdet" in page and "<svg" in page and "data:image" in page
    assert 'src="http' not in page and 'href="http' not in page


def test_inspect_draws_as_many_frames_as_asked_for(command: Command, tiny_root: Path, tmp_path: Path):
    shown = command("inspect", tiny_root, "--frames", "2", "--split", "val", "--out", tmp_path)
    assert shown.code == 0, shown.err
    assert len(shown.out.splitlines()) == len(list(tmp_path.iterdir())) == 2 * 4


def test_a_finished_run_is_not_trained_again(command: Command, student: Path, tiny_root: Path):
    before = (student / "weights.safetensors").stat().st_mtime_ns
    changes = ("log.checkpoint_every=1",)
    ended = command(*train_args("tiny_bevdet", tiny_root, student, changes=changes))
    assert (ended.code, ended.out) == (0, f"{student / 'weights.safetensors'}\n")
    assert (student / "weights.safetensors").stat().st_mtime_ns == before


def test_an_experiment_file_is_a_recipe(command: Command, runs: Path, tiny_root: Path, tmp_path: Path):
    recipe = runs / "student" / "experiment.yaml"
    shown = command("train", recipe, "--data", tiny_root, "--out", tmp_path / "again")
    assert shown.code == 0, shown.err
    first, second = (
        read_weights(run / "weights.safetensors") for run in (runs / "student", tmp_path / "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_distilled_run_takes_the_number_of_sweeps_from_its_teacher(
    command: Command, tiny_root: Path, tmp_path: Path
):
    changes = ("data.num_sweeps=1",)
    assert (
        command(*train_args("tiny_centerpoint", tiny_root, tmp_path / "teacher", changes=changes)).code == 0
    )
    command(
        *train_args(
            "tiny_bevdet_from_centerpoint", tiny_root, tmp_path / "run", "--teacher", tmp_path / "teacher"
        )
    )
    assert read_config(tmp_path / "run" / "experiment.yaml", Experiment).data.num_sweeps == 1


def test_a_fresh_student_starts_from_the_backbone_weights_given(
    command: Command, runs: Path, tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trained = read_weights(runs / "student" / "weights.safetensors")
    prefix = "image_encoder.backbone."
    backbone = {key.removeprefix(prefix): value for key, value in trained.items() if key.startswith(prefix)}
    save_file(backbone, tmp_path / "backbone.safetensors")
    changes = (
        f"student.image_encoder.weights={tmp_path / 'backbone.safetensors'}",
        "optim.learning_rate=1e-9",
    )
    assert command(*train_args("tiny_bevdet", tiny_root, tmp_path / "run", changes=changes)).code == 0
    assert (
        f"image backbone: {tmp_path / 'backbone.safetensors'}: {len(backbone)} tensors loaded" in caplog.text
    )
    learned = read_weights(tmp_path / "run" / "weights.safetensors")
    weights = [key for key in backbone if key.endswith("weight")]
    assert all(torch.allclose(learned[prefix + key], backbone[key], atol=1e-6) for key in weights)


def test_ctrl_c_tells_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distillbev.doctor.examine", interrupt)
    ended = command("doctor")
    assert ended.code == 130
    assert ended.err == "interrupted; run the same command again to go on\n"


def test_a_killed_training_resumes_to_the_numbers_of_an_uninterrupted_one(
    command: Command, runs: Path, tiny_root: Path, tmp_path: Path
):
    def args(out: Path) -> list[str]:
        changes = ("optim.steps=30", "log.log_every=1", "log.checkpoint_every=3")
        teacher = ("--teacher", runs / "teacher")
        return train_args("tiny_bevdet_from_centerpoint", tiny_root, out, *teacher, changes=changes)

    log = tmp_path / "killed" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "distillbev", *args(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        while not log.exists() or log.read_bytes().count(b"\n") < 8:
            assert process.poll() is None, "training ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        _, complaints = process.communicate()
    assert complaints == b""
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    with log.open("a") as file:  # as a kill in the middle of writing a line leaves it
        file.write('{"step": 12, "lo')

    for run in ("killed", "whole"):
        assert command(*args(tmp_path / run)).code == 0
    resumed, whole = (read_log(tmp_path / run) for run in ("killed", "whole"))
    assert [line["step"] for line in resumed] == list(range(30))
    assert resumed == whole
    first, second = (read_weights(tmp_path / run / "weights.safetensors") for run in ("killed", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def read_log(run: Path) -> list[dict[str, float]]:
    """The log without what a run cost."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    cost = ("seconds_per_step", "data_seconds_per_step", "peak_memory_gb")
    return [{name: value for name, value in line.items() if name not in cost} for line in lines]


# The real frame


@pytest.fixture(scope="module")
def real_root() -> Path:
    if not REAL_FRAME.is_dir():
        pytest.skip(f"the real nuScenes frame is not there ({REAL_FRAME.name})")
    return REAL_FRAME


def test_every_command_works_on_the_real_frame(command: Command, real_root: Path, tmp_path: Path):
    shown = command("inspect", real_root, "--out", tmp_path / "inspect")
    assert shown.code == 0, shown.err
    assert len(list((tmp_path / "inspect").iterdir())) == 4

    everything = ("labelled_splits=[all]",)
    for recipe, run, more in (
        ("tiny_centerpoint", "teacher", ()),
        ("tiny_bevdet", "student", ()),
        ("tiny_bevdet_from_centerpoint", "distilled", ("--teacher", tmp_path / "teacher")),
    ):
        shown = command(*train_args(recipe, real_root, tmp_path / run, *more, changes=everything))
        assert shown.code == 0, shown.err

    shown = command("predict", tmp_path / "distilled", "--data", real_root, "--out", tmp_path / "prediction")
    assert shown.code == 0, shown.err
    assert len(list((tmp_path / "prediction").iterdir())) == 3
    shown = command("show", tmp_path / "distilled", "--data", real_root, "--split", "all")
    assert shown.code == 0, shown.err
    assert (tmp_path / "distilled" / "report.html").exists()


# Damaged data


def table_lost(root: Path) -> None:
    (root / "v1.0-mini" / "instance.json").unlink()


def table_cut_off(root: Path) -> None:
    path = root / "v1.0-mini" / "ego_pose.json"
    path.write_bytes(path.read_bytes()[:-100])


def link_broken(root: Path) -> None:
    edit_table(root, "sample_data", lambda rows: [row.update(ego_pose_token="gone") for row in rows])


def images_lost(root: Path) -> None:
    for path in root.glob("samples/CAM_FRONT/*.jpg"):
        path.unlink()


def images_cut_off(root: Path) -> None:
    for path in root.glob("samples/CAM_FRONT/*.jpg"):
        path.write_bytes(path.read_bytes()[:900])


def sweeps_lost(root: Path) -> None:
    for path in root.glob("samples/LIDAR_TOP/*.bin"):
        path.unlink()


def sweeps_cut_off(root: Path) -> None:
    for path in root.glob("samples/LIDAR_TOP/*.bin"):
        path.write_bytes(path.read_bytes()[:-7])


def no_version_folder(root: Path) -> None:
    (root / "v1.0-mini").rename(root / "mini")


def two_version_folders(root: Path) -> None:
    shutil.copytree(root / "v1.0-mini", root / "v1.0-test")


def boxes_not_finite(root: Path) -> None:
    def spoil(rows: list[dict]) -> None:
        for row in rows:
            row["translation"][1] = float("nan")

    edit_table(root, "sample_annotation", spoil)


def images_of_another_size(root: Path) -> None:
    def spoil(rows: list[dict]) -> None:
        for row in rows:
            if row["width"]:
                row.update(width=1600, height=900)

    edit_table(root, "sample_data", spoil)


def no_dataset(root: Path) -> None:
    shutil.rmtree(root)


DAMAGE = {
    table_lost: ("v1.0-mini/instance.json: no such table", "copy it or write it again"),
    table_cut_off: ("v1.0-mini/ego_pose.json", "not a JSON table", "copy or write it again"),
    link_broken: ("sample_data.json, token", "ego_pose_token 'gone' is not in ego_pose.json"),
    images_lost: ("samples/CAM_FRONT/", ".jpg: no such image", "copy it again"),
    images_cut_off: ("samples/CAM_FRONT/", ".jpg (900 bytes): unreadable image", "copy the file again"),
    sweeps_lost: ("samples/LIDAR_TOP/", ".pcd.bin: no such LiDAR file", "copy it again"),
    sweeps_cut_off: (".pcd.bin: 1033 bytes, expected a multiple of 20", "copy it again"),
    no_version_folder: ("expected a nuScenes folder", "found no v1.0-* folder", "check the path"),
    two_version_folders: ("found v1.0-mini, v1.0-test", "give one of them, as in"),
    boxes_not_finite: ("sample_annotation.json, token", "nan", "expected", "mend or delete"),
    images_of_another_size: ("the image is 160x90 pixels, sample_data.json says 1600x900", "mend the table"),
    no_dataset: ("no such folder; expected a nuScenes folder",),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_data_is_told_in_one_line_and_nothing_is_left_behind(
    command: Command, runs: Path, spoilt_root: Path, tmp_path: Path, damage: Callable[[Path], None]
):
    damage(spoilt_root)
    recipe, run = "tiny_bevdet", runs / "student"
    if damage in (sweeps_lost, sweeps_cut_off):
        recipe, run = "tiny_centerpoint", runs / "teacher"
    out = tmp_path / "out"
    for args in (
        train_args(recipe, spoilt_root, out),
        ("evaluate", run, "--data", spoilt_root, "--out", out),
        ("predict", run, "--data", spoilt_root, "--out", out),
        ("show", run, "--data", spoilt_root, "--out", out / "page.html"),
        ("inspect", spoilt_root, "--out", out),
    ):
        assert told(command(*args), *DAMAGE[damage])
        assert not out.exists(), args


def test_one_of_several_versions_can_be_chosen(command: Command, spoilt_root: Path, tmp_path: Path):
    two_version_folders(spoilt_root)
    shown = command("inspect", spoilt_root / "v1.0-mini", "--frames", "1", "--out", tmp_path / "inspect")
    assert shown.code == 0, shown.err


def test_data_that_breaks_in_mid_run_stops_it_and_a_mended_run_goes_on(
    command: Command, spoilt_root: Path, tmp_path: Path
):
    """Frames of which a later step is the first to need one: nothing is skipped silently."""
    lost = spoilt_root / "samples" / "CAM_BACK" / "scene-b-CAM_BACK-1.jpg"
    content = lost.read_bytes()
    lost.unlink()
    changes = ("optim.steps=8", "seed=0", "log.log_every=1", "log.checkpoint_every=1")
    while True:  # a seed that shows the lost frame in the middle of the first round
        args = train_args("tiny_bevdet", spoilt_root, tmp_path / "run", changes=changes)
        ended = command(*args)
        assert told(ended, lost, "no such image")
        if (tmp_path / "run").exists():
            break
        changes = (changes[0], f"seed={int(changes[1][5:]) + 1}", *changes[2:])
    lost.write_bytes(content)
    assert command(*args).code == 0
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(8))


# What a user mistypes


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("train tiny_bevdt --data {data} --out {out}", ["no recipe 'tiny_bevdt'", "tiny_bevdet", "recipes"]),
        (
            "train absent.yaml --data {data} --out {out}",
            ["absent.yaml: no such file", "expected a Experiment"],
        ),
        (
            "train tiny_bevdet --data {data} --out {out} --set optim.step=3",
            ["--set optim.step=3", "no setting 'optim.step'", "optim.steps"],
        ),
        ("train tiny_bevdet --data {data} --out {out} --set optim.steps", ["expected KEY=VALUE"]),
        (
            "train tiny_bevdet --data {data} --out {out} --set optim.steps=many",
            ["Expected `int`, got `str`", "optim.steps"],
        ),
        ("train tiny_bevdet --data {data} --out {out} --set optim.steps=[", ["not a YAML value"]),
        ("train tiny_bevdet --data {data} --out {out} --set optim.steps=0", ["steps=0; choose 1 or more"]),
        ("train tiny_bevdet --data {data} --out {out} --set optim.steps=-3", ["steps=-3; choose 1 or more"]),
        ("train tiny_bevdet --data {data} --out {out} --set log.log_every=0", ["log_every=0; choose 1"]),
        (
            "train tiny_bevdet --data {data} --out {out} --set optim.learning_rate=-1e-3",
            ["learning_rate=-0.001; choose a number above 0"],
        ),
        ("train tiny_bevdet --data {data} --out {out} --seed -1", ["seed=-1; choose 0 or more"]),
        (
            "train tiny_bevdet --data {data} --out {out} --set labelled_splits=[tain]",
            ["no split 'tain'", "train, val", "name one of them"],
        ),
        (
            "train tiny_bevdet --data {data} --out {out} --teacher {runs}/teacher",
            ["'tiny_bevdet' learns from no teacher", "drop --teacher"],
        ),
        (
            "train tiny_bevdet_from_centerpoint --data {data} --out {out}",
            ["needs a trained teacher, found none", "--teacher"],
        ),
        (
            "train tiny_bevdet_from_centerpoint --data {data} --out {out} --teacher {runs}/student",
            ["trained 'tiny_bevdet', no LiDAR teacher", "give the run of a teacher"],
        ),
        (
            "train tiny_bevdet_from_centerpoint --data {data} --out {out} --teacher {runs}/nobody",
            ["nobody: no experiment.yaml", "expected a run folder"],
        ),
        (
            "train tiny_bevdet --data {data} --out {out} --set student.image_encoder.weights=nowhere.pth",
            ["nowhere.pth: no such file"],
        ),
        ("evaluate {runs}/student --data {data} --out {out} --split test", ["no split 'test'", "train, val"]),
        ("show {runs}/student --data {data} --out {out} --split test", ["no split 'test'", "train, val"]),
        ("inspect {data} --out {out} --split test", ["no split 'test'", "train, val"]),
        ("inspect {data} --out {out} --sample nobody", ["sample.json: no sample 'nobody' among 6"]),
        (
            "predict {runs}/student --data {data} --out {out} --sample nobody",
            ["sample.json: no sample 'nobody' among 6", "give a token"],
        ),
        ("evaluate {data} --data {data} --out {out}", ["no experiment.yaml", "expected a run folder"]),
        ("predict {data} --data {data} --out {out}", ["no experiment.yaml", "expected a run folder"]),
        ("show {data} --data {data} --out {out}", ["no experiment.yaml", "expected a run folder"]),
        ("demo --quick --full --out {out}", ["--quick and --full exclude one another", "give at most one"]),
        ("demo --arms alone,distiled --out {out}", ["--arms names distiled", "choose from teacher, alone"]),
        ("demo --seeds 0 --out {out}", ["seeds=[]", "at least one"]),
        ("demo --seed -1 --out {out}", ["seeds=[-1]", "none below 0"]),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_left_behind(
    command: Command, runs: Path, tiny_root: Path, tmp_path: Path, args: str, parts: list[str]
):
    out = tmp_path / "out"
    ended = command(*args.format(data=tiny_root, runs=runs, out=out).split())
    assert told(ended, *parts)
    assert not out.exists()


@pytest.mark.parametrize(
    "args",
    [
        "train tiny_bevdet --data {data} --out {out} --stepz 3",
        "train tiny_bevdet --out {out}",
        "trian tiny_bevdet",
        "inspect {data} --frames 0 --out {out}",
        "predict {data} --data {data} --threshold 7 --out {out}",
        "simulate {out} --scenes train",
        "simulate {out} --image-size 352",
        "simulate {out} --seed -1",
        "simulate {out} --processes 0",
    ],
)
def test_wrong_usage_is_told_with_a_hint_and_no_traceback(
    command: Command, tiny_root: Path, tmp_path: Path, args: str
):
    out = tmp_path / "out"
    ended = command(*args.format(data=tiny_root, out=out).split())
    assert ended.code == 2
    assert "Usage" in ended.err and "Traceback" not in ended.err
    assert not out.exists()


# Runs that are not what they should be


def test_a_folder_with_another_run_is_refused_with_the_first_difference(
    command: Command, student: Path, tiny_root: Path
):
    ended = command(*train_args("tiny_bevdet", tiny_root, student, changes=("optim.clip_norm=2.0",)))
    assert told(ended, student, "its optim.clip_norm is 10.0, this one's 2.0", "choose another --out")


def test_a_run_is_not_begun_again_over_itself(command: Command, student: Path, tiny_root: Path):
    changes = ("log.checkpoint_every=1",)
    ended = command(*train_args("tiny_bevdet", tiny_root, student, "--no-resume", changes=changes))
    assert told(ended, student, "holds this run already")


def test_a_folder_with_foreign_files_is_refused_and_left_as_it_is(
    command: Command, tiny_root: Path, tmp_path: Path
):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("do not touch")
    ended = command(*train_args("tiny_bevdet", tiny_root, tmp_path / "thesis"))
    assert told(ended, tmp_path / "thesis", "not empty and holds no run", "choose another --out")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_place_of_the_output_folder_is_refused(
    command: Command, tiny_root: Path, tmp_path: Path, below: bool
):
    (tmp_path / "file").write_text("do not touch")
    out = tmp_path / "file" / "run" if below else tmp_path / "file"
    assert told(command(*train_args("tiny_bevdet", tiny_root, out)), tmp_path / "file", "mend the path")
    assert told(command("inspect", tiny_root, "--frames", "1", "--out", out), tmp_path / "file")


@pytest.mark.parametrize("verb", ["evaluate", "predict", "show"])
def test_an_unfinished_run_is_not_used(
    command: Command, student: Path, tiny_root: Path, tmp_path: Path, verb: str
):
    unfinish(student)
    ended = command(verb, student, "--data", tiny_root, "--out", tmp_path / "out")
    assert told(ended, student, "no weights.safetensors yet", "let `distillbev train` finish")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["evaluate", "predict", "show"])
def test_weights_of_another_architecture_are_refused(
    command: Command, runs: Path, student: Path, tiny_root: Path, tmp_path: Path, verb: str
):
    shutil.copy(runs / "teacher" / "weights.safetensors", student / "weights.safetensors")
    ended = command(verb, student, "--data", tiny_root, "--out", tmp_path / "out")
    assert told(
        ended, student / "weights.safetensors", "another architecture than BevDet", "keys are missing"
    )
    assert not (tmp_path / "out").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "part"),
    [(Path.unlink, "let `distillbev train` finish"), (truncate, "not readable as safetensors")],
)
def test_a_teacher_without_sound_weights_is_refused(
    command: Command,
    runs: Path,
    tiny_root: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    part: str,
):
    teacher = Path(shutil.copytree(runs / "teacher", tmp_path / "teacher"))
    spoil(teacher / "weights.safetensors")
    args = train_args("tiny_bevdet_from_centerpoint", tiny_root, tmp_path / "out", "--teacher", teacher)
    assert told(command(*args), teacher, "weights.safetensors", part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("optim: [1, 2", "not a valid Experiment"),
        ("", "Expected `object`, got `null`"),
        ("type: Experiment\nname: x\nstudent: {type: BevDetConfig}\nstepz: 1\n", "stepz"),
        ("\0\0\0\0", "not a valid Experiment"),
    ],
)
def test_a_damaged_experiment_file_is_told(
    command: Command, student: Path, tiny_root: Path, content: str, part: str
):
    (student / "experiment.yaml").write_text(content)
    for args in (train_args("tiny_bevdet", tiny_root, student), ("evaluate", student, "--data", tiny_root)):
        assert told(command(*args), student / "experiment.yaml", part, "mend the file")


def test_a_damaged_line_of_the_log_is_named(command: Command, student: Path, tiny_root: Path):
    unfinish(student)
    (student / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\nrubbish\n')
    args = train_args("tiny_bevdet", tiny_root, student, changes=("log.checkpoint_every=1",))
    assert told(command(*args), student / "metrics.jsonl", "line 2: found 'rubbish'", "delete the line")
    (student / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert command(*args).code == 0


@pytest.mark.parametrize("file", ["model", "average", "optimizer"])
def test_a_damaged_checkpoint_tells_which_folder_to_delete_and_then_the_run_goes_on(
    command: Command, student: Path, tiny_root: Path, file: str
):
    unfinish(student)
    newest = student / "checkpoints" / "step-0000001"
    truncate(newest / f"{file}.safetensors")
    args = train_args("tiny_bevdet", tiny_root, student, changes=("log.checkpoint_every=1",))
    ended = command(*args)
    assert told(ended, newest / f"{file}.safetensors", "not readable", f"delete {newest} to go on")
    shutil.rmtree(newest)
    assert command(*args).code == 0


def test_a_demo_folder_with_another_plan_is_refused(command: Command, tmp_path: Path):
    write_config(DemoPlan(), tmp_path / "plan.yaml")
    ended = command("demo", "--quick", "--out", tmp_path)
    assert told(
        ended, tmp_path, "another plan", "labelled_scenes is 16, this one's 8", "choose another --out"
    )


def test_a_demo_folder_with_foreign_files_is_refused(command: Command, tmp_path: Path):
    (tmp_path / "chapter.txt").write_text("do not touch")
    assert told(command("demo", "--quick", "--out", tmp_path), tmp_path, "not empty", "choose another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["chapter.txt"]


# The same through the program itself


def test_the_program_tells_an_error_on_one_line_of_stderr(student: Path, tiny_root: Path):
    unfinish(student)
    args = [sys.executable, "-m", "distillbev", "evaluate", str(student), "--data", str(tiny_root)]
    done = subprocess.run(args, capture_output=True, text=True)
    assert told(Ended(done.returncode, done.stdout, done.stderr), student, "no weights.safetensors yet")
