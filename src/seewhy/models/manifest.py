"""Read `run.json` and check the type and range of every value that is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from seewhy.errors import RunError, reason_of
from seewhy.models.transforms import RESAMPLING

FORMAT = 2  # of run.json; raised when old readers would misread it
MAX_BYTES = 200_000_000  # a class, and a skipped image, take some hundred bytes
AGAIN = "copy the run again or train it again"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class _BackboneRecord(_Record):
    name: str
    timm: str
    weights: str

    @field_validator("name", "timm")
    @classmethod
    def _check_name(cls, value: str) -> str:
        # timm downloads "hf-hub:..." and opens "local-dir:...", which a foreign run must not cause.
        if not value or any(sign in value for sign in ":/\\"):
            raise ValueError("not the name of a network")
        return value


class _PreprocessingRecord(_Record):
    size: Annotated[int, Field(ge=8, le=2048)]
    mean: Annotated[list[Finite], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    interpolation: Annotated[str, Field(pattern=f"^({'|'.join(RESAMPLING)})$")]
    crop: Annotated[float, Field(gt=0, le=2)]
    resize: Literal["squash", "crop"]


class _SelectiveRecord(_Record):
    precision: Share
    threshold: Share | None


class _CalibrationRecord(_Record):
    temperature: Positive
    selective: list[_SelectiveRecord]


class _OODRecord(_Record):
    threshold: Finite


class _MetricsRecord(_Record):
    accuracy: Share
    accuracy_ci95: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    n: Annotated[int, Field(ge=1)]


class _Metrics(_Record):
    test: _MetricsRecord
    val: _MetricsRecord | None = None


class _Hashed(_Record):
    hash: str


class _Versions(_Record):
    seewhy: str


class _Manifest(_Record):
    format: int
    config: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=2, max_length=1_000_000)]
    backbone: _BackboneRecord
    preprocessing: _PreprocessingRecord
    metrics: _Metrics
    versions: _Versions
    data: _Hashed
    split: _Hashed
    calibration: _CalibrationRecord
    ood: _OODRecord | None = None

    @field_validator("classes")
    @classmethod
    def _check_distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("two classes have the same name")
        return value


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check `run.json` of a run folder. Raises RunError."""
    file = path / "run.json"
    if not path.exists():
        raise RunError(f"{path}: no such run; list the runs with `ls {path.parent}`, or train one with `seewhy train`")
    if not path.is_dir():
        raise RunError(f"{path}: a file, not a run folder; pass the folder with run.json")
    if not file.is_file():
        if path.name.startswith(".") and path.name.endswith(".partial"):
            raise RunError(f"{path}: an unfinished run; repeat its train command with --resume")
        raise RunError(f"{path}: not a run (no run.json); pass the folder of a finished run")
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise RunError(f"{file}: {size / 1e6:,.0f} MB is too large for a run.json; {AGAIN}")
        return check_manifest(file.read_bytes(), str(file))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); {AGAIN}") from error


def check_manifest(data: bytes, name: str) -> dict[str, Any]:
    """Parse and check the bytes of a `run.json`. name: for messages. Raises RunError."""
    try:
        manifest = json.loads(data)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{name}: damaged ({reason_of(repr(error), 80)}); {AGAIN}") from error
    if version != FORMAT:
        raise RunError(f"{name}: run format {version!r:.20}, this seewhy reads {FORMAT}; use the version that wrote it or train again")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise RunError(f"{name}: damaged ({where}: {first['msg']}); {AGAIN}") from error
    return dict(manifest)
