"""MkDocs hook: put what the code says of itself where a page has `<!-- generated: NAME -->`.

`reference.yml` holds what no object of the code describes (metrics, run files, ONNX names, HTTP paths, exit codes);
tests/test_docs.py holds its names against a real run, a real exported file and a real server.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))
MARK = re.compile(r"^<!-- generated: ([\w-]+)(?: (\S+))? -->$", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks.reference")  # a warning there ends `mkdocs build --strict`


# ---------------------------------------------------------------- Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; pipes and line ends in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in line) + " |" for line in lines)


def sentence(text: str) -> str:
    """The text with a capital and a full stop, as prose wants it."""
    text = text.strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def first_paragraph(item: Any) -> str:
    return inspect.cleandoc(item.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def cite(text: str) -> str:
    """arXiv and DOI numbers become links."""
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"doi:(10\.\d+/[\w./-]*\w)", r"[doi:\1](https://doi.org/\1)", text)


# ---------------------------------------------------------------- the command line and the options


@cache
def commands() -> dict[str, Any]:
    """Name -> click command, in the order of `seewhy --help`."""
    import typer

    from seewhy.cli.main import app

    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def cli() -> str:
    """Every command with its arguments and options."""
    parts = []
    for name, command in commands().items():
        arguments = [item for item in command.params if item.param_type_name == "argument"]
        options = [item for item in command.params if item.param_type_name == "option" and item.name != "help"]
        usage = " ".join([f"seewhy {name}", *map(_argument, arguments), "[OPTIONS]"])
        parts += [f"## {name}", command.help.strip(), f"```text\n{usage}\n```"]
        rows = [(f"`{item.metavar or item.name.upper()}`", getattr(item, "help", "") or "") for item in arguments]
        rows += [(_flags(item), (item.help or "") + _default(item)) for item in options]
        parts.append(table(["argument or option", "meaning"], rows))
    return "\n\n".join(parts)


def _argument(item: Any) -> str:
    name = (item.metavar or item.name.upper()) + ("..." if item.nargs == -1 else "")
    return name if item.required else f"[{name}]"


def _flags(option: Any) -> str:
    flags = [*option.opts, *option.secondary_opts]
    value = "" if option.is_flag else f" {option.metavar or _value(option)}"
    return ", ".join(f"`{flag}{value}`" for flag in flags)


def _value(option: Any) -> str:
    """INT, FLOAT, STR or PATH. Older typer has click's types, newer typer its own description of the annotation."""
    kind = getattr(option, "type", None)
    return str(kind.name if kind else option.type_descriptor.annotation.__name__).upper()


def _default(option: Any) -> str:
    plain = isinstance(option.default, str | int | float) and not isinstance(option.default, bool) and option.default != ""
    return f" (default: {option.default})" if plain and "default" not in (option.help or "") else ""


def config() -> str:
    """Every option of TrainConfig."""
    from seewhy.config import RECIPES, TrainConfig

    rows = []
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra
        on_command_line = isinstance(extra, dict) and extra.get("cli")
        flag = "argument `DATA`" if name == "data" else f"`--{name.replace('_', '-')}`" if on_command_line else f"`--set {name}=...`"
        of_recipe = any(name in recipe for recipe in RECIPES.values())
        default = "required" if field.is_required() else "by recipe" if of_recipe else f"`{field.default}`"
        rows.append([f"`{name}`", flag, _kind(field.annotation), default, field.description or ""])
    return table(["field", "command line", "type", "default", "meaning"], rows)


