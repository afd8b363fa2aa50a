"""A simulated world whose tables and files are spoilt, one thing at a time, and mended again."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from PIL import Image
from reading import NUM_SWEEPS, TABLES, VERSION, read_all

from distillbev.data.index import FOLDER as INDEX_FOLDER
from distillbev.data.index import build_index
from distillbev.data.index_reader import HEAD_BYTES, FileFacts, read_list
from distillbev.data.samples import NuScenes
from distillbev.evaluation.eval_boxes import ground_truth_boxes

WEIRD_NUMBERS = (0, -1, 1, 0.5, -0.0, 1e-320, 1e9, -1e9, 1e39, 1e308, -1e308, math.nan, math.inf, -math.inf, 2**31,
                 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400)  # fmt: skip
WEIRD_TEXTS = ("", " ", ".", "..", "/", "../../../etc/passwd", "/etc/passwd", "C:\\boot.ini", "..\\..\\x",
               "a\0b", "a\nb", "\x1b[31mred", "ü ñ 漢", "\u202egnp", "\ud800", "x" * 300, "x" * 100_000,
               "1", "null")  # fmt: skip
WEIRD_VALUES = (None, True, False, [], {}, [[]], [None], {"token": {}}, [1, 2], ["a"] * 3, [[1, 2, 3]] * 3)


class World:
    """A simulated world whose files can be spoilt and mended."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {
            p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
        }
        self.tables = {name: json.loads(self.files[self.table_file(name)]) for name in TABLES}
        self._touched: set[str] = set()
        self.sound_content: dict[str, Any] = {}  # of masks and results
        self.sound = read_all(root)
        self.results = json.dumps(a_results_file(self.sound)).encode()
        self.truth = ground_truth_boxes(
            [NuScenes(root).sample(token) for token in NuScenes(root).sample_tokens()]
        )

    @staticmethod
    def table_file(name: str) -> str:
        return f"{VERSION}/{name}.json"

    def names(self, start: str) -> list[str]:
        return [name for name in self.files if name.startswith(start)]

    def remove(self, name: str) -> Path:
        """Takes a file away; returns the place, for something else to stand there."""
        self._touched.add(name)
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: bytes) -> None:
        self.remove(name).write_bytes(content)

    def write_table(self, name: str, rows: Any) -> None:
        self.write(self.table_file(name), json.dumps(rows).encode())

    def mend(self) -> None:
        shutil.rmtree(self.root / INDEX_FOLDER, ignore_errors=True)
        for name in self._touched:
            path = self.remove(name)
            if name in self.files:
                path.write_bytes(self.files[name])
        self._touched.clear()


def a_results_file(found: dict[str, Any]) -> dict[str, Any]:
    results = {
        token: [
            {
                "sample_token": token, "translation": pose[:3, 3].tolist(), "size": size[[1, 0, 2]].tolist(),
                "rotation": [1.0, 0.0, 0.0, 0.0], "velocity": [0.0, 0.0], "detection_name": "car",
                "detection_score": 0.5, "attribute_name": "",
            }
            for pose, size, *_ in sample["boxes"].values()
        ]
        for token, sample in found.items()
        if token != "splits"
    }  # fmt: skip
    meta = {f"use_{name}": name == "camera" for name in ("camera", "lidar", "radar", "map", "external")}
    return {"meta": meta, "results": results}


def make_world(folder: Path) -> World:
    """One scene of two key frames and small images, in memory where there is a place for it."""
    from distillbev.world import SplitConfig, WorldConfig, simulate

    config = WorldConfig(
        splits=(SplitConfig(name="train", scenes=1),), key_frames_per_scene=2, image_size_px=(64, 36),
        lidar_sweeps=NUM_SWEEPS, lidar_beams=4, lidar_azimuth_steps=60,
    )  # fmt: skip
    simulate(config, folder / "world", processes=1, progress=False)
    for path in (folder / "world" / "instance_masks").glob("*/*.png"):  # lists as of another detector
        with Image.open(path) as image:
            numbers = np.unique(np.asarray(image)).tolist()
        instances = [{"id": number, "class": "car", "score": 0.5} for number in numbers if number]
        path.with_suffix(".json").write_text(json.dumps({"instances": instances}))
    return World(folder / "world")


