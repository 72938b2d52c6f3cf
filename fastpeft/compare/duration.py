"""How long a comparison will take, before it begins and while it goes on."""

from __future__ import annotations

import copy
import time

import torch

from fastpeft.compare.timing import BATCHES, SIDES
from fastpeft.compare.train import Setting, enough_memory, evaluations, typical_batches

#: A pass forward takes about a third of a training step.
_FORWARD = 1 / 3


def estimate(runs: int, setting: Setting, device: torch.device) -> str:
    """`about 2 minutes` for so many runs: from a training step of the stock base model, all its weights training."""
    base, encoded, arguments = setting
    model = copy.deepcopy(base.model).to(device).train()
    batch = typical_batches(setting, device)[BATCHES // 2]
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        with enough_memory():
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            loss.item()  # waits for a GPU
        step = time.perf_counter() - began
    size = arguments.batch_size * arguments.accumulate
    steps = arguments.max_steps or arguments.epochs * len(encoded.train) / size
    judged = evaluations(steps) * _FORWARD * len(encoded.eval) / arguments.batch_size
    timed = len(SIDES) * (BATCHES + 1)
    run = step * (steps * arguments.accumulate + judged + timed)
    return _about(run * runs)


class Clock:
    """What is left of some runs, by how long the finished ones took."""

    def __init__(self, runs: int) -> None:
        self._began = time.monotonic()
        self._runs, self._done = runs, 0

    def left(self) -> str:
        """Called when a run has finished: `; about 2 minutes left`, or nothing after the last."""
        self._done += 1
        if self._done == self._runs:
            return ""
        each = (time.monotonic() - self._began) / self._done
        return f"; {_about(each * (self._runs - self._done))} left"


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"
