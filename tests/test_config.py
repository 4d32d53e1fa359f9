"""TrainConfig: validation with one-line errors, recipes filled in, YAML and JSON there and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from seewhy.config import RECIPES, TrainConfig, dump_config, make_config, parse_settings, read_config
from seewhy.errors import ConfigError


def error_of(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(**values)
    return str(caught.value)


def test_defaults_are_the_documented_ones() -> None:
    config = make_config(data="images")
    assert (config.backbone, config.unfreeze, config.views, config.protocol) == ("resnet18", 1, 2, "ratio")
    assert (config.val_fraction, config.test_fraction, config.seed) == (0.1, 0.2, 0)
    assert (config.epochs, config.lr, config.batch_size, config.patience) == (None, None, None, None)


def test_is_frozen() -> None:
    config = make_config(data="images")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]  # frozen on purpose, which is what is tested


def test_yaml_and_json_round_trip(tmp_path: Path) -> None:
    config = make_config(data="images", unfreeze="all", lr=3e-4, label_smoothing=0, mixup="mixup", skip_bad=True)
    values = dump_config(config)
    (tmp_path / "c.json").write_text(json.dumps(values))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert values["lr"] == 0.0003
    assert values["unfreeze"] == "all"
    assert make_config(**values) == config
    assert make_config(**read_config(tmp_path / "c.json")) == config
    assert make_config(**read_config(tmp_path / "c.yaml")) == config


def test_read_config_takes_the_config_of_a_run_json(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"version": 1, "config": {"data": "d", "lr": 0.5}, "metrics": {"top1": 0.9}}))
    assert read_config(tmp_path / "run.json") == {"data": "d", "lr": 0.5}


@pytest.mark.parametrize(("unfreeze", "recipe"), [(0, "linear"), (1, "tail"), (4, "tail"), ("all", "full")])
def test_resolved_fills_in_the_recipe_of_what_is_trained(unfreeze: int | str, recipe: str) -> None:
    config = make_config(data="d", unfreeze=unfreeze).resolved()
    assert {name: getattr(config, name) for name in RECIPES[recipe]} == RECIPES[recipe]


def test_recipes_differ_where_it_matters() -> None:
    assert make_config(data="d", unfreeze=0).resolved().epochs == 40
    assert make_config(data="d", unfreeze=1).resolved().epochs == 8
    assert make_config(data="d", unfreeze="all").resolved().epochs == 12
    assert make_config(data="d", unfreeze=0).resolved().label_smoothing == 0.0
    assert make_config(data="d", unfreeze=1).resolved().label_smoothing == 0.1


def test_resolved_keeps_what_the_user_said() -> None:
    config = make_config(data="d", unfreeze=0, epochs=3, label_smoothing=0.25, weight_decay=0.0).resolved()
    assert (config.epochs, config.label_smoothing, config.weight_decay) == (3, 0.25, 0.0)
    assert (config.batch_size, config.lr) == (256, 1e-3)
    assert config.resolved() == config


@pytest.mark.parametrize(("given", "read"), [("2", 2), (0, 0), ("0", 0), ("all", "all")])
def test_unfreeze_is_read_as_a_number_or_all(given: object, read: object) -> None:
    assert make_config(data="d", unfreeze=given).unfreeze == read


@pytest.mark.parametrize("bad", [-1, "two", "ALL", 1.5, True, None, "1.5", ""])
def test_bad_unfreeze_is_one_line_that_says_what_is_allowed(bad: object) -> None:
    assert error_of(data="d", unfreeze=bad) == f"option unfreeze: must be 0, 1, 2, ... or all, not {bad!r}"


def test_unknown_option_names_it_and_the_known_ones() -> None:
    message = error_of(data="d", learning_rate=1)
    assert message.startswith("unknown option 'learning_rate'; known: data, data_root, backbone, weights, unfreeze, ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("views", -1),
        ("views", 65),
        ("views", 1.5),
        ("lr", 0),
        ("lr", "fast"),
        ("lr", float("nan")),
        ("epochs", 0),
        ("batch_size", 0),
        ("seed", -3),
        ("protocol", "random"),
        ("optimizer", "lion"),
        ("val_fraction", 0),
        ("test_fraction", 1),
        ("label_smoothing", 1.0),
        ("layer_decay", 0),
        ("workers", 65),
        ("skip_bad", "perhaps"),
    ],
)
def test_bad_value_is_one_line_naming_option_and_value(name: str, value: object) -> None:
    message = error_of(data="d", **{name: value})
    assert message.startswith(f"option {name}: ")
    assert repr(value) in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_missing_data_is_said_without_dumping_the_other_values() -> None:
    assert error_of(lr=0.5) == "option data: field required"


def test_randaugment_needs_fresh_views() -> None:
    with pytest.raises(ConfigError, match=r"^augment=randaugment needs fresh images every epoch; add --views 0$"):
        make_config(data="d", augment="randaugment").resolved()
    assert make_config(data="d", views=0, augment="randaugment").resolved().augment == "randaugment"
    assert make_config(data="d", unfreeze="all", augment="randaugment").resolved().augment == "randaugment"


def test_cutmix_needs_maps() -> None:
    with pytest.raises(ConfigError, match=r"^mixup=cutmix needs feature maps"):
        make_config(data="d", unfreeze=0, mixup="cutmix").resolved()
    assert make_config(data="d", unfreeze=0, mixup="mixup").resolved().mixup == "mixup"
    assert make_config(data="d", unfreeze=1, mixup="cutmix").resolved().mixup == "cutmix"


def test_fractions_must_leave_something_to_train_on() -> None:
    with pytest.raises(ConfigError, match=r"^val_fraction 0\.5 \+ test_fraction 0\.5 leave no training images"):
        make_config(data="d", val_fraction=0.5, test_fraction=0.5).resolved()
    assert make_config(data="d", val_fraction=0.5, test_fraction=0.49).resolved().test_fraction == 0.49


def test_parse_settings_reads_values_as_yaml() -> None:
    settings = ["label_smoothing=0", "class-weights=true", "mixup=none", " workers =4", "precision=32-true", "lr=1e-3", "weights=a=b.pth"]
    values = parse_settings(settings)
    assert values == {
        "label_smoothing": 0,
        "class_weights": True,
        "mixup": "none",
        "workers": 4,
        "precision": "32-true",
        "lr": "1e-3",
        "weights": "a=b.pth",
    }
    config = make_config(data="d", **values)
    assert (config.lr, config.class_weights, config.label_smoothing) == (0.001, True, 0.0)


@pytest.mark.parametrize("setting", ["label_smoothing", "lr: 3", "lr=[1", "lr=a: b: c"])
def test_parse_settings_refuses_what_is_no_setting_in_one_line(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings([setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"lr: [1, 2", "not valid YAML or JSON"),
        (b"- lr\n- epochs\n", "expected option names and values, found list"),
        (b"", "expected option names and values, found NoneType"),
        (b"1: 2\n", "expected option names and values"),
        (b"\xff\xfe\x00\x81", "cannot be read"),
    ],
)
def test_read_config_says_in_one_line_what_is_wrong_with_a_file(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert str(caught.value).startswith(f"{file}: {reason}")
    assert "\n" not in str(caught.value)


def test_read_config_of_nothing_and_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        read_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)


def test_every_option_has_a_description_and_says_where_it_belongs() -> None:
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        extra = field.json_schema_extra
        assert name == "data" or (isinstance(extra, dict) and extra["cli"] in (True, False)), name


@pytest.mark.parametrize("name", [name for name, field in TrainConfig.model_fields.items() if field.annotation in (float, float | None)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"option {name}: input should be a finite number, not {value}"):
        make_config(data="images", **{name: value})


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.integers(), max_size=2)
NAMES = st.sampled_from(sorted(TrainConfig.model_fields)) | st.text(max_size=6)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_options_are_a_config_that_comes_back_or_one_line(values: dict[str, Any]) -> None:
    try:
        config = make_config(**{"data": "images", **values})
    except ConfigError as error:
        said = str(error)
    else:
        said = ""
        assert make_config(**json.loads(json.dumps(dump_config(config)))) == config
        resolved = config.resolved()
        assert None not in (resolved.epochs, resolved.lr, resolved.batch_size, resolved.patience, resolved.weight_decay)
        assert resolved.resolved() == resolved
    assert "\n" not in said