@dataclass
class Spoilt:
    """What was done, and to what. `harmless`: the samples must be equal to the sound ones."""

    what: str
    harmless: bool = False
    subject: Literal["dataset", "index", "hostile index", "masks", "results"] = "dataset"


Rng = np.random.Generator


def pick(rng: Rng, choices: Any) -> Any:
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


def some_value(rng: Rng) -> Any:
    return pick(rng, (*WEIRD_NUMBERS, *WEIRD_TEXTS, *WEIRD_VALUES))


def copied(world: World, name: str) -> list[dict]:
    return json.loads(world.files[world.table_file(name)])


def spoil_value(world: World, rng: Rng) -> Spoilt:
    """A field gets a value of another type or size."""
    name = pick(rng, TABLES)
    rows = copied(world, name)
    row = pick(rng, rows)
    key, value = pick(rng, row), some_value(rng)
    row[key] = value
    world.write_table(name, rows)
    return Spoilt(f"{name}.{key} = {value!r:.60}")


def spoil_number(world: World, rng: Rng) -> Spoilt:
    """One number changes, perhaps one of a list."""
    name = pick(rng, ("sample", "sample_data", "ego_pose", "calibrated_sensor", "sample_annotation"))
    rows = copied(world, name)
    row = pick(rng, rows)
    key = pick(
        rng,
        [
            k
            for k, v in row.items()
            if isinstance(v, int | float | list) and not isinstance(v, bool) and v != []
        ],
    )
    target, place = row, key
    while isinstance(target[place], list) and target[place]:
        target, place = target[place], int(rng.integers(len(target[place])))
    old = target[place]
    if rng.random() < 0.5 and isinstance(old, int | float):
        target[place] = pick(rng, (old * 2, -old, old + 1, old * 1e6, old * 1.0000001, int(old), old + 10**7))
    else:
        target[place] = pick(rng, WEIRD_NUMBERS)
    world.write_table(name, rows)
    return Spoilt(f"{name}.{key}: {old!r:.30} -> {target[place]!r:.30}")


def spoil_link(world: World, rng: Rng) -> Spoilt:
    """A token or a link to one changes: to another row, to another table, to nothing."""
    name = pick(rng, TABLES)
    rows = copied(world, name)
    row = pick(rng, rows)
    key = pick(rng, [k for k in row if k == "token" or k.endswith(("_token", "prev", "next", "_tokens"))])
    other = pick(rng, world.tables[pick(rng, (name, name, *TABLES))])["token"]
    old = row[key] if isinstance(row[key], str) else other
    value = pick(rng, (other, other, other, row["token"], "", old[:-1], old.upper(), old + " ", "lost"))
    row[key] = [value] if key.endswith("_tokens") else value
    world.write_table(name, rows)
    return Spoilt(f"{name}.{key}: {old!r:.40} -> {value!r:.40}")


def spoil_rows(world: World, rng: Rng) -> Spoilt:
    """A row goes, comes twice, comes twice under two tokens, or lacks a field."""
    name = pick(rng, TABLES)
    rows = copied(world, name)
    place = int(rng.integers(len(rows)))
    how = pick(rng, ("delete", "repeat", "copy", "drop", "cut", "none"))
    if how == "delete":
        del rows[place]
    elif how == "repeat":
        rows.insert(int(rng.integers(len(rows) + 1)), dict(rows[place]))
    elif how == "copy":
        rows.append(rows[place] | {"token": "another"})
    elif how == "drop":
        del rows[place][pick(rng, rows[place])]
    elif how == "cut":
        del rows[place:]
    else:
        rows[place] = some_value(rng)
    world.write_table(name, rows)
    return Spoilt(f"{name}[{place}]: {how}")


