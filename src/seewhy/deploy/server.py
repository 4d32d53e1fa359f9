"""Serve an exported file over HTTP until SIGINT or SIGTERM, then finish the requests in flight."""

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

DRAIN_S = 30  # for requests in flight when the server is stopped


def serve_forever(file: Path, host: str, port: int, cores: int | None, limits: Limits, target_precision: float | None) -> None:
    """Serve until SIGINT or SIGTERM, one log line a request on stderr. $SEEWHY_API_KEY, if set, is required of every client.

    port: 0 for any free one. cores: batches predicted in parallel (None: one per core). target_precision: see `create_app`.
    Raises RunError if the file cannot be served, OutputError if the address cannot be bound.
    """
    app = create_app(file, cores or os.cpu_count() or 1, limits, os.environ.get("SEEWHY_API_KEY") or None, target_precision)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise OutputError(f"{host}:{port}: cannot bind ({reason}); choose another --host or --port") from error
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("seewhy.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    shown = f"[{host}]" if ":" in host else host
    print(f"serving at http://{shown}:{listening.getsockname()[1]}/  (Ctrl-C to stop)", flush=True)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=DRAIN_S, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
