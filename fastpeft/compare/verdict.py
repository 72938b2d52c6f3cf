"""What a comparison concludes: the smallest method that is as good as the best, and what each is good for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from fastpeft.compare.paired import Difference, difference, shares, would_tell
from fastpeft.compare.summary import Spread, Summary, diverged, listed, summarise
from fastpeft.compare.tasks import TASKS, Task

#: A first is one by this factor at least, in all of its runs: times and memory vary that much by themselves.
_CLEARLY = 0.97


class Standing(NamedTuple):
    """A method beside the best one."""

    summary: Summary
    behind: (
        Difference | None
    )  # how much worse than the best; None for the best, and where one seed has no spread
    worse: bool  # by a test among those of all pairs: which method is best was seen in the same scores


def standings(results: dict[str, Any]) -> list[Standing]:
    """Every method, in the order of the runs. Which of them is best is the mean's to say, even where no test does."""
    task = TASKS[results["task"]]
    summaries = summarise(results)
    weights = np.array(results["data"]["weights"], float)
    best = max(summaries, key=lambda s: task.direction * s.quality.mean)
    if best.seeds < 2 or len(weights) < 2:
        return [Standing(s, None, False) for s in summaries]
    pairs = list(combinations(summaries, 2))
    ps = [difference(a.scores, b.scores, weights).p for a, b in pairs]
    behind = {}
    for (a, b), tests in zip(pairs, shares(ps), strict=True):
        if best in (a, b):
            other = b if a is best else a
            found = difference(task.direction * best.scores, task.direction * other.scores, weights, tests)
            low, high = max(found.low, -task.widest), min(found.high, task.widest)
            behind[other.method] = found._replace(low=low, high=high)
    return [
        Standing(s, behind.get(s.method), s.method in behind and behind[s.method].shown) for s in summaries
    ]


def verdict(results: dict[str, Any]) -> list[str]:
    """The conclusion in one sentence, then what it rests on, and what has no part in it."""
    return [*_verdict(results), *diverged(results)]


def _verdict(results: dict[str, Any]) -> list[str]:
    task = TASKS[results["task"]]
    found = standings(results)
    texts, seeds = len(results["data"]["weights"]), found[0].summary.seeds
    if len(found) < 2:
        return ["One method alone: there is nothing to compare it with."]
    if seeds < 2:
        return ["One seed shows no spread: no verdict follows; --seeds 3 would show one."]
    best = max(found, key=lambda s: task.direction * s.summary.quality.mean)
    level = [s for s in found if not s.worse]
    worse = [s for s in found if s.worse]
    judged = f"{texts:,} held-out {task.scored} and {seeds} seeds"
    if not worse:
        return [f"No difference follows from {judged}: {_told(found, best, task)}"]
    smallest = min(level, key=lambda s: s.summary.trainable_parameters)
    sentence = (
        f"{smallest.summary.method} is the smallest method as good as the best: {_costs(smallest, task)}"
    )
    if smallest.behind is None:
        sentence += "; it is the best."
    else:
        at_most = task.gap(max(0.0, smallest.behind.high))
        sentence += (
            f"; the best mean, {best.summary.method}'s, is {task.show(best.summary.quality.mean)}, with "
            f"{best.summary.trainable_parameters:,}: {smallest.summary.method} is at most {at_most} behind."
        )
    said = [sentence]
    said.append(
        f"Worse than {best.summary.method} by a paired test over {judged}: "
        + "; ".join(f"{s.summary.method} by {_apart(s.behind, task)}" for s in worse if s.behind)
        + "."
    )
    if len(level) > 1:
        said.append(f"No test tells from it: {_told(level, best, task)}")
    return said


def good_for(results: dict[str, Any]) -> dict[str, str]:
    """What each method is good for by these measurements, by its name: what it is first in, or what outdoes it."""
    found = standings(results)
    firsts: dict[str, Callable[[Summary], Spread]] = {
        "fewest parameters": lambda s: Spread(*3 * [s.trainable_parameters]),
        "quickest step": lambda s: s.step_seconds["auto"],
        "least memory": lambda s: s.peak_memory_bytes or Spread(0, 0, 0),
    }
    level = [s.summary for s in found if not s.worse]
    praise: dict[str, list[str]] = {s.summary.method: [] for s in found}
    if len(level) < len(found):
        praise[min(level, key=lambda s: s.trainable_parameters).method].append("smallest as good as the best")
    for reason, key in firsts.items():
        first, *rest = sorted((s.summary for s in found), key=lambda s: key(s).mean)
        if rest and key(first).high < _CLEARLY * min(key(s).low for s in rest):
            praise[first.method].append(reason)
    return {s.summary.method: ", ".join(praise[s.summary.method]) or _outdone(s, found) for s in found}


def _outdone(one: Standing, found: list[Standing]) -> str:
    """That it is worse than the best, or which method is smaller, no slower and not shown worse; or that none is."""
    if one.worse:
        return "worse than the best"
    for other in sorted(found, key=lambda s: s.summary.trainable_parameters):
        if (
            not other.worse
            and other.summary.trainable_parameters < one.summary.trainable_parameters
            and other.summary.step_seconds["auto"].mean <= one.summary.step_seconds["auto"].mean
        ):
            return f"{other.summary.method} is smaller, no slower and not shown worse"
    return "as good as the best, as far as shown"


def _costs(one: Standing, task: Task) -> str:
    s = one.summary
    memory = f", {s.peak_memory_bytes.high / 1e9:.2f} GB at its peak" if s.peak_memory_bytes else ""
    return (
        f"{task.show(s.quality.mean)} with {s.trainable_parameters:,} trainable parameters "
        f"({100 * s.trainable_share:.2g}% of the model), {s.step_seconds['auto'].mean * 1e3:.0f} ms a step{memory}"
    )


def _apart(behind: Difference, task: Task) -> str:
    number, unit = task.gap(behind.low).split()
    return f"{task.gap(behind.mean)} ({number} to {task.gap(behind.high).removesuffix(unit).rstrip()})"


def _told(level: list[Standing], best: Standing, task: Task) -> str:
    """The methods that no test tells from the best, and what would."""
    others = [s for s in level if s.behind]
    widest = max(others, key=lambda s: s.behind.mean if s.behind else 0.0)
    names = listed([f"{s.summary.method} ({_apart(s.behind, task)})" for s in others if s.behind])
    assert widest.behind is not None
    if widest.behind.mean <= 0:
        return f"{names} behind {best.summary.method}."
    said = f"{names} behind {best.summary.method}."
    needed = would_tell(widest.behind)
    if needed is None:
        return f"{said} No number of {task.scored} and seeds that could be had would show such a gap."
    more_texts, more_seeds = needed
    return (
        f"{said} If the gap to {widest.summary.method} is what it seems, about {more_texts:,} held-out {task.scored} "
        f"and {more_seeds:,} seeds would show it."
    )
