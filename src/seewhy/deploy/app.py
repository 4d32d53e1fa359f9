"""Exported file -> web application: images in, answers and heatmaps out as JSON, and the page for people; nothing is kept."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST

from seewhy.deploy.batcher import Batcher
from seewhy.deploy.middleware import Limits, RequestMiddleware, RequestRejected, ServerMetrics, handle_errors, received, under_way
from seewhy.deploy.schemas import PROBLEMS, UPLOAD, Health, ImagePrediction, ModelInfo, PredictResponse, answer_of, heatmap_of
from seewhy.errors import ImageError
from seewhy.inference.onnx_model import about
from seewhy.version import __version__

WEB = Path(__file__).parent / "web"
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/heat.js": "heat.js", "/engine.js": "engine_server.js"}
CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
KEY = APIKeyHeader(name="X-API-Key", auto_error=False)
# The page brings everything itself and asks nobody else.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


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
    confidence_threshold: float = facts["confidence_threshold"]
    classes = model.classes
    number_of = {name: n for n, name in enumerate(classes)}
    meters = ServerMetrics(batcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title="seewhy",
        version=__version__,
        description="An image classifier that shows where in the image its reasons lie.",
        lifespan=lifespan,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.batcher, app.state.limits, app.state.meters, app.state.images = batcher, limits, meters, 0

    def check_key(given: Annotated[str | None, Depends(KEY)]) -> None:
        if not secrets.compare_digest((given or "").encode(), (api_key or "").encode()):
            raise RequestRejected(401, "invalid_api_key", "this server wants a key: send it as the header X-API-Key")

    locked = [Depends(check_key)] if api_key is not None else []

    @app.post(
        "/predict",
        response_model=PredictResponse,
        response_model_exclude_none=True,
        responses=PROBLEMS,
        openapi_extra=UPLOAD,
        dependencies=locked,
    )
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=1, description="classes an image")] = 5,
        heatmap: Annotated[Literal["none", "png", "array", "all"], Query(description="see Heatmap; all: of every class")] = "none",
        target: Annotated[str | None, Query(description="class of the heatmap (default: the most probable)")] = None,
    ) -> Response:
        """Answers to images, sent as files of a form; in the order they came in."""
        if target is not None and target not in number_of:
            raise RequestRejected(422, "unknown_class", f"no class is named {target!r}; GET /model lists them")
        if heatmap != "none" and "heatmaps" not in model.outputs:
            raise RequestRejected(422, "no_heatmaps", "this model's file has no heatmaps, since its network has no closed form for them")
        files = await received(request, limits)
        with under_way(app, len(files), limits):
            found = await asyncio.gather(
                *(asyncio.wrap_future(batcher.answer(data, heatmap != "none")) for _, data in files), return_exceptions=True
            )

        def said(name: str, item: Any) -> ImagePrediction:
            if isinstance(item, ImageError):
                return ImagePrediction(file=name, error=str(item))
            if isinstance(item, BaseException):
                raise item
            answer = answer_of(name, item, classes, model.ood_threshold, confidence_threshold, top_k)
            answer.heatmap = heatmap_of(item, heatmap, classes, None if target is None else number_of[target], facts["crop_fraction"])
            return answer

        names = [name for name, _ in files]
        if heatmap == "none":
            answers = list(map(said, names, found))
        else:  # drawing takes a while, and the loop has others to serve
            answers = await asyncio.to_thread(lambda: list(map(said, names, found)))
        meters.images.labels("good").inc(sum(a.error is None for a in answers))
        meters.images.labels("bad").inc(sum(a.error is not None for a in answers))
        if all(a.error is not None for a in answers):
            shown = "; ".join(f"{a.file}: {a.error}" for a in answers[:5])
            raise RequestRejected(422, "no_usable_image", f"{shown}; send JPEG, PNG, WebP, BMP, GIF or TIFF images")
        reply = PredictResponse(request_id=request.state.id, answers=answers)
        return Response(reply.model_dump_json(exclude_none=True), media_type="application/json")  # FastAPI would check it all again

    @app.get("/model", response_model=ModelInfo, responses={401: PROBLEMS[401]}, dependencies=locked)
    async def describe() -> ModelInfo:
        """The classes, in the order of all-class heatmaps, and what is known about the classifier."""
        return ModelInfo(**facts)

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
    paths = {str(getattr(route, "path", "")) for route in app.routes}
    handle_errors(app)
    app.add_middleware(RequestMiddleware, limits=limits, meters=meters, paths=paths)
    return app


def page_part(name: str) -> Callable[[], Awaitable[Response]]:
    content, kind = (WEB / name).read_bytes(), CONTENT_TYPES[Path(name).suffix]

    async def send() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(content, media_type=kind, headers=headers)

    return send
