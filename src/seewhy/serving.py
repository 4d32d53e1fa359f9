"""Run or exported file x address -> a server until it is told to stop; then it finishes what it has."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import uvicorn

from seewhy.errors import OutputError, RunError
from seewhy.runtime import is_exported
from seewhy.serve import create_app
from seewhy.watch import Limits

DRAIN_S = 30  # for requests under way when it is told to stop


def serve_forever(
    run: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    cores: int | None = None,
    limits: Limits | None = None,
    precision: float | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM. Raises RunError for what cannot be served, OutputError for an address that cannot be used."""
    app = create_app(exported(run), cores or os.cpu_count() or 1, limits, os.environ.get("SEEWHY_API_KEY") or None, precision)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise OutputError(f"{host}:{port}: cannot be listened at ({reason}); choose another --host or --port") from error
    show_requests()
    shown = f"[{host}]" if ":" in host else host
    print(f"seewhy answers at http://{shown}:{listening.getsockname()[1]}/  (Ctrl-C stops it)", flush=True)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=DRAIN_S, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def exported(run: Path) -> Path:
    """The ONNX file of a run, made where there is none yet."""
    if is_exported(run):
        return run
    if not run.is_dir():
        raise RunError(f"{run}: no run and no file of `seewhy export`; name one of them")
    file = run / "model.onnx"
    if not file.is_file():
        from seewhy.parity import export_file
        from seewhy.run import load

        print(f"exporting {file} first", file=sys.stderr)
        try:
            export_file(load(run), file, pictures=100)
        except OutputError as error:
            raise OutputError(f"{error} of `seewhy export {run}`, and serve the file") from error
    return file


def show_requests() -> None:
    """A line a request on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("seewhy.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
