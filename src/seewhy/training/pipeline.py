"""Train a run: data, split, search, features, fit, evaluation, files."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from seewhy.evaluation.evaluate import Evaluation, classifier_vectors
from seewhy.models.backbones import check_request
from seewhy.models.features import FeatureSpec
from seewhy.models.ood import KNNReference, fit_reference, sample_references
from seewhy.models.saved_run import SavedRun, clean_up, finish, hardware, load, make_manifest, save_references, save_weights
from seewhy.reports.figures import confusion_figure, save_png, training_curves
from seewhy.reports.model_card import model_card
from seewhy.reports.run_report import warnings_of, write_report
from seewhy.training.data_parallel import check_distributed
from seewhy.training.fit import DivergedError, FitResult, fit
from seewhy.training.loaders import TrainingContext, training_data
from seewhy.training.run_dirs import RunPaths, acquire_work_dir, read_json, resolve_run_dir
from seewhy.training.trackers import sync_run, tracked
from seewhy.version import __version__

IN_DISTRIBUTION_QUANTILE = 0.95  # share of val below the OOD threshold
TARGET_PRECISIONS = (0.9, 0.95, 0.98, 0.99)  # of the table of confidence thresholds


def train_run(config: TrainConfig, out: Path | None = None, resume: bool = False) -> SavedRun:
    """Train a classifier and return the saved run. An error leaves no files, an interruption those that `resume` needs.

    Under torchrun, SLURM or `launch`, the processes share the work, the main process writes, and all return the run.
    """
    with distributed.process_group():
        config = config.resolved()
        if config.search_trials and distributed.world_size() > 1:
            raise ConfigError("--search-trials runs in one process only; search there, then train with --config RUN/run.json")
        if distributed.is_main_process():
            return _train_main(config, out, resume)
        paths, finished = distributed.broadcast(None)
        if not finished:
            with silent():  # the main process logs
                _run_stages(paths, config)
        distributed.barrier()
        return load(paths.final)


def _train_main(config: TrainConfig, out: Path | None, resume: bool) -> SavedRun:
    """Lock the run's folder and train, or return the finished run; send the folders to the other processes."""
    paths = resolve_run_dir(config, out, resume)
    if resume and (paths.final / "run.json").is_file():
        finished = load(paths.final)
        clean_up(paths.final)
        if finished.config != config and finished.manifest.get("search", {}).get("asked") != dump_config(config):
            raise RunError(f"{paths.final}: a finished run with other options; choose another --out")
        LOG.info(f"already finished: {paths.final}")
        sync_run(paths.final)
        _broadcast_paths(paths, finished=True)
        distributed.barrier()
        return finished
    check_request(config.backbone, config.weights)
    if config.tracker != "none":
        require(config.tracker, f"--tracker {config.tracker}", config.tracker)
    if config.search_trials:
        require("search", "--search-trials", "optuna")
    resumable = paths.tmp.exists()
    with acquire_work_dir(paths, config, resume, named=out is not None) as paths:
        try:
            with log_to(paths.tmp / "log.txt"), tracked(config, paths.tmp, paths.final):
                LOG.debug(f"seewhy {__version__}, {'resuming' if resume else 'starting'}: {json.dumps(dump_config(config))}")
                _broadcast_paths(paths, finished=False)
                run = _run_stages(paths, config)
                assert run is not None  # this is the main process
            distributed.barrier()
            return run
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            resumable |= any((paths.tmp / name).exists() for name in ("checkpoints/last.ckpt", "search.json"))
            if not resumable or isinstance(error, DivergedError):  # a fit that diverged needs other options
                remove_tree(paths.tmp)
            raise


def _broadcast_paths(paths: RunPaths, finished: bool) -> None:
    """Send the other processes the run's folders, and whether the run is finished."""
    distributed.broadcast((RunPaths(paths.tmp.absolute(), paths.final.absolute()), finished))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record the wall time of a stage."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def _run_stages(paths: RunPaths, config: TrainConfig) -> SavedRun | None:
    """Run the stages in order. Returns the run on the main process, None on the others, which only share the work."""
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    with _timed(seconds, "images"):
        images = open_images(config.data, config.data_root, config.skip_bad, config.workers)
        split, leaked = _make_split(images, config)
        _log_data(images, split, leaked)
    with _timed(seconds, "search"):
        config, search = _search(paths, config, images, split)
    context = TrainingContext.create(images, split, config)
    check_distributed(context.cut, config)
    with _timed(seconds, "features"):
        data = training_data(context)
    fitted = fit(context, data, paths.tmp)
    seconds["fit"] = fitted.seconds
    with _timed(seconds, "evaluation"):
        evaluations = _evaluate(context)
        references, ood = _fit_ood(context)
    if not distributed.is_main_process():
        return None
    facts = {"data": _data_facts(images), "split": _split_facts(images, split, leaked), **search, **ood}
    try:
        with _timed(seconds, "report"):
            run = _write_run(paths, context, fitted, evaluations, references, facts)
        seconds["total"] = time.perf_counter() - began
        run.manifest["seconds"] = {stage: round(value, 2) for stage, value in seconds.items()}
        finish(paths.tmp, paths.final, run.manifest)
    except OSError as error:
        raise OutputError(f"{paths.final}: the run cannot be written ({error.strerror}); free space or choose another --out") from error
    return run


