"""bench/timing.py compares a layer with its baseline round by round, and no round that warms up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import timing


class Takes(nn.Module):
    """A layer that takes as long as it is told, on a clock that nothing else moves."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.now += self.seconds()
        return x


def test_a_speedup_is_taken_within_its_round(monkeypatch):
    clock = SimpleNamespace(now=0.0, baseline=0.0)

    def slower_each_time():
        clock.baseline += 1.0
        return clock.baseline

    def pedantic(step, setup, rounds, warmup_rounds):
        for turn in range(-warmup_rounds, rounds):
            setup()
            began = timing.CLOCK()
            step()
            if turn >= 0:
                benchmark.stats.stats.data.append(timing.CLOCK() - began)

    stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
    benchmark = SimpleNamespace(pedantic=pedantic, extra_info={}, stats=stats)
    monkeypatch.setattr(timing, "CLOCK", lambda: clock.now)
    monkeypatch.setattr(timing, "SECONDS", 0)
    layer, baseline = Takes(clock, lambda: clock.baseline / 2), Takes(clock, slower_each_time)
    timing.measure(benchmark, layer, baseline, torch.ones(1), "forward", ("eager", "warm"), variant="half")
    assert len(set(stats.stats.data)) == timing.ROUNDS
    assert benchmark.extra_info["speedup"] == {"median": 2.0, "q20": 2.0, "q80": 2.0}
    assert benchmark.extra_info["variant"] == "half"
