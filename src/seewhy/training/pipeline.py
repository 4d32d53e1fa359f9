"""TrainConfig -> a finished run folder: the stages one after another."""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from seewhy.config import TrainConfig, dump_config, make_config
from seewhy.core import distributed
from seewhy.core.files import atomic_write, escape_formula, escape_formula_path, remove_tree, write_json
from seewhy.core.progress import LOG, log_to, silent
from seewhy.curation.grouping import group_images
from seewhy.curation.split import PARTS, Split, leaked_images, read_split, split_images
from seewhy.data.image_set import ImageSet, conflicting_duplicates, open_images
from seewhy.errors import ConfigError, OutputError, RunError, require
from seewhy.evaluation.calibration import fit_temperature, selective_accuracy, threshold_for
from seewhy.evaluation.evaluate import Evaluation, classifier_vectors, evaluate_part
from seewhy.models.backbones import Backbone, check_request, create_backbone
from seewhy.models.features import FeatureSpec
from seewhy.models.ood import REFERENCES, ROWS, KNNReference, fit_reference, in_rows
from seewhy.models.saved_run import SavedRun, clean_up, finish, hardware, load, make_manifest, save_references, save_weights
from seewhy.models.trunk_tail import TrunkTail, split_backbone
from seewhy.reports.figures import confusion_figure, save_png, training_curves
from seewhy.reports.model_card import model_card
from seewhy.reports.run_report import warnings_of, write_report
from seewhy.training.data_parallel import check_distributed
from seewhy.training.fit import DivergedError, Fit, fit
from seewhy.training.loaders import training_data
from seewhy.training.run_dirs import RunPaths, acquire_work_dir, read_json, resolve_run_dir
from seewhy.training.trackers import check_tracker, tracked, upload_run
from seewhy.version import __version__

IN_DISTRIBUTION_QUANTILE = 0.95  # share of val that is not called unknown
PRECISIONS = (0.9, 0.95, 0.98, 0.99)  # of the table of thresholds below which to say nothing


def train_run(config: TrainConfig, out: Path | None = None, resume: bool = False) -> SavedRun:
    """Train a classifier and return the saved run. An error leaves nothing behind; an interruption leaves what `resume` needs.

    Where torchrun, SLURM or `launch` started several processes with the same call, they share the work, the main process writes, and
    the others return the run that it has written.
    """
    with distributed.process_group():
        config = config.resolved()
        if distributed.world_size() == 1:
            return _train_claimed(config, out, resume)
        if config.search_trials:
            raise ConfigError("--search-trials tries its variants in one process; search there, then train with --config RUN/run.json")
        if distributed.is_main_process():
            return _train_claimed(config, out, resume)
        return _train_along(config)


def _train_along(config: TrainConfig) -> SavedRun:
    """Do this process's shard of the work, then load the run that the main process has written."""
    places, finished = distributed.broadcast(None)
    if not finished:
        with silent():  # the main process logs for all
            _train_in(places, config)
    distributed.barrier()
    return load(places.target)


def _train_claimed(config: TrainConfig, out: Path | None, resume: bool) -> SavedRun:
    places = resolve_run_dir(config, out, resume)
    if resume and (places.target / "run.json").is_file():
        finished = load(places.target)
        clean_up(places.target)
        if finished.config != config and finished.manifest.get("search", {}).get("asked") != dump_config(config):
            raise RunError(f"{places.target}: a finished run with other options; choose another --out")
        LOG.info(f"already finished: {places.target}")
        upload_run(places.target)  # what a tracker has missed
        _broadcast_places(places, finished=True)
        distributed.barrier()
        return finished
    check_request(config.backbone, config.weights)
    check_tracker(config)
    if config.search_trials:
        require("search", "--search-trials", "optuna")
    begun = places.work.exists()
    places, let_go = acquire_work_dir(places, config, resume, out is None)
    try:
        with log_to(places.work / "log.txt"), tracked(config, places.work, places.target):
            LOG.debug(f"seewhy {__version__}, {'going on' if resume else 'starting'}: {json.dumps(dump_config(config))}")
            _broadcast_places(places, finished=False)
            run = _train_in(places, config)
            assert run is not None  # this is the main process
        distributed.barrier()
        return run
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kept = begun or any((places.work / name).exists() for name in ("checkpoints/last.ckpt", "search.json"))
        if not kept or isinstance(error, DivergedError):  # a fit that diverged is repeated with other options, not resumed
            remove_tree(places.work)
        raise
    finally:
        let_go()


def _broadcast_places(places: RunPaths, finished: bool) -> None:
    """Tell the other processes the run's folders, and whether there is nothing left to do."""
    distributed.broadcast((RunPaths(places.work.absolute(), places.target.absolute()), finished))


