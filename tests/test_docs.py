"""The documents are true: blocks run, names exist, and what exists is named."""

from __future__ import annotations

import glob
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

import seewhy
from seewhy import errors
from seewhy.api import Run
from seewhy.cli.guard import INTERRUPTED, run_guarded
from seewhy.cli.main import call
from seewhy.config import RECIPES, TrainConfig
from seewhy.deploy import app, middleware
from seewhy.evaluation.corruptions import CORRUPTIONS
from seewhy.explain.cam import ALL_METHODS
from seewhy.explain.faithfulness import FAITHFULNESS_METRICS, LOCALIZATION_METRICS
from seewhy.models.backbones import BACKBONES

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(REPOSITORY)) for path in DOCS.rglob("*.md") if not {"dev", "decisions"} & set(path.parts)),
]
DOCUMENTS = [*PAGES, "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md"]
FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def load_reference() -> Any:
    """docs/tools/reference.py, which MkDocs loads as a hook."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "tools" / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def rows(name: str) -> dict[str, Any]:
    """A table of docs/tools/reference.yml."""
    content: dict[str, Any] = reference.TABLES[name]["rows"]
    return content


# ---------------------------------------------------------------- README


def test_readme_is_short() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []
    assert "| option" not in read("README.md")


def test_readme_has_no_long_sentence() -> None:
    text = re.sub(r"```.*?```|<[^>]+>|!?\[([^\]]*)\]\([^)]*\)", r"\1", read("README.md"), flags=re.DOTALL)
    prose = "\n".join(
        "" if line.startswith(("|", "#")) else line.removeprefix("- ") + ("." if line.startswith("- ") else "")
        for line in text.splitlines()
    )
    sentences = [" ".join(part.split()) for paragraph in prose.split("\n\n") for part in re.split(r"[.:;?!](?:\s|$)", paragraph)]
    assert [sentence for sentence in sentences if len(sentence.split()) > 25] == []


def test_readme_numbers_are_the_measured_ones() -> None:
    """Its table repeats rows of benchmarks/results.json word for word."""
    columns = ("backbone, what trains, protocol", "test accuracy %", "mean per-class %", "cold s", "warm s")
    measured = {
        " | ".join(["", *(str(row[c]) for c in columns), ""]).strip()
        for row in json.loads(read("benchmarks/results.json"))["caltech101"]["rows"]
    }
    table = read("README.md").split("## Results")[1].split("## ")[0]
    shown = {line for line in table.splitlines() if line.startswith("| ") and not line.startswith(("| backbone", "| ---"))}
    assert len(shown) == 3
    assert shown <= measured


# ---------------------------------------------------------------- links, words, files


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_images_exist(name: str) -> None:
    for target in (a or b for a, b in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"", read(name))):
        if not target.startswith("http"):
            assert ((REPOSITORY / name).parent / target).exists(), target


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if not name.endswith(("CHANGELOG.md", "changelog.md"))])
def test_documents_say_image(name: str) -> None:
    assert re.findall(r"\bpictures?\b", read(name), re.IGNORECASE) == []


def test_every_page_is_in_the_navigation() -> None:
    nav = read("mkdocs.yml").split("\nnav:")[1]
    for path in DOCS.rglob("*.md"):
        if not {"dev", "decisions"} & set(path.parts):
            assert str(path.relative_to(DOCS)) in nav, path


def test_every_decision_says_why_and_what_was_measured() -> None:
    pages = sorted((DOCS / "project" / "decisions").glob("[0-9]*.md"))
    assert len(pages) >= 30
    for page in pages:
        assert re.findall(r"^\*\*(Decision|Why|Measured)\.\*\* \S", page.read_text(encoding="utf-8"), re.MULTILINE) == [
            "Decision",
            "Why",
            "Measured",
        ], page


def test_every_promise_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", read("docs/dev/reliability.md"))
    assert len(named) > 30
    for file, test in named:
        assert any(f"def {test}(" in path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob(file)), (file, test)


def test_every_module_opens_with_one_sentence() -> None:
    for path in [*(REPOSITORY / "src" / "seewhy").rglob("*.py"), *(REPOSITORY / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not text or re.match(r'"""[^\n]+', text), path


def test_architecture_names_every_package() -> None:
    for path in (REPOSITORY / "src" / "seewhy").iterdir():
        if (path / "__init__.py").is_file():
            assert f"  {path.name}/ " in read("ARCHITECTURE.md"), path.name


def test_results_are_rendered_from_the_json() -> None:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from common import render
    finally:
        sys.path.pop(0)
    assert read("benchmarks/RESULTS.md") == render(json.loads(read("benchmarks/results.json")))


