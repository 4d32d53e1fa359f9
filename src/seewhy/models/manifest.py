"""run.json -> a record whose every value has the kind and the range that the rest counts on, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from seewhy.errors import RunError, reason_of
from seewhy.models.transforms import RESAMPLING

FORMAT = 2  # raised when a reader of the old one would misread the new one
MOST_BYTES = 200_000_000  # a class and a bad image take some hundred bytes each
AGAIN = "copy the run again or train it again"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Three = Annotated[list[Finite], Field(min_length=3, max_length=3)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class _BackboneRecord(_Record):
    name: str
    timm: str
    weights: str

    @field_validator("name", "timm")
    @classmethod
    def _plain(cls, value: str) -> str:
        # timm fetches "hf-hub:..." and opens "local-dir:...", which a record from elsewhere must not make it do.
        if not value or any(sign in value for sign in ":/\\"):
            raise ValueError("not the name of a network")
        return value


class _PreprocessingRecord(_Record):
    size: Annotated[int, Field(ge=8, le=2048)]
    mean: Three
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    interpolation: str
    crop: Annotated[float, Field(gt=0, le=2)]
    resize: Literal["squash", "crop"]

    @field_validator("interpolation")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in RESAMPLING:
            raise ValueError(f"none of {', '.join(RESAMPLING)}")
        return value


class _AbstainRecord(_Record):
    precision: Share
    threshold: Share | None


class _CalibrationRecord(_Record):
    temperature: Positive
    selective: list[_AbstainRecord]


class _OODRecord(_Record):
    threshold: Finite


class _MetricsRecord(_Record):
    accuracy: Share
    accuracy_ci95: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    n: Annotated[int, Field(ge=1)]


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
    metrics: dict[str, _MetricsRecord]
    versions: _Versions
    data: _Hashed
    split: _Hashed
    calibration: _CalibrationRecord
    unknowns: _OODRecord | None = None

    @field_validator("classes")
    @classmethod
    def _different(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("two classes have the same name")
        return value

    @field_validator("metrics")
    @classmethod
    def _tested(cls, value: dict[str, _MetricsRecord]) -> dict[str, _MetricsRecord]:
        if "test" not in value:
            raise ValueError("lacks the test part")
        return value


def read_manifest(path: Path) -> dict[str, Any]:
    """`run.json` of a run folder, checked; RunError says what is wrong with it."""
    file = path / "run.json"
    if not path.exists():
        raise RunError(f"{path}: no such run; `seewhy train` makes one, `ls {path.parent}` shows what is there")
    if not path.is_dir():
        raise RunError(f"{path}: a file, not a run folder; pass the folder that holds run.json")
    if not file.is_file():
        half = path.name.startswith(".") and path.name.endswith(".partial")
        hint = (
            "an unfinished run; repeat its train command with --resume"
            if half
            else "not a run (it holds no run.json); pass a finished run's folder"
        )
        raise RunError(f"{path}: {hint}")
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise RunError(f"{file}: {size / 1e6:,.0f} MB, more than a record of a run can need; {AGAIN}")
        return check_manifest(file.read_bytes(), str(file))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); {AGAIN}") from error


def check_manifest(data: bytes, name: str) -> dict[str, Any]:
    """The bytes of a `run.json`, checked. name: for messages."""
    try:
        manifest = json.loads(data)
        number = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{name}: damaged ({reason_of(repr(error), 80)}); {AGAIN}") from error
    if number != FORMAT:
        raise RunError(f"{name}: run format {number!r:.20}, this seewhy reads {FORMAT}; use the version that wrote it or train again")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise RunError(f"{name}: damaged ({where}: {first['msg']}); {AGAIN}") from error
    return dict(manifest)