def _train_in(places: RunPaths, config: TrainConfig) -> SavedRun | None:
    """The stages one after another; the run on the main process, None on the others, which only share the work."""
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    images = open_images(config.data, config.data_root, config.skip_bad, config.workers)
    groups = group_images(images, config.group_by, config.workers, config.cache)
    split = read_split(Path(config.split_from), images) if config.split_from else _split(images, config, groups)
    leaked = len(leaked_images(split, split.groups if groups is None else groups))
    _tell_of(images, split, leaked)
    seconds["images"] = time.perf_counter() - began
    config, found = _searched(places, config, images, split)
    seconds["search"] = time.perf_counter() - began - seconds["images"]
    backbone = create_backbone(config.backbone, len(images.classes), config.weights, config.seed, config.resize, config.size)
    cut = split_backbone(backbone, config.unfreeze)
    check_distributed(cut, config)
    mark = time.perf_counter()
    data = training_data(images, split, backbone, cut, config)
    seconds["features"] = time.perf_counter() - mark
    fitted = fit(backbone, cut, data, config, places.work)
    seconds["fit"] = fitted.seconds
    mark = time.perf_counter()
    val = evaluate_part(images, split.val, "val", backbone, cut, config, split.groups)
    temperature = fit_temperature(val.labels, val.logits)
    test = evaluate_part(images, split.test, "test", backbone, cut, config, split.groups)
    evaluations = {part: replace(found, temperature=temperature) for part, found in (("val", val), ("test", test))}
    strange = _fit_ood(images, split, backbone, cut, config)
    seconds["evaluation"] = time.perf_counter() - mark
    if not distributed.is_main_process():
        return None
    numbers = test.metrics
    LOG.info(
        f"test accuracy {numbers['accuracy']:.1%} ({numbers['n']} images, 95% interval {numbers['accuracy_ci95'][0]:.1%} to "
        f"{numbers['accuracy_ci95'][1]:.1%}), mean per-class {numbers['mean_per_class_accuracy']:.1%}"
    )
    return _write_run(places, config, images, split, backbone, cut, fitted, evaluations, seconds, began, found, strange, leaked)


def _split(images: ImageSet, config: TrainConfig, groups: Any) -> Split:
    return split_images(
        images, config.protocol, config.seed, config.val_fraction, config.test_fraction, groups, config.group_by == "duplicates"
    )


def _searched(places: RunPaths, config: TrainConfig, images: ImageSet, split: Split) -> tuple[TrainConfig, dict[str, Any]]:
    """The best config of the trials asked for, and their record; kept, so that a resumed run does not search again."""
    if not config.search_trials:
        return config, {}
    record = places.work / "search.json"
    if record.is_file():
        found = read_json(record)
        return make_config(**found["chosen"]), found
    from seewhy.training.search import search  # brings optuna, which few runs need

    best, trials = search(images, split, config, config.search_trials)
    best = best.model_copy(update={"search_trials": 0})  # what `--config run.json` repeats is the fit, not the search
    found = {"asked": dump_config(config), "chosen": dump_config(best), "trials": trials}
    with atomic_write(record, "free some space") as work:
        write_json(work, found)
    return best, found


def _tell_of(images: ImageSet, split: Split, leaked: int) -> None:
    LOG.info(
        f"{images.name}: {len(images):,} images, {len(images.classes)} classes; " + ", ".join(f"{p} {len(split.part(p)):,}" for p in PARTS)
    )
    if images.bad:
        LOG.info(f"left out {len(images.bad)} unusable images (listed in run.json)")
    for _, paths in conflicting_duplicates(images)[:5]:
        LOG.info(f"the same image under different classes: {' = '.join(paths)}")
    if grouped := int(np.sum(np.bincount(split.groups)[split.groups] > 1)):
        LOG.info(f"{grouped:,} images have near-duplicates or belong to a group; each group stays in one part")
    if leaked:
        LOG.info(f"{leaked:,} of {len(split.test):,} test images have a near-duplicate in training: the accuracy may be too good")
    if split.split_groups_in:
        shown = ", ".join(split.split_groups_in[:5]) + (", ..." if len(split.split_groups_in) > 5 else "")
        LOG.info(f"too few groups to divide, so only equal files are kept together: {shown}")


# ---------------------------------------------------------------- writing


