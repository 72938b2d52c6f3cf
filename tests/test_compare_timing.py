"""Stock and patched steps are what they are called."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import gpt2, with_adapters
from transformers import GPT2ForSequenceClassification, TrainerControl, TrainerState

import fastpeft
from fastpeft.compare import timing, train


def _model():
    return with_adapters(gpt2(GPT2ForSequenceClassification, num_labels=2))


BATCHES = [
    {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "labels": torch.tensor([1, 0]),
    }
] * timing.BATCHES


def side_of(model):
    """What the report says that a model is."""
    rows = fastpeft.report(model)
    if all(row.path == "stock" and row.kind != "packing" for row in rows):
        return "stock"
    return "auto" if any(row.kind == "packing" for row in rows) else "layers"


def test_all_sides_take_equally_many_steps_and_the_model_is_left_stock(monkeypatch):
    sides = []
    step = timing._step

    def watched(model, *rest):
        sides.append(side_of(model))
        return step(model, *rest)

    monkeypatch.setattr(timing, "_step", watched)
    model = _model()
    seconds = timing.step_seconds(model, BATCHES, "torch", contextlib.nullcontext)
    assert seconds.steps == len(BATCHES)
    assert seconds.medians.keys() == {"stock", "layers", "auto"}
    assert seconds.unpacked is None
    # In turn: each batch is taken by all three, and each has each place as often as the others once all are warm.
    warm_up, *turns = zip(sides[::3], sides[1::3], sides[2::3], strict=True)
    assert len(turns) == len(BATCHES)
    assert {frozenset(turn) for turn in [warm_up, *turns]} == {frozenset(seconds.medians)}
    for place in zip(*turns, strict=True):
        assert {place.count(side) for side in seconds.medians} == {1}
    assert side_of(model) == "stock"


def test_the_median_is_taken_side_by_side(monkeypatch):
    def pretended(model, *_):
        for module in model.modules():
            if "_fastpeft" in module.__dict__:
                module._fastpeft.calls += 1
        return {"stock": 3.0, "layers": 2.0, "auto": 1.0}[side_of(model)]

    monkeypatch.setattr(timing, "_step", pretended)
    seconds = timing.step_seconds(_model(), BATCHES, "torch", contextlib.nullcontext)
    assert seconds.medians == {"stock": 3.0, "layers": 2.0, "auto": 1.0}


def test_why_no_step_was_packed_is_said():
    watched = [{**batch, "output_hidden_states": True} for batch in BATCHES]
    seconds = timing.step_seconds(_model(), watched, "torch", contextlib.nullcontext)
    mixed = timing.step_seconds(_model(), [*watched, *BATCHES], "torch", contextlib.nullcontext)
    assert seconds.unpacked == "output_hidden_states"
    assert mixed.unpacked is None


def test_a_patch_that_fuses_nothing_is_an_error_not_a_result(monkeypatch):
    monkeypatch.setattr(fastpeft, "patch", lambda model, **_: model)
    with pytest.raises(RuntimeError, match=r"0 fused calls in a (layers|auto) step"):
        timing.step_seconds(_model(), BATCHES, "torch", contextlib.nullcontext)


def test_an_auto_scope_that_is_the_layers_scope_is_an_error_not_a_result(monkeypatch):
    patch = fastpeft.patch
    monkeypatch.setattr(
        fastpeft, "patch", lambda model, backend, scope: patch(model, backend, scope="layers")
    )
    with pytest.raises(RuntimeError, match="fused calls in a auto step"):
        timing.step_seconds(_model(), BATCHES, "torch", contextlib.nullcontext)


def test_a_stock_side_that_is_still_patched_is_an_error_not_a_result(monkeypatch):
    monkeypatch.setattr(fastpeft, "unpatch", lambda model: model)
    with pytest.raises(RuntimeError, match="the stock side isn't stock"):
        timing.step_seconds(fastpeft.patch(_model()), BATCHES, "torch", contextlib.nullcontext)


@pytest.mark.parametrize(("steps", "judged"), [(50, [50]), (99, [99]), (100, [50, 100]), (201, [101, 201])])
def test_a_run_is_judged_at_its_end_and_half_way_where_that_is_far(steps, judged):
    pace, state, found = train._Pace(lambda step, steps: None), TrainerState(max_steps=steps), []
    for state.global_step in range(1, steps + 1):
        control = TrainerControl()
        pace.on_step_end(None, state, control)
        if control.should_evaluate:
            found.append(state.global_step)
    assert found == judged
