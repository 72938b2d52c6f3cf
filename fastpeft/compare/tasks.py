"""The two tasks: what each measures on held-out texts, and how its figures are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Task(NamedTuple):
    """What a comparison judges by. A quality is the sum of a run's scores over the sum of their weights."""

    name: str
    measure: str
    scored: str  # what has a score: a text's verdict is right or not, a document takes so many bits
    direction: int  # 1 where higher is better, -1 where lower is
    widest: float  # how far apart two qualities can be
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
        1.0,
        "{:.1%}".format,
        lambda gap: f"{100 * gap:.1f} points",
        lambda value: f"{100 * value:g}%",
    ),
    LM: Task(
        LM,
        "bits a token",
        "documents",
        -1,
        math.inf,
        lambda bits: f"{written(bits)} bits a token (perplexity {perplexity(bits):.1f})",
        lambda gap: f"{written(gap)} bits",
        "{:g}".format,
    ),
}


def written(bits: float) -> str:
    """Bits with three decimals, where they aren't so many that nobody looks at these."""
    return f"{bits:.3f}" if abs(bits) < 1000 else f"{bits:.3g}"


def perplexity(bits: float) -> float:
    """The perplexity of so many bits a token, `2^bits`."""
    return 2.0**bits if bits < 1024 else math.inf
