"""The report page of a comparison, from its results alone; self-contained."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastpeft.compare import plots
from fastpeft.compare.methods import METHODS
from fastpeft.compare.summary import Spread, ranking, speed_shown, standard_error, summarise
from fastpeft.compare.timing import SCOPES


def render(results: dict[str, Any]) -> str:
    """The page as HTML: table, conclusions, plots, and how it was measured."""
    environment = Environment(
        loader=PackageLoader("fastpeft.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "range": percent_range,
        "milliseconds": milliseconds,
        "gigabytes": gigabytes,
        "seconds": lambda spread: f"{spread.mean:.0f} s",
    }
    summaries = summarise(results["runs"])
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
        summaries=summaries,
        ranking=ranking(summaries, results["data"]["eval_rows"]),
        figures=figures,
        methods=METHODS,
        speed_shown=speed_shown,
        scopes=SCOPES,
        base_sentence=base_sentence(results["model"]),
        command=command(results["arguments"]),
        folder=lambda method: f"runs/{method}-seed0/weights",
        standard_error=f"{100 * standard_error(summaries, results['data']['eval_rows']):.1f}",
        memory_kind="what tensors take on the GPU"
        if results["machine"]["device"] == "cuda"
        else "the resident memory of the whole process, libraries and base model included",
    )


def base_sentence(model: dict[str, Any]) -> str:
    """What the base model is, in one or two plain sentences."""
    size = f"{model['layers']} layers × {model['width']}, {model['parameters']:,} parameters"
    made = model["pretrained_here"]
    if made is None:
        return f"The base model is {model['name']} (GPT-2, {size}), with a fresh head."
    return (
        f"The base model is a small GPT-2 ({size}), not a published checkpoint: trained here from random "
        f"weights on {made['train_reviews']:,} IMDB reviews, where it judges {made['held_out_accuracy']:.1%} "
        f"of {made['held_out']:,} held-out reviews right. Every run starts from it with a fresh head."
    )


def command(arguments: dict[str, Any]) -> str:
    """The command that asks for these arguments, those left at None aside."""
    words = ["fastpeft compare"]
    for name, value in arguments.items():
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


def percent(spread: Spread) -> str:
    """`71.2% (70.1–72.3)`; the range only where there is one."""
    mean = f"{spread.mean:.1%}"
    return mean if spread.low == spread.high else f"{mean} ({percent_range(spread)})"


def percent_range(spread: Spread) -> str:
    """`70.1–72.3`."""
    return f"{spread.low * 100:.1f}–{spread.high * 100:.1f}"


def milliseconds(spread: Spread) -> str:
    """`61.3 ms`."""
    return f"{spread.mean * 1e3:.1f} ms"


def gigabytes(spread: Spread | None) -> str:
    """The highest of the runs, in 10⁹ bytes."""
    return "not measured" if spread is None else f"{spread.high / 1e9:.2f} GB"
