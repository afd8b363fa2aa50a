"""Writes measured results into the documents: `.venv/bin/python tools/results.py FILE ...`.

What stands between `<!-- results: NAME -->` and `<!-- end -->` is made anew: from a demo's summary.json, NAME being
its folder, or from the text that a benchmark printed into NAME.md.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/experiments.md", "docs/benchmarks.md", "docs/reliability.md")
SMALL = ("pedestrian", "motorcycle", "bicycle", "traffic_cone", "barrier")


def interval(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"


def arms_table(summary: dict) -> list[str]:
    """One row per arm: mAP with its interval over scenes, single seeds, NDS, some classes."""
    classes = ("car", "truck", "bus", "pedestrian", "bicycle", "traffic_cone", "barrier")
    lines = [
        "| arm | mAP | 95 % over scenes | by seed | NDS | " + " | ".join(classes) + " |",
        "|---" * (5 + len(classes)) + "|",
    ]
    for name, arm in summary["arms"].items():
        seeds = ", ".join(f"{value:.3f}" for value in arm["mAP_by_seed"])
        cells = [
            f"`{name}`",
            f"**{arm['mAP']:.3f}**",
            interval(*arm["mAP_interval"]),
            seeds,
            f"{arm['NDS']:.3f}",
        ]
        lines.append("| " + " | ".join([*cells, *(f"{arm['AP'][c]:.3f}" for c in classes)]) + " |")
    return lines


def differences_table(summary: dict) -> list[str]:
    """One row per comparison, paired by seed and scene; large and small classes apart."""
    lines = [
        "| difference in mAP | mean | 95 % over scenes | by seed | large classes | small classes |",
        "|---" * 6 + "|",
    ]
    for d in summary["differences"]:
        small = sum(d["AP"][c] for c in SMALL) / len(SMALL)
        large = sum(v for c, v in d["AP"].items() if c not in SMALL) / (len(d["AP"]) - len(SMALL))
        seeds = ", ".join(f"{value:+.3f}" for value in d["mAP_by_seed"])
        low, high = d["mAP_interval"]
        lines.append(
            f"| `{d['second']}` - `{d['first']}` | {d['mAP']:+.3f} | {low:+.3f} to {high:+.3f} | {seeds} "
            f"| {large:+.3f} | {small:+.3f} |"
        )
    return lines


def results(summary: dict) -> str:
    frames = (
        f"{summary['labelled_frames']} labelled, {summary['unlabelled_frames']} unlabelled, "
        f"{summary['held_out_frames']} held-out frames; seeds {', '.join(map(str, summary['seeds']))}."
    )
    return "\n".join([frames, "", *arms_table(summary), "", *differences_table(summary)])


def measured(path: Path) -> tuple[str, str]:
    """The name and the text of a block."""
    if path.suffix == ".md":
        return path.stem, path.read_text().strip()
    return path.parent.name, results(json.loads(path.read_text()))


if __name__ == "__main__":
    blocks = [measured(Path(path)) for path in sys.argv[1:]]
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text()
        for name, block in blocks:
            pattern = rf"(<!-- results: {re.escape(name)} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL)
        path.write_text(text)
