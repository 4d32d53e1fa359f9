"""Images in tar and parquet files: the same numbers and weights as from folders; damaged and hostile shards are refused in a line."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

import seewhy
from seewhy.cli.main import app
from seewhy.config import TrainConfig
from seewhy.curation.audit import audit_images
from seewhy.curation.grouping import group_images
from seewhy.curation.image_issues import find_image_issues
from seewhy.curation.split import split_images
from seewhy.data import shard_index, shard_parquet, shard_tar, shards
from seewhy.data.decode import read_bytes
from seewhy.data.image_set import ImageSet, open_images
from seewhy.data.listing import find_images
from seewhy.data.shards import Member, members, read_member, shard_of, stream
from seewhy.data.verify import check_files
from seewhy.errors import DataError, ImageError
from seewhy.inference.work_units import find_sources
from seewhy.models.transforms import Preprocessing
from seewhy.training.dry_run import dry_run
from seewhy.training.loaders import ImageViews, make_loader

PREPROCESSING = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875)
Rows = list[tuple[str, bytes, str]]  # name, content, class
CLASSES = {"cat": 6, "dog": 5, "owl": 7}


def rows_of(folder: Path) -> Rows:
    """Name, content and class of each image of a folder, in the order of its listing."""
    return [(path.relative_to(folder).as_posix(), path.read_bytes(), path.parent.name) for path in sorted(folder.rglob("*.png"))]


def write_tar(file: Path, entries: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(file, "w", format=form) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def hugging_face(rows: Rows, classes: list[str], column: str = "image") -> pa.Table:
    """The table that `datasets` writes of an image folder: a struct of bytes and path, and a ClassLabel in the schema's metadata."""
    features = {column: {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    images = pa.array(
        [{"bytes": content, "path": name} for name, content, _ in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    labels = pa.array([classes.index(label) for _, _, label in rows], pa.int64())
    table = pa.table({column: images, "label": labels})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_webdataset(place: Path, rows: Rows) -> None:
    """Two shards by the webdataset library: a .png, and a .cls with the class's number, an image."""
    classes = sorted({label for _, _, label in rows})
    for number, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        with webdataset.TarWriter(str(place / f"images-{number:06d}.tar")) as writer:
            for name, content, label in part:
                writer.write({"__key__": Path(name).with_suffix("").as_posix(), "png": content, "cls": classes.index(label)})


def write_hugging_face(place: Path, rows: Rows) -> None:
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        table = hugging_face(part, sorted({label for _, _, label in rows}))
        pq.write_table(table, place / f"train-{number:05d}-of-00002.parquet", row_group_size=3)


def write_folder_tar(place: Path, rows: Rows) -> None:
    write_tar(place / "all.tar", [(f"./{name}", content) for name, content, _ in rows])


WRITERS = {"webdataset": write_webdataset, "parquet": write_hugging_face, "tar of a folder": write_folder_tar}


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder(CLASSES)


def same_images(found: ImageSet, wanted: ImageSet) -> bool:
    columns = ("hashes", "labels", "phashes", "sizes", "grey")
    return all(np.array_equal(getattr(found, name), getattr(wanted, name)) for name in columns)


# ---------------------------------------------------------------- the same numbers as from a folder


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_hold_what_the_folder_holds(kind: str, folder: Path, tmp_path: Path, cache: Path) -> None:
    place = tmp_path / "shards"
    place.mkdir()
    WRITERS[kind](place, rows_of(folder))
    wanted, found = open_images(str(folder)), open_images(str(place))
    assert same_images(found, wanted)
    if kind == "webdataset":
        assert found.classes == ("0", "1", "2")  # the numbers that a .cls holds
        found = replace(found, classes=wanted.classes)
    assert found.classes == wanted.classes
    assert found.content_hash == wanted.content_hash
    undivided = replace(found, parts=wanted.parts)
    assert split_images(undivided).hash(undivided) == split_images(wanted).hash(wanted)


@functools.cache
def recipe(unfreeze: int) -> dict[str, Any]:
    if unfreeze == 0:
        return {"backbone": "efficientnet_lite0", "unfreeze": 0, "epochs": 2, "seed": 3}
    return {"backbone": "resnet18", "weights": "none", "unfreeze": 1, "epochs": 1, "seed": 3, "size": 64, "group_by": "exact"}


@pytest.mark.usefixtures("one_thread", "without_report")
@pytest.mark.parametrize("unfreeze", [0, 1])
def test_weights_from_shards_equal_those_from_a_folder_to_the_last_bit(
    unfreeze: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(folder)
    write_tar(tmp_path / "all.tar", [(name, content) for name, content, _ in rows])
    pq.write_table(hugging_face(rows, sorted(CLASSES)), tmp_path / "all.parquet", row_group_size=4)
    weights, metrics = [], []
    for data in (folder, tmp_path / "all.tar", tmp_path / "all.parquet")[:: 1 + unfreeze]:
        monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / f"cache-{data.name}"))  # each computes its own features
        run = seewhy.train(data, out=tmp_path / f"run-{data.name}", **recipe(unfreeze))
        weights.append(load_file(run.path / "model.safetensors"))
        metrics.append((run.manifest["data"]["hash"], run.manifest["split"]["hash"], run.manifest["metrics"]))
    assert all(found.keys() == weights[0].keys() for found in weights)
    assert all(np.array_equal(found[name], weights[0][name]) for found in weights[1:] for name in weights[0])
    assert all(found == metrics[0] for found in metrics)


def test_numbered_views_are_the_same_from_worker_processes(folder: Path, tmp_path: Path, cache: Path) -> None:
    """Fresh images in a shuffled order: parquet row groups come and go, and forked readers share nothing."""
    pq.write_table(hugging_face(rows_of(folder), sorted(CLASSES)), tmp_path / "all.parquet", row_group_size=2)
    write_tar(tmp_path / "all.tar", [(name, content) for name, content, _ in rows_of(folder)])
    batches = []
    for data, workers in ((folder, 0), (tmp_path / "all.parquet", 0), (tmp_path / "all.parquet", 2), (tmp_path / "all.tar", 2)):
        images = open_images(str(data))  # reads in this process, whose handles and row groups the workers must not use
        dataset = ImageViews(images, np.arange(len(images)), PREPROCESSING, 0, 7, "standard")
        batches.append(list(make_loader(dataset, 5, 7, workers)))
    for found in batches[1:]:
        assert all(np.array_equal(a, b) and np.array_equal(c, d) for (a, c), (b, d) in zip(found, batches[0], strict=True))


def test_audit_of_shards_equals_that_of_the_folder(folder: Path, tmp_path: Path, cache: Path) -> None:
    rows = rows_of(folder)
    black = io.BytesIO()
    Image.new("RGB", (48, 40)).save(black, "PNG")
    rows[2] = (rows[2][0], black.getvalue(), rows[2][2])
    (folder / rows[2][0]).write_bytes(rows[2][1])
    pq.write_table(hugging_face(rows, sorted(CLASSES)), tmp_path / "all.parquet", row_group_size=4)
    with threadpool_limits(1):  # BLAS's threads wait for each other on a busy machine
        wanted, found = (audit_images(open_images(str(data)), seeds=1) for data in (folder, tmp_path / "all.parquet"))
    assert found.summary() == wanted.summary()
    assert "dark" in set(found.image_issues["issue"])
    assert list(found.image_issues["path"].map(lambda path: Path(path).name)) == list(
        wanted.image_issues["path"].map(lambda path: Path(path).name)
    )
    assert list(found.groups_table()["path"]) == list(wanted.groups_table()["path"])


def test_grey_images_with_transparency_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    """cleanvision takes none of two bands."""
    entries = []
    for name, mode in (("a/grey.png", "LA"), ("a/black.png", "RGB")):
        content = io.BytesIO()
        Image.new(mode, (40, 40)).save(content, "PNG")
        entries.append((name, content.getvalue()))
    tar = write_tar(tmp_path / "x.tar", entries)
    assert set(find_image_issues([tar / name for name, _ in entries])["path"]) == {str(tar / "a/black.png")}


def test_groups_by_pattern_and_table_name_images_below_the_data(folder: Path, tmp_path: Path, cache: Path) -> None:
    tar = write_tar(tmp_path / "all.tar", [(name, content) for name, content, _ in rows_of(folder)])
    wanted = group_images(open_images(str(folder)), r"[0-9]+(?=\.png)")
    assert np.array_equal(group_images(open_images(str(tar)), r"[0-9]+(?=\.png)"), wanted)


def test_a_run_answers_about_shards_as_about_files(demo_run: seewhy.Run, demo_images: list[Path], tmp_path: Path, cache: Path) -> None:
    rows = [(f"{path.parent.name}/{path.name}", path.read_bytes(), path.parent.name) for path in demo_images]
    tar = write_tar(tmp_path / "demo.tar", [(name, content) for name, content, _ in rows])
    pq.write_table(hugging_face(rows, list(demo_run.classes)), tmp_path / "demo.parquet", row_group_size=4)
    wanted, maps = demo_run.predict(demo_images), demo_run.explain(demo_images[:3]).maps
    for shard in (tar, tmp_path / "demo.parquet"):
        found = demo_run.predict([shard])
        assert [str(path) for path in found.paths] == [str(shard / name) for name, _, _ in rows]
        assert np.array_equal(found.probs, wanted.probs)
        some = [shard / name for name, _, _ in rows[:3]]
        assert np.array_equal(demo_run.explain(some).maps, maps)
        assert np.array_equal(demo_run.predict(some).probs, demo_run.predict(demo_images[:3]).probs)
        evaluation = demo_run.evaluate(data=str(shard))
        assert evaluation.metrics["n"] == len(rows)
        assert np.array_equal(evaluation.labels, [demo_run.classes.index(label) for _, _, label in rows])


def test_commands_take_shards(
    demo_run: seewhy.Run, demo_onnx: Path, demo_images: list[Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """predict with the exported file and with the run, patterns and folders of shards; an interrupted table knows its shard."""
    write_tar(tmp_path / "a-0.tar", [(f"{path.parent.name}/{path.name}", path.read_bytes()) for path in demo_images[:2]])
    write_tar(tmp_path / "a-1.tar", [(f"{path.parent.name}/{path.name}", path.read_bytes()) for path in demo_images[2:5]])
    inputs = find_images([tmp_path])
    assert inputs == find_images([tmp_path / "a-*.tar"]) == find_images([tmp_path / "a-0.tar", tmp_path / "a-1.tar", inputs[0]])
    assert len(inputs) == 5
    runner = CliRunner()
    answers = []
    for model in (demo_onnx, demo_run.path):
        found = runner.invoke(app, ["predict", str(model), str(tmp_path), "--json"])
        assert found.exit_code == 0
        answers.append([(record["path"], record["top"][0]["class"]) for record in json.loads(found.stdout)])
    assert answers[0] == answers[1]
    assert [path for path, _ in answers[0]] == [str(path) for path in inputs]
    before = [source.key for source in find_sources([tmp_path])]
    assert [source.key for source in find_sources([tmp_path])] == before
    os.utime(tmp_path / "a-1.tar", (1, 1))
    assert [source.key == key for source, key in zip(find_sources([tmp_path]), before, strict=True)] == [True, False]


def test_the_record_of_checked_files_follows_the_shard(folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(folder)
    tar = write_tar(tmp_path / "x.tar", [(name, content) for name, content, _ in rows[:2]])
    first = check_files([tar / rows[0][0]])
    monkeypatch.setattr("seewhy.data.verify.read_bytes", lambda path: pytest.fail("read again"))
    assert check_files([tar / rows[0][0]]) == first
    monkeypatch.undo()
    monkeypatch.setenv("SEEWHY_CACHE", str(cache))
    write_tar(tar, [(rows[0][0], rows[1][1]), (rows[1][0], rows[0][1])])  # the same names and sizes of other images
    os.utime(tar, (1, 1))
    assert check_files([tar / rows[0][0]])[0].sha256 != first[0].sha256


def test_dry_run_of_shards(folder: Path, tmp_path: Path, cache: Path) -> None:
    pq.write_table(hugging_face(rows_of(folder), sorted(CLASSES)), tmp_path / "all.parquet", row_group_size=2)
    config = TrainConfig(data=str(tmp_path / "all.parquet"), backbone="efficientnet_lite0", unfreeze=0, size=64, group_by="exact")
    found = dry_run(config, tmp_path / "run")
    assert sum(found["classes"].values()) == 18
    assert sum(found["parts"].values()) == 18
    assert found["seconds"] > 0
    assert not cache.exists()


# ---------------------------------------------------------------- what a shard says


def test_labels_and_images_of_a_tar(tmp_path: Path) -> None:
    """.cls before .json before the folder; a sample's .jpg before its .mask.png; hidden files, folders, links and other files aside."""
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as archive:

        def add(name: str, content: bytes = b"image", kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))

        add("cat", b"", tarfile.DIRTYPE)
        add("cat/1.jpg", b"first" * 200)
        add("cat/1.cls", b" lynx\n")
        add("cat/1.json", b'{"label": "wrong"}')
        add("2.json", b'{"size": 3, "class": 7}')
        add("2.mask.png")
        add("2.JPG", b"second")
        add("./owl/deep/3.a.jpeg", b"third")
        add("/4.png", b"fourth")
        add("owl/5.json", b"[" * 5000)
        add("owl/5.webp", b"fifth")
        add("owl/._6.jpg")
        add("owl/7.jpg", b"", tarfile.SYMTYPE)
        add("owl/8.jpg", b"", tarfile.CHRTYPE)
        add("owl/readme.txt")
    wanted = [
        Member("cat/1.jpg", "lynx"),
        Member("2.JPG", "7"),
        Member("owl/deep/3.a.jpeg", "deep"),
        Member("4.png", None),
        Member("owl/5.webp", "owl"),
    ]
    contents = [b"first" * 200, b"second", b"third", b"fourth", b"fifth"]
    assert members(file) == wanted
    assert [read_member(file, member.name) for member in wanted] == contents
    assert [read_bytes(file / member.name) for member in wanted] == contents
    with file.open("rb") as opened:
        assert list(stream(opened, "tar")) == [(m.name, data, m.label) for m, data in zip(wanted, contents, strict=True)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_all_formats_of_tar(form: int, tmp_path: Path) -> None:
    names = ["Kätzchen/ø.jpg", "a/" + "b" * 90 + "/" + "c" * 60 + ".png"]
    file = write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names], form)
    assert [member.name for member in members(file)] == names
    assert [read_member(file, name) for name in names] == [name.encode() for name in names]


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


NUMBERED = [("000000.jpg", None), ("000001.jpg", None)]
PARQUET = {
    "names from a column": (
        table(jpg=[b"1", b"2"], file_name=["a/x.png", "b"], label=["cat", None]),
        [("a/x.png", "cat"), ("b.jpg", None)],
    ),
    "numbers where names repeat": (table(image=[b"1", b"2"], path=["x.jpg", "x.jpg"]), NUMBERED),
    "numbers where names lead out": (table(image=[b"1", b"2"], path=["../x.jpg", "y.jpg"]), NUMBERED),
    "numbers where one has no name": (table(image=[b"1", b"2"], path=["x.jpg", None]), NUMBERED),
    "the only binary column": (table(odd=[b"1", b"2"], cls=[3, 12]), [("000000.jpg", "3"), ("000001.jpg", "12")]),
    "a dictionary of classes": (
        table(content=[b"1", b"2"], target=pa.array(["cat", "owl"]).dictionary_encode()),
        [("000000.jpg", "cat"), ("000001.jpg", "owl")],
    ),
    "fractions are no classes": (table(image=[b"1", b"2"], label=[0.5, 1.0]), NUMBERED),
    "large columns": (
        table(image=pa.array([b"1", b"2"], pa.large_binary()), label=pa.array(["cat", "owl"], pa.large_string())),
        [("000000.jpg", "cat"), ("000001.jpg", "owl")],
    ),
    "Hugging Face's": (
        hugging_face([("a.png", b"1", "owl"), ("b.png", b"2", "cat")], ["cat", "owl"], "img"),
        [("a.png", "owl"), ("b.png", "cat")],
    ),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_names_and_labels_of_parquet(kind: str, tmp_path: Path) -> None:
    content, wanted = PARQUET[kind]
    file = tmp_path / "x.parquet"
    pq.write_table(content, file, row_group_size=1)
    assert members(file) == [Member(*row) for row in wanted]
    assert [read_member(file, name) for name, _ in wanted] == [b"1", b"2"]
    with file.open("rb") as opened:
        assert list(stream(opened, "parquet")) == [(name, data, label) for (name, label), data in zip(wanted, (b"1", b"2"), strict=True)]


def test_a_class_label_that_says_none_and_one_beyond_its_names(tmp_path: Path) -> None:
    content = hugging_face([("a.png", b"1", "cat"), ("b.png", b"2", "cat"), ("c.png", b"3", "cat")], ["cat"])
    content = content.set_column(1, "label", pa.array([-1, 0, 5], pa.int64()))
    pq.write_table(content, tmp_path / "x.parquet")
    assert [member.label for member in members(tmp_path / "x.parquet")] == [None, "cat", "5"]


def test_paths_into_shards_and_beside_them(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a/b.jpg", b"1")])
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "folder.tar" / "y.jpg").write_bytes(b"2")
    assert shard_of(tar / "a/b.jpg") == (tar, "a/b.jpg")
    assert shard_of(tar) is None
    assert shard_of(tmp_path / "folder.tar" / "y.jpg") is None  # a folder, whatever it is called
    assert read_bytes(tmp_path / "folder.tar" / "y.jpg") == b"2"
    assert shard_of(tmp_path / "gone.tar" / "y.jpg") is None
    with pytest.raises(ImageError, match="no such file"):
        seewhy.data.decode.read_image(tar / "a/c.jpg")


# ---------------------------------------------------------------- which shards make a dataset


def test_parts_by_name_and_by_folder(folder: Path, tmp_path: Path, cache: Path) -> None:
    rows = rows_of(folder)
    for place, names in (
        ("named", ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet")),
        ("foldered", ("train/a.parquet", "val/a.parquet", "test/a.parquet")),
    ):
        for number, name in enumerate(names):
            (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(hugging_face(rows[number::3], sorted(CLASSES)), tmp_path / place / name)
        images = open_images(str(tmp_path / place))
        wanted = {content: part for number, part in enumerate(("train", "val", "test")) for _, content, _ in rows[number::3]}
        assert {read_bytes(path): part for path, part in zip(images.paths, images.parts, strict=True)} == wanted
        split = split_images(images)
        assert [len(split.train), len(split.val), len(split.test)] == [6, 6, 6]


def test_shards_that_make_no_dataset(folder: Path, tmp_path: Path, cache: Path) -> None:
    content = (folder / "cat/0.png").read_bytes()
    labelled = [("cat/1.png", content), ("owl/1.png", content)]

    def refused(place: str, match: str, **files: list[tuple[str, bytes]]) -> None:
        for name, entries in files.items():
            file = tmp_path / place / f"{name}.tar"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tar(file, entries)
        with pytest.raises(DataError, match=match) as caught:
            open_images(str(tmp_path / place))
        assert "\n" not in str(caught.value)

    refused("unlabelled", r"x\.tar: 1\.png has no label; expected a \.cls beside each image, a \.json", x=[("1.png", content)])
    refused("single", "only one class", x=labelled[:1])
    refused("empty", "no images in its shards", x=[("readme.txt", b"")])
    refused("cased", "differ in case only", x=[*labelled, ("Cat/2.png", content)])
    refused("named", "train-0.tar names a part and other.tar none", **{"train-0": labelled, "other": labelled})
    refused("both", "separate them", **{"x": labelled, "train/y": labelled})
    (tmp_path / "mixed" / "cat").mkdir(parents=True)
    (tmp_path / "mixed" / "cat" / "1.png").write_bytes(content)
    refused("mixed", r"holds shards \(x\.tar\) and folders of images \(cat\); separate them", x=labelled)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="store it as plain tar"):
        open_images(str(tmp_path / "x.tar.gz"))
    with pytest.raises(DataError, match="store it as plain tar"):
        find_images([tmp_path / "x.tar.gz"])
    pq.write_table(table(image=[content]), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"000000\.jpg has no label; expected a column named label, .* or Hugging Face's ClassLabel"):
        open_images(str(tmp_path / "y.parquet"))


def test_a_bad_image_in_a_shard_is_named_and_can_be_left_out(folder: Path, tmp_path: Path, cache: Path) -> None:
    rows = rows_of(folder)
    rows[3] = (rows[3][0], rows[3][1][:50], rows[3][2])
    content = hugging_face(rows, sorted(CLASSES))
    column = content.column("image").to_pylist()
    column[5] = {"bytes": None, "path": column[5]["path"]}
    pq.write_table(content.set_column(0, "image", pa.array(column)), tmp_path / "x.parquet")
    with pytest.raises(ImageError, match=r"2 of 18 images .*x\.parquet/cat/3\.png \(truncated.*x\.parquet/cat/5\.png \(empty file\)"):
        open_images(str(tmp_path / "x.parquet"))
    assert len(open_images(str(tmp_path / "x.parquet"), skip_bad=True)) == 16


# ---------------------------------------------------------------- damaged and hostile


def header(name: str = "a/1.jpg", size: int = 0, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def negative_size() -> bytes:
    """A header whose size leads back to itself, which an older tarfile reads for ever."""
    block = bytearray(header(size=5).tobuf())
    block[124:136] = b"\xff" * 10 + (0x10000 - 1024).to_bytes(2, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


TARS = {
    "no tar": (b"x" * 2000, "not a complete tar file"),
    "empty": (b"", "not a complete tar file"),
    "cut in an image": (header(size=3000).tobuf() + b"x" * 1000, "not a complete tar file"),
    "garbage between": (header(size=3).tobuf() + b"abc".ljust(512, b"\0") + b"x" * 512, "no header at byte 1,024"),
    "back to itself": (negative_size() + bytes(2048), "not a complete tar file"),
    "a header of gigabytes": (header("x", 1 << 40, type=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) + bytes(4096), "too large"),
    "twice": (header().tobuf() + header("./a//1.jpg").tobuf() + bytes(1024), "a/1.jpg is in it twice"),
    "leads out": (header("../../etc/1.jpg").tobuf() + bytes(1024), "leads out of the shard"),
    "control characters": (header("a/\x1b[2J.jpg").tobuf() + bytes(1024), "holds control characters"),
    "not UTF-8": (header("a/\udcff.jpg").tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + bytes(1024), "is not UTF-8"),
    "a long name": (header("a" * 1200 + ".jpg").tobuf(tarfile.GNU_FORMAT) + bytes(1024), "is too long"),
}


@pytest.mark.parametrize("kind", TARS)
def test_damaged_and_hostile_tars_are_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    content, reason = TARS[kind]
    file = tmp_path / "x.tar"
    file.write_bytes(content)
    for read in (lambda: members(file), lambda: list(stream(io.BytesIO(content), "tar", str(file)))):
        with pytest.raises(DataError, match=reason) as caught:
            read()
        assert str(caught.value).startswith(f"{file}: ")
        assert len(str(caught.value)) < len(str(file)) + 1400


def test_tars_that_are_only_odd(tmp_path: Path) -> None:
    """No images at all; no end marks; an image of a size that nobody means is bad by itself."""
    file = tmp_path / "x.tar"
    file.write_bytes(bytes(10240))
    assert members(file) == []
    file.write_bytes(header(size=3).tobuf() + b"abc".ljust(512, b"\0"))
    assert read_member(file, "a/1.jpg") == b"abc"


def test_images_of_absurd_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a/1.jpg", b"x" * 600), ("a/2.jpg", b"y")])
    parquet = tmp_path / "x.parquet"
    pq.write_table(table(image=[b"x" * 600, b"y"]), parquet)
    monkeypatch.setattr(shard_index, "MAX_BYTES", 500)
    monkeypatch.setattr(shard_tar, "MAX_BYTES", 500)
    for shard in (tar, parquet):
        first, second = (member.name for member in members(shard))
        with pytest.raises(OSError, match="more than"):
            read_member(shard, first)
        assert read_member(shard, second) == b"y"
        with shard.open("rb") as opened, pytest.raises(DataError, match="more than"):
            list(stream(opened, shard.suffix[1:]))


def test_damaged_parquet_files_are_refused_in_a_line(tmp_path: Path) -> None:
    good = io.BytesIO()
    pq.write_table(table(image=[b"abc" * 100] * 20, label=["cat"] * 20), good, compression="none")
    content = good.getvalue()
    file = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    spoiled = [b"", b"PAR1", content[:-30], content[: len(content) // 2], b"x" * 1000]
    places = rng.integers(0, len(content), 60)
    spoiled += [content[:at] + rng.bytes(8) + content[at + 8 :] for at in places]
    refused = 0
    for number, data in enumerate(spoiled):
        file.write_bytes(data)
        os.utime(file, (number, number))
        try:
            for member in members(file):
                with suppress(OSError):  # what is damaged before the footer is a bad image
                    read_member(file, member.name)
        except DataError as error:
            refused += 1
            assert str(error).startswith(f"{file}: ")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert refused >= 10
    pq.write_table(table(number=[1, 2]), file)
    with pytest.raises(DataError, match="no column of images; expected"):
        members(file)


@pytest.mark.parametrize("column", ["img", "picture", "content"])
def test_usual_names_of_the_column_of_images(column: str, tmp_path: Path) -> None:
    """Among other binary columns."""
    pq.write_table(table(thumbnail=[b"small"], **{column: [b"large"]}), tmp_path / "x.parquet")
    (member,) = members(tmp_path / "x.parquet")
    assert read_member(tmp_path / "x.parquet", member.name) == b"large"


def test_a_row_group_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(image=[b"abc" * 100] * 20), tmp_path / "x.parquet", row_group_size=10)
    monkeypatch.setattr(shard_parquet, "MAX_GROUP", 50)
    with pytest.raises(DataError, match="write groups of 100 rows"):
        members(tmp_path / "x.parquet")


# ---------------------------------------------------------------- memory, threads, pipes


def test_at_most_two_row_groups_are_held(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    contents = [rng.bytes(100_000) for _ in range(200)]
    pq.write_table(table(image=contents), file, row_group_size=10)  # 20 groups of 1 MB
    names = [member.name for member in members(file)]
    before = pa.total_allocated_bytes()
    with ThreadPoolExecutor(4) as pool:
        for name, content in zip(names, pool.map(functools.partial(read_member, file), names), strict=True):
            assert content == contents[int(Path(name).stem)]
            assert pa.total_allocated_bytes() - before < 5_000_000
    with file.open("rb") as opened:
        for found, (_, content, _) in enumerate(stream(opened, "parquet")):
            assert content == contents[found]
            assert pa.total_allocated_bytes() - before < 8_000_000
    rng.shuffle(names)
    assert all(read_member(file, name) == contents[int(Path(name).stem)] for name in names[:50])


class Pipe(io.RawIOBase):
    """Gives a few bytes at a time and knows no way back, as a connection does."""

    def __init__(self, content: bytes) -> None:
        self.source, self.most = io.BytesIO(content), 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "reads to the end"
        self.most = max(self.most, size)
        return self.source.read(min(size, 700))

    def seekable(self) -> bool:
        return False


def test_a_tar_is_read_from_a_pipe(tmp_path: Path) -> None:
    entries = [(f"{n % 3}/{n:03d}.jpg", bytes([n]) * 5000 * n) for n in range(40)]
    file = write_tar(tmp_path / "x.tar", [*entries, ("z.bin", bytes(3_000_000))])
    pipe = Pipe(file.read_bytes())
    assert [(name, data) for name, data, _ in stream(pipe, "tar")] == entries
    assert pipe.most <= 1 << 20  # the member that is no image is passed over a little at a time


def read_in_child(shard: Path, names: list[str], results: Any) -> None:
    results.put([len(read_member(shard, name)) for name in names])


def test_forked_readers_do_not_wait_for_the_parent(tmp_path: Path) -> None:
    """A fork in the middle of another thread's reading: the child has a lock of its own, and opens the shard itself."""
    file = tmp_path / "x.parquet"
    pq.write_table(table(image=[b"a" * n for n in range(1, 31)]), file, row_group_size=5)
    names = [member.name for member in members(file)]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with shards._LOCK:
            held.set()
            done.wait(60)

    reader = threading.Thread(target=hold)
    reader.start()
    held.wait(10)
    child = context.Process(target=read_in_child, args=(file, names, results))
    child.start()
    try:
        assert results.get(timeout=30) == list(range(1, 31))
    finally:
        done.set()
        child.kill()
        child.join()