# ---------------------------------------------------------------- stages


def _make_split(images: ImageSet, config: TrainConfig) -> tuple[Split, int]:
    """Split the images, or read the split of another run; count the test images with a near-duplicate in train."""
    groups = group_images(images, config.group_by, config.workers, config.cache)
    if config.split_from:
        split = read_split(Path(config.split_from), images)
    else:
        ratio = (config.protocol, config.seed, config.val_fraction, config.test_fraction)
        split = split_images(images, *ratio, groups, config.group_by == "duplicates")
    return split, len(leaked_images(split, split.groups if groups is None else groups))


def _log_data(images: ImageSet, split: Split, leaked: int) -> None:
    parts = ", ".join(f"{part} {len(split.part(part)):,}" for part in PARTS)
    LOG.info(f"{images.name}: {len(images):,} images, {len(images.classes)} classes; {parts}")
    if images.bad:
        LOG.info(f"skipped {len(images.bad):,} unreadable images (see run.json)")
    for _, paths in conflicting_duplicates(images)[:5]:
        LOG.info(f"the same image in different classes: {' = '.join(paths)}")
    if grouped := int(np.sum(np.bincount(split.groups)[split.groups] > 1)):
        LOG.info(f"{grouped:,} images have near-duplicates or belong to a group; each group stays in one part")
    if leaked:
        LOG.info(f"{leaked:,} of {len(split.test):,} test images have a near-duplicate in training: the accuracy may be too high")
    if split.split_groups_in:
        names = ", ".join(split.split_groups_in[:5]) + (", ..." if len(split.split_groups_in) > 5 else "")
        LOG.info(f"not enough groups to split these classes, so only exact duplicates stay together: {names}")


def _search(paths: RunPaths, config: TrainConfig, images: ImageSet, split: Split) -> tuple[TrainConfig, dict[str, Any]]:
    """Search if the config has trials. Returns the best config and the manifest entry, both from search.json after a resume."""
    if not config.search_trials:
        return config, {}
    file = paths.tmp / "search.json"
    if file.is_file():
        record = read_json(file)
        return make_config(**record["chosen"]), {"search": record}
    from seewhy.training.search import search  # imports optuna

    best, trials = search(images, split, config, config.search_trials)
    best = best.model_copy(update={"search_trials": 0})  # `--config run.json` repeats the fit and not the search
    record = {"asked": dump_config(config), "chosen": dump_config(best), "trials": trials}
    with atomic_write(file, "free some space") as work:
        write_json(work, record)
    return best, {"search": record}


def _evaluate(context: TrainingContext) -> dict[str, Evaluation]:
    """Evaluate val and test, calibrated by the temperature that fits val."""
    evaluations = {part: context.evaluate(part) for part in ("val", "test")}
    temperature = fit_temperature(evaluations["val"].labels, evaluations["val"].logits)
    calibrated = {part: replace(evaluation, temperature=temperature) for part, evaluation in evaluations.items()}
    if distributed.is_main_process():
        numbers = calibrated["test"].metrics
        LOG.info(
            f"test accuracy {numbers['accuracy']:.1%} ({numbers['n']} images, 95% interval {numbers['accuracy_ci95'][0]:.1%} to "
            f"{numbers['accuracy_ci95'][1]:.1%}), mean per-class {numbers['mean_per_class_accuracy']:.1%}"
        )
    return calibrated


def _fit_ood(context: TrainingContext) -> tuple[KNNReference | None, dict[str, Any]]:
    """Sample OOD references from train; the threshold is the IN_DISTRIBUTION_QUANTILE of val's scores. Returns the manifest entry too."""
    split, spec = context.split, FeatureSpec.of(context.config)
    drawn = sample_references(split.train, context.config.seed)
    train_vectors, vectors = (
        classifier_vectors(context.backbone, context.cut, context.images, indices, spec)
        for indices in (drawn, np.concatenate([split.val, split.test]))
    )
    if train_vectors is None or vectors is None:
        return None, {}
    references = fit_reference(np.concatenate(list(train_vectors)))
    val, test = np.split(np.concatenate([references.ood_score(block) for block in vectors]), [len(split.val)])
    threshold = float(np.quantile(val, IN_DISTRIBUTION_QUANTILE, method="inverted_cdf"))
    flagged = {f"{part}_flagged": float(np.mean(scores > threshold)) for part, scores in (("val", val), ("test", test))}
    return references, {"ood": {"score": "nearest neighbours", "threshold": threshold, "references": len(drawn), **flagged}}


