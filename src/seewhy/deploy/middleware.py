"""Requests -> numbered, limited, counted and logged ones; what is refused becomes one line of JSON."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from seewhy.deploy.batcher import Batcher
from seewhy.deploy.schemas import ErrorDetail, ErrorResponse
from seewhy.errors import ConfigError, one_line

log = logging.getLogger("seewhy.serve")


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    files: int = 32
    request_bytes: int = 64_000_000
    pixels: int = 50_000_000  # of one image
    upload_s: float = 30.0
    waiting: int = 256  # images under way, of all requests
    waiting_bytes: int = 512_000_000  # received and not yet answered, of all requests

    def __post_init__(self) -> None:
        if self.waiting < self.files:
            raise ConfigError(f"a queue of {self.waiting} images cannot take a request of {self.files}; raise --queue or lower --max-files")
        if self.waiting_bytes < self.request_bytes:
            most = self.waiting_bytes / 1e6
            raise ConfigError(f"requests of {self.request_bytes / 1e6:g} MB are more than all may hold together; --max-mb {most:g} at most")


class RequestRejected(Exception):
    """A request that gets a status and a line instead of an answer."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


# ---------------------------------------------------------------- what comes in


async def received(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """(name, content) of each file of the form; names are shown again and used for nothing else."""
    kind = request.headers.get("content-type", "").lower()
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]*)", kind)
    if charset and charset.group(1) not in ("utf-8", "utf8"):
        raise RequestRejected(400, "malformed_multipart", "names in the form have to be UTF-8; leave the charset out")
    if not kind.startswith("multipart/form-data"):
        raise RequestRejected(415, "not_a_form", "send the images as multipart/form-data with the field `files`")
    # One more than allowed is read, so that too many can be told from a broken form.
    async with request.form(max_files=limits.files + 1, max_fields=16) as form:
        files = [item for name, item in form.multi_items() if name == "files"]
        if not files or not all(isinstance(item, UploadFile) for item in files):
            raise RequestRejected(400, "no_files", "the form has no files in the field `files`")
        if len(files) > limits.files:
            raise RequestRejected(413, "too_many_files", f"more than {limits.files} files; send them in several requests")
        return [(item.filename or "image", await item.read()) for item in files if isinstance(item, UploadFile)]


@contextmanager
def under_way(app: FastAPI, count: int, limits: Limits) -> Iterator[None]:
    """Counts images as long as they are being answered; RequestRejected where that would be too many."""
    state = app.state
    if state.images + count > limits.waiting:
        raise RequestRejected(503, "overloaded", f"{state.images} images are under way; come again", {"Retry-After": "1"})
    state.images += count
    state.meters.waiting.set(state.images)
    try:
        yield
    finally:
        state.images -= count
        state.meters.waiting.set(state.images)


# ---------------------------------------------------------------- what goes wrong


def problem(request: Request, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    name = getattr(request.state, "id", "-")
    log.info("%s %d %s: %r", name, status, code, message)  # %r: names in it come from outside
    body = ErrorResponse(error=ErrorDetail(code=code, message=one_line(message), request_id=name))
    return JSONResponse(body.model_dump(), status, headers)


async def refused(request: Request, error: Any) -> Response:
    return problem(request, error.status, error.code, error.message, error.headers)


async def http_problem(request: Request, error: Any) -> Response:
    if error.status_code == 400 and "Too many files" in str(error.detail):
        limit = request.app.state.limits.files
        return problem(request, 413, "too_many_files", f"more than {limit} files; send them in several requests")
    code = {400: "malformed_multipart", 404: "not_found", 405: "wrong_method"}.get(error.status_code, "refused")
    return problem(request, error.status_code, code, str(error.detail), dict(error.headers or {}))


async def wrong_option(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    return problem(request, 422, "invalid_parameter", f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")


async def broken(request: Request, error: Any) -> Response:
    name = getattr(request.state, "id", "-")
    log.error("%s", name, exc_info=error)
    message = "the server made a mistake; its log says more under this request's number"
    return problem(request, 500, "internal_error", message, {"X-Request-ID": name})  # Watch does not see this answer


async def client_gone(request: Request, error: Any) -> Response:
    return problem(request, 400, "client_disconnected", "the client went away before it had sent everything")


def handle_errors(app: FastAPI) -> None:
    """Every error becomes the interface's `ErrorResponse`, with its status."""
    app.add_exception_handler(RequestRejected, refused)
    app.add_exception_handler(HTTPException, http_problem)
    app.add_exception_handler(RequestValidationError, wrong_option)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(Exception, broken)


# ---------------------------------------------------------------- around every request

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class ServerMetrics:
    """Prometheus's numbers of one application."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("seewhy_requests", "Requests by path and status", ["path", "status"], registry=self.registry)
        self.images = Counter("seewhy_images", "Images by whether they could be used", ["state"], registry=self.registry)
        self.seconds = Histogram("seewhy_request_seconds", "Seconds from a request's head to the end of its answer", registry=self.registry)
        self.waiting = Gauge("seewhy_inflight_images", "Images received and not yet answered", registry=self.registry)
        self.batch = Gauge("seewhy_batch_images_mean", "Images a batch, mean of the last 10,000", registry=self.registry)
        self.batch.set_function(lambda: float(np.mean(list(batcher.sizes) or [0])))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class RequestMiddleware:
    """Gives each request a number, counts its bytes and its time while it comes in, logs and measures it; the rest is below."""

    # paths: those that are counted by their own name; all others are "other".
    def __init__(self, app: Application, limits: Limits, meters: ServerMetrics, paths: Collection[str]) -> None:
        self.app, self.limits, self.meters, self.paths = app, limits, meters, paths
        self.held = 0  # bytes of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self.limits.upload_s
        name = uuid.uuid4().hex[:12]
        scope.setdefault("state", {})["id"] = name
        status = 500
        count, complete = 0, False
        too_many = f"more than {self.limits.request_bytes / 1e6:g} MB in one request"

        async def counted() -> MutableMapping[str, Any]:
            nonlocal count, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):  # wait_for would make a task of every piece
                    message = await receive()
            except TimeoutError:
                raise RequestRejected(
                    408, "request_timeout", f"the upload took more than {self.limits.upload_s:g} s", {"Connection": "close"}
                ) from None
            count += len(message.get("body", b""))
            self.held += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if count > self.limits.request_bytes:
                raise RequestRejected(413, "too_many_bytes", too_many, {"Connection": "close"})
            if self.held > self.limits.waiting_bytes:
                raise RequestRejected(
                    503, "overloaded", "too many bytes are under way; come again", {"Retry-After": "1", "Connection": "close"}
                )
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
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.meters.requests.labels(path, str(status)).inc()
            self.meters.seconds.observe(seconds)
            log.info("%s %s %s %d %.0f ms", name, scope["method"], path, status, 1000 * seconds)
