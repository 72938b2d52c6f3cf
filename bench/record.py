"""What every result is recorded with, and how a record that was begun is gone on with."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkout import ROOT

from fastpeft.compare.machine import machine, versions

MEASURED = ("fastpeft", "kernels", "bench/*.py")
#: What a process exits with where its time was up and something is left (EX_TEMPFAIL).
LEFT = 75


def header() -> dict[str, Any]:
    """The commit, sources, machine, versions and command of this process, as they go into a record."""
    on = machine()
    return {
        "command": " ".join([f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "sources": sources(),
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


def sources() -> str:
    """A digest of the files measured: changes that aren't committed count, and git isn't needed."""
    folders = ("fastpeft", "fastpeft/compare", "kernels", "bench")
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON; the file is the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def resumed(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The record at `path` where one of the same sources, machine and versions was begun; else `fresh`."""
    if not path.exists():
        return fresh
    begun = json.loads(path.read_text(encoding="utf-8"))
    same = all(begun.get(key) == fresh[key] for key in ("kind", "sources", "machine", "versions"))
    return begun if same else fresh


def timer(minutes: float | None) -> Callable[[], bool]:
    """Says whether so many minutes are over, counted from now."""
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    return lambda: time.monotonic() >= end


def failure(error: BaseException) -> str:
    """An error as a line of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


@contextmanager
def noted(failed: dict[str, str] | None, name: str) -> Iterator[None]:
    """Within it an error becomes the line of `name` in `failed`, and not an end; with None it is raised."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed[name] = failure(error)


def spread(values: list[float]) -> dict[str, float]:
    """The median with the 20 % and 80 % quantiles."""
    if len(values) == 1:
        values = values * 2
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "q20": fifths[0], "q80": fifths[-1]}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