def spoil_order(world: World, rng: Rng) -> Spoilt:
    """Rows and fields in another order, unknown fields, other white space: nothing that matters."""
    for name in TABLES:
        rows = copied(world, name)
        rng.shuffle(rows)
        for row in rows:
            fields = list(row.items())
            rng.shuffle(fields)
            row.clear()
            row |= dict(fields) | {"unknown": pick(rng, (math.nan, "ü\n", {"a": [[1]]}, None, 10**30))}
        content = json.dumps(rows, indent=pick(rng, (None, 0, 4)), ensure_ascii=bool(rng.integers(2)))
        world.write(world.table_file(name), pick(rng, ("", "\ufeff", "\n \t")).encode() + content.encode())
    return Spoilt("tables in another order, with fields of their own", harmless=True)


def spoil_bytes(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """Cut, flipped, overwritten, repeated: what disks and networks do."""
    size = max(len(content), 1)
    place, end = sorted(int(n) for n in rng.integers(0, size + 1, size=2))
    how = pick(rng, ("cut", "flip", "flip", "flip", "zeros", "noise", "longer", "less", "twice", "empty"))
    changed = bytearray(content)
    if how == "cut":
        changed = changed[:place]
    elif how == "flip":
        for _ in range(int(rng.integers(1, 12)) if rng.random() < 0.7 else 1):
            changed[int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    elif how == "zeros":
        changed[place:end] = bytes(end - place)
    elif how == "noise":
        changed[place : place + 64] = rng.bytes(64)
    elif how == "longer":
        changed += rng.bytes(int(rng.integers(1, 100)))
    elif how == "less":
        del changed[place : place + int(rng.integers(1, 30))]
    elif how == "twice":
        changed *= 2
    else:
        changed = bytearray()
    return bytes(changed), how


def bombs() -> dict[str, bytes]:
    return {
        "deep list": b"[" * 200_000,
        "deep row": b'[{"token": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}]",
        "deep in an unknown field": b'[{"unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        "many lists": b"[" + b"[]," * 3_000_000 + b"[]]",
        "one row of lists": b'[{"a": [' + b"[]," * 3_000_000 + b"[]]}]",
        "long number": b'[{"token": ' + b"9" * 100_000 + b"}]",
        "long text": b'[{"token": "' + b"9" * 10_000_000 + b'"}]',
        "no list": b'{"token": "a"}',
        "no rows": b"[]",
        "UTF-16": '[{"token": "a"}]'.encode("utf-16"),
        "zeros": bytes(1000),
    }


def spoil_table_file(world: World, rng: Rng) -> Spoilt:
    name = pick(rng, TABLES)
    if rng.random() < 0.25:
        what, content = pick(rng, bombs().items())
    else:
        content, what = spoil_bytes(world.files[world.table_file(name)], rng)
    world.write(world.table_file(name), content)
    return Spoilt(f"{name}.json: {what}")


def spoil_splits(world: World, rng: Rng) -> Spoilt:
    scene, token = world.tables["scene"][0]["name"], world.tables["sample"][0]["token"]
    values = (
        {"train": [scene]}, {"train": [token]}, {"train": [scene, scene]}, {"train": []}, {}, [], {"train": scene},
        {"train": [1]}, {"train": [None]}, {"train": {"a": 1}}, {"ü/../": [scene]}, {"train": ["\ud800"]},
        {"train": ["x" * 100_000]}, 10**400, math.nan,
    )  # fmt: skip
    if rng.random() < 0.5:
        content, what = spoil_bytes(world.files["splits.json"], rng)
    elif rng.random() < 0.3:
        what, content = pick(rng, bombs().items())
    else:
        value = pick(rng, values)
        content, what = json.dumps(value).encode(), f"{value!r:.50}"
    world.write("splits.json", content)
    return Spoilt(f"splits.json: {what}")


def spoil_kind(world: World, rng: Rng) -> Spoilt:
    """In a file's place stands nothing, a folder, a pipe, a device or a link."""
    name = pick(
        rng, [n for n in world.files if n.startswith(("samples/", "sweeps/", VERSION)) or n == "splits.json"]
    )
    name = (
        name if rng.random() < 0.5 else pick(rng, [n for n in world.names(VERSION) if Path(n).stem in TABLES])
    )
    content = world.files[name]
    path = world.remove(name)
    how = pick(rng, ("nothing", "folder", "pipe", "endless", "circle", "broken link", "link", "link outside"))
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "endless":
        path.symlink_to("/dev/zero")
    elif how == "circle":
        path.symlink_to(path)
    elif how == "broken link":
        path.symlink_to("gone")
    elif how != "nothing":
        target = world.root / "elsewhere.bin" if how == "link" else world.root.parent / "outside.bin"
        target.write_bytes(content)
        path.symlink_to(target)
    return Spoilt(f"{name}: {how}", harmless=how.startswith("link"))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gigantic(png: bytes, side_px: int) -> bytes:
    """The PNG with a head that claims another size."""
    head = b"IHDR" + side_px.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]


def spoil_image(world: World, rng: Rng) -> Spoilt:
    name = pick(rng, [n for n in world.names("samples/CAM")])
    content = world.files[name]
    if rng.random() < 0.6:
        content, what = spoil_bytes(content, rng)
    else:
        image = Image.open(io.BytesIO(content))
        whole = encoded(image, "JPEG", progressive=True)
        scan = whole[whole.index(b"\xff\xda") : -2]
        png = encoded(image, "PNG")
        postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 36\n(hello) print\n"
        what, content = pick(rng, {
            "PNG": png, "GIF": encoded(image, "GIF"), "TIFF": encoded(image, "TIFF"), "huge PNG": gigantic(png, 60_000),
            "grey": encoded(image.convert("L"), "JPEG"), "CMYK": encoded(image.convert("CMYK"), "JPEG"),
            "PNG with alpha": encoded(image.convert("RGBA"), "PNG"), "PostScript": postscript,
            "16 bit": encoded(Image.fromarray(np.zeros((36, 64), np.uint16)), "PNG"),
            "many scans": whole[:-2] + scan * 2000 + b"\xff\xd9",
            "another": world.files[pick(rng, world.names("samples/CAM"))],
            "smaller": encoded(image.resize((32, 18)), "JPEG"), "text": b"<html>404</html>",
        }.items())  # fmt: skip
    world.write(name, content)
    return Spoilt(f"{name}: {what}")


def spoil_points(world: World, rng: Rng) -> Spoilt:
    name = pick(rng, world.names("samples/LIDAR") + world.names("sweeps/LIDAR"))
    content = world.files[name]
    if rng.random() < 0.5:
        content, what = spoil_bytes(content, rng)
    else:
        points = np.frombuffer(content, dtype="<f4").copy()
        what = pick(rng, (math.nan, math.inf, -math.inf, 3e38, 1e20, 9e3, 1e-40))
        points[int(rng.integers(len(points)))] = what
        content = points.tobytes()
    world.write(name, content)
    return Spoilt(f"{name}: {what}")


def spoil_name(world: World, rng: Rng) -> Spoilt:
    """A file has an odd name, or its row names something odd."""
    rows = copied(world, "sample_data")
    row = pick(rng, rows)
    old, odd = row["filename"], pick(rng, WEIRD_TEXTS)
    if rng.random() < 0.4:
        renamed = pick(
            rng,
            (
                "ü ñ 漢.jpg",
                "with space.bin",
                "100%.jpg",
                "a'b\".jpg",
                "-rf",
                "~",
                "$HOME",
                "..name",
                "name..",
                "CON",
            ),
        )
        row["filename"] = f"samples/{renamed}"
        world.write(row["filename"], world.files[old])
        world.remove(old)
        world.write_table("sample_data", rows)
        return Spoilt(f"renamed to {renamed!r}", harmless=True)
    (world.root.parent / "outside.bin").write_bytes(world.files[old])
    row["filename"] = pick(rng, (odd, f"samples/{odd}", f"samples/../{old}", "../outside.bin", str(world.root / old),
                                 f"{world.root.name}/../../outside.bin", "samples", old + "/", "//" + old))  # fmt: skip
    world.write_table("sample_data", rows)
    return Spoilt(f"filename = {row['filename']!r:.60}")


def spoil_index(world: World, rng: Rng) -> Spoilt:
    """A prepared index changes, by bad luck (its checksums tell) or by someone who makes the checksums fit."""
    place = build_index(world.root / VERSION)
    path = pick(rng, sorted(place.iterdir()))
    content = path.read_bytes()
    headers = (
        ("'<f8'", "'|O'"),
        ("(", "(9999999999, "),
        ("'<i4'", "'<i8'"),
        ("False", "True"),
        ("'<f8'", "'<c16'"),
    )
    if path.suffix == ".npy" and rng.random() < 0.4:
        old, new = pick(rng, headers)
        head, body = content[10:128], content[128:]
        head = head.replace(old.encode(), new.encode())[:118].ljust(118)
        content, what = content[:10] + head + body, f"header {old} -> {new}"
    elif path.name == "index.json" and rng.random() < 0.5:
        what, content = pick(rng, bombs().items())
    else:
        content, what = spoil_bytes(content, rng)
        if path.suffix == ".npy":  # the length is looked at first
            content = content[: path.stat().st_size].ljust(path.stat().st_size, b"\0")
    path.write_bytes(content)
    listed = read_list(place)
    if listed is None or rng.random() < 0.5:
        return Spoilt(f"{path.name}: {what}", subject="index")
    head = zlib.crc32(content[:HEAD_BYTES])
    facts = FileFacts(size=len(content), head_crc32=head, crc32=zlib.crc32(content))
    listed = msgspec.structs.replace(listed, files=listed.files | {path.name: facts})
    (place / "index.json").write_bytes(msgspec.json.encode(listed))
    return Spoilt(f"{path.name}: {what}, and listed so", subject="hostile index")


def spoil_masks(world: World, rng: Rng) -> Spoilt:
    name = pick(rng, world.names("instance_masks/"))
    content, what = spoil_bytes(world.files[name], rng)
    if rng.random() < 0.4:
        if name.endswith(".json"):
            instance = {"id": some_value(rng), "class": "car", "score": some_value(rng)}
            odd = [{"instances": [instance]}, {"1": some_value(rng)}, {"x": "y"}]
            what, content = pick(rng, [*bombs().items(), *(("odd", json.dumps(one).encode()) for one in odd)])
        else:
            what, content = "huge", gigantic(world.files[name], pick(rng, (5000, 60_000)))
    world.write(name, content)
    return Spoilt(f"{name}: {what}", subject="masks")


def spoil_results(world: World, rng: Rng) -> Spoilt:
    if rng.random() < 0.4:
        content, what = spoil_bytes(world.results, rng)
    elif rng.random() < 0.2:
        what, content = pick(rng, bombs().items())
    else:
        results = json.loads(world.results)
        token = pick(rng, results["results"])
        target = pick(rng, (results, results["meta"], results["results"], *results["results"][token][:3]))
        key = pick(rng, target)
        value = some_value(rng)
        if isinstance(target[key], list) and target[key] and rng.random() < 0.5:
            target[key][int(rng.integers(len(target[key])))] = value
        else:
            target[key] = value
        content, what = json.dumps(results).encode(), f"{key} = {value!r:.50}"
    world.write("results.json", content)
    return Spoilt(f"results: {what}", subject="results")


SPOILERS: tuple[tuple[Callable[[World, Rng], Spoilt], int], ...] = (
    (spoil_value, 5), (spoil_number, 5), (spoil_link, 5), (spoil_rows, 3), (spoil_order, 1), (spoil_table_file, 4),
    (spoil_splits, 1), (spoil_kind, 3), (spoil_image, 4), (spoil_points, 2), (spoil_name, 2), (spoil_index, 4),
    (spoil_masks, 2), (spoil_results, 3),
)  # fmt: skip
