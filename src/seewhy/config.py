"""Options -> TrainConfig: validated once, frozen, to and from YAML and JSON; the CLI derives from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from seewhy.errors import ConfigError

# What a fit uses where the user says nothing, by how much is trained.
# What they reach, and what else was tried on validation, stands in benchmarks/RESULTS.md.
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "epochs": 40,
        "batch_size": 256,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "patience": 10,
        "label_smoothing": 0.0,
        "ema_decay": 0.0,
        "tta_flip": False,
    },
    "tail": {
        "epochs": 8,
        "batch_size": 32,
        "lr": 2e-3,
        "weight_decay": 0.1,
        "patience": 3,
        "label_smoothing": 0.1,
        "ema_decay": 0.99,
        "tta_flip": True,
    },
    "full": {
        "epochs": 12,
        "batch_size": 32,
        "lr": 1e-3,
        "weight_decay": 0.05,
        "patience": 4,
        "label_smoothing": 0.1,
        "ema_decay": 0.0,
        "tta_flip": False,
    },
}


def _main(default: Any, text: str, **limits: Any) -> Any:
    """A field that is also a command-line option."""
    return Field(default, description=text, json_schema_extra={"cli": True}, **limits)


def _fine(default: Any, text: str, **limits: Any) -> Any:
    """A field for `--set name=value` and config files."""
    return Field(default, description=text, json_schema_extra={"cli": False}, **limits)


class TrainConfig(BaseModel):
    """Everything that decides a run; `run.json` holds it, and `--config` takes it back.

    Fields left at None are filled from RECIPES by `resolved()`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)  # JSON has neither

    data: str = Field(description="caltech101, scenes, a folder of class folders, or tar or parquet shards")
    data_root: str | None = _main(None, "folder that holds (or receives) caltech101; also $SEEWHY_DATA")
    backbone: str = _main("resnet18", "a named backbone or any timm model")
    weights: str | None = _main(None, "a weights file (safetensors, pth), or 'none' for a random start")
    unfreeze: int | Literal["all"] = _main(1, "train the N deepest stages with the classifier; 0 = classifier only, all")
    views: int = _main(2, "views of each training image: 1 plain, 2 + mirrored, more = random; 0 = fresh every epoch", ge=0, le=64)
    protocol: Literal["ratio", "caltech30"] = _main("ratio", "ratio (70/10/20 of each class) or caltech30 (30 training images a class)")
    group_by: str = _main(
        "duplicates",
        "what stays in one part of the split: duplicates (near ones too), exact (equal files alone), a .csv of path and group, or a "
        "regular expression over paths",
    )
    split_from: str | None = _main(None, "use the split of another run (its folder or split.json)")
    epochs: int | None = _main(None, "most epochs; early stopping may end sooner", ge=1)
    lr: float | None = _main(None, "learning rate of the classifier", gt=0)
    batch_size: int | None = _main(None, "images a step", ge=1)
    seed: int = _main(0, "seed of the split, the classifier's start and the order", ge=0)
    search_trials: int = _main(
        0, "first try this many variants of the options on val, and train with the best; 0 = no search", ge=0, le=10_000
    )
    skip_bad: bool = _main(False, "leave unusable images out instead of stopping; they are listed in run.json")
    tracker: Literal["tensorboard", "mlflow", "none"] = _main(
        "none", "who is told of each epoch: files for TensorBoard in the run, MLflow at $MLFLOW_TRACKING_URI, or nobody"
    )
    cache: bool = _main(True, "keep frozen features on disk (the same weights either way)")

    resize: Literal["squash", "crop"] = _fine("squash", "show the network the whole image, or its centred square")
    size: int | None = _fine(None, "side of the square the network sees, in pixels; default: what it was made for", ge=32, le=1024)
    val_fraction: float = _fine(0.1, "share of each class for validation", gt=0, lt=1)
    test_fraction: float = _fine(0.2, "share of each class for test", gt=0, lt=1)
    optimizer: Literal["adamw", "adam", "sgd"] = _fine("adamw", "optimiser")
    weight_decay: float | None = _fine(None, "weight decay (not applied to biases and norms)", ge=0)
    schedule: Literal["cosine", "plateau"] = _fine("cosine", "cosine with warm-up, or ReduceLROnPlateau on val loss")
    warmup_epochs: float = _fine(1.0, "epochs of linear warm-up (cosine)", ge=0)
    patience: int | None = _fine(None, "epochs without a better val loss before early stopping", ge=1)
    min_delta: float = _fine(0.0, "least fall of the val loss that counts as better", ge=0)
    layer_decay: float = _fine(0.3, "learning rate of each stage, as a share of that of the one above", gt=0, le=1)
    label_smoothing: float | None = _fine(None, "share of each target spread over all classes", ge=0, lt=1)
    ema_decay: float | None = _fine(None, "moving average of the trained weights over the steps, validated and kept; 0 = off", ge=0, lt=1)
    class_weights: bool = _fine(False, "weigh classes by the inverse of their size")
    augment: Literal["standard", "randaugment"] = _fine("standard", "what a fresh view goes through (views = 0)")
    mixup: Literal["none", "mixup", "cutmix"] = _fine(
        "none", "MixUp or CutMix of what a batch trains on: images, or features behind a frozen trunk"
    )
    tta_flip: bool | None = _fine(None, "answer with the mean over an image and its mirror image; doubles the cost of an answer")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = _fine("32-true", "arithmetic of the fit")
    compile: bool = _fine(False, "torch.compile for the training step: half a minute to start, then faster for some networks")
    runtime: Literal["auto", "onnx", "torch"] = _fine("auto", "what runs the frozen trunk")
    feature_dtype: Literal["auto", "float16", "float32"] = _fine(
        "auto", "what frozen features are kept as: maps in float16 and vectors in float32, or all of them so"
    )
    workers: int = _fine(2, "threads or processes that decode images", ge=0, le=64)

    @field_validator("unfreeze", mode="before")
    @classmethod
    def _unfreeze(cls, value: Any) -> Any:
        if value == "all":
            return value
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = -1
        if number < 0 or isinstance(value, (bool, float)):
            raise ValueError(f"must be 0, 1, 2, ... or all, not {value!r}")
        return number

    @property
    def recipe(self) -> str:
        """Which row of RECIPES applies."""
        return {0: "linear", "all": "full"}.get(self.unfreeze, "tail")

    @property
    def fresh_views(self) -> bool:
        """Whether each epoch sees new random views of the images (nothing can be cached then)."""
        return self.views == 0 or self.unfreeze == "all"

    def resolved(self) -> TrainConfig:
        """The same config with every None of the recipe filled in, and checked for contradictions."""
        filled = {name: value for name, value in RECIPES[self.recipe].items() if getattr(self, name) is None}
        config = self.model_copy(update=filled)
        if not config.fresh_views and config.augment != "standard":
            raise ConfigError(f"augment={config.augment} needs fresh images every epoch; add --views 0")
        if config.mixup == "cutmix" and config.unfreeze == 0:
            raise ConfigError("mixup=cutmix cuts maps, and --unfreeze 0 trains on vectors; use mixup=mixup, or --unfreeze 1")
        if config.val_fraction + config.test_fraction >= 1:
            raise ConfigError(
                f"val_fraction {config.val_fraction} + test_fraction {config.test_fraction} leave nothing to train on; "
                "make them sum to less than 1"
            )
        return config


def make_config(**values: Any) -> TrainConfig:
    """Validated TrainConfig, or a ConfigError of one line that names the option."""
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1]) or "config"
        if first["type"] == "extra_forbidden":
            known = ", ".join(TrainConfig.model_fields)
            raise ConfigError(f"unknown option {name!r}; known: {known}") from error
        text = first["msg"].removeprefix("Value error, ")
        text = text[0].lower() + text[1:]
        said = "" if first["type"] == "missing" or repr(first["input"]) in text else f", not {first['input']!r}"
        raise ConfigError(f"option {name}: {text}{said}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Values of a YAML or JSON config file; a `run.json` counts too (its `config` is taken)."""
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
    if odd := [name for name in values if not isinstance(name, str)]:
        raise ConfigError(f"{path}: expected option names and values, found the name {odd[0]!r}")
    return values


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """['label_smoothing=0', ...] -> {'label_smoothing': 0, ...}; values are read as YAML."""
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
    """JSON-ready values; `make_config(**dump_config(c)) == c`."""
    values: dict[str, Any] = json.loads(config.model_dump_json())
    return values
