"""The public surface: what `__all__` names exists, is documented, and nothing else is promised."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import seewhy
from seewhy import errors

REPOSITORY = Path(__file__).parents[1]


def test_all_is_sorted_complete_and_importable() -> None:
    assert seewhy.__all__ == sorted(seewhy.__all__)
    for name in seewhy.__all__:
        assert getattr(seewhy, name).__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        seewhy.nonsense  # noqa: B018  # the access itself is what is tested


def test_error_tree_is_drawn_in_its_docstring_and_public() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    for error in classes:
        assert error.__name__ in (errors.__doc__ or "")
        assert issubclass(error, seewhy.SeewhyError)
    assert {c.__name__ for c in classes} == {name for name in seewhy.__all__ if name.endswith("Error")}


def test_version_is_the_packages() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert f'version = "{seewhy.__version__}"' in text


def test_the_first_line_of_every_docstring_is_a_sentence() -> None:
    """What `help()`, editors and the reference show of it."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    cut = [
        f"{path.name}: {text.splitlines()[0]}"
        for path in (REPOSITORY / "src" / "seewhy").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) and not text.splitlines()[0].endswith(".")
    ]
    assert cut == []


ARRAYS = r"NDArray|ndarray|DataFrame|\bTensor"


def test_what_holds_arrays_is_compared_by_identity() -> None:
    """Comparing the fields of such dataclasses raises ValueError, and hashing them TypeError."""
    held: dict[str, tuple[bool, list[str]]] = {}
    arrays: set[str] = set()
    for file in (REPOSITORY / "src" / "seewhy").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        arrays |= set(re.findall(rf"^(\w+) = .*(?:{ARRAYS})", text, flags=re.MULTILINE))  # names of such types
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and (made := [d for d in map(ast.unparse, node.decorator_list) if d.startswith("dataclass")]):
                kinds = [ast.unparse(field.annotation) for field in node.body if isinstance(field, ast.AnnAssign)]
                held[node.name] = "eq=False" in made[0], [kind for kind in kinds if "Callable" not in kind]
    arrays -= held.keys()  # a dataclass of that name is judged by its own fields
    while (
        more := {
            name for name, (_, kinds) in held.items() if re.search("|".join([ARRAYS, *(rf"\b{a}\b" for a in arrays)]), " ".join(kinds))
        }
        - arrays
    ):
        arrays |= more
    assert {"ImageSet", "Split", "Evaluation", "Predictions", "Explanation", "SavedRun"} <= arrays
    assert sorted(name for name in arrays & held.keys() if not held[name][0]) == []
