"""Each method trains exactly what it says, and starts from the base model's own output."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
from models import gpt2
from transformers import GPT2ForSequenceClassification, GPT2Model

from fastpeft.compare.arguments import Arguments
from fastpeft.compare.methods import METHODS, trainable, why_not

ARGUMENTS = Arguments(Path("out"), rank=3, bottleneck=5)


def _model(**config):
    return gpt2(GPT2ForSequenceClassification, num_labels=3, **config)


@pytest.mark.parametrize("inner", [None, 40])
@pytest.mark.parametrize("name", METHODS, ids="method-{}".format)
def test_the_formula_counts_the_trainable_parameters(name, inner):
    model = METHODS[name].apply(_model(n_inner=inner, n_positions=64), ARGUMENTS)
    _, numbers = METHODS[name].formula(model.config, ARGUMENTS).split(" = ")
    expected = sum(p.numel() for p in trainable(model))
    assert eval(numbers.replace("·", "*")) == expected


@pytest.mark.parametrize("name", METHODS, ids="method-{}".format)
def test_only_the_head_and_what_the_method_names_trains(name):
    model = METHODS[name].apply(_model(n_positions=64), ARGUMENTS)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    part = {"head": None, "lora": "lora_", "prefix": "prompt_encoder", "full": ""}.get(name, ".adapter.")
    heads = {n for n in names if "score" in n}
    assert len(heads) == 1
    assert all(part is not None and part in n for n in names - heads)
    assert (names == heads) == (name == "head")


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"prefix"}), ids="method-{}".format)
def test_training_starts_from_the_base_models_output(name):
    base = _model().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = base(ids).logits
        started = METHODS[name].apply(copy.deepcopy(base), ARGUMENTS).eval()(input_ids=ids).logits
    assert torch.equal(started, expected)


def test_every_method_can_be_trained_but_a_prefix_where_peft_looks_for_a_renamed_argument(monkeypatch):
    state = torch.get_rng_state()
    takes = inspect.signature(GPT2Model.forward).parameters
    expected = set() if "past_key_values" in takes else {"prefix"}
    assert {name for name in METHODS if why_not(name)} == expected
    assert torch.equal(torch.get_rng_state(), state)
    for model in GPT2Model, GPT2ForSequenceClassification:
        monkeypatch.setattr(model, "forward", lambda self, input_ids=None, cache=None: None)
    assert "does not support past key values" in why_not("prefix")


def test_adapters_go_where_their_method_says():
    places = {
        "adapter-attn": ["h.0.attn.adapter", "h.1.attn.adapter"],
        "adapter-mlp": ["h.0.mlp.adapter", "h.1.mlp.adapter"],
        "adapter-block": ["h.0.adapter", "h.1.adapter"],
        "adapter-embed": ["drop.adapter"],
        "adapter-head": ["ln_f.adapter"],
    }
    for name, expected in places.items():
        model = METHODS[name].apply(_model(), ARGUMENTS)
        found = [n for n, _ in model.transformer.named_modules() if n.endswith("adapter")]
        assert sorted(found) == expected
