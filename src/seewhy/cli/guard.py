"""Turn what a command raises into one line on stderr and an exit status."""

from __future__ import annotations

import errno
import shlex
import socket
from collections.abc import Callable, Sequence
from typing import Any

import typer

from seewhy.errors import SeewhyError, one_line

INTERRUPTED = 130  # exit status, as shells have it


def run_guarded(work: Callable[[], Any], command: Sequence[str] = ()) -> int:
    """Calls work() and turns what it raises into one line on stderr and an exit status, which docs/RELIABILITY.md lists.

    command: as it was given, for what is said when it is interrupted.
    """
    try:
        status = work()
        return status if isinstance(status, int) else 0
    except SeewhyError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain(f"interrupted; {_how_to_go_on(command)}", status=INTERRUPTED)
    except ModuleNotFoundError as error:  # of a light installation, see requirements-runtime.txt
        if (error.name or "seewhy").split(".")[0] == "seewhy":
            raise
        return _complain(f"this needs {error.name}, which is not installed; the full installation (README) brings it")
    except OSError as error:  # one raised by a mistake of ours has no number
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        advice = "check the network" if _of_network(error) else "check the disk and its permissions"
        return _complain(f"{one_line(where)}{error.strerror}; {advice}")
    except Exception as error:
        # typer's own errors (unknown options, missing arguments) carry their text in format_message.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = f"; see {context.command_path} --help" if context is not None else ""
        return _complain(f"{' '.join(error.format_message().split()).rstrip('.')}{where}")


def _how_to_go_on(command: Sequence[str]) -> str:
    """The command after which nothing that was finished is computed again."""
    if {"train", "train.py"} & set(command[:2]):
        return f"go on with: {shlex.join([*command, *(['--resume'] if '--resume' not in command else [])])}"
    return "the same command again uses what was finished"


def _complain(text: str, status: int = 2) -> int:
    typer.echo(f"seewhy: {text}", err=True)
    return status


def _of_network(error: OSError) -> bool:
    """Whether a network failed, and not a disk; a broken pipe is of the process that reads our output."""
    failed = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)) and not isinstance(error, BrokenPipeError)
    return failed or error.errno in (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
