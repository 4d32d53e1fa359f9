"""What an installation without an extra says: one line that names the extra, and exit status 2."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SERVE = ["fastapi", "uvicorn", "python_multipart", "prometheus_client"]
NETWORK = ["--backbone", "test_resnet.r160_in1k", "--weights", "none"]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


@pytest.mark.parametrize(
    ("module", "extra", "what", "command"),
    [
        *((name, "serve", "seewhy serve", ["serve", "model.onnx"]) for name in SERVE),
        ("optuna", "search", "--search-trials", ["train", "DATA", *NETWORK, "--search-trials", "2"]),
        ("cleanvision", "audit", "seewhy audit", ["audit", "DATA"]),
        ("tensorboard", "tensorboard", "--tracker tensorboard", ["train", "DATA", *NETWORK, "--tracker", "tensorboard"]),
        ("mlflow", "mlflow", "--tracker mlflow", ["train", "DATA", *NETWORK, "--tracker", "mlflow"]),
        ("ray", "ray", "--backend ray", ["predict", "RUN", "a.jpg", "--backend", "ray", "--out", "a.parquet"]),
    ],
)
def test_a_missing_package_is_one_line_before_any_work(
    module: str,
    extra: str,
    what: str,
    command: list[str],
    make_folder: Callable[..., Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_folder({"ant": 10, "bee": 10})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # so Python says that it is not there
    monkeypatch.setattr("seewhy.data.verify.check_file", lambda path: pytest.fail("images are read"))
    assert run_guarded(lambda: call([str(folder) if word == "DATA" else word for word in command])) == 2
    printed = capsys.readouterr()
    assert printed.err == f'seewhy: {what} needs {module}, which is not installed; pip install "seewhy[{extra}]"\n'
    assert printed.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) in ([folder.name], [cache.name, folder.name])  # no run, no table, no page


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_pixel_methods_without_captum(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from seewhy.errors import ConfigError
    from seewhy.explain.pixel_attribution import pixel_maps

    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ConfigError, match=rf'^{method} needs captum, which is not installed; pip install "seewhy\[captum\]"$'):
        pixel_maps(torch.nn.Identity(), torch.zeros(1, 3, 28, 28), method, None, None)


def test_no_extra_is_imported_by_what_all_commands_need() -> None:
    """In a process of its own, where an import of any optional package fails: the core trains' modules, its commands' and its help."""
    import subprocess

    optional = [*SERVE, "starlette", "optuna", "cleanvision", "mlflow", "ray", "captum", "tensorboard", "tensorboardX"]
    code = f"""
import sys
for name in {optional}:
    sys.modules[name] = None
import seewhy
import seewhy.training.pipeline, seewhy.inference.predict, seewhy.explain.explainer, seewhy.deploy.export
import seewhy.reports.run_report, seewhy.evaluation.evaluate, seewhy.evaluation.comparison, seewhy.evaluation.robustness
import seewhy.deploy.hub, seewhy.deploy.static_site, seewhy.training.dry_run, seewhy.cli.batch, seewhy.curation.audit
from seewhy.cli.main import call
call(["serve", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage: seewhy serve" in done.stdout


def test_all_is_all_of_them_and_the_core_has_none() -> None:
    features = ["serve", "search", "audit", "tensorboard", "mlflow", "ray", "captum"]
    assert set(EXTRAS) == {*features, "all", "dev", "docs", "bench"}
    assert EXTRAS["all"] == [f"seewhy[{','.join(features)}]"]
    for extra in features:
        assert not names(EXTRAS[extra]) & names(PROJECT["dependencies"])


def test_the_light_installation_is_what_an_exported_file_needs() -> None:
    """requirements-runtime.txt: the extra that serves, and some of the core."""
    text = (REPOSITORY / "requirements-runtime.txt").read_text()
    lines = {str(Requirement(line)) for line in text.splitlines() if not line.startswith("#")}
    served, core = ({str(Requirement(text)) for text in given} for given in (EXTRAS["serve"], PROJECT["dependencies"]))
    assert served <= lines <= served | core
