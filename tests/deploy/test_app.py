"""Test the web application: predictions equal the run's, and bad requests get one line of JSON and harm no other."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from seewhy.api import Run
from seewhy.deploy.app import create_app
from seewhy.deploy.middleware import Limits, RequestMiddleware
from seewhy.errors import ConfigError
from seewhy.inference.onnx_model import load_onnx

LIMITS = Limits(files=8, request_bytes=3_000_000, pixels=1_000_000, upload_s=5, max_inflight=16)


@pytest.fixture(scope="module")
def client(demo_onnx: Path) -> Iterator[TestClient]:
    with TestClient(create_app(demo_onnx, 2, LIMITS), raise_server_exceptions=False) as found:
        yield found


def form(*contents: bytes, name: str = "a.jpg") -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("files", (name, content, "image/jpeg")) for content in contents]


def noise_png(width: int = 200, height: int = 200) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def plain(kind: str, width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, kind)
    return data.getvalue()


def bomb_png(side: int) -> bytes:
    """A PNG of a few hundred bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_answers_are_those_of_the_run(client: TestClient, demo_run: Run, demo_images: list[Path]) -> None:
    chosen = demo_images[::4]
    response = client.post("/predict", params={"top_k": 3}, files=form(*(path.read_bytes() for path in chosen)))
    assert response.status_code == 200
    body = response.json()
    assert body["request_id"] == response.headers["x-request-id"]
    expected = demo_run.predict(chosen).records(3)
    for found, wanted, path in zip(body["answers"], expected, chosen, strict=True):
        assert [choice["class_name"] for choice in found["top"]] == [choice["class"] for choice in wanted["top"]]
        np.testing.assert_allclose([c["prob"] for c in found["top"]], [c["prob"] for c in wanted["top"]], atol=1e-4)
        assert found["ood"] == wanted["ood"]
        assert (found["width"], found["height"]) == Image.open(path).size
        assert found["below_threshold"] == ("decision" not in found)


def test_below_threshold_and_ood_are_flagged(client: TestClient, demo_onnx: Path, demo_images: list[Path]) -> None:
    (noise,) = client.post("/predict", files=form(noise_png())).json()["answers"]
    assert noise["ood"] is True
    about = client.get("/model").json()
    model = load_onnx(demo_onnx)
    assert about["classes"] == list(model.classes)
    assert about["confidence_threshold"] == (model.threshold_for(about["precision"]) if about["precision"] else 0.5)
    answers = client.post("/predict", files=form(*(path.read_bytes() for path in demo_images[:8]))).json()["answers"]
    for found in answers:
        assert found["below_threshold"] == (found["top"][0]["prob"] < about["confidence_threshold"])
        assert found.get("decision") == (None if found["below_threshold"] else found["top"][0]["class_name"])
    with pytest.raises(ConfigError, match="has no threshold for precision"):
        create_app(demo_onnx, 1, target_precision=0.123)


def test_heatmaps_of_any_class(client: TestClient, demo_onnx: Path, demo_images: list[Path]) -> None:
    path, model = demo_images[0], load_onnx(demo_onnx)
    expected = model.run(model.read(path)[None])["heatmaps"][0]

    def ask(**params: Any) -> dict[str, Any]:
        return dict(client.post("/predict", params=params, files=form(path.read_bytes())).json()["answers"][0])

    for number, name in enumerate(model.classes):
        found = ask(heatmap="array", target=name)["heatmap"]
        assert found["class_name"] == name
        np.testing.assert_allclose(found["rows"], expected[number], atol=1e-3)
    everything = ask(heatmap="all")["heatmap"]
    maps = np.frombuffer(base64.b64decode(everything["bytes"]), np.uint8).reshape(everything["shape"])
    np.testing.assert_allclose(maps / 255, expected, atol=1 / 255)
    answer = ask(heatmap="png")
    assert answer["heatmap"]["class_name"] == answer["top"][0]["class_name"]
    image = Image.open(io.BytesIO(base64.b64decode(answer["heatmap"]["png"])))
    assert (image.mode, image.size) == ("RGBA", Image.open(path).size)
    assert "heatmap" not in ask()


