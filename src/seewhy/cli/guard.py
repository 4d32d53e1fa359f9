"""Run a command and turn its exceptions into one line on stderr and an exit status."""

from __future__ import annotations

import errno
import shlex
import socket
from collections.abc import Callable, Sequence
from typing import Any

import typer

from seewhy.errors import SeewhyError, one_line

INTERRUPTED = 130  # exit status, as in shells


def run_guarded(work: Callable[[], Any], command: Sequence[str] = ()) -> int:
    """Call work() and return an exit status: its int result, 0, or that of the exception, which is printed as one line on stderr.

    command: the command line, quoted in the advice after an interrupt. docs/reference/errors.md lists the statuses.
    """
    try:
        status = work()
        return status if isinstance(status, int) else 0
    except SeewhyError as error:
        return _print_error(str(error))
    except KeyboardInterrupt:
        return _print_error(f"interrupted; {_resume_advice(command)}", status=INTERRUPTED)
    except ModuleNotFoundError as error:  # in an installation of requirements-runtime.txt
        if (error.name or "seewhy").split(".")[0] == "seewhy":
            raise
        return _print_error(f"this needs {error.name}, which is not installed; install seewhy in full (see README)")
    except OSError as error:
        if error.errno is None:  # a bug, not the system's error
            raise
        where = f"{error.filename}: " if error.filename else ""
        advice = "check the network" if _is_network_error(error) else "check the disk and its permissions"
        return _print_error(f"{one_line(where)}{error.strerror}; {advice}")
    except Exception as error:
        # typer's errors (unknown options, missing arguments) have their text in format_message.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = f"; see {context.command_path} --help" if context is not None else ""
        return _print_error(f"{' '.join(error.format_message().split()).rstrip('.')}{where}")


def _resume_advice(command: Sequence[str]) -> str:
    if {"train", "train.py"} & set(command[:2]):
        return f"resume with: {shlex.join([*command, *(['--resume'] if '--resume' not in command else [])])}"
    return "re-run the same command to resume"


def _print_error(text: str, status: int = 2) -> int:
    typer.echo(f"seewhy: {text}", err=True)
    return status


def _is_network_error(error: OSError) -> bool:
    """Tell network from disk errors; a broken pipe is neither: the reader of our output has closed it."""
    failed = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)) and not isinstance(error, BrokenPipeError)
    return failed or error.errno in (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
