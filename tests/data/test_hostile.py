"""Files and names of strangers: nothing of them is run, nothing is read that they point to, nothing they say is trusted unchecked."""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

import seewhy
from seewhy.api import Run, load
from seewhy.curation.audit import audit_images
from seewhy.data.image_set import open_images
from seewhy.errors import RunError
from seewhy.inference.onnx_model import load_onnx
from seewhy.models.manifest import check_manifest
from seewhy.reports.audit_report import save_audit

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
NASTY = "<script>alert(1)</script>"


# ---------------------------------------------------------------- no code from data


def calls_of(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_runs_what_data_says(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not {name.split(".")[0] for name in modules} & {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
    for name, call in calls_of(tree):
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in ("eval", "exec", "np.load", "numpy.load", "yaml.load", "os.system"), (path.name, call.lineno)
        assert keywords.get("shell", "False") == "False"
        assert keywords.get("weights_only", "True") == "True"
        if name == "torch.load" or name == "trainer.fit":
            assert "weights_only" in keywords, (path.name, call.lineno)


def test_the_search_above_finds_something() -> None:
    """It has seen the two places where PyTorch reads files, so it would see others."""
    found = [name for path in SOURCES for name, _ in calls_of(ast.parse(path.read_text(encoding="utf-8")))]
    assert found.count("torch.load") >= 2
    assert found.count("trainer.fit") == 1


# ---------------------------------------------------------------- run folders


@pytest.fixture
def copied(demo_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_run.path, tmp_path / "stranger"))


def change(copied: Path, *place: str, value: Any) -> None:
    manifest = json.loads((copied / "run.json").read_text())
    holder = manifest
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    (copied / "run.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("backbone", "timm"), "hf-hub:stranger/network", "not the name of a network"),
        (("backbone", "timm"), "local-dir:/etc", "not the name of a network"),
        (("backbone", "name"), "../../etc/passwd", "not the name of a network"),
        (("backbone", "timm"), "vit_giant_patch14_dinov2", "not the weights of"),
        (("preprocessing", "size"), 1_000_000, "preprocessing.size"),
        (("preprocessing", "size"), -1, "preprocessing.size"),
        (("preprocessing", "crop"), "0.9", "preprocessing.crop"),
        (("metrics", "test", "accuracy"), "0.5", "metrics.test.accuracy"),
        (("preprocessing", "std"), [0, 0, 0], "preprocessing.std"),
        (("preprocessing", "mean"), [float("nan"), 0, 0], "preprocessing.mean"),
        (("preprocessing", "interpolation"), "magic", "preprocessing.interpolation"),
        (("classes",), ["a"], "classes"),
        (("classes",), ["a"] * 8, "same name"),
        (("classes",), [f"c{n}" for n in range(9)], "tensors differ"),
        (("classes",), {"a": 1}, "classes"),
        (("calibration", "temperature"), 0, "calibration.temperature"),
        (("calibration", "temperature"), float("inf"), "calibration.temperature"),
        (("ood", "threshold"), "high", "ood.threshold"),
        (("metrics",), {}, "metrics.test: "),
        (("metrics", "test", "accuracy"), 7, "metrics.test.accuracy"),
        (("config", "unfreeze"), -3, "unfreeze"),
        (("config", "data"), ["x"], "data"),
        (("config",), 5, "config"),
    ],
)
def test_a_record_is_checked_before_it_is_used(copied: Path, place: tuple[str, ...], value: Any, words: str) -> None:
    change(copied, *place, value=value)
    with pytest.raises(RunError) as caught:
        load(copied)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deep_and_large_records(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "run.json").write_text('{"format": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(RunError, match=r"damaged|run format"):
        load(copied)
    monkeypatch.setattr("seewhy.models.manifest.MAX_BYTES", 1000)
    with pytest.raises(RunError, match=r"is too large for a run\.json"):
        load(copied)


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("model.safetensors", lambda s: {k: np.full_like(v, np.nan) for k, v in s.items()}, "not finite"),
        ("model.safetensors", lambda s: {k: v[:1] for k, v in s.items() if v.ndim}, "differ"),
        ("ood_reference.safetensors", lambda s: {"centre": s["centre"][:-1], "unit_features": s["unit_features"]}, "other lengths"),
        ("ood_reference.safetensors", lambda s: {"centre": s["centre"]}, "other lengths"),
        ("ood_reference.safetensors", lambda s: {"centre": s["centre"], "unit_features": s["unit_features"][:0]}, "other lengths"),
        ("ood_reference.safetensors", lambda s: {"centre": s["centre"][:9], "unit_features": s["unit_features"][:, :9]}, "other lengths"),
    ],
)
def test_weights_are_checked_before_they_are_used(copied: Path, file: str, spoil: Callable[[Any], Any], words: str) -> None:
    save_file({name: np.ascontiguousarray(value) for name, value in spoil(load_file(copied / file)).items()}, copied / file)
    with pytest.raises(RunError, match=words):
        load(copied)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_record_is_refused_in_one_line_or_read(demo_run: Run, data: st.DataObject) -> None:
    manifest = json.loads((demo_run.path / "run.json").read_text())
    holder: Any = manifest
    while isinstance(holder, dict | list) and holder:  # walk down to any place and put anything there
        keys = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = data.draw(st.sampled_from(keys))
        if data.draw(st.booleans()) or not isinstance(holder[key], dict | list) or not holder[key]:
            holder[key] = data.draw(JSON)
            break
        holder = holder[key]
    try:
        found = check_manifest(json.dumps(manifest).encode(), "run.json")
    except RunError as error:
        found, text = None, str(error)
    if found is None:
        assert "\n" not in text
        return
    assert found["preprocessing"]["size"] <= 2048
    assert float(found["metrics"]["test"]["accuracy"]) <= 1


