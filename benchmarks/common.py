"""A measured command -> an entry of results.json, and results.json -> RESULTS.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"


def measure(arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a command as a process of its own: wall seconds, peak resident memory in GB, the JSON it printed last."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(arguments, stdout=output, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        lines = output.read().strip().splitlines()
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    # ru_maxrss: the largest of the process and its finished children, in KiB on Linux.
    return {"seconds": round(seconds, 1), "peak_gb": round(usage.ru_maxrss / 2**20, 2), "answer": json.loads(lines[-1])}


def seewhy(*arguments: str) -> list[str]:
    """The command line of this environment's seewhy."""
    return [sys.executable, "-m", "seewhy.cli", *arguments]


def record(name: str, question: str, entry: dict[str, Any]) -> None:
    """Puts an entry under its name into results.json, with hardware, date and command, and renders RESULTS.md."""
    from seewhy.run import hardware, installed_versions

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {
        "question": question,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": installed_versions(),
        **entry,
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (FOLDER / "RESULTS.md").write_text(render(results))


def render(results: dict[str, Any]) -> str:
    """RESULTS.md: a section for each entry, its table, and what it was measured on."""
    parts = [
        "# Results",
        "",
        "Rendered from `results.json` by the benchmarks themselves; every figure comes from the command named under it.",
        "",
    ]
    for name in sorted(results):
        entry = results[name]
        parts += [f"## {entry['question']}", ""]
        columns = list(entry["rows"][0])
        parts += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        parts += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in entry["rows"]]
        machine = entry["hardware"]
        versions = ", ".join(f"{k} {entry['versions'][k]}" for k in ("python", "torch", "timm", "onnxruntime"))
        parts += ["", *(f"{note}  " for note in entry.get("notes", [])), ""]
        parts += [
            f"`{entry['command']}`, {entry['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
            f"GPU: {machine['gpu'] or 'none'}; {versions}.",
            "",
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    (FOLDER / "RESULTS.md").write_text(render(json.loads(RESULTS.read_text())))
