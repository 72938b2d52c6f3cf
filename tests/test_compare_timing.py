"""Stock and patched steps are what they are called."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import gpt2, with_adapters
from transformers import GPT2ForSequenceClassification

import fastpeft
from fastpeft.compare import timing


def _model():
    return with_adapters(gpt2(GPT2ForSequenceClassification, num_labels=2))


BATCHES = [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([1])}] * 2


def test_both_sides_take_equally_many_steps_and_the_model_is_left_stock(monkeypatch):
    sides = []
    step = timing._step

    def watched(model, *rest):
        sides.append({row.path for row in fastpeft.report(model)})
        return step(model, *rest)

    monkeypatch.setattr(timing, "_step", watched)
    model = _model()
    seconds = timing.step_seconds(model, BATCHES, "torch", contextlib.nullcontext)
    assert seconds.steps == timing.ROUNDS * len(BATCHES)
    assert sides.count({"stock"}) == sides.count({"torch"}) == len(sides) / 2
    # In turn: of each pair one is stock and one patched, and each goes first as often as the other.
    pairs = list(zip(sides[::2], sides[1::2], strict=True))
    assert all(first != second for first, second in pairs)
    assert [first for first, _ in pairs].count({"stock"}) == len(pairs) / 2
    assert all(row.path == "stock" for row in fastpeft.report(model))


def test_the_median_is_taken_side_by_side(monkeypatch):
    model = _model()

    def pretended(model, *_):
        patched = any(row.path != "stock" for row in fastpeft.report(model))
        for module in model.modules():
            if patched and "_fastpeft" in module.__dict__:
                module._fastpeft.calls += 1
        return 1.0 if patched else 3.0

    monkeypatch.setattr(timing, "_step", pretended)
    seconds = timing.step_seconds(model, BATCHES, "torch", contextlib.nullcontext)
    assert (seconds.stock, seconds.patched) == (3.0, 1.0)


def test_a_patch_that_fuses_nothing_is_an_error_not_a_result(monkeypatch):
    monkeypatch.setattr(fastpeft, "patch", lambda model, **_: model)
    with pytest.raises(RuntimeError, match="0 fused calls in a patched step"):
        timing.step_seconds(_model(), BATCHES, "torch", contextlib.nullcontext)


def test_a_stock_side_that_is_still_patched_is_an_error_not_a_result(monkeypatch):
    monkeypatch.setattr(fastpeft, "unpatch", lambda model: model)
    with pytest.raises(RuntimeError, match="the stock side isn't stock"):
        timing.step_seconds(fastpeft.patch(_model()), BATCHES, "torch", contextlib.nullcontext)
