"""Number, limit, log and count requests, and turn every error into one line of JSON."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seewhy.deploy.batcher import Batcher
from seewhy.deploy.schemas import ErrorDetail, ErrorResponse
from seewhy.errors import ConfigError, one_line

log = logging.getLogger("seewhy.serve")


@dataclass(frozen=True)
class Limits:
    """Limits of one request (files, bytes, pixels of an image, seconds of the upload) and of all requests in flight together."""

    files: int = 32
    request_bytes: int = 64_000_000
    pixels: int = 50_000_000
    upload_s: float = 30.0
    max_inflight: int = 256  # images
    max_inflight_bytes: int = 512_000_000

    def __post_init__(self) -> None:
        if self.max_inflight < self.files:
            raise ConfigError(f"--queue {self.max_inflight} is smaller than --max-files {self.files}; raise the one or lower the other")
        if self.max_inflight_bytes < self.request_bytes:
            most = self.max_inflight_bytes / 1e6
            raise ConfigError(f"--max-mb {self.request_bytes / 1e6:g} is more than all requests may hold together; use at most {most:g}")


class RequestRejected(Exception):
    """Reject a request with an HTTP status, an error code and a message of one line."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


# ---------------------------------------------------------------- uploads


async def read_upload(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """Return (name, content) of each file of the form; names are only echoed in the response. Raises RequestRejected."""
    kind = request.headers.get("content-type", "").lower()
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]*)", kind)
    if charset and charset.group(1) not in ("utf-8", "utf8"):
        raise RequestRejected(400, "malformed_multipart", "the form must be UTF-8; leave out the charset")
    if not kind.startswith("multipart/form-data"):
        raise RequestRejected(415, "not_a_form", "send the images as multipart/form-data in the field `files`")
    async with request.form(max_files=limits.files, max_fields=16) as form:
        files = [item for name, item in form.multi_items() if name == "files"]
        if not files or not all(isinstance(item, UploadFile) for item in files):
            raise RequestRejected(400, "no_files", "the form has no files in the field `files`")
        return [(item.filename or "image", await item.read()) for item in files if isinstance(item, UploadFile)]


@contextmanager
def inflight(app: FastAPI, count: int, limits: Limits) -> Iterator[None]:
    """Count `count` images as in flight during the block. Raises RequestRejected if that exceeds the limit."""
    state = app.state
    if state.inflight + count > limits.max_inflight:
        raise RequestRejected(503, "overloaded", f"{state.inflight} images are in flight; retry later", Retry_After="1")
    state.inflight += count
    try:
        yield
    finally:
        state.inflight -= count


# ---------------------------------------------------------------- errors


def error_response(request: Request, error: RequestRejected) -> JSONResponse:
    """Log an error and return it as an `ErrorResponse`."""
    request_id = getattr(request.state, "id", "-")
    log.info("%s %d %s: %r", request_id, error.status, error.code, error.message)  # %r: it may quote the client's text
    detail = ErrorDetail(code=error.code, message=one_line(error.message), request_id=request_id)
    return JSONResponse(ErrorResponse(error=detail).model_dump(), error.status, error.headers)


async def handle_error(request: Request, error: Exception) -> Response:
    """Return the `ErrorResponse` of any exception that a request raises."""
    if isinstance(error, HTTPException):
        code = {400: "malformed_multipart", 404: "not_found", 405: "wrong_method"}.get(error.status_code, "http_error")
        rejected = RequestRejected(error.status_code, code, str(error.detail), **(error.headers or {}))
        if error.status_code == 400 and "Too many files" in str(error.detail):
            text = f"more than {request.app.state.limits.files} files; split them into several requests"
            rejected = RequestRejected(413, "too_many_files", text)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        rejected = RequestRejected(422, "invalid_parameter", f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")
    elif isinstance(error, ClientDisconnect):
        rejected = RequestRejected(400, "client_disconnected", "the client closed the connection before the upload was complete")
    elif isinstance(error, RequestRejected):
        rejected = error
    else:
        request_id = getattr(request.state, "id", "-")
        log.error("%s", request_id, exc_info=error)
        message = "the server failed; its log has the details under this request_id"
        rejected = RequestRejected(500, "internal_error", message, X_Request_ID=request_id)  # sent around RequestMiddleware
    return error_response(request, rejected)


def handle_errors(app: FastAPI) -> None:
    """Answer every error of the application with an `ErrorResponse`."""
    for kind in (RequestRejected, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, handle_error)


# ---------------------------------------------------------------- every request


class ServerMetrics:
    """Prometheus metrics of one application."""

    def __init__(self, app: FastAPI, batcher: Batcher) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("seewhy_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self.images = Counter("seewhy_images", "Images by whether they could be decoded", ["state"], registry=registry)
        self.seconds = Histogram("seewhy_request_seconds", "Seconds from a request's head to the end of its response", registry=registry)
        inflight_images = Gauge("seewhy_inflight_images", "Images received and not yet answered", registry=registry)
        inflight_images.set_function(lambda: app.state.inflight)
        batch_size = Gauge("seewhy_batch_images_mean", "Images a batch, mean of the last 10,000 batches", registry=registry)
        batch_size.set_function(lambda: float(np.mean(list(batcher.sizes) or [0])))


class RequestMiddleware:
    """Give each request an id, bound the bytes and seconds of its upload, log it and measure it.

    paths: those with a metric of their own; all others count as "other".
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: ServerMetrics, paths: Collection[str]) -> None:
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.inflight_bytes = 0  # of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self.limits.upload_s
        request_id = uuid.uuid4().hex[:12]
        scope.setdefault("state", {})["id"] = request_id
        status = 500
        received_bytes, complete = 0, False
        too_large = RequestRejected(
            413, "too_many_bytes", f"more than {self.limits.request_bytes / 1e6:g} MB in one request", Connection="close"
        )

        async def limited_receive() -> Message:
            nonlocal received_bytes, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):  # wait_for would start a task for every chunk
                    message = await receive()
            except TimeoutError:
                text = f"the upload took more than {self.limits.upload_s:g} s"
                raise RequestRejected(408, "request_timeout", text, Connection="close") from None
            received_bytes += len(message.get("body", b""))
            self.inflight_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received_bytes > self.limits.request_bytes:
                raise too_large
            if self.inflight_bytes > self.limits.max_inflight_bytes:
                raise RequestRejected(503, "overloaded", "too many bytes are in flight; retry later", Retry_After="1", Connection="close")
            return message

        async def tagged_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            length = dict(scope["headers"]).get(b"content-length", b"")
            if length.isdigit() and int(length) > self.limits.request_bytes:
                await error_response(Request(scope), too_large)(scope, receive, tagged_send)
            else:
                await self.app(scope, limited_receive, tagged_send)
        finally:
            self.inflight_bytes -= received_bytes
            seconds = time.monotonic() - began
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.observe(seconds)
            log.info("%s %s %s %d %.0f ms", request_id, scope["method"], path, status, 1000 * seconds)
