"""The results in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from fastpeft.compare.page import percent
from fastpeft.compare.summary import Summary, ranking, speed_shown, summarise
from fastpeft.compare.timing import SCOPES


def table(results: dict[str, Any]) -> RenderableType:
    """Two tables of a row a method, 80 columns wide, and below them what the spreads allow to conclude."""
    summaries = summarise(results["runs"])
    learnt = _grid("accuracy", "trainable\nparameters", "peak\nGB")
    speed = _grid("step ms\nstock", *(f"step ms\n{s}" for s in SCOPES), *(f"speed-up\n{s}" for s in SCOPES))
    for s in summaries:
        learnt.add_row(
            s.method,
            percent(s.accuracy),
            f"{s.trainable_parameters:,}",
            f"{s.peak_memory_bytes.high / 1e9:.2f}" if s.peak_memory_bytes else "-",
        )
        times = [f"{seconds.mean * 1e3:.1f}" for seconds in s.step_seconds.values()]
        speed.add_row(s.method, *times, *(_speed_up(s, scope) for scope in SCOPES))
    notes = ranking(summaries, results["data"]["eval_rows"])
    if not all(speed_shown(s, scope) for s in summaries for scope in SCOPES):
        notes.append("Speed-ups in brackets: one run only, or runs that disagree about which side is faster.")
    return Group(learnt, speed, *notes)


def _grid(*headings: str) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    grid.add_column("method", no_wrap=True, vertical="bottom")
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    return grid


def _speed_up(summary: Summary, scope: str) -> str:
    text = f"{summary.speed_up[scope].mean:.2f}×"
    return text if speed_shown(summary, scope) else f"({text})"
