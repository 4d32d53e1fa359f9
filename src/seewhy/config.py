"""Validate the training options once, and read and write them as YAML and JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from seewhy.errors import ConfigError

# Defaults of the training options by how much is trained; their accuracy and the alternatives tried are in benchmarks/RESULTS.md.
_RECIPE_OPTIONS = ("epochs", "batch_size", "lr", "weight_decay", "patience", "label_smoothing", "ema_decay", "tta_flip")
_RECIPE_VALUES = {
    "linear": (40, 256, 1e-3, 0.1, 10, 0.0, 0.0, False),
    "tail": (8, 32, 2e-3, 0.1, 3, 0.1, 0.99, True),
    "full": (12, 32, 1e-3, 0.05, 4, 0.1, 0.0, False),
}
RECIPES: dict[str, dict[str, Any]] = {name: dict(zip(_RECIPE_OPTIONS, values, strict=True)) for name, values in _RECIPE_VALUES.items()}


def _main(default: Any, text: str, **limits: Any) -> Any:
    """A field that is also a command-line option."""
    return Field(default, description=text, json_schema_extra={"cli": True}, **limits)


def _fine(default: Any, text: str, **limits: Any) -> Any:
    """A field for `--set name=value` and config files."""
    return Field(default, description=text, json_schema_extra={"cli": False}, **limits)


class TrainConfig(BaseModel):
    """All options of a training run; `run.json` holds them, and `--config` reads them.

    `resolved()` fills fields that are None from RECIPES.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # JSON has neither

    data: str = Field(description="caltech101, scenes, a folder of class folders, or tar or parquet shards")
    data_root: str | None = _main(None, "folder of caltech101, downloaded into it if missing; also $SEEWHY_DATA")
    backbone: str = _main("resnet18", "a named backbone or any timm model")
    weights: str | None = _main(None, "a weights file (safetensors, pth), or 'none' for random initialisation")
    unfreeze: int | Literal["all"] = _main(1, "train the classifier and the N deepest stages; 0 = classifier only, all = the whole network")
    views: int = _main(2, "views of each training image: 1 = plain, 2 = and mirrored, more = random; 0 = new ones every epoch", ge=0, le=64)
    protocol: Literal["ratio", "caltech30"] = _main("ratio", "ratio (70/10/20 of each class) or caltech30 (30 training images a class)")
    group_by: str = _main("duplicates", "images to keep in one part: duplicates (also near), exact, a .csv of path and group, or a regex")
    split_from: str | None = _main(None, "use the split of another run (its folder or split.json)")
    epochs: int | None = _main(None, "maximum number of epochs; early stopping may end sooner", ge=1)
    lr: float | None = _main(None, "learning rate of the classifier", gt=0)
    batch_size: int | None = _main(None, "images per step", ge=1)
    seed: int = _main(0, "random seed for split, initialisation and shuffling", ge=0)
    search_trials: int = _main(0, "trials of a hyperparameter search on val before training; 0 = no search", ge=0, le=10_000)
    skip_bad: bool = _main(False, "skip unreadable images instead of stopping; run.json lists them")
    tracker: Literal["tensorboard", "mlflow", "none"] = _main("none", "experiment tracker (MLflow at $MLFLOW_TRACKING_URI)")
    cache: bool = _main(True, "cache frozen features on disk (the trained weights are the same either way)")

    resize: Literal["squash", "crop"] = _fine("squash", "squash the whole image, or crop its centred square")
    size: int | None = _fine(None, "side of the network's input in pixels; default: that of its pretraining", ge=32, le=1024)
    val_fraction: float = _fine(0.1, "fraction of each class for validation", gt=0, lt=1)
    test_fraction: float = _fine(0.2, "fraction of each class for test", gt=0, lt=1)
    optimizer: Literal["adamw", "adam", "sgd"] = _fine("adamw", "optimiser")
    weight_decay: float | None = _fine(None, "weight decay (not applied to biases and norms)", ge=0)
    schedule: Literal["cosine", "plateau"] = _fine("cosine", "cosine with warm-up, or ReduceLROnPlateau on val loss")
    warmup_epochs: float = _fine(1.0, "epochs of linear warm-up (cosine)", ge=0)
    patience: int | None = _fine(None, "epochs without a lower val loss before early stopping", ge=1)
    min_delta: float = _fine(0.0, "smallest decrease of the val loss that counts as an improvement", ge=0)
    layer_decay: float = _fine(0.3, "learning rate of each stage, as a fraction of that of the next stage towards the output", gt=0, le=1)
    label_smoothing: float | None = _fine(None, "fraction of each target spread over all classes", ge=0, lt=1)
    ema_decay: float | None = _fine(None, "decay of the moving average of the weights, which is validated and saved; 0 = off", ge=0, lt=1)
    class_weights: bool = _fine(False, "weight classes by the inverse of their frequency")
    augment: Literal["standard", "randaugment"] = _fine("standard", "augmentation of new views (views = 0)")
    mixup: Literal["none", "mixup", "cutmix"] = _fine("none", "MixUp or CutMix of images, or of features behind a frozen trunk")
    tta_flip: bool | None = _fine(None, "test-time augmentation: average over each image and its mirror image; twice the cost")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = _fine("32-true", "floating-point precision of training")
    compile: bool = _fine(False, "torch.compile the training step: starts half a minute later, then faster for some networks")
    runtime: Literal["auto", "onnx", "torch"] = _fine("auto", "runtime of the frozen trunk")
    feature_dtype: Literal["auto", "float16", "float32"] = _fine("auto", "type of cached features; auto: maps float16, vectors float32")
    workers: int = _fine(2, "threads or processes that decode images", ge=0, le=64)

    @field_validator("unfreeze", mode="before")
    @classmethod
    def _unfreeze(cls, value: Any) -> Any:
        if isinstance(value, float) or not re.fullmatch("[0-9]+|all", str(value)):
            raise ValueError(f"must be 0, 1, 2, ... or all, not {value!r}")
        return value if value == "all" else int(value)

    @property
    def recipe(self) -> str:
        """Key of RECIPES."""
        return {0: "linear", "all": "full"}.get(self.unfreeze, "tail")

    @property
    def fresh_views(self) -> bool:
        """Whether each epoch sees new random views of the images, so that features cannot be cached."""
        return self.views == 0 or self.unfreeze == "all"

    def resolved(self) -> TrainConfig:
        """Copy with the recipe's values for options that are None; raises ConfigError if options contradict each other."""
        filled = {name: value for name, value in RECIPES[self.recipe].items() if getattr(self, name) is None}
        config = self.model_copy(update=filled)
        if not config.fresh_views and config.augment != "standard":
            raise ConfigError(f"augment={config.augment} needs fresh images every epoch; add --views 0")
        if config.mixup == "cutmix" and config.unfreeze == 0:
            raise ConfigError("mixup=cutmix needs feature maps, and --unfreeze 0 trains on vectors; use mixup=mixup, or --unfreeze 1")
        if config.val_fraction + config.test_fraction >= 1:
            fractions = f"val_fraction {config.val_fraction} + test_fraction {config.test_fraction}"
            raise ConfigError(f"{fractions} leave no training images; make them sum to less than 1")
        return config


