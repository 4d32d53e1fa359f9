"""Test prediction: finding images, tables and their files, unreadable images."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from seewhy.api import Run
from seewhy.data.decode import read_image
from seewhy.data.listing import find_images
from seewhy.errors import DataError, ImageError, OutputError
from seewhy.evaluation.metrics import softmax
from seewhy.inference.predict import logits_executor, make_worker, predict
from seewhy.inference.predictions import WRITERS, Columns, Predictions, open_table, predict_files
from seewhy.inference.work_units import find_sources
from seewhy.models.features import render_view
from tests.cheap_run import CLASSES, cheap_run, normalised

TABLE = Predictions(
    paths=("a, b.jpg", "é.png"),
    probs=np.array([[0.1, 0.7, 0.2], [1 / 3, 1 / 3, 1 / 3]]),
    classes=("ant", "bee", "cat"),
    ood=np.array([False, True]),
)


@pytest.fixture(scope="module")
def run() -> Run:
    return cheap_run()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """four/{0,1}.jpg, four/deep/{2,3}.jpg beside a text, and an empty folder."""
    root = tmp_path / "four"
    (root / "deep").mkdir(parents=True)
    for n in range(4):
        noise = np.random.default_rng(n).integers(0, 256, size=(30 + n, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save((root if n < 2 else root / "deep") / f"{n}.jpg")
    (root / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    return root


# ---------------------------------------------------------------- find_images


def names(found: list[Path]) -> list[str]:
    return [path.name for path in found]


def test_files_folders_and_patterns_are_found_in_the_order_given(folder: Path) -> None:
    assert find_images([folder / "1.jpg"]) == [folder / "1.jpg"]
    assert names(find_images([folder])) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert names(find_images([f"{folder}/*.jpg"])) == ["0.jpg", "1.jpg"]
    assert names(find_images([f"{folder}/**/*.jpg"])) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert names(find_images([folder / "deep", folder / "0.jpg"])) == ["2.jpg", "3.jpg", "0.jpg"]


def test_a_image_named_twice_counts_once(folder: Path) -> None:
    assert names(find_images([folder / "1.jpg", folder, f"{folder}/*.jpg", f"{folder}/./1.jpg"])) == ["1.jpg", "0.jpg", "2.jpg", "3.jpg"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(folder: Path) -> None:
    (folder / "0.jpg").rename(folder / "x[1].jpg")
    assert names(find_images([folder / "x[1].jpg"])) == ["x[1].jpg"]


@pytest.mark.parametrize(
    ("item", "message"),
    [("none.jpg", "none.jpg: no such file, folder or pattern"), ("*.gif", "no such file"), ("../empty", "no images in this folder")],
)
def test_nothing_found_is_a_data_error(folder: Path, item: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        find_images([folder / "0.jpg", folder / item])


def test_images_beside_shards_are_refused_as_they_are_in_training(folder: Path) -> None:
    with tarfile.open(folder / "more.tar", "w") as shard:
        shard.add(folder / "0.jpg", "cat/0.jpg")
    for inputs in ([folder], [folder / "deep", folder]):
        with pytest.raises(DataError, match=r"four: holds shards \(more\.tar\) and images \(0\.jpg\); separate them"):
            find_images(inputs)
        with pytest.raises(DataError, match=r"four: holds shards \(more\.tar\) and images \(0\.jpg\); separate them"):
            find_sources(inputs)
    assert names(find_images([folder / "more.tar", folder / "1.jpg"])) == ["0.jpg", "1.jpg"]


def test_no_inputs_are_a_data_error() -> None:
    with pytest.raises(DataError, match="no images given"):
        find_images([])


# ---------------------------------------------------------------- the table


def test_table_holds_the_most_probable_classes_first() -> None:
    table = TABLE.table(2)
    assert list(table.columns) == ["path", "class_1", "prob_1", "class_2", "prob_2", "ood"]
    assert table.to_numpy().tolist() == [["a, b.jpg", "bee", 0.7, "cat", 0.2, False], ["é.png", "ant", 1 / 3, "bee", 1 / 3, True]]
    assert TABLE.table(99).shape == (2, 1 + 2 * 3 + 1)
    assert TABLE.table(1, min_confidence=0.5)["decision"].tolist() == ["bee", ""]


def test_records_hold_what_the_table_holds_and_are_json() -> None:
    assert json.loads(json.dumps(TABLE.records(1))) == [
        {"path": "a, b.jpg", "top": [{"class": "bee", "prob": 0.7}], "ood": False},
        {"path": "é.png", "top": [{"class": "ant", "prob": 1 / 3}], "ood": True},
    ]
    assert [record["decision"] for record in TABLE.records(1, min_confidence=0.5)] == ["bee", None]


@settings(deadline=None)
@given(data=st.data(), n=st.integers(0, 6), c=st.integers(1, 5), top_k=st.integers(1, 7))
def test_rows_say_what_the_probabilities_say(data: st.DataObject, n: int, c: int, top_k: int) -> None:
    """Any probabilities: each row's classes are different, sorted by probability, and records hold the same as columns."""
    rows = data.draw(st.lists(st.lists(st.floats(1e-3, 1), min_size=c, max_size=c), min_size=n, max_size=n))
    probs = np.array(rows, dtype=np.float64).reshape(n, c)
    probs /= probs.sum(axis=1, keepdims=True)
    min_confidence = data.draw(st.none() | st.floats(0, 1))
    names = tuple(data.draw(st.lists(st.text(min_size=1), min_size=c, max_size=c, unique=True)))
    found = Predictions(tuple(f"{i}.jpg" for i in range(n)), probs, names, np.zeros(n, dtype=bool))
    columns = found.columns(top_k, min_confidence)
    assert set(map(len, columns.values())) <= {n}
    for i, record in enumerate(found.records(top_k, min_confidence)):
        shown = [answer["prob"] for answer in record["top"]]
        assert shown == sorted(probs[i].tolist(), reverse=True)[:top_k]
        assert len({answer["class"] for answer in record["top"]}) == min(top_k, c)
        assert all(probs[i][names.index(answer["class"])] == answer["prob"] for answer in record["top"])
        if min_confidence is not None:
            assert record["decision"] == (record["top"][0]["class"] if shown[0] >= min_confidence else None)