# ---------------------------------------------------------------- files


def _write_run(
    paths: RunPaths,
    context: TrainingContext,
    fitted: FitResult,
    evaluations: dict[str, Evaluation],
    references: KNNReference | None,
    facts: dict[str, Any],
) -> SavedRun:
    """Write all files of the run but its manifest into the work folder. facts: entries of the manifest."""
    work, images, backbone, test = paths.tmp, context.images, context.backbone, evaluations["test"]
    backbone.model.requires_grad_(False)
    save_weights(backbone, work)
    if references is not None:
        save_references(references, work)
    context.split.write(work / "split.json", images)
    facts = facts | {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "best_epoch": fitted.best_epoch,
        "epochs_run": len(fitted.history),
        "calibration": _calibration(evaluations["val"], test),
        "metrics": {part: evaluation.metrics for part, evaluation in evaluations.items()},
        "hardware": hardware() | ({"processes": distributed.world_size()} if distributed.world_size() > 1 else {}),
    }
    write_json(work / "metrics.json", facts["metrics"])
    _write_csv(work / "history.csv", list(fitted.history[0]), (row.values() for row in fitted.history))
    for part, evaluation in evaluations.items():
        _write_csv(work / f"predictions_{part}.csv", ["path", "true", "predicted", "prob"], _prediction_rows(evaluation))
    save_png(training_curves(fitted.history, fitted.best_epoch), work / "figures" / "training_curves.png")
    save_png(confusion_figure(test.confusion, images.classes), work / "figures" / "confusion_matrix.png")
    manifest = make_manifest(context.config, images.classes, backbone, facts)
    run = SavedRun(paths.final, context.config, images.classes, backbone, context.cut, manifest, references)
    with distributed.main_process_only():  # the other processes have finished
        write_report(run, fitted.history, test, work)
    (work / "README.md").write_text(model_card(run, warnings_of(run)), encoding="utf-8")
    return run


def _data_facts(images: ImageSet) -> dict[str, Any]:
    """Manifest entry of the images."""
    return {
        "name": images.name,
        "images": len(images),
        "hash": images.content_hash,
        "grey": int(images.grey.sum()),
        "median_size": np.median(images.sizes, axis=0).astype(int).tolist(),
        "smallest_side": int(images.sizes.min()),
        "class_sizes": [int(n) for n in np.sort(np.bincount(images.labels))[[0, -1]]],
        "bad": [{"path": path, "reason": reason} for path, reason in images.bad],
        "conflicting_duplicates": [list(paths) for _, paths in conflicting_duplicates(images)],
    }


def _split_facts(images: ImageSet, split: Split, leaked: int) -> dict[str, Any]:
    """Manifest entry of the split: sizes of the parts, and of the groups of more than one image."""
    sizes = np.bincount(split.groups)
    grouped = sizes[split.groups] > 1
    pairs = np.unique(split.groups[grouped] * len(images.classes) + images.labels[grouped])  # each label of each group once
    return {
        "protocol": split.protocol,
        "hash": split.hash(images),
        **{part: len(split.part(part)) for part in PARTS},
        "grouped_images": int(sizes[sizes > 1].sum()),
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes.max()),
        "groups_across_labels": int((np.bincount(pairs // len(images.classes)) > 1).sum()),
        "leaked_test_images": leaked,
        "classes_with_split_groups": list(split.split_groups_in),
    }


def _calibration(val: Evaluation, test: Evaluation) -> dict[str, Any]:
    """Manifest entry of the temperature, and of the confidence threshold for each target precision, both fitted on val."""
    rows = []
    for precision in TARGET_PRECISIONS:
        threshold = threshold_for(val.confidence, val.correct, precision)
        row: dict[str, Any] = {"precision": precision, "threshold": threshold}
        if threshold is not None:
            for part, evaluation in (("val", val), ("test", test)):
                coverage, accuracy = selective_accuracy(evaluation.confidence, evaluation.correct, threshold)
                row |= {f"{part}_answered": coverage, f"{part}_right": None if math.isnan(accuracy) else accuracy}
        rows.append(row)
    return {"temperature": val.temperature, "n": len(val.labels), "selective": rows}


def _prediction_rows(evaluation: Evaluation) -> Iterator[list[str]]:
    """Rows of an image's path, true class, predicted class and its calibrated probability."""
    names = [escape_formula(name) for name in evaluation.classes]
    for path, true, predicted, prob in zip(evaluation.paths, evaluation.labels, evaluation.predicted, evaluation.confidence, strict=True):
        yield [escape_formula_path(path), names[true], names[predicted], repr(float(prob))]


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
