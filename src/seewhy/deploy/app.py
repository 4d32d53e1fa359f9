"""Build the web application of an exported file: a page for people and a JSON API; nothing is stored."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.routing import Route

from seewhy.deploy import schemas
from seewhy.deploy.batcher import Batcher
from seewhy.deploy.middleware import Limits, RequestMiddleware, RequestRejected, ServerMetrics, handle_errors, inflight, read_upload
from seewhy.errors import ImageError
from seewhy.inference.onnx_model import describe_model
from seewhy.version import __version__

WEB = Path(__file__).parent / "web"
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/heat.js": "heat.js", "/engine.js": "engine_server.js"}
CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
API_KEY = APIKeyHeader(name="X-API-Key", auto_error=False)
POLICY = (  # the page loads nothing from other hosts
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
PAGE_HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


def create_app(
    file: Path | str | bytes,
    cores: int = 2,
    limits: Limits | None = None,
    api_key: str | None = None,
    target_precision: float | None = None,
) -> FastAPI:
    """Build the application of an exported file (a path, or its content).

    cores: batches predicted in parallel. api_key: required of every client in X-API-Key. target_precision: share of decisions that are
    correct, one that the file has a threshold for (default: the highest up to 0.95 that it has).
    Raises RunError if the file cannot be loaded, ConfigError if it has no threshold for `target_precision`.
    """
    limits = limits or Limits()
    batcher = Batcher(file, cores, limits.pixels)
    model = batcher.model
    facts = describe_model(model, target_precision)
    confidence_threshold: float = facts["confidence_threshold"]
    classes = model.classes
    index_of = {name: c for c, name in enumerate(classes)}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title="seewhy",
        version=__version__,
        description="An image classifier that shows where in the image its evidence lies.",
        lifespan=lifespan,
        docs_url=None,  # it would load scripts from another host
        redoc_url=None,
    )
    app.state.batcher, app.state.limits, app.state.inflight = batcher, limits, 0
    server_metrics = ServerMetrics(app, batcher)

    def check_key(key: Annotated[str | None, Depends(API_KEY)]) -> None:
        if not secrets.compare_digest((key or "").encode(), (api_key or "").encode()):
            raise RequestRejected(401, "invalid_api_key", "missing or wrong API key; send it in the header X-API-Key")

    protected = [Depends(check_key)] if api_key is not None else []

    @app.post(
        "/predict",
        response_model=schemas.PredictResponse,
        response_model_exclude_none=True,
        responses=schemas.ERROR_RESPONSES,
        openapi_extra=schemas.UPLOAD_FORM,
        dependencies=protected,
    )
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=1, description="classes an image")] = 5,
        heatmap: Annotated[Literal["none", "png", "array", "all"], Query(description="see Heatmap; all: of every class")] = "none",
        target: Annotated[str | None, Query(description="class of the heatmap (default: the predicted class)")] = None,
    ) -> Response:
        """Predict the images of a multipart form, in their order."""
        if target is not None and target not in index_of:
            raise RequestRejected(422, "unknown_class", f"no class is named {target!r}; GET /model lists them")
        if heatmap != "none" and "heatmaps" not in model.outputs:
            raise RequestRejected(422, "no_heatmaps", "this model has no heatmaps: its network has no closed form for them")
        files = await read_upload(request, limits)
        with inflight(app, len(files), limits):
            futures = [asyncio.wrap_future(batcher.submit(data, heatmap != "none")) for _, data in files]
            results = await asyncio.gather(*futures, return_exceptions=True)

        def to_record(name: str, result: Any) -> schemas.ImagePrediction:
            if isinstance(result, ImageError):
                return schemas.ImagePrediction(file=name, error=str(result))
            if isinstance(result, BaseException):
                raise result
            prediction = schemas.to_prediction(name, result, model, confidence_threshold, top_k)
            prediction.heatmap = schemas.to_heatmap(
                result, heatmap, classes, None if target is None else index_of[target], facts["crop_fraction"]
            )
            return prediction

        names = [name for name, _ in files]
        if heatmap == "none":
            answers = list(map(to_record, names, results))
        else:  # encoding heatmaps would block the event loop
            answers = await asyncio.to_thread(lambda: list(map(to_record, names, results)))
        failed = [answer for answer in answers if answer.error is not None]
        server_metrics.images.labels("good").inc(len(answers) - len(failed))
        server_metrics.images.labels("bad").inc(len(failed))
        if len(failed) == len(answers):
            shown = "; ".join(f"{answer.file}: {answer.error}" for answer in failed[:5])
            raise RequestRejected(422, "no_usable_image", f"{shown}; send JPEG, PNG, WebP, BMP, GIF or TIFF images")
        response = schemas.PredictResponse(request_id=request.state.id, answers=answers)
        return Response(response.model_dump_json(exclude_none=True), media_type="application/json")  # FastAPI would validate it again

    @app.get("/model", response_model=schemas.ModelInfo, responses={401: schemas.ERROR_RESPONSES[401]}, dependencies=protected)
    async def model_info() -> schemas.ModelInfo:
        """Describe the classifier; its classes are in the order of all-class heatmaps."""
        return schemas.ModelInfo(**facts)

    @app.get("/healthz", response_model=schemas.Health)
    async def health() -> schemas.Health:
        """Return 200 while the server is up."""
        return schemas.Health(status="ok")

    metrics_responses: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}, 401: schemas.ERROR_RESPONSES[401]}

    @app.get("/metrics", response_class=Response, responses=metrics_responses, dependencies=protected)
    async def metrics() -> Response:
        """Return counters and times in Prometheus' text format."""
        return Response(generate_latest(server_metrics.registry), media_type=CONTENT_TYPE_LATEST)

    for address, name in PAGE.items():
        page = Response((WEB / name).read_bytes(), media_type=CONTENT_TYPES[Path(name).suffix], headers=PAGE_HEADERS)
        app.router.routes.append(Route(address, page, methods=["GET"], include_in_schema=False))
    paths = {str(getattr(route, "path", "")) for route in app.routes}
    handle_errors(app)
    app.add_middleware(RequestMiddleware, limits=limits, metrics=server_metrics, paths=paths)
    return app
