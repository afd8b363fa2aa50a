"""What the documents say about the code is so."""

import ast
import importlib
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from distillbev.distill.adapters import LayeredAdapterConfig
from distillbev.distill.settings import DistillConfig, clean, released_bevdepth4d, released_bevformer

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")], key=str
)
MENTION = re.compile(r"(?<![\w/.])((?:\w+/)*\w+\.py)(?:::([A-Za-z_][\w.]*))?")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PRESETS = (released_bevdepth4d(), released_bevformer(), clean())


def mentions(document: Path) -> set[tuple[str, str]]:
    """The (file, name in it or "") pairs that a document mentions."""
    return {(file, name) for file, name in MENTION.findall(document.read_text())}


def resolve(file: str, name: str) -> object:
    """A module of the package, or what it defines under a dotted name."""
    found: object = importlib.import_module("distillbev." + file.removesuffix(".py").replace("/", "."))
    assert isinstance(found, ModuleType)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def anchors(document: Path) -> set[str]:
    """The anchors that headings of a document get."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", ["method.md", "frames.md", "data.md", "design.md", "evaluation.md", "from_mmdet3d.md"]
)
def test_every_file_and_function_mentioned_exists(name: str) -> None:
    document = ROOT / "docs" / name
    found = mentions(document)
    assert len(found) > 5, found
    for file, function in found:
        if not (ROOT / file).exists() or function:
            resolve(file, function)


def test_a_function_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(AttributeError):
        resolve("distill/masks.py", "no_such_function")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks_are_closed_and_tables_are_even(document: Path) -> None:
    lines = document.read_text().splitlines()
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    for above, below in pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert above.count("|") == below.count("|"), below


def preset_table() -> dict[str, list[str]]:
    """Rows of the table of presets: setting -> what it says of the three presets."""
    text = (ROOT / "docs" / "method.md").read_text()
    part = text.split("## Presets compared", 1)[1].split("\n\nWhy", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if "|" in line
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def text_of(value: object) -> str:
    if value is None:
        return "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def facts_of(config: DistillConfig) -> dict[str, str]:
    """The rows of the table as the preset has them."""
    first, head, regions = config.taps[0], config.taps[-1], config.regions
    assert head.student == "head" and first.attention is not None
    assert first.foreground is not None and first.background is not None
    assert all(tap.false_positive is None for tap in config.taps[:-1])
    false_positive, attention_term = head.false_positive, first.attention_imitation
    values = {
        "taps": ", ".join(tap.student for tap in config.taps),
        "attention temperature T": first.attention.temperature,
        "student share r": first.attention.student_share,
        "attention standardised": first.attention.standardise,
        "w (over all)": config.weight,
        "w_fg": first.foreground.weight,
        "w_bg": first.background.weight,
        "w_fp (head tap only)": false_positive and false_positive.weight,
        "channel attention in L_fp, Tc": false_positive and false_positive.channel_temperature,
        "w_sp": attention_term and attention_term.weight,
        "L_sp of signed means": attention_term and attention_term.signed,
        "sample point of a cell": regions.sample,
        "small box takes its centre's cell": regions.min_one_cell,
        "object scale": regions.object_scale,
        "combined scale": regions.combined_scale,
        "halo of objects": regions.halo,
        "tau, tau_gt": f"{regions.teacher_threshold}, {regions.target_threshold}",
        "reduction": config.reduction,
    }
    return {name: text_of(value) for name, value in values.items()}


@pytest.mark.parametrize("column", range(3))
def test_the_table_of_presets_says_what_the_presets_are(column: int) -> None:
    table, config = preset_table(), PRESETS[column]
    told = {name: cells[column] for name, cells in table.items()}
    layered = isinstance(config.taps[0].adapter, LayeredAdapterConfig)
    assert told.pop("adapter").startswith("layered x3, align_corners" if layered else "1x1")
    assert (told.pop("normalise") == "none") == (config.taps[0].normalise is None)
    assert told == facts_of(config)


def test_the_conversions_of_the_frames_page_work() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "frames.md").read_text(), re.DOTALL)
    page: dict[str, object] = {}
    exec(code, page)
    ours = [[10.0, 20.0, 0.5, 4.0, 2.0, 1.5, 0.3, 1.0, -2.0]]
    version_0 = [[10.0, 20.0, -0.25, 2.0, 4.0, 1.5, -0.3 - np.pi / 2, 1.0, -2.0]]
    version_1 = [[10.0, 20.0, -0.25, 4.0, 2.0, 1.5, 0.3, 1.0, -2.0]]
    np.testing.assert_allclose(page["from_mmdet3d_0"](version_0), ours)  # type: ignore[operator]
    np.testing.assert_allclose(page["from_mmdet3d_1"](version_1), ours)  # type: ignore[operator]


def import_table() -> dict[str, set[str]]:
    """Part of the package -> the parts that docs/design.md lets it import."""
    text = (ROOT / "docs" / "design.md").read_text()
    part = text.split("### Imports go one way", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if "|" in line
    ]
    return {name: set(re.findall(r"\w+", right)) for left, right in rows[2:] for name in left.split(", ")}


def imports_of(path: Path, package: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in the file."""
    folder = path.relative_to(package).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            names = [*base, *(node.module.split(".") if node.module else [])]
            found |= {names[0]} if names else {alias.name for alias in node.names}
    return found


def test_imports_go_one_way_as_the_design_says() -> None:
    allowed, package = import_table(), ROOT / "src" / "distillbev"
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__"):
            surplus = imports_of(path, package) - allowed[part] - {part}
            assert not surplus, f"{path.relative_to(package)} imports {surplus}"
