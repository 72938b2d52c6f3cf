"""What every result is recorded with: commit, machine, versions, and the command that made it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastpeft.compare.machine import machine, versions

ROOT = Path(__file__).parent.parent
MEASURED = ("fastpeft", "kernels", "bench/*.py")


def header() -> dict[str, Any]:
    """The commit, machine, versions and command of this process, as they go into a record."""
    on = machine()
    return {
        "command": " ".join([f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "machine": {key: on[key] for key in ("system", "processor", "cores", "torch_threads", "gpu")},
        "versions": versions(),
    }


def commit() -> str | None:
    """The commit measured, with `+changes` where measured files differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + "+changes" * bool(_git("status", "--porcelain", "--", *MEASURED))
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def spread(values: list[float]) -> dict[str, float]:
    """The median with the 20 % and 80 % quantiles."""
    if len(values) == 1:
        values = values * 2
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "q20": fifths[0], "q80": fifths[-1]}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
