"""The report page of a comparison, from its results alone; self-contained."""

from __future__ import annotations

import base64
import shlex
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastpeft.compare import plots
from fastpeft.compare.summary import Spread, Summary, speed_shown
from fastpeft.compare.tasks import CLASSIFY, TASKS, Task, written
from fastpeft.compare.timing import SCOPES
from fastpeft.compare.verdict import good_for, standings, verdict


def render(results: dict[str, Any]) -> str:
    """The page as HTML: verdict, trade-off table, plots, and how it was measured."""
    environment = Environment(
        loader=PackageLoader("fastpeft.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "milliseconds": milliseconds,
        "gigabytes": gigabytes,
        "seconds": lambda spread: f"{spread.mean:.0f} s",
    }
    task = TASKS[results["task"]]
    found = standings(results)
    summaries = [standing.summary for standing in found]
    differs = {row["what"] for row in results["joined"]["differs"]} if results["joined"] else set()
    figures = [
        {
            "source": "data:image/svg+xml;base64," + base64.b64encode(plots.svg(plot, results)).decode(),
            "caption": plot.caption,
            "alt": plot.describe(results),
        }
        for plot in plots.PLOTS
    ]
    return environment.get_template("report.html.j2").render(
        results=results,
        task=task,
        summaries=summaries,
        standings=found,
        verdict=verdict(results),
        good_for=good_for(results),
        before=before(results),
        figures=figures,
        speed_shown=speed_shown,
        scopes=SCOPES,
        classifies=results["task"] == CLASSIFY,
        differs=differs,
        elsewhere=any(what.startswith(("machine ", "versions ")) for what in differs),
        steps=_steps(results, summaries, differs),
        base_sentence="The folders’ base models differ, as the table of what differs says."
        if "model sha256" in differs
        else base_sentence(results["model"]),
        command=command(results),
        quality=lambda summary: quality(summary, task),
        gap=lambda value: task.gap(value),
        loads=[(base, list(group)) for base, group in groupby(summaries, key=lambda s: s.base)],
        memory_kind="what tensors take on the GPU"
        if results["machine"]["device"] == "cuda"
        else "what the process grows by",
    )


def before(results: dict[str, Any]) -> str | None:
    """The quality of the base model before it is fine-tuned; None where its head is fresh."""
    if results["before"] is None:
        return None
    return TASKS[results["task"]].show(sum(results["before"]) / sum(results["data"]["weights"]))


def base_sentence(model: dict[str, Any]) -> str:
    """What the base model is, in one or two plain sentences."""
    size = f"{model['layers']} layers × {model['width']}, {model['parameters']:,} parameters"
    made = model["pretrained_here"]
    if made is None:
        return f"The base model is {model['name']} (GPT-2, {size}), with a fresh head."
    return (
        f"The base model is a small GPT-2 ({size}), not a published checkpoint: trained here from random "
        f"weights on {made['train_reviews']:,} IMDB reviews, where it judges {made['held_out_accuracy']:.1%} "
        f"of {made['held_out']:,} held-out reviews right. Every run starts from it."
    )


def _steps(results: dict[str, Any], summaries: list[Summary], differs: set[str]) -> str:
    """How long the runs are."""
    arguments, processes = results["arguments"], results["machine"]["processes"]
    sizes = {"arguments batch size", "arguments accumulate", "machine processes"}
    if len({summary.steps for summary in summaries}) > 1 or differs & sizes:
        return "The runs’ steps differ, as the table of what differs says."
    size = min(arguments["batch_size"] * arguments["accumulate"], results["data"]["train_rows"])
    each = f" on each of {processes} devices" if processes > 1 else ""
    return f"Every run takes {summaries[0].steps} steps of {size} texts{each}."


def command(results: dict[str, Any]) -> str:
    """The command that asks for these results, options left at None aside."""
    if results["joined"]:
        return shlex.join(["fastpeft", "report", *results["joined"]["folders"]])
    words = ["fastpeft", "compare"]
    for name, value in results["arguments"].items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list):
            words.append(",".join(value))
        elif value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return shlex.join(words)


def quality(summary: Summary, task: Task) -> tuple[str, str]:
    """Mean, and the interval over held-out texts: `71.2%`, `70.1–72.3`."""
    low, high = summary.interval
    if task.name == CLASSIFY:
        return f"{100 * summary.quality.mean:.1f}%", f"{100 * low:.1f}–{100 * high:.1f}"
    return written(summary.quality.mean), f"{written(low)}–{written(high)}"


def milliseconds(spread: Spread) -> str:
    """`61.3 ms`."""
    return f"{spread.mean * 1e3:.1f} ms"


def gigabytes(spread: Spread | None) -> str:
    """The highest of the runs, in 10⁹ bytes."""
    return "not measured" if spread is None else f"{spread.high / 1e9:.2f} GB"