def _write_run(
    places: RunPaths,
    config: TrainConfig,
    images: ImageSet,
    split: Split,
    backbone: Backbone,
    cut: TrunkTail,
    fitted: Fit,
    evaluations: dict[str, Evaluation],
    seconds: dict[str, float],
    began: float,
    found: dict[str, Any],
    strange: tuple[KNNReference, dict[str, Any]] | None,
    leaked: int,
) -> SavedRun:
    """Everything but the manifest into the work folder, then the manifest, then the rename."""
    work, mark = places.work, time.perf_counter()
    metrics = {part: evaluation.metrics for part, evaluation in evaluations.items()}
    try:
        backbone.model.requires_grad_(False)
        save_weights(backbone, work)
        if strange:
            save_references(strange[0], work)
        split.write(work / "split.json", images)
        write_json(work / "metrics.json", metrics)
        _write_history(work / "history.csv", fitted)
        for part, evaluation in evaluations.items():
            _write_answers(work / f"predictions_{part}.csv", evaluation)
        save_png(training_curves(fitted.history, fitted.best_epoch), work / "figures" / "training_curves.png")
        save_png(confusion_figure(evaluations["test"].confusion, images.classes), work / "figures" / "confusion_matrix.png")
        facts = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": {
                "name": images.name,
                "images": len(images),
                "hash": images.content_hash,
                "grey": int(images.grey.sum()),
                "median_size": np.median(images.sizes, axis=0).astype(int).tolist(),
                "smallest_side": int(images.sizes.min()),
                "class_sizes": [int(n) for n in np.sort(np.bincount(images.labels))[[0, -1]]],
                "bad": [{"path": path, "reason": reason} for path, reason in images.bad],
                "conflicting_duplicates": [list(paths) for _, paths in conflicting_duplicates(images)],
            },
            "split": {
                "protocol": split.protocol,
                "hash": split.hash(images),
                **{part: len(split.part(part)) for part in PARTS},
                **_grouping(images, split),
                "leaked_test_images": leaked,
                "classes_with_split_groups": list(split.split_groups_in),
            },
            "best_epoch": fitted.best_epoch,
            "epochs_run": len(fitted.history),
            "calibration": _calibration(evaluations["val"], evaluations["test"]),
            **({"ood": strange[1]} if strange else {}),
            "metrics": metrics,
            "hardware": hardware() | ({"processes": distributed.world_size()} if distributed.world_size() > 1 else {}),
            **({"search": found} if found else {}),
        }
        manifest = make_manifest(config, images.classes, backbone, facts)
        run = SavedRun(places.target, config, images.classes, backbone, cut, manifest, strange[0] if strange else None)
        with distributed.main_process_only():  # the others have nothing left to do
            write_report(run, fitted.history, evaluations["test"], work)
        (work / "README.md").write_text(model_card(run, warnings_of(run)), encoding="utf-8")
        seconds["report"] = time.perf_counter() - mark
        seconds["total"] = time.perf_counter() - began
        manifest["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
        finish(work, places.target, manifest)
    except OSError as error:
        raise OutputError(f"{places.target}: the run cannot be written ({error.strerror}); free space or choose another --out") from error
    return run


def _calibration(val: Evaluation, test: Evaluation) -> dict[str, Any]:
    """What makes answers trustworthy, chosen on val, and what came of it on test."""
    rows = []
    for precision in PRECISIONS:
        threshold = threshold_for(val.confidence, val.correct, precision)
        row: dict[str, Any] = {"precision": precision, "threshold": threshold}
        if threshold is not None:
            for part, evaluation in (("val", val), ("test", test)):
                coverage, right = selective_accuracy(evaluation.confidence, evaluation.correct, threshold)
                row |= {f"{part}_answered": coverage, f"{part}_right": None if math.isnan(right) else right}
        rows.append(row)
    return {"temperature": val.temperature, "n": len(val.labels), "selective": rows}


def _fit_ood(
    images: ImageSet, split: Split, backbone: Backbone, cut: TrunkTail, config: TrainConfig
) -> tuple[KNNReference, dict[str, Any]] | None:
    """What tells images of nothing known: references, and the ood_score that IN_DISTRIBUTION_QUANTILE of val stays within."""
    drawn = np.sort(np.random.default_rng(config.seed).permutation(split.train)[:REFERENCES])
    indices = np.concatenate([drawn, split.val, split.test])
    vectors = classifier_vectors(backbone, cut, images, indices, FeatureSpec.of(config))
    if vectors is None:
        return None
    blocks = in_rows(vectors, [len(drawn), *[ROWS] * (len(indices) // ROWS), len(indices)])
    references = fit_reference(next(blocks))
    val, test = np.split(np.concatenate([references.ood_score(block) for block in blocks]), [len(split.val)])
    threshold = float(np.quantile(val, IN_DISTRIBUTION_QUANTILE, method="inverted_cdf"))
    flagged = {f"{part}_flagged": float(np.mean(scores > threshold)) for part, scores in (("val", val), ("test", test))}
    return references, {"score": "nearest neighbours", "threshold": threshold, "references": len(drawn), **flagged}


def _grouping(images: ImageSet, split: Split) -> dict[str, int]:
    """How many images belong to groups, in how many, how large the largest is, and how many groups have several labels."""
    sizes = np.bincount(split.groups)
    several = sizes[split.groups] > 1
    labelled = np.unique(split.groups[several] * len(images.classes) + images.labels[several])  # each label of each group once
    return {
        "grouped_images": int(sizes[sizes > 1].sum()),
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes.max()),
        "groups_across_labels": int((np.bincount(labelled // len(images.classes)) > 1).sum()),
    }


def _write_history(path: Path, fitted: Fit) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(fitted.history[0]))
        writer.writeheader()
        writer.writerows(fitted.history)


def _write_answers(path: Path, evaluation: Evaluation) -> None:
    """One row an image: path, true class, predicted class and its calibrated probability."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "true", "predicted", "prob"])
        for n, name in enumerate(evaluation.paths):
            best = int(evaluation.predicted[n])
            answer = [escape_formula(evaluation.classes[c]) for c in (evaluation.labels[n], best)]
            writer.writerow([escape_formula_path(name), *answer, repr(float(evaluation.confidence[n]))])
