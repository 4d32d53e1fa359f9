"""Dockerfile and compose.yaml, as far as they can be held to their word without Docker: what they copy, install, run and ask."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_server import served
from tests.test_docs import options_of

REPOSITORY = Path(__file__).parents[1]
Instruction = tuple[str, str]


def stages() -> dict[str, list[Instruction]]:
    """The Dockerfile: stage -> (instruction, its arguments), those of the stage it builds on included."""
    text = re.sub(r"\\\n", " ", (REPOSITORY / "Dockerfile").read_text())
    found: dict[str, list[Instruction]] = {}
    name = ""
    for line in (line for line in text.splitlines() if line.strip() and not line.startswith("#")):
        word, _, rest = line.partition(" ")
        assert re.fullmatch(r"FROM|ENV|RUN|WORKDIR|COPY|USER|ENTRYPOINT|CMD|EXPOSE|HEALTHCHECK", word), line
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = [*found.get(base, []), (word, base)]
        else:
            found[name].append((word, rest))
    return found


def every(instructions: list[Instruction], word: str) -> list[str]:
    return [rest for name, rest in instructions if name == word]


def check_command(command: list[str]) -> None:
    """`seewhy serve FILE --option value ...` of options that the command has."""
    assert command[:2] == ["seewhy", "serve"]
    known = options_of("serve")
    options = [word for word in command if word.startswith("--")]
    assert options
    for option in options:
        assert option in known
    assert command[command.index("--port") + 1] == "8000"
    assert command[2] == "/model/model.onnx"


def test_what_is_copied_is_there_and_gets_into_the_context() -> None:
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"  # nothing unless named: no data, no runs, no keys
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for instructions in stages().values():
        for rest in every(instructions, "COPY"):
            *sources, _ = shlex.split(rest)
            copied |= set(sources)
    assert copied == let_in
    for name in copied:
        assert (REPOSITORY / name).exists(), name
        assert not any(fnmatch.fnmatch(name, line.removeprefix("**/")) for line in lines[1:] if not line.startswith("!"))


def test_the_image_that_serves_has_the_light_installation() -> None:
    assert list(stages())[-1] == "serve"  # what `docker build .` makes
    instructions = stages()["serve"]
    runs = " && ".join(every(instructions, "RUN"))
    installs = re.findall(r"pip install (.+?)(?: && |$)", runs)
    assert installs == ["-c constraints.txt -r requirements-runtime.txt", "--no-deps ."]
    pins = (REPOSITORY / "constraints.txt").read_text().lower().replace("_", "-")
    for line in (REPOSITORY / "requirements-runtime.txt").read_text().splitlines():
        if not line.startswith("#"):
            name = re.split(r"[<>=;\s\[]", line)[0]
            assert name != "torch"
            assert f"\n{name}==" in pins, name
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert every(instructions, "FROM") == ["python:3.11-slim", "base"]
    assert 'requires-python = ">=3.11"' in project
    # What the build of the package reads is there when it is built.
    order = [rest for word, rest in instructions if word in ("COPY", "RUN")]
    assert order.index("pip install --no-deps . && rm -rf src") > max(
        order.index("src src"), order.index("pyproject.toml README.md LICENSE ./")
    )


def test_both_images_run_as_nobody_special() -> None:
    for name in ("serve", "train"):
        instructions = stages()[name]
        (user,) = every(instructions, "USER")
        assert any(f"useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin {user}" in run for run in every(instructions, "RUN"))
        assert [word for word, _ in instructions].index("USER") > max(n for n, (word, _) in enumerate(instructions) if word == "RUN")
    assert '".[serve,search,audit,tensorboard,mlflow]"' in "".join(every(stages()["train"], "RUN"))


def test_commands_are_seewhy_s() -> None:
    (command,) = every(stages()["serve"], "CMD")
    check_command(json.loads(command))
    assert every(stages()["serve"], "EXPOSE") == ["8000"]
    assert json.loads(every(stages()["train"], "ENTRYPOINT")[0]) == ["seewhy"]


def test_the_image_s_command_and_health_check_work(demo_onnx: Path) -> None:
    """The very words of the image, with another file and port."""
    command = json.loads(every(stages()["serve"], "CMD")[0])
    health = json.loads(every(stages()["serve"], "HEALTHCHECK")[0].partition(" CMD ")[2])
    assert health[0] == "python"

    def healthy(address: str) -> bool:
        code = health[2].replace("http://127.0.0.1:8000", address)
        assert code != health[2]
        return subprocess.run([sys.executable, health[1], code], capture_output=True, check=False).returncode == 0

    with served(str(demo_onnx), *command[3 : command.index("--port")]) as (_, address):
        assert healthy(address)
    assert not healthy(address)


@pytest.fixture
def service() -> Any:
    content = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
    (found,) = content["services"].values()
    return found


def test_compose_builds_the_image_and_runs_its_command(service: Any) -> None:
    assert service["build"]["target"] in stages()
    assert (REPOSITORY / service["build"]["context"] / "Dockerfile").is_file()
    check_command(service["command"])
    assert service["command"][: service["command"].index("--cores")] == json.loads(every(stages()["serve"], "CMD")[0])
    (volume,) = service["volumes"]
    assert (volume["target"], volume["read_only"]) == (service["command"][2], True)


def test_compose_is_closed_unless_opened(service: Any) -> None:
    assert service["ports"] == ["${SEEWHY_ADDRESS:-127.0.0.1:8000}:8000"]
    assert service["environment"] == {"SEEWHY_API_KEY": "${SEEWHY_API_KEY:-}"}  # from the environment: no key in the file
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    limits = service["deploy"]["resources"]["limits"]
    assert limits == {"cpus": "${SEEWHY_CORES:-2}", "memory": "${SEEWHY_MEMORY:-2g}"}
    from seewhy.deploy.server import DRAIN_S

    assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_S
    assert not {"privileged", "network_mode", "env_file", "devices"} & set(service)
