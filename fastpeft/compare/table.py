"""The results in the terminal."""

from __future__ import annotations

import re
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastpeft.compare.page import before, quality
from fastpeft.compare.summary import Summary, speed_shown
from fastpeft.compare.tasks import TASKS
from fastpeft.compare.timing import SCOPES
from fastpeft.compare.verdict import good_for, standings, verdict

_LONGEST = 24  # of a name beside the other columns


def table(results: dict[str, Any]) -> RenderableType:
    """The verdict, the trade-off table and the steps' times, a row a method each, 80 columns wide."""
    task = TASKS[results["task"]]
    found = standings(results)
    trade = _grid(
        task.measure, "95 %\ninterval", "behind\nbest", "trainable\nparameters", "peak\nGB", "step\nms"
    )
    speed = _grid("step ms\nstock", *(f"step ms\n{s}" for s in SCOPES), *(f"speed-up\n{s}" for s in SCOPES))
    for standing in found:
        s = standing.summary
        # Rich folds a long name anywhere; the options of a method are better told apart.
        name = Text(re.sub("([:,])", r"\1\n", s.method) if len(s.method) > _LONGEST else s.method)
        trade.add_row(
            name,
            *quality(s, task),
            f"{task.gap(standing.behind.mean).split()[0]}{'' if standing.worse else '?'}"
            if standing.behind
            else "-",
            f"{s.trainable_parameters:,}",
            f"{s.peak_memory_bytes.high / 1e9:.2f}" if s.peak_memory_bytes else "-",
            f"{s.step_seconds['auto'].mean * 1e3:.0f}",
        )
        times = [f"{seconds.mean * 1e3:.1f}" for seconds in s.step_seconds.values()]
        speed.add_row(name, *times, *(_speed_up(s, scope) for scope in SCOPES))
    conclusion, *notes = verdict(results)
    notes += [f"{method}: {praise}." for method, praise in good_for(results).items()]
    if any(standing.behind and not standing.worse for standing in found):
        notes.append("With a question mark: behind by what no test tells from nothing.")
    if shown := before(results):
        notes.append(f"The base model, not fine-tuned: {shown}.")
    if not all(speed_shown(s.summary, scope) for s in found for scope in SCOPES):
        notes.append("Speed-ups in brackets: one run only, or runs that disagree about which side is faster.")
    return Group(f"[bold]{escape(conclusion)}[/]", trade, speed, *map(escape, notes))


def _grid(*headings: str) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    grid.add_column("method", overflow="fold", vertical="bottom")
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    return grid


def _speed_up(summary: Summary, scope: str) -> str:
    text = f"{summary.speed_up[scope].mean:.2f}×"
    return text if speed_shown(summary, scope) else f"({text})"
