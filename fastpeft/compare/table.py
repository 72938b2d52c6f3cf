"""The results in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from fastpeft.compare.page import percent
from fastpeft.compare.summary import ranking, speed_shown, summarise


def table(results: dict[str, Any]) -> RenderableType:
    """A row for each method, 80 columns wide, and below it what the spreads allow to conclude."""
    summaries = summarise(results["runs"])
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    grid.add_column("method", no_wrap=True, vertical="bottom")
    for heading in (
        "accuracy",
        "trainable\nparameters",
        "step ms\nstock",
        "step ms\npatched",
        "speed-\nup",
        "peak\nGB",
    ):
        grid.add_column(heading, justify="right", no_wrap=True)
    for s in summaries:
        speed_up = f"{s.speed_up.mean:.2f}×"
        grid.add_row(
            s.method,
            percent(s.accuracy),
            f"{s.trainable_parameters:,}",
            f"{s.step_seconds_stock.mean * 1e3:.1f}",
            f"{s.step_seconds_patched.mean * 1e3:.1f}",
            speed_up if speed_shown(s) else f"({speed_up})",
            f"{s.peak_memory_bytes.high / 1e9:.2f}" if s.peak_memory_bytes else "-",
        )
    notes = ranking(summaries, results["data"]["eval_rows"])
    if not all(map(speed_shown, summaries)):
        notes.append("Speed-ups in brackets: one run only, or runs that disagree about which side is faster.")
    return Group(grid, *notes)
