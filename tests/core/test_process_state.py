"""A caller's process is as it was: after importing seewhy, and after a call that needed it otherwise."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest

from seewhy.core.process_state import environment, quiet

# What others do when they are imported is not ours: they come first.
PROBE = """
import faulthandler, importlib, json, locale, logging, multiprocessing, os, pkgutil, random, signal, sys, threading, warnings
import cleanvision, fastapi, huggingface_hub, imagehash, lightning.pytorch, matplotlib, numpy, onnx, onnxruntime, onnxscript, optuna, pandas
import PIL.Image, psutil, pyarrow.fs, pyarrow.parquet, safetensors.torch, scipy, sklearn, timm, torch, torchmetrics, torchvision, typer
import IPython, tensorboard, uvicorn

LOGGERS = (None, "seewhy", "lightning", "lightning.pytorch", "PIL", "optuna", "timm", "cleanvision", "matplotlib", "torch", "ray")

def state():
    return {
        "matplotlib": [repr(dict.__getitem__(matplotlib.rcParams, "backend")), {k: repr(v) for k, v in matplotlib.rcParams.copy().items()}],
        "warnings": [repr(warnings.filters), repr(warnings.showwarning), repr(warnings.formatwarning)],
        "environment": dict(os.environ),
        "loggers": {str(name): [log.level, repr(log.handlers), log.propagate, log.disabled, repr(log.filters)]
                    for name in LOGGERS for log in [logging.getLogger(name)]},
        "logging": [logging.root.manager.disable, repr(logging.getLoggerClass()), repr(logging.lastResort)],
        "signals": {str(each): repr(signal.getsignal(each)) for each in signal.valid_signals()},
        "hooks": [repr(each) for each in (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook)],
        "streams": [repr(sys.stdout), repr(sys.stderr)],
        "torch": [torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
                  torch.multiprocessing.get_sharing_strategy()],
        "random": [torch.initial_seed(), repr(numpy.random.get_state()), repr(hash(random.getstate()))],
        "numpy": [repr(numpy.geterr()), repr(numpy.get_printoptions())],
        "pillow": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "python": [multiprocessing.get_start_method(allow_none=True), sys.getrecursionlimit(), locale.setlocale(locale.LC_ALL), os.getcwd(),
                   faulthandler.is_enabled(), threading.active_count(), sys.path, pandas.get_option("display.max_rows")],
    }

import PIL.ImageFile
before = state()
import seewhy
names = [module.name for module in pkgutil.walk_packages(seewhy.__path__, "seewhy.") if not module.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
after = state()
print(json.dumps([len(names), {name: [before[name], after[name]] for name in before if before[name] != after[name]}]))
"""


def test_importing_every_module_changes_nothing() -> None:
    answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    modules, changed = json.loads(answer.splitlines()[-1])
    assert modules > 50
    assert changed == {}


def test_loggers_and_warnings_are_quiet_for_as_long_as_the_call_lasts() -> None:
    log, filters = logging.getLogger("seewhy.test"), list(warnings.filters)
    log.setLevel(logging.INFO)

    @quiet("seewhy.test", warnings_of="nobody|tests?")
    def work() -> None:
        assert not log.isEnabledFor(logging.WARNING)
        assert log.isEnabledFor(logging.ERROR)
        warnings.warn_explicit("unheard", UserWarning, "test.py", 1, "tests.some")
        raise ValueError("within")

    with warnings.catch_warnings(record=True) as heard, pytest.raises(ValueError, match="within"):
        work()
    assert heard == []
    assert log.level == logging.INFO
    assert warnings.filters == filters


def test_variables_of_the_environment_are_set_only_meanwhile_and_not_over_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEWHY_TEST_GIVEN", "caller")
    before = dict(os.environ)

    @environment(SEEWHY_TEST_GIVEN="ours", SEEWHY_TEST_NEW="ours")
    def work() -> None:
        assert (os.environ["SEEWHY_TEST_GIVEN"], os.environ["SEEWHY_TEST_NEW"]) == ("caller", "ours")
        raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        work()
    assert dict(os.environ) == before
