"""Search for the options with the best validation accuracy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import optuna

from seewhy.config import RECIPES, TrainConfig
from seewhy.core.process_state import quiet
from seewhy.core.progress import LOG
from seewhy.curation.split import Split
from seewhy.data.image_set import ImageSet
from seewhy.errors import BackboneError, ConfigError
from seewhy.evaluation.metrics import accuracy, negative_log_likelihood
from seewhy.training.fit import DivergedError, FitResult, fit
from seewhy.training.loaders import TrainingContext, training_data


@quiet("optuna")
def search(images: ImageSet, split: Split, config: TrainConfig, trials: int) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """Return the best of `trials` configs near the resolved `config`, by accuracy on val, and a row for each trial.

    Tree-structured Parzen estimation (optuna's TPESampler, seeded), starting with `config`; the negative log-likelihood breaks ties.
    Raises ConfigError unless trials can train on cached features.
    """
    if config.unfreeze == "all" or config.fresh_views or not config.cache:
        raise ConfigError("--search-trials tries fits on cached features; use it with --unfreeze 0, 1, 2, ... and --views 1 or more")
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.seed))
    study.enqueue_trial({name: getattr(config, name) for name in ("lr", "weight_decay", "label_smoothing", "views", "unfreeze")})
    rows: list[dict[str, Any]] = []

    def objective(trial: optuna.Trial) -> float:
        candidate = _suggest(trial, config)
        try:
            row = _try(images, split, candidate)
        except (DivergedError, BackboneError) as error:
            if isinstance(error, BackboneError) and candidate.unfreeze == config.unfreeze:
                raise  # the user's own --unfreeze, not one that the search tried
            LOG.info(f"trial skipped: {error}")
            raise optuna.TrialPruned from error
        rows.append({**trial.params, **row})
        LOG.info(f"trial {len(rows)}/{trials}: val accuracy {row['val_accuracy']:.2%}, " + _format(trial.params))
        return row["val_accuracy"] - 1e-4 * min(row["val_nll"], 10.0)  # one image in 1,000 outweighs the likelihood

    study.optimize(objective, n_trials=trials)
    if not rows:
        raise ConfigError(f"all {trials} trials failed; lower --lr (now {config.lr})")
    best = config.model_copy(update=_complete(study.best_trial.params, config))
    LOG.info(f"best of {trials} trials: " + _format(study.best_trial.params))
    return best, rows


def _suggest(trial: optuna.Trial, config: TrainConfig) -> TrainConfig:
    """Sample from the search space around `config`: learning rate, weight decay, label smoothing, views, and unfreeze 0 or as it is."""
    assert config.lr is not None
    assert config.weight_decay is not None
    frozen = set() if config.mixup == "cutmix" else {0}  # CutMix needs maps, not vectors
    trial.suggest_categorical("unfreeze", sorted(frozen | {int(config.unfreeze)}))
    trial.suggest_float("lr", config.lr / 3.2, config.lr * 3.2, log=True)
    trial.suggest_float("weight_decay", min(config.weight_decay, 0.01), max(config.weight_decay, 0.3))
    trial.suggest_float("label_smoothing", 0.0, max(0.2, config.label_smoothing or 0.0))
    trial.suggest_categorical("views", sorted({1, config.views, 2 * config.views}))
    return config.model_copy(update=_complete(trial.params, config))


def _complete(params: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Options of a trial, with those of the linear recipe if the trial freezes the whole network and `config` does not."""
    return params if params["unfreeze"] == config.unfreeze else {**RECIPES["linear"], **params}


def fit_candidate(images: ImageSet, split: Split, config: TrainConfig) -> tuple[TrainingContext, FitResult]:
    """Fit the network of a resolved config, with checkpoints in a temporary folder."""
    context = TrainingContext.create(images, split, config)
    with tempfile.TemporaryDirectory() as folder:
        return context, fit(context, training_data(context), Path(folder))


def _try(images: ImageSet, split: Split, config: TrainConfig) -> dict[str, float]:
    """Fit a candidate and evaluate it on val."""
    context, fitted = fit_candidate(images, split, config)
    val = context.evaluate("val")
    return {
        "val_accuracy": accuracy(val.labels, val.predicted),
        "val_nll": negative_log_likelihood(val.labels, val.logits),
        "best_epoch": fitted.best_epoch,
        "seconds": round(fitted.seconds, 2),
    }


def _format(params: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())
