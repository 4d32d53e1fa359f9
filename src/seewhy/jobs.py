"""Pictures in bytes -> rows of a table, in bounded memory: what one worker does, here or on another machine."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

from seewhy.attribution import FeatureMaps, maps_of_features
from seewhy.backbones import Backbone, create_backbone
from seewhy.cam import scale_to_one
from seewhy.checking import Checked, check_bytes
from seewhy.config import TrainConfig
from seewhy.cutting import Cut, cut_backbone
from seewhy.decoding import decode
from seewhy.engines import MANY, Engine, kept_engine, make_engine, steady
from seewhy.errors import RunError
from seewhy.explain import class_index, maps_both_ways
from seewhy.features import eval_square, feature_shape, render_view, rounded
from seewhy.metrics import softmax
from seewhy.predict import answers_engine, as_predictions, logits_of
from seewhy.predictions import Columns, Predictions
from seewhy.run import Run, load
from seewhy.runtime import OnnxModel, load_onnx
from seewhy.store import stored_dtype
from seewhy.streams import BATCH, in_batches, in_order
from seewhy.transforms import Preprocessing

Picture = tuple[str, bytes | str]  # name, and content or why there is none
Bad = list[tuple[str, str]]  # name, reason
MANY_ASKED = 1_000_000  # pictures that a job is made ready for; only "many" counts
MOST_ROWS, MOST_BYTES = 8192, 32_000_000  # of a piece, so that no shard is too large
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # that are tried
GAIN = 1.05  # what twice the batch has to be faster by, to be worth its memory
TRIED_S = 0.15  # a batch size


@dataclass(eq=False)
class Piece:
    """Rows of answers in the order of the pictures, columns by name, and what was left out."""

    columns: Columns = field(default_factory=dict)
    bad: Bad = field(default_factory=list)

    @property
    def pictures(self) -> int:
        return len(self.columns.get("path", ())) + len(self.bad)


Work = Callable[[Iterable[Picture]], Iterator[Piece]]


@dataclass(frozen=True)
class Request:
    """What is asked of every picture. job: its name in JOBS. asked: run folder or exported file, '' for none. options: of the job."""

    job: str
    asked: str
    options: dict[str, Any]


def make_work(request: Request, cores: int, pictures: int = MANY_ASKED) -> Work:
    """Loads what is asked and makes ready to answer on so many cores. pictures: how many will be asked about, roughly."""
    return JOBS[request.job](Path(request.asked), request.options, cores, pictures)


# ---------------------------------------------------------------- how many at once


def choose_batch(measured: Sequence[tuple[int, float]]) -> int:
    """(batch size, pictures a second) of growing sizes -> the smallest size from which the next ones gain less than GAIN.

    Two steps are looked at, so that one disturbed measurement does not end the growth.
    """
    chosen, best = measured[0]
    for size, rate in measured[1:]:
        if rate > best * GAIN:
            chosen, best = size, rate
    return chosen


def measured_batch(forward: Engine, side: int) -> tuple[Engine, int]:
    """The engine with the batch size that is fastest here, and that size; sizes grow until two in a row gain nothing or memory is out."""
    measured: list[tuple[int, float]] = []
    squares = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    for size in BATCHES:
        batch = np.repeat(squares, size, axis=0)
        try:
            forward.run(batch)
            began, done = time.perf_counter(), 0
            while (spent := time.perf_counter() - began) < TRIED_S or not done:
                forward.run(batch)
                done += size
        except (MemoryError, torch.cuda.OutOfMemoryError):
            break
        measured.append((size, done / (time.perf_counter() - began if spent < TRIED_S else spent)))
        if len(measured) > 2 and choose_batch(measured) < measured[-2][0]:
            break
    if not measured:
        raise RunError("not even one picture fits into memory here; ask fewer workers, or a machine with more")
    size = choose_batch(measured)
    return replace(forward, batch=size), size


def _at_once(size: int) -> int:
    """Squares that are held together: BATCH, or more where an engine takes more."""
    return max(BATCH, size)


# ---------------------------------------------------------------- the way of every job


def _answered(
    pictures: Iterable[Picture],
    prepare: Callable[[bytes], Any],
    answer: Callable[[list[str], list[Any]], Columns],
    cores: int,
    lanes: int,
    size: int,
) -> Iterator[Piece]:
    """Pieces: what `prepare` makes of bytes (ValueError with the reason where it cannot), in threads, then `answer` of a batch of those."""

    def prepared(picture: Picture) -> tuple[str, Any, str]:
        name, data = picture
        if isinstance(data, str):
            return name, None, data
        try:
            return name, prepare(data), ""
        except ValueError as error:
            return name, None, str(error)

    def piece_of(batch: list[tuple[str, Any, str]]) -> Piece:
        good = [(name, ready) for name, ready, reason in batch if not reason]
        columns = answer([name for name, _ in good], [ready for _, ready in good]) if good else {}
        return Piece(columns, [(name, reason) for name, _, reason in batch if reason])

    batches = in_batches(in_order(prepared, pictures, cores, ahead=2 * size), size)
    with threadpool_limits(max(1, cores // lanes), "blas"):  # each lane its share of the cores, for NumPy's products too
        yield from _gathered(in_order(piece_of, batches, lanes, ahead=lanes))


def _gathered(small: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces of up to MOST_ROWS pictures or MOST_BYTES of values."""
    held = Piece()
    weight = 0
    for piece in small:
        for name, values in piece.columns.items():
            held.columns.setdefault(name, []).extend(values)
            weight += sum(len(value) for value in values if isinstance(value, bytes))
        held.bad += piece.bad
        if held.pictures >= MOST_ROWS or weight >= MOST_BYTES:
            yield held
            held, weight = Piece(), 0
    if held.pictures:
        yield held