def test_no_path_of_one_machine_in_the_tree() -> None:
    left_out = {".venv", "runs", "data", "build"}
    for path in REPOSITORY.rglob("*"):
        if path.suffix in {".py", ".md", ".toml", ".txt", ".ipynb", ".json", ".html", ".yml"} and not left_out & set(path.parts):
            assert not re.search(r"/(work|farm|root)/", path.read_text(encoding="utf-8")), path


# ---------------------------------------------------------------- the reference is complete


def test_every_command_and_option_is_described() -> None:
    page = reference.cli()
    for name in [
        *reference.commands(),
        *(f.replace("_", "-") for f, x in TrainConfig.model_fields.items() if (x.json_schema_extra or {}).get("cli")),
    ]:
        assert f"## {name}\n" in page or f"`--{name}" in page, name
    assert [line for line in page.splitlines() if re.search(r"^\| `[^|]*\| *\|$", line)] == []


def test_every_field_of_the_config_is_described() -> None:
    page = reference.config()
    for name in TrainConfig.model_fields:
        assert re.search(rf"^\| `{name}` \|.* \| [^|]{{8,}} \|$", page, re.MULTILINE), name
    assert all(f"`{name}`" in reference.recipes() for name in RECIPES)
    assert all(f"`{name}`" in reference.backbones() for name in BACKBONES)


def test_every_method_score_and_corruption_is_described() -> None:
    for name in ALL_METHODS:
        assert re.search(rf"^\| `{re.escape(name)}` \| [^|]{{15,}} \| \[(arXiv|doi)", reference.methods(), re.MULTILINE), name
    for name in (*FAITHFULNESS_METRICS, *LOCALIZATION_METRICS):
        assert re.search(rf"^\| {name} \| (higher|lower) \| [^|]{{15,}} \|$", reference.scores(), re.MULTILINE), name
    assert all(f"`{name}`" in reference.corruptions() for name in CORRUPTIONS)


def test_every_key_of_a_run_is_described_and_no_other(demo_run: Run) -> None:
    assert set(rows("metrics")) == set(demo_run.metrics["test"])
    assert set(rows("split")) == set(demo_run.manifest["split"])
    assert set(rows("ood")) == set(demo_run.manifest["ood"])
    calibration = demo_run.manifest["calibration"]
    nested = {f"selective[].{key}" for row in calibration["selective"] for key in row}
    assert set(rows("calibration")) == set(calibration) | nested


def test_every_file_of_a_run_is_described(demo_run: Run) -> None:
    assert demo_run.path is not None
    names = {str(path.relative_to(demo_run.path)) for path in demo_run.path.rglob("*") if path.is_file()}
    names = {"tensorboard/" if name.startswith("tensorboard/") else name for name in names} - {"model.onnx"}
    assert names | {"mlflow.json", "tensorboard/"} == set(rows("run-files"))


def test_inputs_outputs_and_metadata_of_an_exported_file_are_described(demo_onnx: Path) -> None:
    import onnx

    model = onnx.load(demo_onnx)
    assert [item.name for item in model.graph.input] == list(rows("onnx-inputs"))
    assert [item.name for item in model.graph.output] == list(rows("onnx-outputs"))
    assert {item.key for item in model.metadata_props} == set(rows("onnx-metadata"))


@pytest.fixture(scope="module")
def paths(demo_onnx: Path) -> dict[str, Any]:
    """The server's own description of its paths."""
    found: dict[str, Any] = app.create_app(demo_onnx).openapi()["paths"]
    return found


def test_every_request_and_error_of_the_server_is_described(paths: dict[str, Any]) -> None:
    assert {f"{method.upper()} {path}" for path, item in paths.items() for method in item} == set(rows("http-paths"))
    source = inspect.getsource(app) + inspect.getsource(middleware)
    found = {code: status for status, code in re.findall(r"(\d{3})(?:,|:) \"([a-z_]+)\"", source)}
    assert found == {code: status for code, (status, _) in rows("http-errors").items()}


def test_every_record_of_the_server_is_described(paths: dict[str, Any]) -> None:
    page = reference.http_models()
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(paths))) - {"HTTPValidationError"}
    assert all(f"### {name}\n" in page for name in used)


def test_every_exit_code_and_error_is_described() -> None:
    assert set(rows("exit-codes")) == {"0", "1", "2", str(INTERRUPTED), str(128 + signal.SIGTERM)}
    tree = reference.errors()
    for name, item in vars(errors).items():
        if inspect.isclass(item) and issubclass(item, errors.SeewhyError):
            assert f"- `{name}`: " in tree


def test_every_public_name_is_on_the_python_page() -> None:
    page = read("docs/reference/python.md")
    for name in seewhy.__all__:
        assert name.endswith("Error") or f"::: seewhy.{name}\n" in page, name


def test_every_mark_of_a_page_can_be_generated() -> None:
    marks = [mark for name in PAGES for mark in re.findall(r"<!-- generated: ([\w-]+)", read(name))]
    assert set(marks) - {"file"} == set(reference.GENERATED) - {"decisions"}
    assert "| [" in reference.decisions()