READERS = {
    "csv": pd.read_csv,
    "parquet": pd.read_parquet,
    "json": lambda path: pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))),
}


@pytest.mark.parametrize("suffix", READERS)
def test_saved_table_reads_back_equal(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"table.{suffix}"
    TABLE.save(path, top_k=3)
    tolerance = {"csv": 1e-14, "parquet": 0, "json": 1e-9}[suffix]  # pandas writes 10 digits to JSON
    pd.testing.assert_frame_equal(READERS[suffix](path), TABLE.table(3), rtol=tolerance, atol=0)
    TABLE.save(str(path), top_k=1)  # replaces it
    assert READERS[suffix](path).shape == (2, 4)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saved_table_is_as_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    TABLE.save(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["table.xls", "table", "."])
def test_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"unknown table format; name it \.csv, \.parquet or \.json"):
        TABLE.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/table.csv", "file/deeper/table.json", "folder.parquet"])
def test_unwritable_place_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("a regular file")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(OutputError, match=r"cannot be written \(.+\); choose another path") as caught:
        TABLE.save(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.parquet"]


def test_full_disk_keeps_the_older_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TABLE.save(tmp_path / "table.csv")
    before = (tmp_path / "table.csv").read_bytes()

    @contextmanager
    def full(path: Path) -> Iterator[Callable[[Columns], None]]:
        def write(columns: Columns) -> None:
            path.write_text("half")
            raise OSError(28, "No space left on device")

        yield write

    monkeypatch.setitem(WRITERS, ".csv", full)
    with pytest.raises(OutputError, match="No space left on device"):
        TABLE.save(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes() == before
    assert os.listdir(tmp_path) == ["table.csv"]


# ---------------------------------------------------------------- predict


def test_probabilities_are_those_of_the_network(run: Run, folder: Path) -> None:
    predictions = predict(run, [folder])
    paths = [folder / "0.jpg", folder / "1.jpg", folder / "deep" / "2.jpg", folder / "deep" / "3.jpg"]
    assert predictions.paths == tuple(map(str, paths))
    assert predictions.classes == CLASSES
    assert predictions.bad == ()
    pixels = np.stack([render_view(read_image(path), 0, "", run.backbone.preprocessing) for path in paths])
    with torch.no_grad():
        logits = run.backbone.model(torch.from_numpy(normalised(pixels, run.backbone.preprocessing))).numpy()
    np.testing.assert_allclose(predictions.probs, softmax(logits), rtol=1e-4, atol=1e-6)
    assert np.ptp(predictions.probs, axis=1).min() > 0.01
    assert np.abs(predictions.probs[0] - predictions.probs[3]).max() > 1e-4


def batches(run: Run, folder: Path, size: int, skip_bad: bool = False) -> list[Predictions]:
    worker = replace(make_worker(run, logits_executor(run, 4)), batch=size)
    return list(predict_files(worker, run.classes, find_images([folder]), skip_bad))


def test_more_images_than_a_batch_keep_their_order(run: Run, folder: Path) -> None:
    whole = predict(run, [folder])
    parts = batches(run, folder, 3)
    assert [path for part in parts for path in part.paths] == list(whole.paths)
    np.testing.assert_allclose(np.concatenate([part.probs for part in parts]), whole.probs, rtol=1e-4, atol=1e-6)


def spoil(folder: Path) -> None:
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:700])
    (folder / "deep" / "2.jpg").write_text("not an image")