# ---------------------------------------------------------------- ONNX files


@pytest.fixture
def graph(demo_onnx: Path) -> onnx.ModelProto:
    return onnx.load(demo_onnx)


def outside(model: onnx.ModelProto, place: str) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)


def inside_an_if(model: onnx.ModelProto) -> None:
    branch = next(a.g for node in model.graph.node if node.op_type == "If" for a in node.attribute)
    branch.initializer.append(numpy_helper.from_array(np.zeros(3, dtype=np.float32), "w"))
    branch.initializer[-1].data_location = TensorProto.EXTERNAL
    branch.initializer[-1].external_data.add(key="location", value="/etc/passwd")


def loop(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["x"], body=helper.make_graph([], "body", [], [])))


def foreign(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("PyOp", [], ["x"], domain="stranger"))


def function(model: onnx.ModelProto) -> None:
    model.functions.append(helper.make_function("s", "f", [], [], [], [helper.make_opsetid("", 18)]))


def another_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def another_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("secret", TensorProto.FLOAT, [1]))


def sparse_constant(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.zeros(1, dtype=np.float32), "v")
    values.data_location = TensorProto.EXTERNAL
    values.external_data.add(key="location", value="secret.bin")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, dtype=np.int64), "i"), [1])
    model.graph.node.append(helper.make_node("Constant", [], ["x"], sparse_value=sparse))


