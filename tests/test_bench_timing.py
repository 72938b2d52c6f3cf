"""bench/timing.py compares a layer with its baseline round by round, and no round that warms up."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

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


@pytest.mark.parametrize(
    ("most", "rounds"), [(1e9, timing.ROUNDS), (0, timing.FEWEST)], ids=["quick", "slow"]
)
def test_a_speedup_is_taken_within_its_round(most, rounds, monkeypatch):
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
    monkeypatch.setattr(timing, "MOST_SECONDS", most)
    layer, baseline = Takes(clock, lambda: clock.baseline / 2), Takes(clock, slower_each_time)
    timing.measure(benchmark, layer, baseline, torch.ones(1), "forward", ("eager", "warm"))
    assert len(set(stats.stats.data)) == rounds
    assert benchmark.extra_info["speedup"] == {"median": 2.0, "q20": 2.0, "q80": 2.0}


class Leaves(nn.Module):
    """A layer that says which of its parameter's accumulators are still alive, and marks each one it meets."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def accumulator(self):
        return self.weight.view_as(self.weight).grad_fn.next_functions[0][0]

    def forward(self, x: Tensor) -> Tensor:
        self.accumulator().metadata["met"] = True  # in vain where the graph below doesn't keep it
        y = self.weight * x
        self.accumulator().metadata["met"] = True
        return y


@pytest.mark.parametrize("phase", timing.PHASES)
def test_a_step_leaves_no_accumulator_alive(phase):
    """One made on another stream would break a capture."""
    layer, x = Leaves(), torch.ones(3, requires_grad=True)
    y = layer(x)
    assert "met" in layer.accumulator().metadata  # y keeps it
    del y
    step = timing._step(layer, x, phase, "eager")
    step()
    assert "met" not in layer.accumulator().metadata


@pytest.mark.parametrize("phase", timing.PHASES)
def test_a_graph_is_made_warmed_up_and_captured_on_one_side_stream(phase, monkeypatch):
    streams, at = [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))

    @contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: on(stream))

    class Layer(nn.Module):
        def forward(self, x):
            at.append(streams[-1] if streams else None)
            return x.exp()

    timing._step(Layer(), torch.ones(3, requires_grad=True), phase, "graph")
    assert len(at) == 5  # its shape, three to warm up, the capture
    assert len(set(map(id, at))) == 1
    assert at[0] is not None


@pytest.mark.gpu
@pytest.mark.parametrize("phase", timing.PHASES)
def test_a_graph_captures_after_the_same_layer_ran_eagerly(phase):
    layer, x = nn.Linear(16, 16, device="cuda"), torch.ones(4, 16, device="cuda", requires_grad=True)
    kept = layer(x)  # its accumulators are the default stream's, as long as it is kept
    timing._step(layer, x, phase, "eager")()
    del kept
    replay = timing._step(layer, x, phase, "graph")
    replay()
    torch.cuda.synchronize()
