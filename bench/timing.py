"""How microbenchmarks are timed: by the host's clock on the CPU, by events in the stream on CUDA."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, WARM_UP = (100, 10) if DEVICE == "cuda" else (15, 2)
SECONDS = 0 if DEVICE == "cuda" else 1  # that the rounds of one benchmark last, at least
MOST_SECONDS, FEWEST = 20, 5  # that they last, unless so many rounds last longer
PHASES = ("forward", "forward+backward")
#: How kernels are launched, and what L2 holds: on CUDA one by one or by a graph, after a use or a flush.
STATES = [(run, l2) for run in ("eager", "graph") for l2 in ("warm", "cold")]
if DEVICE == "cpu":
    STATES = [("eager", "warm")]


class Instant:
    """A point in CUDA's stream; the difference of two is seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


CLOCK: Callable[[], Any] = Instant if DEVICE == "cuda" else time.perf_counter


def graphed(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """The step that `make` returns, as a CUDA graph: calling it replays the kernels, without the host's share.

    Made, warmed up and captured on one side stream: autograd's accumulators remember the stream they were made on, and
    one that is still alive from another stream would break the capture.
    """
    gc.collect()  # accumulators that only a cycle holds
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = make()
        for _ in range(3):  # a capture wants what it runs compiled, and its memory allocated
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def flush_l2() -> None:
    """Fill L2 with something else (it is 50 MB on an H100)."""
    torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()


def measure(
    benchmark: Any,
    layer: nn.Module,
    baseline: nn.Module,
    x: Tensor,
    phase: str,
    state: tuple[str, str],
) -> None:
    """Have pytest-benchmark time `layer` on x in a phase and a state.

    Before each round the baseline has its turn, so that a slow moment meets both: `speedup` is taken round by round.
    """
    run, l2 = state
    x.requires_grad_()
    timed, other = (_step(each, x, phase, run) for each in (layer, baseline))
    cool = flush_l2 if l2 == "cold" else lambda: None
    theirs: list[float] = []

    def setup() -> None:
        cool()
        began = CLOCK()
        other()
        theirs.append(CLOCK() - began)
        cool()

    timed()
    began = time.perf_counter()
    timed()
    took = time.perf_counter() - began
    rounds = max(FEWEST, min(max(ROUNDS, round(SECONDS / took)), round(MOST_SECONDS / took)))
    benchmark.pedantic(timed, setup=setup, rounds=rounds, warmup_rounds=min(WARM_UP, rounds // FEWEST))
    ours = benchmark.stats.stats.data
    speedup = record.spread([a / b for a, b in zip(theirs[-rounds:], ours, strict=True)])
    benchmark.extra_info["speedup"] = speedup


def about(phase: str, state: tuple[str, str]) -> dict[str, str]:
    """What a row of the record says of a phase and a state."""
    run, l2 = state
    return {"phase": phase, "device": DEVICE, "run": run, "l2": l2}


def _step(layer: nn.Module, x: Tensor, phase: str, run: str) -> Callable[[], Any]:
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def make() -> Callable[[], None]:
        dy = torch.randn_like(layer(x))

        def step() -> None:
            y = layer(x)
            if phase == "forward+backward":
                torch.autograd.grad(y, inputs, dy)

        return step

    return graphed(make) if run == "graph" else make()