def float_images(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def facts(**changed: Any) -> Callable[[onnx.ModelProto], None]:
    def spoil(model: onnx.ModelProto) -> None:
        for item in model.metadata_props:
            if item.key in changed:
                item.value = json.dumps(changed[item.key])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: outside(m, "/etc/passwd"), "reads weights from other files"),
        (lambda m: outside(m, "../../../etc/passwd"), "reads weights from other files"),
        (lambda m: outside(m, "weights.bin"), "reads weights from other files"),
        (inside_an_if, "reads weights from other files"),
        (loop, "has a loop"),
        (sparse_constant, "holds sparse tensors"),
        (float_images, "takes images of another type or shape"),
        (foreign, "uses operators of 'stranger'"),
        (function, "defines its own functions"),
        (another_input, "takes inputs other than images"),
        (another_output, "gives unknown outputs .*secret"),
        (facts(classes=["a", "b"]), "names 2 classes, but its outputs have other numbers"),
        (facts(classes=["a"] * 8), "classes is not a list of unique names"),
        (facts(min_decode_side=10**9), "min_decode_side is out of range"),
        (facts(min_decode_side=-1), "min_decode_side is out of range"),
        (facts(test_accuracy=float("nan")), "not finite"),
        (facts(ood_threshold="x"), "not one of `seewhy export`"),
        (facts(selective=[{"precision": 0.9}]), "not one of `seewhy export`"),
        (facts(selective=7), "not one of `seewhy export`"),
        (facts(preprocess_graph="AAAA"), "not a readable ONNX file|gives unknown outputs|takes inputs other"),
        (facts(preprocess_graph="not base64 !"), "not one of `seewhy export`"),
    ],
)
def test_a_graph_is_checked_before_it_is_used(
    graph: onnx.ModelProto, tmp_path: Path, spoil: Callable[[onnx.ModelProto], None], words: str
) -> None:
    spoil(graph)
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(RunError, match=words) as caught:
        load_onnx(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- names


@pytest.fixture(scope="module")
def named_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on classes whose names are HTML, Markdown and formulas."""
    root = tmp_path_factory.mktemp("names")
    from PIL import Image

    for c, name in enumerate((NASTY.replace("/", "\u2215"), "=1+cmd|' '!A0", '"><img src=x onerror=alert(1)>', "@SUM(1)", "`x` [a](b)")):
        (root / "data" / name).mkdir(parents=True)
        for n in range(10):
            noise = np.random.default_rng([c, n]).integers(0, 90, (40, 40, 3))
            noise[..., c % 3] += 40 * c
            Image.fromarray(noise.astype(np.uint8)).save(root / "data" / name / f"=<b>{n}.png")
    small = {"backbone": "test_resnet.r160_in1k", "weights": "none", "epochs": 1, "batch_size": 8, "workers": 0}
    return seewhy.train(root / "data", out=root / "run", group_by="exact", **small)


def assert_escaped(page: str) -> None:
    assert "<img src=x" not in page
    assert not re.search(r"<script>alert\(1\)", page)
    assert "=<b>" not in page
    assert "&lt;script&gt;" in page


def test_pages_escape_names(named_run: Run, tmp_path: Path) -> None:
    assert_escaped((named_run.path / "report.html").read_text())
    audit = audit_images(open_images(named_run.config.data))
    save_audit(audit, tmp_path / "audit")
    assert_escaped((tmp_path / "audit" / "audit.html").read_text())


def test_the_model_card_escapes_names(named_run: Run) -> None:
    body = (named_run.path / "README.md").read_text().split("\n---\n", 1)[1]
    assert "<script>" not in body
    assert not re.search(r"(?<!\\)<img", body)
    assert "[a](b)" not in body


def test_no_csv_has_a_formula(named_run: Run, tmp_path: Path) -> None:
    save_audit(audit_images(open_images(named_run.config.data)), tmp_path / "audit")
    named_run.predict([named_run.config.data]).save(tmp_path / "table.csv")
    files = [*named_run.path.glob("*.csv"), *(tmp_path / "audit").glob("*.csv"), tmp_path / "table.csv"]
    assert len(files) >= 8
    quoted = 0
    for file in files:
        for row in csv.reader(file.open(newline="", encoding="utf-8")):
            for cell in row:
                quoted += cell.startswith("'")
                assert not cell.startswith(("=", "@", "\t", "\r")), (file, cell)
                assert not cell.startswith(("+", "-")) or float(cell) <= 0, (file, cell)
    assert quoted > 20
    assert named_run.threshold_for(0.0001) >= 0  # what was made harmless is still read


def test_names_do_not_steer_a_terminal() -> None:
    error = RunError("run\x1b[2J\r\n\u2028\x9b3m: no such run")
    assert str(error) == "run [2J 3m: no such run"


def test_bytes_that_are_two_formats_are_read_as_the_one_that_was_checked(demo_onnx: Path, demo_images: list[Path]) -> None:
    """ONNX Runtime takes ORTM at bytes 4 to 7 for its own format. A producer's name can put it there; the last of two names counts."""
    trick = b"\x12\x06__ORTM" + demo_onnx.read_bytes()
    with pytest.raises(Exception, match="ORT"):  # its own exception type: not what the bytes are as ONNX
        onnxruntime.InferenceSession(trick, providers=["CPUExecutionProvider"])
    plain, found = load_onnx(demo_onnx), load_onnx(trick)
    image = plain.read(demo_images[0])[None]
    np.testing.assert_array_equal(found.run(image)["logits"], plain.run(image)["logits"])
