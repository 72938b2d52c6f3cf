"""The results in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from fastpeft.compare.page import gigabytes, milliseconds, percent
from fastpeft.compare.summary import ranking, speed_shown, summarise


def table(results: dict[str, Any]) -> RenderableType:
    """A row for each method, 80 columns wide, and below it what the spreads allow to conclude."""
    summaries = summarise(results["runs"])
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    grid.add_column("method", no_wrap=True, vertical="bottom")
    for heading in (
        "accuracy",
        "trainable\nparameters",
        "step,\nstock",
        "step,\npatched",
        "speed-\nup",
        "peak\nmemory",
    ):
        grid.add_column(heading, justify="right", no_wrap=True)
    for s in summaries:
        speed_up = f"{s.speed_up.mean:.2f}×"  # noqa: RUF001
        grid.add_row(
            s.method,
            percent(s.accuracy),
            f"{s.trainable_parameters:,}",
            milliseconds(s.step_seconds_stock),
            milliseconds(s.step_seconds_patched),
            speed_up if speed_shown(s) else f"({speed_up})",
            gigabytes(s.peak_memory_bytes),
        )
    notes = ranking(summaries)
    if not all(map(speed_shown, summaries)):
        notes.append("Speed-ups in brackets lie within the spread of stock and patched: none is shown.")
    return Group(grid, *notes)
