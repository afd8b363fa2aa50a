import importlib
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from distillbev import doctor
from distillbev.cli import app
from distillbev.doctor import Finding, examine


def finding(subject: str) -> Finding:
    return next(finding for finding in examine() if finding.subject == subject)


def break_import(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def import_module(module: str) -> ModuleType:
        if module == name:
            raise error
        return importlib.import_module(module)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=import_module))


def test_every_needed_package_is_reported_with_its_version_and_nothing_is_fatal_here():
    found = {finding.subject: finding for finding in examine()}
    assert {"python", "distillbev", "gpu", "cpu cores", "memory", "free disk here"} < set(found)
    for package in ("torch", "numpy", "pillow", "safetensors", "msgspec", "pyyaml", "rich", "typer"):
        assert re.match(r"\d+\.", found[package].found), found[package]
        assert found[package].mend is None
    assert not any(finding.fatal for finding in found.values())


def test_a_missing_needed_package_is_fatal_and_comes_with_its_mend(monkeypatch: pytest.MonkeyPatch):
    break_import(monkeypatch, "safetensors", ModuleNotFoundError("No module named 'safetensors'"))
    missing = finding("safetensors")
    assert missing == Finding("safetensors", "not installed", "pip install -e . (or: make setup)", fatal=True)
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 1
    assert "not installed" in shown.output


def test_a_package_that_breaks_on_import_tells_why_in_one_line(monkeypatch: pytest.MonkeyPatch):
    break_import(monkeypatch, "timm", RuntimeError("operator torchvision::nms\n  does not exist"))
    broken = finding("timm")
    assert broken.found.startswith("broken: operator torchvision::nms does not exist (optional: ")
    assert broken.mend is not None and "pip install" in broken.mend
    assert not broken.fatal


def test_the_command_prints_what_to_type_to_the_letter(monkeypatch: pytest.MonkeyPatch):
    break_import(monkeypatch, "simplejpeg", ModuleNotFoundError("No module named 'simplejpeg'"))
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "pip install 'distillbev[fast]'" in shown.output


def test_doctor_lives_without_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert finding("torch").fatal
    assert finding("gpu").found == "unknown without torch"


def test_doctor_lives_in_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert finding("distillbev").found == "there, but not installed by pip"


def test_too_little_disk_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # pyright: ignore
    assert finding("free disk here").mend == "the demo wants 2 GB"
