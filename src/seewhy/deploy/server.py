"""Exported file x address -> a server until it is told to stop; then it finishes what it has."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import uvicorn

from seewhy.deploy.app import create_app
from seewhy.deploy.middleware import Limits
from seewhy.errors import OutputError

DRAIN_S = 30  # for requests under way when it is told to stop


def serve_forever(
    file: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    cores: int | None = None,
    limits: Limits | None = None,
    precision: float | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM. Raises RunError for a file that cannot be served, OutputError for an address that cannot be used."""
    app = create_app(file, cores or os.cpu_count() or 1, limits, os.environ.get("SEEWHY_API_KEY") or None, precision)
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


def show_requests() -> None:
    """A line a request on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("seewhy.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
