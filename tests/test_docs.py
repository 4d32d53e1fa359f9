"""The documents are true: every option, method and module is named, links lead somewhere, README commands exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from seewhy import cli
from seewhy.api import Run
from seewhy.config import RECIPES, TrainConfig
from seewhy.evaluation.corruptions import CORRUPTIONS
from seewhy.explain.cam import ALL_METHODS
from seewhy.models.backbones import BACKBONES

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(f"docs/{n}.md" for n in ("EXPORT", "METRICS", "RELIABILITY", "SCALE", "SHARING")),
]


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_images_exist(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", read(name))
    for target in (a or b for a, b in targets):
        if not target.startswith("http"):
            assert ((REPOSITORY / name).parent / target).exists(), target


def test_every_option_method_and_backbone_is_documented() -> None:
    text = read("README.md")
    for name in TrainConfig.model_fields:
        assert f"`{name}`" in text or f"`--{name.replace('_', '-')}" in text, name
    for name in [*ALL_METHODS, *BACKBONES]:
        assert f"`{name}`" in text, name


def test_recipes_in_the_readme_are_those_of_the_code() -> None:
    text = read("README.md")
    for name, recipe in RECIPES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
        assert cells == [
            str(recipe[key])
            for key in ("epochs", "patience", "batch_size", "lr", "weight_decay", "label_smoothing", "ema_decay", "tta_flip")
        ]


def test_every_promise_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", read("docs/RELIABILITY.md"))
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in read(f"tests/{file}"), (file, test)
    for section in read("docs/RELIABILITY.md").split("\n## ")[1:]:
        assert "Tests: " in section or section.startswith("Numbers"), section[:40]


def test_architecture_names_every_module() -> None:
    text = read("ARCHITECTURE.md")
    for path in (REPOSITORY / "src" / "seewhy").glob("*.py"):
        assert path.name in text, path.name


def test_every_module_opens_with_one_sentence() -> None:
    for path in [*(REPOSITORY / "src" / "seewhy").glob("*.py"), *(REPOSITORY / "tests").glob("*.py")]:
        assert re.match(r'"""[^\n]+', path.read_text(encoding="utf-8")), path


def test_readme_seewhy_commands_parse() -> None:
    """Every `seewhy ...` line of the README's code blocks has a known command and known options."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", read("README.md"), flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("seewhy ")]
    assert len(commands) >= 6
    known = {command.name: command for command in cli.app.registered_commands}
    known |= {command.callback.__name__: command for command in cli.app.registered_commands if command.callback}
    for words in commands:
        assert words[1] in known, words
        help_text = str(cli_help(words[1]))
        for option in (word for word in words[2:] if word.startswith("--")):
            assert option in help_text, (words, option)


def test_help_names_every_method() -> None:
    words = set(re.findall(r"[a-z_+]+", cli_help("explain")))
    assert set(ALL_METHODS) <= words


def test_help_names_every_corruption() -> None:
    assert set(CORRUPTIONS) <= set(re.findall(r"[a-z]+", cli_help("robustness")))


def test_every_key_of_a_run_s_numbers_is_explained(demo_run: Run) -> None:
    text = read("docs/METRICS.md")
    keys = {*demo_run.metrics["test"], *demo_run.metrics["test"]["per_class"][0]}
    keys |= {key for name in ("calibration", "ood", "split") for key in demo_run.manifest[name]}
    keys |= {key for row in demo_run.manifest["calibration"]["selective"] for key in row}
    assert sorted(key for key in keys if f"`{key}`" not in text and f".{key}`" not in text) == []


def cli_help(command: str) -> str:
    import contextlib
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.run_guarded(lambda: cli.call([command, "--help"]))
    return output.getvalue()


def test_readme_numbers_are_the_measured_ones() -> None:
    """The README's table repeats rows of benchmarks/results.json word for word."""
    results = json.loads(read("benchmarks/results.json"))
    readme = read("README.md")
    for row in results["caltech101"]["rows"]:
        name = row["backbone, what trains, protocol"]
        if not name.startswith("peer"):
            assert f"| {name} | {row['test accuracy %']} | {row['mean per-class %']} | {row['cold s']} | {row['warm s']} |" in readme


def test_results_are_rendered_from_the_json() -> None:
    import sys

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from common import render
    finally:
        sys.path.pop(0)
    assert read("benchmarks/RESULTS.md") == render(json.loads(read("benchmarks/results.json")))


def test_no_path_of_one_machine_in_the_tree() -> None:
    for path in REPOSITORY.rglob("*"):
        if path.suffix in {".py", ".md", ".toml", ".txt", ".ipynb", ".json", ".html"} and not {".venv", "runs", "data"} & set(path.parts):
            assert not re.search(r"/(work|farm|root)/", path.read_text(encoding="utf-8")), path
