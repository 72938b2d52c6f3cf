"""Runs of one method put together."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastpeft.compare.paired import Floats, interval
from fastpeft.compare.timing import SCOPES, SIDES


class Spread(NamedTuple):
    """Mean, lowest and highest value over the seeds."""

    mean: float
    low: float
    high: float


class Summary(NamedTuple):
    """One method over its seeds."""

    method: str
    seeds: int
    trains: str
    base: str  # Python that makes the base model
    load: str  # and puts the first run's weights on it
    quality: Spread
    interval: tuple[float, float]  # of the quality, over held-out texts
    scores: Floats  # (seeds, texts)
    trainable_parameters: int
    trainable_share: float
    formula: str
    learning_rate: float
    steps: int
    step_seconds: dict[str, Spread]  # stock, and patched by scope
    speed_up: dict[str, Spread]  # by scope: stock / patched, of each run
    unpacked: str | None  # why the auto scope left the padding in, where it did in every run
    peak_memory_bytes: Spread | None  # None where it wasn't measured
    train_seconds: Spread
    sites: list[dict[str, Any]]


def summarise(results: dict[str, Any]) -> list[Summary]:
    """A summary for each method none of whose runs diverged, in the order of the runs."""
    weights = np.array(results["data"]["weights"], float)
    return [_summary(method, group, weights) for method, group in _by_method(results).items() if _held(group)]


def nothing_left(results: dict[str, Any]) -> str | None:
    """That no method is left to compare, and why; None where `summarise` has one."""
    left = any(map(_held, _by_method(results).values()))
    return None if left else f"nothing is left to compare. {' '.join(diverged(results))}"


def diverged(results: dict[str, Any]) -> list[str]:
    """A sentence for each method that `summarise` leaves out."""
    said = []
    for method, group in _by_method(results).items():
        if seeds := [str(run["seed"]) for run in group if run["diverged"]]:
            what = "seed" if len(seeds) == 1 else "seeds"
            rate = f"{group[0]['learning_rate']:g}"
            said.append(
                f"{method} isn't compared: it diverged from {what} {listed(seeds)} at the learning rate {rate}; a "
                "lower --lr may hold it."
            )
    return said


def _held(runs: list[dict[str, Any]]) -> bool:
    return not any(run["diverged"] for run in runs)


def _by_method(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        found.setdefault(run["method"], []).append(run)
    return found


def _summary(method: str, runs: list[dict[str, Any]], weights: Floats) -> Summary:
    first = runs[0]
    scores = np.array([run["scores"] for run in runs], float)
    peaks = [run["peak_memory_bytes"] for run in runs]
    seconds = {side: [run[f"step_seconds_{side}"] for run in runs] for side in SIDES}
    ratios = {
        scope: [stock / patched for stock, patched in zip(seconds["stock"], seconds[scope], strict=True)]
        for scope in SCOPES
    }
    unpacked = [run["unpacked_because"] for run in runs]
    return Summary(
        method=method,
        seeds=len(runs),
        trains=first["trains"],
        base=first["base"],
        load=first["load"],
        quality=_spread([run["quality"] for run in runs]),
        interval=interval(scores, weights),
        scores=scores,
        trainable_parameters=first["trainable_parameters"],
        trainable_share=first["trainable_share"],
        formula=first["formula"],
        learning_rate=first["learning_rate"],
        steps=first["steps"],
        step_seconds={side: _spread(taken) for side, taken in seconds.items()},
        speed_up={scope: _spread(found) for scope, found in ratios.items()},
        unpacked=None if None in unpacked else unpacked[0],
        peak_memory_bytes=None if None in peaks else _spread(peaks),
        train_seconds=_spread([run["train_seconds"] for run in runs]),
        sites=first["sites"],
    )


def _spread(values: list[float]) -> Spread:
    low, high = min(values), max(values)
    return Spread(
        min(max(sum(values) / len(values), low), high), low, high
    )  # of like values a sum may be rounded


def speed_shown(summary: Summary, scope: str) -> bool:
    """Whether the runs show stock and patched to differ: every one of them has the same side faster.

    The ratio counts, not the times: a run measures all sides in turn, but a machine is busier in some runs.
    """
    return summary.seeds > 1 and not summary.speed_up[scope].low <= 1.0 <= summary.speed_up[scope].high


def listed(names: list[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