def _square_from(preprocessing: Preprocessing) -> Callable[[bytes], npt.NDArray[np.uint8]]:
    """Bytes -> the square that the network answers about."""
    return lambda data: eval_square(decode(data, preprocessing.enough), preprocessing)


# ---------------------------------------------------------------- predict


def _predict(asked: Path, options: dict[str, Any], cores: int, pictures: int) -> Work:
    """options: top_k, least. Columns as `Predictions.columns`."""
    if asked.suffix == ".onnx":
        return _predict_onnx(load_onnx(asked), options, cores)
    run = load(asked)
    return predict_work(run, options, cores, pictures)


def predict_work(run: Run, options: dict[str, Any], cores: int, pictures: int = MANY_ASKED) -> Work:
    """The same of a run that is loaded already."""
    preprocessing = run.backbone.preprocessing
    forward, size = measured_batch(answers_engine(run, pictures), preprocessing.size)

    def answer(names: list[str], squares: list[npt.NDArray[np.uint8]]) -> Columns:
        found = as_predictions(run, names, logits_of(run, forward, np.stack(squares)), ())
        return found.columns(options["top_k"], options["least"])

    return lambda given: _answered(given, _square_from(preprocessing), answer, cores, forward.lanes, _at_once(size))


def _predict_onnx(model: OnnxModel, options: dict[str, Any], cores: int) -> Work:
    """An exported file resizes by itself, so each picture is asked about alone, one a core."""
    wanted = [name for name in ("probabilities", "strangeness") if name in model.outputs]

    def ask(data: bytes) -> dict[str, npt.NDArray[Any]]:
        return model.ask(np.asarray(decode(data, model.facts["enough"]))[None], wanted)

    def answer(names: list[str], found: list[dict[str, npt.NDArray[Any]]]) -> Columns:
        probs = np.concatenate([each["probabilities"] for each in found]).astype(np.float64)
        strange = np.array([float(each["strangeness"][0]) if "strangeness" in each else -math.inf for each in found])
        answers = Predictions(tuple(names), probs, model.classes, strange > model.unknown_above)
        return answers.columns(options["top_k"], options["least"])

    return lambda given: _answered(given, ask, answer, cores, 1, BATCH)


# ---------------------------------------------------------------- explain


