"""The report page of a comparison, from its results alone; self-contained."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastpeft.compare import plots
from fastpeft.compare.card import base_lines
from fastpeft.compare.summary import Spread, Summary, speed_shown
from fastpeft.compare.tasks import CLASSIFY, TASKS, Task
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
        summaries=[standing.summary for standing in found],
        standings=found,
        verdict=verdict(results),
        good_for=good_for(results),
        before=before(results),
        figures=figures,
        speed_shown=speed_shown,
        scopes=SCOPES,
        classifies=results["task"] == CLASSIFY,
        base_sentence=base_sentence(results["model"]),
        command=command(results),
        quality=lambda summary: quality(summary, task),
        gap=lambda value: task.gap(value),
        base_lines=base_lines(results, results["task"]),
        memory_kind="what tensors take on the GPU"
        if results["machine"]["device"] == "cuda"
        else "the resident memory of the whole process, libraries and base model included",
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


def command(results: dict[str, Any]) -> str:
    """The command that asks for these results, options left at None aside."""
    if results["joined"]:
        return " ".join(["fastpeft report", *results["joined"]["folders"]])
    words = ["fastpeft compare"]
    for name, value in results["arguments"].items():
        if value is not None:
            shown = (
                ",".join(value)
                if isinstance(value, list)
                else f"{value:g}"
                if isinstance(value, float)
                else value
            )
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def quality(summary: Summary, task: Task) -> tuple[str, str]:
    """Mean, and the interval over held-out texts: `71.2%`, `70.1–72.3`."""
    scale = 100 if task.name == CLASSIFY else 1
    digits = 1 if task.name == CLASSIFY else 3
    low, high = (f"{scale * end:.{digits}f}" for end in summary.interval)
    mean = f"{scale * summary.quality.mean:.{digits}f}" + ("%" if task.name == CLASSIFY else "")
    return mean, f"{low}–{high}"


def milliseconds(spread: Spread) -> str:
    """`61.3 ms`."""
    return f"{spread.mean * 1e3:.1f} ms"


def gigabytes(spread: Spread | None) -> str:
    """The highest of the runs, in 10⁹ bytes."""
    return "not measured" if spread is None else f"{spread.high / 1e9:.2f} GB"
