"""The plots of a comparison, from its results alone: one figure for the page and for a PNG each."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastpeft.compare.summary import Summary, listed, speed_shown, summarise
from fastpeft.compare.tasks import TASKS, Task

# Okabe and Ito's colours, told apart by colour-blind readers too; each with a marker of its own.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31", "#E69F00", "#777777")
_MARKERS = ("o", "s", "^", "v", "D", "<", ">", "p", "h")
_SIDES = {"stock": "#A6A6A6", "layers": "#56B4E9", "auto": "#0072B2"}
_STYLE: dict[Any, Any] = {
    "font.size": 13,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 12,
    "svg.hashsalt": "fastpeft",  # the same results give the same file
}
#: Of the quality axis, 10 points or a tenth of a bit: differences too small to mean anything shouldn't fill the plot.
_LEAST_SPAN = 0.1
_WIDTH = 6.6  # inches: a phone shows the page's images at about half size, still legible


class Plot(NamedTuple):
    """A figure's file name, caption, what it shows in words, and how it is drawn."""

    name: str
    caption: str
    describe: Callable[[dict[str, Any]], str]
    draw: Callable[[dict[str, Any]], Figure]


def write(results: dict[str, Any], folder: Path) -> None:
    """Every plot as a PNG in `folder`."""
    for plot in PLOTS:
        part = folder / f".{plot.name}.png.part"
        part.write_bytes(_rendered(plot, results, "png"))
        part.replace(folder / f"{plot.name}.png")


def svg(plot: Plot, results: dict[str, Any]) -> bytes:
    """A plot as a stand-alone SVG file."""
    return _rendered(plot, results, "svg")


