"""Exported file -> web application: pictures in, answers and heatmaps out as JSON, and the page for people; nothing is kept."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from seewhy import __version__
from seewhy.about import about
from seewhy.batching import Batcher
from seewhy.errors import ConfigError
from seewhy.heat import heat_png

log = logging.getLogger("seewhy.serve")
WEB = Path(__file__).parent / "web"
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/heat.js": "heat.js", "/engine.js": "engine_server.js"}
CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
KEY = APIKeyHeader(name="X-API-Key", auto_error=False)
# The page brings everything itself and asks nobody else.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    files: int = 32
    request_bytes: int = 64_000_000
    pixels: int = 50_000_000  # of one picture
    upload_s: float = 30.0
    waiting: int = 256  # pictures under way, of all requests
    waiting_bytes: int = 512_000_000  # received and not yet answered, of all requests

    def __post_init__(self) -> None:
        if self.waiting < self.files:
            raise ConfigError(
                f"a queue of {self.waiting} pictures cannot take a request of {self.files}; raise --queue or lower --max-files"
            )


class Refused(Exception):
    """A request that gets a status and a line instead of an answer."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


# ---------------------------------------------------------------- what goes over the wire


class Choice(BaseModel):
    class_name: str
    prob: float


class Heatmap(BaseModel):
    """Of one class (or of all, `class_name` null), from 0 to 1.

    png: base64, a transparent picture of the given one's proportions to lay over it. rows: h lists of w values.
    bytes: base64 of C x h x w bytes, 255 for 1, classes in the order of /classes; shape: C, h, w.
    """

    class_name: str | None = None
    png: str | None = None
    rows: list[list[float]] | None = None
    bytes: str | None = None
    shape: list[int] | None = None


class Answer(BaseModel):
    """Of one file. error: why there is none, and then nothing else is there.

    answer: the most probable class, null where it is less probable than `/classes` says for `unsure_below`. unknown: looks like
    nothing the classifier was trained on. strangeness: the number behind it, null where the model does not tell.
    """

    file: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    answer: str | None = None
    unsure: bool | None = None
    unknown: bool | None = None
    strangeness: float | None = None
    top: list[Choice] | None = None
    heatmap: Heatmap | None = None


class Answers(BaseModel):
    request_id: str
    answers: list[Answer]


class Model(BaseModel):
    """What the served classifier is.

    unsure_below: least probability of an answer; precision: the share of right answers it was chosen for on val. unknown_above: the
    strangeness from which a picture looks like nothing known. box_share: null where heatmaps cover the whole picture, else the side of
    the centred square that they cover over the short side. enough: pixels a side beyond which more change no answer.
    """

    classes: list[str]
    backbone: str
    test_accuracy: float
    test_accuracy_ci95: list[float] | None
    test_pictures: int
    heatmaps: bool
    unsure_below: float
    precision: float | None
    unknown_above: float | None
    box_share: float | None
    enough: int
    version: str


class Problem(BaseModel):
    code: str
    message: str
    request_id: str


class Error(BaseModel):
    error: Problem