def make_config(**values: Any) -> TrainConfig:
    """Return a validated TrainConfig. Raises ConfigError, which names the option."""
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "config"
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"unknown option {name!r}; known: {', '.join(TrainConfig.model_fields)}") from error
        text = first["msg"].removeprefix("Value error, ")
        text = text[0].lower() + text[1:]
        value = "" if first["type"] == "missing" or repr(first["input"]) in text else f", not {first['input']!r}"
        raise ConfigError(f"option {name}: {text}{value}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Read options from a YAML or JSON file, or from the `config` of a run.json."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); pass a YAML or JSON file") from error
    except yaml.YAMLError as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"{path}: not valid YAML or JSON ({reason})") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected option names and values, found {type(values).__name__}")
    if bad_names := [name for name in values if not isinstance(name, str)]:
        raise ConfigError(f"{path}: expected option names and values, found the name {bad_names[0]!r}")
    return values


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse ['label_smoothing=0', ...] into {'label_smoothing': 0, ...}; values are YAML."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write it as name=value")
        try:
            values[name.strip().replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: the value is not valid YAML; put it in quotes") from error
    return values


def dump_config(config: TrainConfig) -> dict[str, Any]:
    """Return the options as JSON types; `make_config(**dump_config(c)) == c`."""
    return config.model_dump(mode="json")