GOOD = Path("good")  # stands for a real image
BAD: list[tuple[str, Any, dict[str, Any], int, str, str]] = [
    ("not an image", [b"hello"], {}, 422, "no_usable_image", "not an image"),
    ("nothing in it", [b""], {}, 422, "no_usable_image", "empty file"),
    ("a bomb", [bomb_png(40_000)], {}, 422, "no_usable_image", "more than 1,000,000"),
    ("more pixels than allowed", [plain("PNG", 1300, 800)], {}, 422, "no_usable_image", "1300 x 800 pixels, more than 1,000,000"),
    ("longer than allowed", [plain("PNG", 100_000, 9)], {}, 422, "no_usable_image", "longer than 65,535"),
    ("more bytes than allowed", [noise_png(1300, 800)], {}, 413, "too_many_bytes", "more than 3 MB in one request"),
    (
        "a format that may start other programs",
        [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
        {},
        422,
        "no_usable_image",
        "not an image",
    ),
    ("an icon larger than it says", [plain("ICO", 64, 64)], {}, 422, "no_usable_image", "not an image"),
    ("too many files", [b"x"] * 9, {}, 413, "too_many_files", "more than 8 files"),
    ("far too many files", [b"x"] * 500, {}, 413, "too_many_files", "more than 8 files"),
    ("unknown class", [GOOD], {"target": "cat"}, 422, "unknown_class", "no class is named 'cat'; GET /model lists them"),
    ("zero classes", [GOOD], {"top_k": 0}, 422, "invalid_parameter", "top_k: "),
    ("unknown heatmap", [GOOD], {"heatmap": "gif"}, 422, "invalid_parameter", "heatmap: "),
]


@pytest.mark.parametrize(("contents", "params", "status", "code", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_a_clear_line(
    client: TestClient, demo_images: list[Path], contents: list[Any], params: dict[str, Any], status: int, code: str, words: str
) -> None:
    real = [demo_images[0].read_bytes() if content is GOOD else content for content in contents]
    response = client.post("/predict", params=params, files=form(*real))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert words in error["message"]
    assert error["request_id"] == response.headers["x-request-id"]
    assert client.post("/predict", files=form(demo_images[0].read_bytes())).status_code == 200


def test_a_truncated_image_among_good_ones_fails_alone(client: TestClient, demo_images: list[Path]) -> None:
    good = demo_images[0].read_bytes()
    response = client.post("/predict", files=form(good, good[:1500], good))
    assert response.status_code == 200
    assert [answer.get("error") for answer in response.json()["answers"]] == [None, "truncated", None]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a\\b.jpg", "<script>alert(1)</script>.jpg", "x" * 300 + ".jpg", "ü ñ.jpg"]
)
def test_names_are_shown_and_nothing_else(client: TestClient, demo_images: list[Path], name: str) -> None:
    response = client.post("/predict", files=form(demo_images[0].read_bytes(), name=name))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json()["answers"][0]["file"] == name


def test_other_bodies(client: TestClient) -> None:
    for content, kind, status, code in [
        (b"{}", "application/json", 415, "not_a_form"),
        (b"\xff\xd8", "image/jpeg", 415, "not_a_form"),
        (b"", "multipart/form-data", 400, "malformed_multipart"),
        (b"garbage", "multipart/form-data; boundary=x", 400, "malformed_multipart"),
        (b"garbage", "multipart/form-data; charset=utf-7; boundary=x", 400, "malformed_multipart"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "not_a_form"),
    ]:
        response = client.post("/predict", content=content, headers={"content-type": kind})
        assert response.status_code == status, response.text
        assert response.json()["error"]["code"] == code, response.text
    assert client.post("/predict", data={"files": "text"}, files={"other": b"x"}).json()["error"]["code"] == "no_files"
    assert client.get("/predict").json()["error"]["code"] == "wrong_method"
    assert client.get("/nothing").json()["error"]["code"] == "not_found"


def test_an_overloaded_server_sends_retry_after(client: TestClient, demo_images: list[Path]) -> None:
    app: Any = client.app
    app.state.inflight = LIMITS.max_inflight
    try:
        response = client.post("/predict", files=form(demo_images[0].read_bytes()))
    finally:
        app.state.inflight = 0
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "overloaded"
    assert client.post("/predict", files=form(demo_images[0].read_bytes())).status_code == 200


def test_too_many_bytes_at_once(demo_onnx: Path, demo_images: list[Path]) -> None:
    image = form(demo_images[0].read_bytes())
    most = len(image[0][1][1]) + 1000
    app: Any = create_app(demo_onnx, 1, Limits(request_bytes=most, max_inflight_bytes=most))
    with TestClient(app) as client:
        assert [client.post("/predict", files=image).status_code for _ in range(3)] == [200] * 3  # finished requests no longer count
        middleware = app.middleware_stack
        while not isinstance(middleware, RequestMiddleware):
            middleware = middleware.app
        middleware.inflight_bytes = 1000  # bytes of another request
        response = client.post("/predict", files=image)
        assert (response.status_code, response.json()["error"]["code"], response.headers["retry-after"]) == (503, "overloaded", "1")
        assert client.get("/healthz").status_code == 200
        assert middleware.inflight_bytes == 1000
    with pytest.raises(ConfigError, match=r"--max-mb 600 is more than all requests may hold together; use at most 512"):
        Limits(request_bytes=600_000_000)
    with pytest.raises(ConfigError, match="--queue 8 is smaller than --max-files 32"):
        Limits(max_inflight=8)


def test_an_internal_error_is_reported_and_survived(client: TestClient, demo_images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    app: Any = client.app
    with monkeypatch.context() as patch:
        patch.setattr(app.state.batcher, "submit", fail)
        response = client.post("/predict", files=form(demo_images[0].read_bytes()))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "memory" not in response.text
    assert response.headers["x-request-id"] == response.json()["error"]["request_id"]
    assert app.state.inflight == 0
    assert client.post("/predict", files=form(demo_images[0].read_bytes())).status_code == 200


def test_an_api_key_is_required(demo_onnx: Path, demo_images: list[Path]) -> None:
    with TestClient(create_app(demo_onnx, 1, LIMITS, api_key="s3cret")) as client:
        image = form(demo_images[0].read_bytes())
        for headers in ({}, {"X-API-Key": "wrong"}, {"X-API-Key": "s3cret "[:-2]}):
            response = client.post("/predict", files=image, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.post("/predict", files=image, headers={"X-API-Key": "s3cret"}).status_code == 200
        assert [client.get(path).status_code for path in ("/", "/healthz", "/model", "/metrics")] == [200, 200, 401, 401]


def test_a_name_with_line_ends_is_one_line(client: TestClient) -> None:
    """Found by benchmarks/fuzz.py."""
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.j\x05\x08\t\npg"\r\n\r\nno image\r\n--x--\r\n'
    found = client.post("/predict", content=form, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert found.status_code == 422
    assert found.json()["error"]["message"].startswith("a.j pg: not an image")


def test_health_and_metrics_count(client: TestClient, demo_images: list[Path]) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}

    def count(line: str) -> float:
        found = [row.split()[-1] for row in client.get("/metrics").text.splitlines() if row.startswith(line)]
        return float(found[0]) if found else 0.0

    good, bad = 'seewhy_images_total{state="good"}', 'seewhy_images_total{state="bad"}'
    before = count(good), count(bad)
    client.post("/predict", files=form(demo_images[0].read_bytes(), demo_images[1].read_bytes(), b"x"))
    assert (count(good) - before[0], count(bad) - before[1]) == (2, 1)
    assert count('seewhy_requests_total{path="/predict",status="200"}') >= 1
    assert count("seewhy_batch_images_mean") > 0
    client.get("/nothing/at/all/123")
    assert count('seewhy_requests_total{path="other",status="404"}') >= 1


def test_the_page_brings_everything_itself(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("", "page.css", "page.js", "heat.js", "engine.js"):
        part = client.get(f"/{name}")
        assert part.status_code == 200
        assert "://" not in part.text


def test_the_interface_keeps_its_description(client: TestClient) -> None:
    """Whatever fits or breaks the description, answers have a documented status and shape; no 500."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} == {"/predict", "/model", "/healthz", "/metrics"}
    for operation in operations:

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy())
        def keeps(case: Any) -> None:
            # A description cannot say which bytes are an image.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        keeps()