class Health(BaseModel):
    status: Literal["ok"]


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "the body is no form with files in it"},
    401: {"model": Error, "description": "the server wants a key (header X-API-Key), and this is not it"},
    408: {"model": Error, "description": "the upload took too long"},
    413: {"model": Error, "description": "too many bytes or files"},
    415: {"model": Error, "description": "the body is not multipart/form-data"},
    422: {"model": Error, "description": "none of the files is a usable picture, or an option is wrong"},
    503: {"model": Error, "description": "too many pictures under way; Retry-After says when to come again"},
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {"files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}


# ---------------------------------------------------------------- the application


def create_app(
    file: Path | str | bytes, cores: int = 2, limits: Limits | None = None, api_key: str | None = None, precision: float | None = None
) -> FastAPI:
    """The application for an exported file; `precision` (of those that the file knows) decides what counts as unsure.

    Raises RunError for a file that cannot be used, ConfigError for a precision that it does not know.
    """
    limits = limits or Limits()
    batcher = Batcher(file, cores, limits.pixels)
    model = batcher.model
    facts = about(model, precision)
    unsure_below: float = facts["unsure_below"]
    classes = model.classes
    number_of = {name: n for n, name in enumerate(classes)}
    meters = Meters(batcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title="seewhy",
        version=__version__,
        description="An image classifier that shows where in the picture its reasons lie.",
        lifespan=lifespan,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.batcher, app.state.limits, app.state.meters, app.state.pictures = batcher, limits, meters, 0

    def check_key(given: Annotated[str | None, Depends(KEY)]) -> None:
        if api_key is not None and not secrets.compare_digest((given or "").encode(), api_key.encode()):
            raise Refused(401, "wrong_key", "this server wants a key: send it as the header X-API-Key")

    locked = [Depends(check_key)] if api_key is not None else []

    @app.post(
        "/predict", response_model=Answers, response_model_exclude_none=True, responses=PROBLEMS, openapi_extra=UPLOAD, dependencies=locked
    )
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=1, description="classes a picture")] = 5,
        heatmap: Annotated[Literal["none", "png", "array", "all"], Query(description="see Heatmap; all: of every class")] = "none",
        target: Annotated[str | None, Query(description="class of the heatmap (default: the most probable)")] = None,
    ) -> Answers:
        """Answers to pictures, sent as files of a form; in the order they came in."""
        if target is not None and target not in number_of:
            raise Refused(422, "unknown_class", f"no class is named {target!r}; GET /classes lists them")
        if heatmap != "none" and "heatmaps" not in model.outputs:
            raise Refused(422, "no_heatmaps", "this model's file has no heatmaps, since its network has no closed form for them")
        files = await received(request, limits)
        with under_way(app, len(files), limits):
            found = await asyncio.gather(*(asyncio.wrap_future(batcher.answer(data)) for _, data in files), return_exceptions=True)

        def said(name: str, item: Any) -> Answer:
            if isinstance(item, ValueError):
                return Answer(file=name, error=str(item))
            if isinstance(item, BaseException):
                raise item
            answer = answer_of(name, item, classes, model.unknown_above, unsure_below, top_k)
            answer.heatmap = heatmap_of(item, heatmap, classes, number_of.get(target or ""), facts["box_share"])
            return answer

        names = [name for name, _ in files]
        # Drawing takes a while, and the loop has others to serve.
        draw = asyncio.to_thread(lambda: list(map(said, names, found))) if heatmap == "png" else None
        answers = list(map(said, names, found)) if draw is None else await draw
        meters.pictures.labels("good").inc(sum(a.error is None for a in answers))
        meters.pictures.labels("bad").inc(sum(a.error is not None for a in answers))
        if all(a.error is not None for a in answers):
            shown = "; ".join(f"{a.file}: {a.error}" for a in answers[:5])
            raise Refused(422, "no_usable_picture", f"{shown}; send JPEG, PNG, WebP, BMP, GIF or TIFF pictures")
        return Answers(request_id=request.state.id, answers=answers)

    @app.get("/classes", response_model=Model, responses={401: PROBLEMS[401]}, dependencies=locked)
    async def describe() -> Model:
        """The classes, in the order of all-class heatmaps, and what is known about the classifier."""
        return Model(**facts)

    @app.get("/healthz", response_model=Health)
    async def health() -> Health:
        """Whether the server answers."""
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: PROBLEMS[401]}, dependencies=locked)
    async def metrics() -> Response:
        """Counts and times in Prometheus's text format."""
        return Response(meters.text(), media_type=CONTENT_TYPE_LATEST)

    for address, name in PAGE.items():
        app.add_api_route(address, page_part(name), methods=["GET"], include_in_schema=False)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, http_problem)
    app.add_exception_handler(RequestValidationError, wrong_option)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(Exception, broken)
    app.add_middleware(Watch, limits=limits, meters=meters)
    return app


def page_part(name: str) -> Callable[[], Awaitable[Response]]:
    content, kind = (WEB / name).read_bytes(), CONTENT_TYPES[Path(name).suffix]

    async def send() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(content, media_type=kind, headers=headers)

    return send


async def received(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """(name, content) of each file of the form; names are shown again and used for nothing else."""
    kind = request.headers.get("content-type", "").lower()
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]*)", kind)
    if charset and charset.group(1) not in ("utf-8", "utf8"):
        raise Refused(400, "broken_form", "names in the form have to be UTF-8; leave the charset out")
    if not kind.startswith("multipart/form-data"):
        raise Refused(415, "not_a_form", "send the pictures as multipart/form-data with the field `files`")
    # One more than allowed is read, so that too many can be told from a broken form.
    async with request.form(max_files=limits.files + 1, max_fields=16) as form:
        files = [item for name, item in form.multi_items() if name == "files"]
        if not files or not all(isinstance(item, UploadFile) for item in files):
            raise Refused(400, "no_files", "the form has no files in the field `files`")
        if len(files) > limits.files:
            raise Refused(413, "too_many_files", f"more than {limits.files} files; send them in several requests")
        return [(item.filename or "picture", await item.read()) for item in files if isinstance(item, UploadFile)]


@contextmanager
def under_way(app: FastAPI, count: int, limits: Limits) -> Iterator[None]:
    """Counts pictures as long as they are being answered; Refused where that would be too many."""
    state = app.state
    if state.pictures + count > limits.waiting:
        raise Refused(503, "busy", f"{state.pictures} pictures are under way; come again", {"Retry-After": "1"})
    state.pictures += count
    state.meters.waiting.set(state.pictures)
    try:
        yield
    finally:
        state.pictures -= count
        state.meters.waiting.set(state.pictures)


def answer_of(
    name: str, found: dict[str, npt.NDArray[Any]], classes: tuple[str, ...], unknown_above: float, unsure_below: float, top_k: int
) -> Answer:
    probs = found["probabilities"]
    order = np.argsort(-probs, kind="stable")[:top_k]
    strangeness = float(found["strangeness"]) if "strangeness" in found else None
    unsure = bool(probs[order[0]] < unsure_below)
    return Answer(
        file=name,
        width=int(found["size"][0]),
        height=int(found["size"][1]),
        answer=None if unsure else classes[order[0]],
        unsure=unsure,
        unknown=strangeness is not None and strangeness > unknown_above,
        strangeness=strangeness,
        top=[Choice(class_name=classes[c], prob=float(probs[c])) for c in order],
    )


