"""The two tasks: what each measures on held-out texts, and how its figures are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Task(NamedTuple):
    """What a comparison judges by. A quality is the sum of a run's scores over the sum of their weights."""

    name: str
    measure: str
    scored: str  # what has a score: a text's verdict is right or not, a document takes so many bits
    direction: int  # 1 where higher is better, -1 where lower is
    show: Callable[[float], str]  # a quality
    gap: Callable[[float], str]  # how far apart two are
    tick: Callable[[float], str]  # on a plot's axis


CLASSIFY = "classify"
LM = "lm"
TASKS = {
    CLASSIFY: Task(
        CLASSIFY,
        "accuracy",
        "texts",
        1,
        "{:.1%}".format,
        lambda gap: f"{100 * gap:.1f} points",
        lambda value: f"{100 * value:g}%",
    ),
    LM: Task(
        LM,
        "bits a token",
        "documents",
        -1,
        lambda bits: f"{bits:.3f} bits a token (perplexity {perplexity(bits):.1f})",
        "{:.3f} bits".format,
        "{:g}".format,
    ),
}


def perplexity(bits: float) -> float:
    """The perplexity of so many bits a token, `2^bits`."""
    return 2.0**bits