def _explain(asked: Path, options: dict[str, Any], cores: int, pictures: int) -> Work:
    """options: method, target, against. Columns path, class, prob, predicted, heatmap: a grey PNG of the network's last maps, 255 most."""
    run = load(asked)
    model, preprocessing = run.backbone.model, run.backbone.preprocessing
    forward, size = measured_batch(kept_engine(run.engines["maps"], FeatureMaps(model), preprocessing, pictures), preprocessing.size)
    target, against = (options[name] and class_index(options[name], run.classes) for name in ("target", "against"))

    def maps_of(way: torch.Tensor, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        held = torch.full((len(way),), against) if against is not None else None
        return maps_of_features(model, way, options["method"], given, held)

    def answer(names: list[str], squares: list[npt.NDArray[np.uint8]]) -> Columns:
        whole = np.stack(squares)
        ways = [whole, np.ascontiguousarray(whole[:, :, ::-1])] if run.config.test_flip else [whole]
        features = [torch.from_numpy(forward(way)) for way in ways]
        given = torch.full((len(names),), target) if target is not None else None
        found, logits, chosen = maps_of(features[0], given) if len(ways) == 1 else maps_both_ways(maps_of, features, given)
        probs, maps = softmax(logits.numpy() / run.temperature), scale_to_one(found).numpy()
        return {
            "path": names,
            "class": [run.classes[c] for c in chosen],
            "prob": probs[np.arange(len(names)), chosen.numpy()].tolist(),
            "predicted": [run.classes[c] for c in probs.argmax(axis=1)],
            "heatmap": [_png(each) for each in maps],
        }

    # One lane: the head's gradients are PyTorch's, which has threads of its own.
    return lambda given: _answered(given, _square_from(preprocessing), answer, cores, forward.lanes, _at_once(size))


def _png(heatmap: npt.NDArray[np.float32]) -> bytes:
    """(h, w) of 0..1 -> a grey picture."""
    file = io.BytesIO()
    Image.fromarray((255 * heatmap).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- features


def frozen_part(config: TrainConfig, classes: int) -> tuple[Backbone, Cut]:
    """The network that such a training starts from, and its cut."""
    backbone = create_backbone(config.backbone, classes, config.weights, config.seed, config.resize, config.size)
    return backbone, cut_backbone(backbone, config.unfreeze)


def _features(asked: Path, options: dict[str, Any], cores: int, pictures: int) -> Work:
    """options: config (of train, as JSON), classes, views, engine. Columns path, views (all in a row of bytes), and those of Checked.

    Pictures that cannot be used have a row too, with the reason and no views: the record of checked files wants them.
    """
    config = TrainConfig.model_validate(options["config"])
    backbone, cut = frozen_part(config, options["classes"])
    assert cut.trunk is not None  # the command refuses what has nothing frozen
    preprocessing, views = backbone.preprocessing, range(options["views"])
    dtype = stored_dtype(feature_shape(cut.trunk, preprocessing), config.feature_dtype)
    forward = make_engine(cut.trunk, preprocessing, max(pictures, MANY), options["engine"])
    if options["engine"] == "onnx":  # PyTorch's bits depend on the batch
        forward, _ = measured_batch(forward, preprocessing.size)

    def prepare(data: bytes) -> tuple[Checked, list[npt.NDArray[np.uint8]]]:
        checked = check_bytes(data)
        if checked.problem:
            return checked, []
        picture = decode(data, preprocessing.enough)
        return checked, [render_view(picture, view, checked.sha256, preprocessing) for view in views]

    def answer(names: list[str], found: list[tuple[Checked, list[npt.NDArray[np.uint8]]]]) -> Columns:
        squares = [square for _, each in found for square in each]
        features = rounded(steady(forward, np.stack(squares)), dtype) if squares else np.empty(0, dtype)
        rows = iter(features)
        kept = [b"".join(next(rows).tobytes() for _ in each) for _, each in found]
        columns: Columns = {"path": names, "views": kept}
        for name in ("sha256", "width", "height", "problem", "phash", "grey"):
            columns[name] = [getattr(checked, name) for checked, _ in found]
        return columns

    return lambda given: _answered(given, prepare, answer, cores, forward.lanes, BATCH)


JOBS: dict[str, Callable[[Path, dict[str, Any], int, int], Work]] = {"predict": _predict, "explain": _explain, "features": _features}


def prepared(job: str, asked: Path) -> Run | OnnxModel:
    """What is asked, loaded once here: so that mistakes are told of before any worker starts, and the export of the network is at hand."""
    if asked.suffix == ".onnx":
        if job != "predict":
            raise RunError(f"{asked}: an exported file answers, it does not explain pictures in numbers; pass its run")
        return load_onnx(asked)
    run = load(asked)
    if job == "predict":
        answers_engine(run, MANY_ASKED)
    else:
        kept_engine(run.engines["maps"], FeatureMaps(run.backbone.model), run.backbone.preprocessing, MANY_ASKED)
    return run


def asked_hash(asked: Path) -> str:
    """sha256 over what decides a run's or an exported file's answers."""
    found = hashlib.sha256()
    for file in asked_files(asked):
        found.update(f"{file.name}\n".encode())
        with file.open("rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                found.update(block)
    return found.hexdigest()


def asked_files(asked: Path) -> list[Path]:
    """What has to travel to another machine, so that it can answer."""
    if not asked.is_dir():
        return [asked]
    return [file for name in ("run.json", "model.safetensors", "unknowns.safetensors") if (file := asked / name).is_file()]