def heatmap_of(
    found: dict[str, npt.NDArray[Any]], kind: str, classes: tuple[str, ...], target: int | None, box_share: float | None
) -> Heatmap | None:
    if kind == "none":
        return None
    maps = found["heatmaps"]
    if kind == "all":
        data = np.round(255 * maps).astype(np.uint8)
        return Heatmap(bytes=base64.b64encode(data.tobytes()).decode(), shape=list(data.shape))
    number = int(found["probabilities"].argmax()) if target is None else target
    if kind == "array":
        return Heatmap(class_name=classes[number], rows=maps[number].astype(float).round(4).tolist())
    return Heatmap(class_name=classes[number], png=base64.b64encode(heat_png(maps[number], tuple(found["size"]), box_share)).decode())


# ---------------------------------------------------------------- what goes wrong


def problem(request: Request, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    name = getattr(request.state, "id", "-")
    log.info("%s %d %s: %r", name, status, code, message)  # %r: names in it come from outside
    body = Error(error=Problem(code=code, message=message, request_id=name))
    return JSONResponse(body.model_dump(), status, headers)


async def refused(request: Request, error: Any) -> Response:
    return problem(request, error.status, error.code, error.message, error.headers)


async def http_problem(request: Request, error: Any) -> Response:
    if error.status_code == 400 and "Too many files" in str(error.detail):
        limit = request.app.state.limits.files
        return problem(request, 413, "too_many_files", f"more than {limit} files; send them in several requests")
    code = {400: "broken_form", 404: "not_found", 405: "wrong_method"}.get(error.status_code, "refused")
    return problem(request, error.status_code, code, str(error.detail), dict(error.headers or {}))


async def wrong_option(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    return problem(request, 422, "wrong_option", f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")


async def broken(request: Request, error: Any) -> Response:
    name = getattr(request.state, "id", "-")
    log.error("%s", name, exc_info=error)
    message = "the server made a mistake; its log says more under this request's number"
    return problem(request, 500, "broken", message, {"X-Request-ID": name})  # Watch does not see this answer


async def client_gone(request: Request, error: Any) -> Response:
    return problem(request, 400, "client_gone", "the client went away before it had sent everything")


# ---------------------------------------------------------------- around every request

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Meters:
    """Prometheus's numbers of one application."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("seewhy_requests", "Requests by path and status", ["path", "status"], registry=self.registry)
        self.pictures = Counter("seewhy_pictures", "Pictures by whether they could be used", ["state"], registry=self.registry)
        self.seconds = Histogram("seewhy_request_seconds", "Seconds from a request's head to the end of its answer", registry=self.registry)
        self.waiting = Gauge("seewhy_pictures_under_way", "Pictures received and not yet answered", registry=self.registry)
        self.batch = Gauge("seewhy_batch_pictures_mean", "Pictures a batch, mean of the last 10,000", registry=self.registry)
        self.batch.set_function(lambda: float(np.mean(batcher.sizes)) if batcher.sizes else 0.0)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Watch:
    """Gives each request a number, counts its bytes and its time while it comes in, logs and measures it; the rest is below."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limits: Limits, meters: Meters) -> None:
        self.app, self.limits, self.meters = app, limits, meters
        self.held = 0  # bytes of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        name = uuid.uuid4().hex[:12]
        scope.setdefault("state", {})["id"] = name
        status = 500
        count, complete = 0, False
        too_many = f"more than {self.limits.request_bytes / 1e6:g} MB in one request"

        async def counted() -> MutableMapping[str, Any]:
            nonlocal count, complete
            if complete:
                return await receive()
            left = self.limits.upload_s - (time.monotonic() - began)
            try:
                message = await asyncio.wait_for(receive(), max(0.001, left))
            except TimeoutError:
                raise Refused(408, "too_slow", f"the upload took more than {self.limits.upload_s:g} s", {"Connection": "close"}) from None
            count += len(message.get("body", b""))
            self.held += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if count > self.limits.request_bytes:
                raise Refused(413, "too_many_bytes", too_many, {"Connection": "close"})
            if self.held > self.limits.waiting_bytes:
                raise Refused(503, "busy", "too many bytes are under way; come again", {"Retry-After": "1", "Connection": "close"})
            return message

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            sent = dict(scope["headers"]).get(b"content-length", b"")
            if sent.isdigit() and int(sent) > self.limits.request_bytes:
                await problem(Request(scope), 413, "too_many_bytes", too_many, {"Connection": "close"})(scope, receive, watched)
            else:
                await self.app(scope, counted, watched)
        finally:
            self.held -= count
            seconds = time.monotonic() - began
            path = scope["path"] if scope["path"] in (*PAGE, "/predict", "/classes", "/healthz", "/metrics") else "other"
            self.meters.requests.labels(path, str(status)).inc()
            self.meters.seconds.observe(seconds)
            log.info("%s %s %s %d %.0f ms", name, scope["method"], path, status, 1000 * seconds)