def test_help_names_every_method_and_corruption() -> None:
    assert all(name in reference.cli().split("\n## explain")[1] for name in ALL_METHODS)
    assert all(name in reference.cli().split("\n## robustness")[1] for name in CORRUPTIONS)


# ---------------------------------------------------------------- what the pages name exists


def options_of(command: str) -> set[str]:
    return {flag for item in reference.commands()[command].params for flag in (*item.opts, *item.secondary_opts)} | {"--help", "--version"}


def check_options(line: str) -> None:
    """Every option behind `seewhy COMMAND` in a line of shell is one of that command."""
    words = shlex.split(line, comments=True)
    start = next((n for n, word in enumerate(words) if word in ("seewhy", "seewhy.cli", "seewhy-train")), None)
    if start is None or start + 1 == len(words) or not re.fullmatch(r"[a-z]+", words[start + 1]) or words[:2] == ["docker", "build"]:
        return
    command, given = words[start + 1], words[start + 2 :]
    assert command in reference.commands(), line
    for n, word in enumerate(given):
        assert not word.startswith("--") or word.split("=")[0] in options_of(command), (line, word)
        if word == "--set":
            assert given[n + 1].split("=")[0] in TrainConfig.model_fields, line


@pytest.mark.parametrize("name", PAGES)
def test_options_in_the_text_exist(name: str) -> None:
    known = {flag for command in reference.commands() for flag in options_of(command)}
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", read(name), flags=re.DOTALL)):
        if code.startswith("seewhy "):
            check_options(code)
        elif code.startswith("--"):
            for flag in re.findall(r"(?:^| )(--[a-z][a-z-]*)", code):
                assert flag in known, (name, code)
        for option in re.findall(r"--set (\w+)", code):
            assert option in {*TrainConfig.model_fields, "name"}, (name, code)


@pytest.mark.parametrize("name", PAGES)
def test_blocks_that_are_not_run_have_options_that_exist(name: str, paths: dict[str, Any]) -> None:
    for block in FENCE.finditer(read(name)):
        if not block["reason"]:
            continue
        for line in block["code"].splitlines() if block["language"] == "bash" else ():
            check_options(line)
            for address in re.findall(r"http://127\.0\.0\.1:8000(/[^\s\"]*)", line):
                path = urlsplit(address)
                described = paths[path.path]
                parameters = {item["name"] for method in described.values() for item in method.get("parameters", ())}
                assert set(parse_qs(path.query)) <= parameters, line
        if block["language"] == "python":
            compile(block["code"], name, "exec")


# ---------------------------------------------------------------- every other block runs


@pytest.fixture
def world(
    name: str, demo_run: Run, demo_onnx: Path, demo_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_report: None
) -> Path:
    """A folder with what the pages name: images/, masks/ and, unless the page trains it, runs/first. Short fits, no listening server."""
    for part in ("images", "masks"):
        shutil.copytree(demo_set / part, tmp_path / part, copy_function=os.link)
    if "--out runs/first" not in read(name):
        shutil.copytree(demo_run.path, tmp_path / "runs" / "first")
    if name != "docs/start/tour.md":  # which asks its run for a threshold
        monkeypatch.setitem(RECIPES["linear"], "epochs", 2)
    monkeypatch.setattr("seewhy.cli.deploy.ensure_exported", lambda run: demo_onnx)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: [item.close() for item in sockets])
    listen = socket.create_server
    monkeypatch.setattr(socket, "create_server", lambda address, **options: listen((address[0], 0), **options))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(line: str, fail: Callable[[str], None]) -> None:
    """A line of shell, in this process: `seewhy ...` with patterns, and nothing else."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "seewhy", f"{line}: only seewhy is run here; mark the block"
    quoted = re.findall(r"'([^']*)'", line)
    expanded = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word and word not in quoted else [word])]
    if (status := run_guarded(lambda: call(expanded[1:]))) != 0:
        fail(f"{line}: status {status}")


@pytest.mark.blocks
@pytest.mark.parametrize(
    "name", [name for name in PAGES if any(not b["reason"] and b["language"] in ("bash", "python") for b in FENCE.finditer(read(name)))]
)
def test_blocks_run(name: str, world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In order, in one folder and one namespace."""
    space: dict[str, Any] = {"__name__": name}
    for block in FENCE.finditer(read(name)):
        if block["reason"]:
            continue
        if block["language"] == "python":
            exec(compile(block["code"], name, "exec"), space)
        elif block["language"] == "bash":
            for line in block["code"].replace("\\\n", " ").splitlines():
                run_line(line, lambda text: pytest.fail(f"{text}\n{capfd.readouterr().err[-2000:]}"))
    if name == "docs/guides/audit.md":
        assert set(os.listdir("audit")) == set(rows("audit-files"))