def _kind(annotation: Any) -> str:
    arguments = [item for item in typing.get_args(annotation) if item is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{item}`" for item in arguments)
    if arguments:
        return ", ".join(_kind(item) for item in arguments)
    return str(getattr(annotation, "__name__", annotation))


def recipes() -> str:
    """What fills the options that the user leaves open, by how much is trained."""
    from seewhy.config import RECIPES

    used = {"linear": "`--unfreeze 0`", "tail": "`--unfreeze 1`, `2`, ...", "full": "`--unfreeze all`"}
    keys = list(dict.fromkeys(key for recipe in RECIPES.values() for key in recipe))
    rows = [[f"`{name}`", used[name], *(f"`{recipe[key]}`" if key in recipe else "–" for key in keys)] for name, recipe in RECIPES.items()]
    return table(["recipe", "used for", *(f"`{key}`" for key in keys)], rows)


def backbones() -> str:
    """The backbones with a name of their own."""
    from seewhy.models.backbones import BACKBONES

    rows = []
    for name, named in BACKBONES.items():
        weights = "installed with seewhy" if named.package_weights else "fetched once from timm's hub"
        rows.append([f"`{name}`", f"`{named.timm}`", named.stages, weights])
    return table(["`--backbone`", "timm model", "stages", "weights"], rows)


# ---------------------------------------------------------------- heatmaps


def method_texts() -> dict[str, tuple[str, str]]:
    """Method -> (what it computes, the docstring that cites its paper); those of pixels share the function that describes them."""
    from seewhy.explain import cam
    from seewhy.explain import pixel_attribution as pixels

    described: dict[str, tuple[str, str]] = {}
    for name in cam.ALL_METHODS:
        function = cam.METHODS.get(name) or getattr(cam, f"{name}_weights", None)
        text = inspect.cleandoc((function or pixels.pixel_maps).__doc__ or "")
        if function is None:
            line = re.search(rf"^{name}: (.+)$", text, re.MULTILINE)
            assert line, f"{name} is not described"
            described[name] = (_plain(re.sub(r"\s*\([^()]*\)\.?$", "", sentence(line.group(1)))), line.group(1))
        else:
            described[name] = (_plain(text.split("\n\n")[0].replace("\n", " ")), text)
    return described


def methods() -> str:
    """Every method of `seewhy explain`, with the paper that its function cites."""
    rows = []
    for name, (text, docstring) in method_texts().items():
        papers = re.findall(r"arXiv:\d{4}\.\d{4,5}|doi:10\.[\w./-]*\w", docstring)
        rows.append([f"`{name}`", text, cite(", ".join(dict.fromkeys(papers)))])
    return table(["`--method`", "what it computes", "source"], rows)


def scores() -> str:
    """Every score of heatmaps."""
    from seewhy.explain.faithfulness import FAITHFULNESS_METRICS, LOCALIZATION_METRICS

    rows = [[name, score.better, cite(_plain(first_paragraph(score.of)))] for name, score in FAITHFULNESS_METRICS.items()]
    rows += [[name, "higher", cite(_plain(first_paragraph(function)))] for name, function in LOCALIZATION_METRICS.items()]
    return table(["score", "better", "definition"], rows)


def _plain(docstring: str) -> str:
    """The first clause without shapes of arguments and sections of papers, which a reader of the page has no use for."""
    text = re.split(r"\s*(?:,? ?->|\((?:\w+, )*N,)", docstring)[0]
    text = re.sub(r"\s*(?:Sec|Eq)\. .*$|\s*arXiv:.*$", "", text).strip().rstrip(",.")
    return sentence(text)


def corruptions() -> str:
    """The corruptions of `seewhy robustness`."""
    from seewhy.evaluation.corruptions import CORRUPTIONS

    rows = [[f"`{name}`", item.unit, ", ".join(map(str, item.values))] for name, item in CORRUPTIONS.items()]
    return table(["`--corruption`", "unit", "strengths 1 to 5"], rows)


# ---------------------------------------------------------------- HTTP and errors


def http_models() -> str:
    """The JSON records of the server."""
    from pydantic import BaseModel

    from seewhy.deploy import schemas

    parts = []
    for name, model in vars(schemas).items():
        if inspect.isclass(model) and issubclass(model, BaseModel) and model.__module__ == schemas.__name__:
            text = inspect.cleandoc(model.__doc__ or "") if model.__doc__ and model.__doc__ != BaseModel.__doc__ else ""
            rows = [[f"`{field}`", _json_kind(item.annotation)] for field, item in model.model_fields.items()]
            parts += [f"### {name}", *([text] if text else []), table(["field", "type"], rows)]
    return "\n\n".join(parts)


def _json_kind(annotation: Any) -> str:
    name = annotation.__name__ if inspect.isclass(annotation) and not typing.get_args(annotation) else str(annotation)
    return re.sub(r"[\w.]+\.(\w+)", r"\1", name).replace("NoneType", "null").replace("None", "null")


def errors() -> str:
    """The tree of exceptions."""
    from seewhy import errors as module

    def branch(kind: type, depth: int) -> Iterable[str]:
        yield f"{'    ' * depth}- `{kind.__name__}`: {sentence(first_paragraph(kind))}"
        for below in sorted(kind.__subclasses__(), key=lambda item: item.__name__):
            if below.__module__ == module.__name__:
                yield from branch(below, depth + 1)

    return "\n".join(branch(module.SeewhyError, 0))


# ---------------------------------------------------------------- tables of reference.yml, files of the repository


def tabled(name: str) -> Callable[[], str]:
    """A table of reference.yml: {key: text} or {key: [text, text]}."""

    def made() -> str:
        content = TABLES[name]
        rows = [[f"`{key}`", *([text] if isinstance(text, str) else text)] for key, text in content["rows"].items()]
        return table(content["head"], rows)

    return made


def decisions() -> str:
    """An index of the decision pages: title and first sentence of each."""
    rows = []
    for path in sorted((ROOT / "docs/project/decisions").glob("[0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        decided = re.search(r"^\*\*Decision\.\*\* (.+?)$", text, re.MULTILINE)
        assert title, path
        assert decided, path
        rows.append([f"[{title.group(1)}]({path.name})", decided.group(1)])
    return table(["question", "decision"], rows)


GENERATED: dict[str, Callable[[], str]] = {
    "cli": cli,
    "config": config,
    "recipes": recipes,
    "backbones": backbones,
    "methods": methods,
    "scores": scores,
    "corruptions": corruptions,
    "http-models": http_models,
    "errors": errors,
    "decisions": decisions,
    **{name: tabled(name) for name in TABLES},
}


PAGES = {"ARCHITECTURE.md": "project/architecture.md", "CONTRIBUTING.md": "project/contributing.md", "CHANGELOG.md": "project/changelog.md"}


def included(name: str, page: str) -> str:
    """A file of the repository without its first heading; its links to other files point to their pages, as seen from `page`."""
    text = (ROOT / name).read_text(encoding="utf-8")

    def link(match: re.Match[str]) -> str:
        target = PAGES.get(match.group(1), match.group(1).removeprefix("docs/"))
        return f"]({os.path.relpath(target, Path(page).parent)})"

    return re.sub(r"\]\(((?:docs/)?[\w/-]+\.md)\)", link, re.sub(r"\A# .*\n+", "", text))


def fill(markdown: str, page: str) -> str:
    """The page with all that is generated in its place. page: its path below docs/."""

    def replacement(match: re.Match[str]) -> str:
        name, file = match.groups()
        return included(file, page) if name == "file" else GENERATED[name]()

    return MARK.sub(replacement, markdown)


# ---------------------------------------------------------------- the events of MkDocs


def on_config(config: Any) -> Any:
    """Every decision page goes into the navigation, so that a new one needs no second line."""
    folder = ROOT / "docs/project/decisions"
    pages = [
        f"project/decisions/{path.name}" for path in sorted(folder.glob("*.md"), key=lambda path: (path.name != "index.md", path.name))
    ]
    for section in config.nav or []:
        for item in section.get("Project", []) if isinstance(section, dict) else []:
            if isinstance(item, dict) and "Decisions" in item:
                item["Decisions"] = pages
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    try:
        return fill(markdown, page.file.src_path)
    except (KeyError, ImportError, AttributeError, OSError) as error:
        log.warning("%s: cannot be generated (%r)", page.file.src_path, error)
        return markdown
