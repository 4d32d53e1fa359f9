"""The search: the best trial by val is the one trained, everything is recorded, a resumed run does not search again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import seewhy
from seewhy.config import dump_config, make_config
from seewhy.curation.split import split_images
from seewhy.data.image_set import open_images
from seewhy.errors import BackboneError, ConfigError
from seewhy.models.features import extract_features
from seewhy.training import search as search_module
from seewhy.training.fit import DivergedError, FitResult
from seewhy.training.search import search

OPTIONS: dict[str, Any] = {
    "backbone": "test_resnet.r160_in1k",
    "weights": "none",
    "unfreeze": 1,
    "epochs": 2,
    "batch_size": 8,
    "workers": 0,
}


def test_best_by_accuracy_then_likelihood(make_folder: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(str(make_folder({"ant": 10, "bee": 10})))
    answers = iter([(0.8, 0.1), (0.9, 2.0), (0.9, 0.5), (0.7, 0.01)])
    seen = []

    def pretend(images: object, split: object, candidate: seewhy.TrainConfig) -> dict[str, float]:
        seen.append(candidate)
        accuracy, nll = next(answers)
        return {"val_accuracy": accuracy, "val_nll": nll, "best_epoch": 1, "seconds": 0.0}

    monkeypatch.setattr(search_module, "_try", pretend)
    config = make_config(data="x", **OPTIONS).resolved()
    best, rows = search(images, split_images(images), config, 4)
    assert seen[0] == config  # the options as given are the first trial
    assert best == seen[2]
    assert [row["val_accuracy"] for row in rows] == [0.8, 0.9, 0.9, 0.7]
    assert all(config.lr / 3.2 <= c.lr <= config.lr * 3.2 and c.unfreeze in (0, 1) and c.views in (1, 2, 4) for c in seen)
    assert all(c.epochs == (40 if c.unfreeze == 0 else 2) for c in seen)


@pytest.mark.parametrize("options", [{"unfreeze": "all"}, {"views": 0}, {"cache": False}])
def test_nothing_cached_is_refused(make_folder: Callable[..., Path], cache: Path, options: dict[str, Any]) -> None:
    images = open_images(str(make_folder({"ant": 10, "bee": 10})))
    with pytest.raises(ConfigError, match="--search-trials tries fits on cached features"):
        search(images, split_images(images), make_config(data="x", **{**OPTIONS, **options}).resolved(), 2)


@pytest.mark.usefixtures("one_thread")
def test_run_trains_the_chosen_options_and_records_all_trials(make_folder: Callable[..., Path], cache: Path, tmp_path: Path) -> None:
    folder = make_folder({"ant": 12, "bee": 12})
    run = seewhy.train(folder, out=tmp_path / "run", search_trials=3, **OPTIONS)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["search"]
    assert len(record["trials"]) == 3
    assert record["asked"]["search_trials"] == 3
    assert record["chosen"] == dump_config(run.config)
    assert run.config.search_trials == 0
    best = max(record["trials"], key=lambda row: (row["val_accuracy"], -row["val_nll"]))
    assert run.config.lr == best["lr"]
    # The fit of the run is that trial once more: same options, same seed.
    assert run.metrics["val"]["accuracy"] == best["val_accuracy"]
    # Going on with a finished run returns it, and does not take the chosen options for others.
    again = seewhy.train(folder, out=tmp_path / "run", search_trials=3, resume=True, **OPTIONS)
    assert again.manifest["seconds"] == run.manifest["seconds"]


@pytest.mark.usefixtures("one_thread")
def test_resumed_run_does_not_search_again(
    make_folder: Callable[..., Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder({"ant": 12, "bee": 12})

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("seewhy.training.pipeline.fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            seewhy.train(folder, out=tmp_path / "run", search_trials=2, **OPTIONS)
    monkeypatch.setattr("seewhy.training.search.search", interrupted)
    run = seewhy.train(folder, out=tmp_path / "run", search_trials=2, resume=True, **OPTIONS)
    assert len(run.manifest["search"]["trials"]) == 2


@pytest.mark.usefixtures("one_thread")
def test_trials_are_measured_with_the_features_they_were_trained_on(
    make_folder: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(str(make_folder({"ant": 10, "bee": 10})))
    config = make_config(data="x", **OPTIONS, feature_dtype="float32").resolved()
    rows = []

    def computed(*arguments: Any) -> Any:
        found = extract_features(*arguments)
        rows.append(found.computed)
        return found

    monkeypatch.setattr("seewhy.evaluation.evaluate.extract_features", computed)
    _, trials = search(images, split_images(images), config, 1)
    assert len(list((cache / "features").iterdir())) == 1
    assert rows == [0]  # val comes from the store that the fit has filled
    assert 0 <= trials[0]["val_accuracy"] <= 1


@pytest.mark.parametrize(("error", "left_out"), [(DivergedError("lower --lr"), True), (ConfigError("needs a C++ compiler"), False)])
def test_only_what_diverged_is_left_out(
    make_folder: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch, error: ConfigError, left_out: bool
) -> None:
    images = open_images(str(make_folder({"ant": 10, "bee": 10})))
    fits = iter([FitResult(({"epoch": 1, "val_loss": 0.1},), 1, 0.1)])

    def fail_once(*arguments: Any) -> FitResult:
        fitted = next(fits, None)
        if fitted is None:
            raise error
        return fitted

    monkeypatch.setattr(search_module, "fit", fail_once)
    config = make_config(data="x", **OPTIONS).resolved()
    if left_out:
        assert len(search(images, split_images(images), config, 3)[1]) == 1
    else:
        with pytest.raises(ConfigError, match=r"^needs a C\+\+ compiler$"):
            search(images, split_images(images), config, 3)


def test_a_network_that_cannot_be_cut_behind_its_pooling_is_searched_as_asked(
    make_folder: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(str(make_folder({"ant": 10, "bee": 10})))
    seen = []

    def attempt(images: object, split: object, candidate: seewhy.TrainConfig) -> dict[str, float]:
        seen.append(candidate.unfreeze)
        if candidate.unfreeze == refused:
            raise BackboneError("cannot be cut")
        return {"val_accuracy": 0.5, "val_nll": 1.0, "best_epoch": 1, "seconds": 0.0}

    monkeypatch.setattr(search_module, "_try", attempt)
    config = make_config(data="x", **OPTIONS).resolved()
    refused = 0
    assert all(row["unfreeze"] == 1 for row in search(images, split_images(images), config, 12)[1])
    assert 0 in seen
    refused = 1
    with pytest.raises(BackboneError, match="cannot be cut"):
        search(images, split_images(images), config, 12)


def test_cutmix_is_not_tried_on_vectors(make_folder: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(str(make_folder({"ant": 10, "bee": 10})))
    found = {"val_accuracy": 0.5, "val_nll": 1.0, "best_epoch": 1, "seconds": 0.0}
    monkeypatch.setattr(search_module, "_try", lambda images, split, candidate: found)
    rows = {
        mix: search(images, split_images(images), make_config(data="x", **OPTIONS, mixup=mix).resolved(), 12)[1]
        for mix in ("cutmix", "none")
    }
    assert {row["unfreeze"] for row in rows["cutmix"]} == {1}
    assert {row["unfreeze"] for row in rows["none"]} == {0, 1}