def _rendered(plot: Plot, results: dict[str, Any], kind: str) -> bytes:
    buffer = io.BytesIO()
    with rc_context(_STYLE):
        figure = plot.draw(results)
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=170, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of the method of this index; no two of the first 72 share both."""
    turn, place = divmod(index, len(_COLOURS))
    return _COLOURS[place], _MARKERS[(place + turn) % len(_MARKERS)]


def _figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(panels, sharex=panels > 1)))


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the plot, in as many columns as the longest name lets fit; the figure grows by its further rows."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = 3 if longest <= 16 else 2 if longest <= 26 else 1
    figure.set_figheight(figure.get_figheight() + 0.26 * max(0, math.ceil(len(labels) / columns) - 2))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.4, handletextpad=0.5
    )


def _draw_quality(results: dict[str, Any]) -> Figure:
    figure, axes = _draw_against(results, _apart([s.trainable_parameters for s in summarise(results)]))
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("trainable parameters (log scale)")
    return figure


def _draw_time(results: dict[str, Any]) -> Figure:
    figure, axes = _draw_against(results, [1e3 * s.step_seconds["auto"].mean for s in summarise(results)])
    axes.set_xlabel("milliseconds a training step, patched")
    return figure


def _draw_against(results: dict[str, Any], places: list[float]) -> tuple[Figure, Axes]:
    """The quality of each method at its place: the mean, its interval over texts, and a tick a seed."""
    task = TASKS[results["task"]]
    figure, [axes] = _figure(5.4)
    for index, (summary, x) in enumerate(zip(summarise(results), places, strict=True)):
        colour, marker = _look(index)
        axes.vlines(x, *summary.interval, color=colour, linewidth=2, alpha=0.6)
        seeds = [run["quality"] for run in results["runs"] if run["method"] == summary.method]
        axes.plot([x] * len(seeds), seeds, "_", color=colour, markersize=10, markeredgewidth=2)
        axes.plot(
            x,
            summary.quality.mean,
            marker,
            color=colour,
            markersize=9,
            markeredgecolor="white",
            label=summary.method,
        )
    axes.margins(x=0.12, y=0.12)
    low, high = axes.get_ylim()
    short = max(0.0, _LEAST_SPAN - (high - low))
    axes.set_ylim(low - short / 2, high + short / 2)
    _quality_axis(axes, task)
    _legend(figure, axes)
    return figure, axes


def _quality_axis(axes: Axes, task: Task) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: task.tick(value)))
    axes.set_ylabel(f"{task.measure}, {'higher' if task.direction > 0 else 'lower'} is better")


def _apart(values: list[int]) -> list[float]:
    """The values, those within a tenth of each other moved apart on a log axis so that all can be seen."""
    near, step = math.log(1.1), math.log(1.25)
    groups: list[list[int]] = []

    def ends(group: list[int]) -> tuple[float, float]:
        middle = sum(math.log(values[index]) for index in group) / len(group)
        half = step * (len(group) - 1) / 2
        return middle - half, middle + half

    for index in sorted(range(len(values)), key=values.__getitem__):
        group = [index]
        while groups and ends(group)[0] - ends(groups[-1])[1] <= near:  # moved, they may meet another
            group = groups.pop() + group
        groups.append(group)
    placed = [float(value) for value in values]
    for group in groups:
        for place, index in enumerate(group if len(group) > 1 else ()):
            placed[index] = math.exp(ends(group)[0] + step * place)
    return placed


def _judged_on_the_way(results: dict[str, Any]) -> bool:
    """Whether quality is a curve: runs of few steps are judged once, at their end."""
    return any(sum("eval_quality" in point for point in run["curve"]) > 1 for run in results["runs"])


def _draw_curves(results: dict[str, Any]) -> Figure:
    keys = ["eval_quality", "loss"] if _judged_on_the_way(results) else ["loss"]
    figure, panels = _figure(4.4 * len(keys) - 0.8, panels=len(keys))
    for axes, key in zip(panels, keys, strict=True):
        for index, summary in enumerate(summarise(results)):
            runs = [run for run in results["runs"] if run["method"] == summary.method]
            points = [{p["step"]: p[key] for p in run["curve"] if key in p} for run in runs]
            # Runs side by side are judged and logged less often than one that was trained alone.
            steps = [step for step in points[0] if all(step in run for run in points)]
            values = np.array([[run[step] for step in steps] for run in points], dtype=float)
            colour, marker = _look(index)
            axes.plot(
                steps,
                values.mean(axis=0),
                color=colour,
                marker=marker if key == "eval_quality" else None,
                markersize=7,
                markeredgecolor="white",
                linewidth=1.8,
                label=summary.method,
            )
            axes.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.13, linewidth=0
            )
    if len(keys) > 1:
        _quality_axis(panels[0], TASKS[results["task"]])
    panels[-1].set_ylabel("training loss (nats)")
    panels[-1].set_xlabel("training step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, panels[0])
    return figure


def _draw_step_time(results: dict[str, Any]) -> Figure:
    summaries = summarise(results)
    figure, [axes] = _figure(1.9 + 1.05 * len(summaries))
    rows = np.arange(len(summaries))
    longest = max(seconds.high for s in summaries for seconds in s.step_seconds.values())
    for offset, (side, colour) in zip((-0.28, 0.0, 0.28), _SIDES.items(), strict=True):
        spreads = [summary.step_seconds[side] for summary in summaries]
        means = np.array([s.mean for s in spreads]) * 1e3
        around = [[(s.mean - s.low) * 1e3 for s in spreads], [(s.high - s.mean) * 1e3 for s in spreads]]
        axes.barh(rows + offset, means, 0.26, color=colour, label=side)
        axes.errorbar(
            means, rows + offset, xerr=around, fmt="none", ecolor="#333333", capsize=3, linewidth=1.2
        )
        for row, summary in zip(rows, summaries, strict=True):
            if side != "stock":
                axes.annotate(
                    f"{summary.speed_up[side].mean:.2f}×"
                    + ("" if speed_shown(summary, side) else " (none shown)"),
                    (summary.step_seconds[side].high * 1e3, row + offset),
                    xytext=(8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=10,
                )
    axes.set_xlim(0, longest * 1e3 * 1.42)
    # Each option of a method on a line of its own, or the names would push the bars aside.
    names = [re.sub("([:,])", r"\1\n", summary.method) for summary in summaries]
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds a training step")
    _legend(figure, axes)
    return figure


def _short(value: float) -> str:
    for size, unit in (1e9, "B"), (1e6, "M"), (1e3, "k"):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _describe_quality(results: dict[str, Any]) -> str:
    return _describe_against(results, "trainable parameters", lambda s: f"{s.trainable_parameters:,}")


def _describe_time(results: dict[str, Any]) -> str:
    return _describe_against(
        results, "time a training step", lambda s: f"{1e3 * s.step_seconds['auto'].mean:.1f} ms"
    )


def _describe_against(results: dict[str, Any], what: str, value: Callable[[Summary], str]) -> str:
    task = TASKS[results["task"]]
    points = [f"{s.method} {task.show(s.quality.mean)} with {value(s)}" for s in summarise(results)]
    return f"Held-out {task.measure} against {what}: {listed(points)}."


def _describe_curves(results: dict[str, Any]) -> str:
    names = listed([s.method for s in summarise(results)])
    quality = (
        f"Held-out {TASKS[results['task']].measure} and training"
        if _judged_on_the_way(results)
        else "Training"
    )
    return f"{quality} loss by training step, for {names}; the numbers are in results.json."


def _describe_step_time(results: dict[str, Any]) -> str:
    bars = [
        f"{s.method} " + ", ".join(f"{t.mean * 1e3:.1f} ms {side}" for side, t in s.step_seconds.items())
        for s in summarise(results)
    ]
    return f"Time a training step, stock and patched by scope: {'; '.join(bars)}."


_MARKS = (
    "The marker is the mean over seeds, ticks are the seeds, and the bar is the 95 % interval that the held-out "
    "texts leave it (bootstrap)."
)
PLOTS = (
    Plot(
        "quality",
        f"Quality against trainable parameters. {_MARKS} Methods with about as many parameters are set a little "
        "apart. Two bars may overlap where a paired test tells the methods apart: the table says which.",
        _describe_quality,
        _draw_quality,
    ),
    Plot(
        "quality_time",
        f"Quality against the time of one training step, patched as by default. {_MARKS}",
        _describe_time,
        _draw_time,
    ),
    Plot(
        "step_time",
        "Time of one training step (forward, backward, AdamW), stock and patched in either scope, in turn on "
        "the same batches; beside the bars, stock's time over theirs. Bars are means over the seeds of each "
        "run's median, whiskers the lowest and highest run.",
        _describe_step_time,
        _draw_step_time,
    ),
    Plot(
        "curves",
        "Training curves: means over the seeds, the shade from the lowest to the highest.",
        _describe_curves,
        _draw_curves,
    ),
)
