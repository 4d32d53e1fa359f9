"""TrainConfig x N trials -> the options that validate best, and the record of all trials."""

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
from seewhy.evaluation.evaluate import evaluate_part
from seewhy.evaluation.metrics import accuracy, negative_log_likelihood
from seewhy.models.backbones import Backbone, create_backbone
from seewhy.models.trunk_tail import TrunkTail, split_backbone
from seewhy.training.fit import DivergedError, Fit, fit
from seewhy.training.loaders import training_data


@quiet("optuna")
def search(images: ImageSet, split: Split, config: TrainConfig, trials: int) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """The best of `trials` configs near `config`, by the accuracy on val, and one row a trial.

    Tree-structured Parzen estimation (optuna's TPESampler, seeded); the first trial is `config` itself.
    Equal accuracies are told apart by the negative log-likelihood. The test part is not touched.
    config must be resolved. Raises ConfigError where nothing is frozen: a trial would take hours.
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
                raise  # else the network cannot be cut where the search wanted to, and not the user
            LOG.info(f"trial left out: {error}")
            raise optuna.TrialPruned from error
        rows.append({**trial.params, **row})
        LOG.info(f"trial {len(rows)}/{trials}: val accuracy {row['val_accuracy']:.2%}, " + _shown(trial.params))
        return row["val_accuracy"] - 1e-4 * min(row["val_nll"], 10.0)  # one image in 1,000 outweighs any likelihood

    study.optimize(objective, n_trials=trials)
    if not rows:
        raise ConfigError(f"none of {trials} trials could be fitted; lower --lr (now {config.lr})")
    best = config.model_copy(update=_complete(study.best_trial.params, config))
    LOG.info(f"best of {trials} trials: " + _shown(study.best_trial.params))
    return best, rows


def _suggest(trial: optuna.Trial, config: TrainConfig) -> TrainConfig:
    """A config of the space: a decade around the given rate and decay, smoothing, views up to twice as many, frozen or as asked."""
    assert config.lr is not None
    assert config.weight_decay is not None
    frozen = set() if config.mixup == "cutmix" else {0}  # vectors have no pieces to cut
    trial.suggest_categorical("unfreeze", sorted(frozen | {int(config.unfreeze)}))
    trial.suggest_float("lr", config.lr / 3.2, config.lr * 3.2, log=True)
    trial.suggest_float("weight_decay", min(config.weight_decay, 0.01), max(config.weight_decay, 0.3))
    trial.suggest_float("label_smoothing", 0.0, max(0.2, config.label_smoothing or 0.0))
    trial.suggest_categorical("views", sorted({1, config.views, 2 * config.views}))
    return config.model_copy(update=_complete(trial.params, config))


def _complete(found: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What was found, over the recipe of the frozen network where that was tried instead of what was asked."""
    return found if found["unfreeze"] == config.unfreeze else {**RECIPES["linear"], **found}


def fit_candidate(images: ImageSet, split: Split, config: TrainConfig) -> tuple[Backbone, TrunkTail, Fit]:
    """The network of one config, fitted to the train part and stopped on val; nothing is written but the cache."""
    backbone = create_backbone(config.backbone, len(images.classes), config.weights, config.seed, config.resize, config.size)
    cut = split_backbone(backbone, config.unfreeze)
    data = training_data(images, split, backbone, cut, config)
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(backbone, cut, data, config, Path(folder))
    return backbone, cut, fitted


def _try(images: ImageSet, split: Split, config: TrainConfig) -> dict[str, float]:
    """Fits one candidate and measures on val what a run of it would answer."""
    backbone, cut, fitted = fit_candidate(images, split, config)
    val = evaluate_part(images, split.val, "val", backbone, cut, config)
    return {
        "val_accuracy": accuracy(val.labels, val.predicted),
        "val_nll": negative_log_likelihood(val.labels, val.logits),
        "best_epoch": fitted.best_epoch,
        "seconds": round(fitted.seconds, 2),
    }


def _shown(params: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())
