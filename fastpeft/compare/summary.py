"""Runs of one method put together, and what may be concluded from their spread."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastpeft.compare.timing import SCOPES, SIDES


class Spread(NamedTuple):
    """Mean, lowest and highest value over the seeds."""

    mean: float
    low: float
    high: float

    def stands_above(self, other: Spread, gap: float) -> bool:
        """Whether this range lies above the other, and its mean by more than `gap`."""
        return self.low > other.high and self.mean - other.mean > gap


class Summary(NamedTuple):
    """One method over its seeds."""

    method: str
    seeds: int
    accuracy: Spread
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


def summarise(runs: list[dict[str, Any]]) -> list[Summary]:
    """A summary for each method, in the order of the runs."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    return [_summary(method, group) for method, group in by_method.items()]


def _summary(method: str, runs: list[dict[str, Any]]) -> Summary:
    first = runs[0]
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
        accuracy=_spread([run["accuracy"] for run in runs]),
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
    return Spread(sum(values) / len(values), min(values), max(values))


def ranking(summaries: list[Summary], eval_rows: int) -> list[str]:
    """Sentences on what the accuracies allow to say: who stands above whom, and where no ranking follows.

    A pair is ranked where its spreads over the seeds don't overlap and its means are further apart than two
    standard errors of their difference, `2·√(2·p·(1 - p) / eval_rows)` (binomial; p the mean accuracy).
    """
    seeds = summaries[0].seeds
    if len(summaries) < 2:
        return ["One method alone: there is nothing to rank."]
    if seeds < 2:
        return ["One seed shows no spread: no ranking follows."]
    gap = 2 * math.sqrt(2) * standard_error(summaries, eval_rows)
    ordered = sorted(summaries, key=lambda s: s.accuracy.mean, reverse=True)
    above = {
        s.method: [o.method for o in ordered if s.accuracy.stands_above(o.accuracy, gap)] for s in ordered
    }
    told_apart = f"closer than the {100 * gap:.1f} points that {eval_rows:,} eval texts can tell apart"
    if not any(above.values()):
        return [
            f"No ranking follows: over {seeds} seeds the spreads of any two methods overlap, or lie "
            f"{told_apart}."
        ]
    ranked = "; ".join(f"{method} above {listed(below)}" for method, below in above.items() if below)
    sentences = [f"Ranked, as spreads over {seeds} seeds don't overlap: {ranked}."]
    if sum(map(len, above.values())) < math.comb(len(ordered), 2):
        sentences.append(f"All other pairs overlap, or lie {told_apart}: no ranking follows between them.")
    chance = math.comb(2 * seeds, seeds) / 2
    sentences.append(
        f"With {seeds} seeds, the spreads of two equally good methods lie apart by chance in 1 of {chance:g} "
        "cases."
    )
    return sentences


def standard_error(summaries: list[Summary], eval_rows: int) -> float:
    """One standard error that the number of eval rows alone gives an accuracy (binomial, at the mean one)."""
    mean = sum(s.accuracy.mean for s in summaries) / len(summaries)
    return math.sqrt(mean * (1 - mean) / eval_rows)


def speed_shown(summary: Summary, scope: str) -> bool:
    """Whether the runs show stock and patched to differ: every one of them has the same side faster.

    The ratio counts, not the times: a run measures all sides in turn, but a machine is busier in some runs.
    """
    return summary.seeds > 1 and not summary.speed_up[scope].low <= 1.0 <= summary.speed_up[scope].high


def listed(names: list[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