def test_bad_images_are_named_with_their_reason(run: Run, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ImageError, match=r"^2 of 4 images cannot be used: .*1\.jpg \(truncated\).*--skip-bad") as caught:
        predict(run, [folder])
    assert caught.value.bad == ((f"{folder}/1.jpg", "truncated"), (f"{folder}/deep/2.jpg", "not an image"))
    assert "\n" not in str(caught.value)


def test_skip_bad_leaves_them_out_and_keeps_the_others(run: Run, folder: Path) -> None:
    good = predict(run, [folder / "0.jpg", folder / "deep" / "3.jpg"])
    spoil(folder)
    found = predict(run, [folder], skip_bad=True)
    assert found.paths == good.paths
    assert [Path(path).name for path, _ in found.bad] == ["1.jpg", "2.jpg"]
    np.testing.assert_allclose(found.probs, good.probs, rtol=1e-4, atol=1e-6)


def test_all_bad_is_an_error_even_with_skip_bad(run: Run, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ImageError, match=r"2 of 2 images cannot be used.*none is left to predict"):
        predict(run, [folder / "1.jpg", folder / "deep" / "2.jpg"], skip_bad=True)


def test_many_bad_images_are_counted_not_all_listed(run: Run, folder: Path) -> None:
    for n in range(7):
        (folder / f"bad{n}.jpg").write_text("x")
    with pytest.raises(ImageError, match=r"^7 of 11 .*bad4\.jpg \(not an image\), and 2 more; pass --skip-bad") as caught:
        predict(run, [folder])
    assert len(caught.value.bad) == 7
    assert "bad5" not in str(caught.value)


def test_flip_answers_with_the_mean_over_both_directions(folder: Path) -> None:
    run = cheap_run()
    flipping = cheap_run(tta_flip=True)
    with Image.open(folder / "0.jpg") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "mirrored.png")
        image.save(folder / "plain.png")
    plain, mirrored = (np.log(predict(run, [folder / f"{name}.png"]).probs[0]) for name in ("plain", "mirrored"))
    expected = softmax(((plain + mirrored) / 2)[None])[0]
    assert np.abs(np.exp(plain) - np.exp(mirrored)).max() > 1e-3
    for name in ("plain", "mirrored"):
        # Resizing a mirrored image rounds a little differently from mirroring a resized one.
        np.testing.assert_allclose(predict(flipping, [folder / f"{name}.png"]).probs[0], expected, atol=2e-3)


def test_a_second_call_does_not_build_its_engine_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cheap_run()
    first = predict(run, [folder])
    monkeypatch.setattr("seewhy.models.executors.EXECUTORS", {})
    np.testing.assert_array_equal(predict(run, [folder]).probs, first.probs)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_blocks_written_one_by_one_are_the_whole_table(run: Run, folder: Path, tmp_path: Path, suffix: str) -> None:
    whole = predict(run, [folder])
    file = tmp_path / f"answers{suffix}"
    blocks = batches(run, folder, 3)
    assert [len(block.paths) for block in blocks] == [3, 1]
    with open_table(file) as write:
        for block in blocks:
            write(block.columns(2))
        assert not file.exists()  # it appears when it is whole
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json}[suffix]
    pd.testing.assert_frame_equal(read(file), whole.table(2), rtol=1e-4)
    assert sorted(path.name for path in tmp_path.glob("*answers*")) == [file.name]


def test_a_table_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_table(tmp_path / "new" / "table.parquet") as write:
            write(TABLE.table(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_block_of_bad_images_alone(run: Run, folder: Path) -> None:
    spoil(folder)
    blocks = batches(run, folder, 1, skip_bad=True)
    assert [len(block.paths) for block in blocks] == [1, 0, 0, 1]
    assert [len(block.bad) for block in blocks] == [0, 1, 1, 0]
    found = predict(run, [folder], skip_bad=True)
    assert found.probs.shape == (2, len(CLASSES))
