"""Opt-in autotuning, with the clock replaced: what it measures, what it remembers, what it never touches."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_lora, draws_of, lora_arguments
from triton.runtime.errors import OutOfResources

import fastpeft
from fastpeft import routes
from fastpeft.kernels import launch, lora_linear, tiling, tuning
from fastpeft.projections import Projection
from fastpeft.routes import Options

X = torch.empty(100, 24)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Tuning as it is on a GPU that was opted in; `clock.times` are the durations that the next measurements take."""

    class Clock:
        def __init__(self):
            self.times = []
            self.calls = 0

        def __call__(self, call, return_mode):
            self.calls += 1
            call()
            return self.times[(self.calls - 1) % len(self.times)]

    clock = Clock()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "active", lambda x: not launch.recording())
    monkeypatch.setattr(tuning, "do_bench", clock)
    monkeypatch.setattr(tuning, "_decided", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    return clock


def test_the_fastest_candidate_is_measured_once_and_kept_on_disk(clock, monkeypatch):
    clock.times = [3.0, 1.0, 2.0]
    ran = []
    assert tuning.fastest("k", X, (1,), ["a", "b", "c"], ran.append) == "b"
    assert ran == ["a", "b", "c"]
    assert tuning.fastest("k", X, (1,), ["a", "b", "c"], ran.append) == "b"
    monkeypatch.setattr(tuning, "_decided", {})  # as a new process starts
    assert tuning.fastest("k", torch.empty(128, 24), (1,), ["a", "b", "c"], ran.append) == "b"
    assert clock.calls == 3
    tuning.fastest(
        "k", torch.empty(129, 24), (1,), ["a", "b", "c"], ran.append
    )  # the next power of two of rows
    assert clock.calls == 6


def test_within_a_graph_what_was_measured_before_is_taken_and_nothing_is_measured(clock, monkeypatch):
    clock.times = [3.0, 1.0]
    ran = []
    monkeypatch.setattr(tuning, "capturing", lambda x: True)
    assert tuning.fastest("k", X, (), ["a", "b"], ran.append) == "a"
    assert tuning.slower_than("op", (X,), (), ran.append, ran.append) is None
    assert ran == []
    monkeypatch.setattr(tuning, "capturing", lambda x: False)
    assert tuning.fastest("k", X, (), ["a", "b"], ran.append) == "b"
    monkeypatch.setattr(tuning, "capturing", lambda x: True)
    assert tuning.fastest("k", X, (), ["a", "b"], ran.append) == "b"
    assert ran == ["a", "b"]


def test_a_candidate_that_cant_be_built_is_passed_over(clock):
    clock.times = [1.0]

    def run(candidate):
        if candidate == "a":
            raise OutOfResources(2, 1, "shared memory")

    assert tuning.fastest("k", X, (), ["a", "b"], run) == "b"


def test_without_opting_in_the_tables_first_choice_runs_unmeasured():
    def run(candidate):
        raise AssertionError("measured")

    assert tuning.fastest("k", X, (), ["a", "b"], run) == "a"
    assert tuning.slower_than("op", (X,), (), run, run) is None


@pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter")
def test_tuning_changes_the_tiles_and_not_the_result(clock, monkeypatch):
    clock.times = [2.0, 2.0, 1.0]
    check_lora(lora_linear.lora_linear, draws_of(lora_arguments, 40, 24, 16, 3, "fp16", "cpu"), 0.0)
    x, weight, *_ = lora_arguments(40, 24, 16, 3, "fp16", "cpu").values()
    candidates = tiling.linear(x, weight, 3, False, False, False)
    assert clock.calls >= len(candidates) > 3


@pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter")
@pytest.mark.parametrize(("times", "path"), [([2.0, 1.0], "torch"), ([1.0, 2.0], "triton")])
def test_pytorch_serves_what_it_was_measured_to_do_faster(clock, monkeypatch, times, path):
    clock.times = times
    monkeypatch.setattr(tuning, "fastest", lambda kernel, x, key, candidates, run: candidates[0])
    choose = routes.choose
    monkeypatch.setattr(
        routes,
        "choose",
        lambda options, device: choose(Options("triton") if options == Options() else options, device),
    )
    x, weight, bias, a, b = lora_arguments(9, 24, 16, 3, "fp32", "cpu").values()
    a.requires_grad_()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    y, route = fastpeft.ops.routed_lora_linear(x, Projection(weight, bias, a, b, 1.0, 0.5), Options())
    assert route.path == path
    assert ("measured here" in route.reason) == (path == "torch")
    torch.set_rng_state(state)
    expected = fastpeft.lora_linear(x, weight, bias, a, b, 1.0, 0.5, backend="torch")
    assert torch.equal(y, expected) == (path == "torch")  # measuring drew nothing


@pytest.mark.skipif(not launch.INTERPRETED, reason="the CPU runs kernels only in the interpreter")
def test_a_named_backend_is_not_second_guessed(clock, monkeypatch):
    clock.times = [2.0, 1.0]
    monkeypatch.setattr(tuning, "slower_than", lambda *a: pytest.fail("measured"))
    monkeypatch.setattr(tuning, "fastest", lambda kernel, x, key, candidates, run: candidates[0])
    x, weight, bias, a, b = lora_arguments(9, 24, 16, 3, "fp32", "cpu").values()
    _, route = fastpeft.ops.routed_lora_linear(x, Projection(weight, bias, a, b, 1.0, 0.0), Options("triton"))
    assert route.path == "triton"
