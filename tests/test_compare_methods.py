"""Each method trains exactly what it says, and starts from the base model's own output."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from models import gpt2
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

from fastpeft.compare import methods, preflight
from fastpeft.compare.arguments import Arguments
from fastpeft.compare.errors import BadInput
from fastpeft.compare.methods import PLACES
from fastpeft.compare.placement import apply, trainable, why_not
from fastpeft.compare.tasks import CLASSIFY, LM

#: Every place that makes sense for a task, and each kind with options of its own.
NAMES = {
    task: [name for name, place in PLACES.items() if not place.senseless or place.senseless[0] != task]
    for task in (CLASSIFY, LM)
}
OPTIONED = [
    "lora:r=2,layers=1", "lora-qkv:r=6,dropout=0", "lora-proj:layers=0-1", "lora-mlp:layers=0",
    "adapter-mlp:bottleneck=7,layers=1", "adapter-houlsby:layers=0", "adapter-head:bottleneck=2", "prefix:tokens=3",
]  # fmt: skip
CASES = [(task, name) for task in (CLASSIFY, LM) for name in NAMES[task]]
CASES += [(CLASSIFY, name) for name in OPTIONED] + [(LM, "prompt:tokens=3")]


def _model(task=CLASSIFY, **config):
    head = GPT2LMHeadModel if task == LM else GPT2ForSequenceClassification
    return gpt2(head, num_labels=3, n_positions=64, **config)


def _method(name, task=CLASSIFY):
    return Arguments(methods=(name,), task=task, rank=3, bottleneck=5).chosen[0]


def _refused(name, task=CLASSIFY):
    with pytest.raises(BadInput) as refusal:
        _method(name, task)
    return str(refusal.value)


@pytest.mark.parametrize("inner", [None, 40])
@pytest.mark.parametrize(("task", "name"), CASES)
def test_the_formula_counts_the_trainable_parameters(task, name, inner):
    method = _method(name, task)
    model = apply(method, _model(task, n_inner=inner), task)
    _, numbers = method.formula(model.config, task).split(" = ")
    assert eval(numbers.replace("·", "*")) == sum(p.numel() for p in trainable(model))


@pytest.mark.parametrize(("task", "name"), CASES)
def test_only_a_classifiers_head_and_what_the_method_names_trains(task, name):
    method = _method(name, task)
    model = apply(method, _model(task), task)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    part = {"lora": "lora_", "adapter": ".adapter.", "full": ""}.get(method.place.kind, "prompt_encoder")
    heads = {n for n in trained if "score" in n}
    assert len(heads) == (task == CLASSIFY)
    assert all(part in n for n in trained - heads)
    assert (trained == heads) == (name == "head")


@pytest.mark.parametrize(
    ("task", "name"), [case for case in CASES if "prefix" not in case[1] and "prompt" not in case[1]]
)
def test_training_starts_from_the_base_models_output(task, name):
    base = _model(task).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = base(ids).logits
        started = apply(_method(name, task), copy.deepcopy(base), task).eval()(input_ids=ids).logits
    assert torch.equal(started, expected)


def test_every_method_can_be_trained_but_a_prefix_where_peft_looks_for_a_renamed_argument(monkeypatch):
    state = torch.get_rng_state()
    takes = inspect.signature(GPT2Model.forward).parameters
    expected = set() if "past_key_values" in takes else {"prefix"}
    assert {name for name in NAMES[CLASSIFY] if why_not(_method(name), CLASSIFY)} == expected
    assert torch.equal(torch.get_rng_state(), state)
    for model in GPT2Model, GPT2ForSequenceClassification:
        monkeypatch.setattr(model, "forward", lambda self, input_ids=None, cache=None: None)
    assert "does not support past key values" in why_not(_method("prefix"), CLASSIFY)


PLACED = {
    "adapter-attn": {"h.0.attn.adapter", "h.1.attn.adapter"},
    "adapter-mlp": {"h.0.mlp.adapter", "h.1.mlp.adapter"},
    "adapter-mlp:layers=1": {"h.1.mlp.adapter"},
    "adapter-houlsby": {f"h.{i}.{part}.adapter" for i in (0, 1) for part in ("attn", "mlp")},
    "adapter-parallel": {"h.0.mlp.adapter", "h.1.mlp.adapter"},
    "adapter-block": {"h.0.adapter", "h.1.adapter"},
    "adapter-embed": {"drop.adapter"},
    "adapter-head": {"ln_f.adapter"},
    "lora": {
        f"h.{i}.{part}" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
    "lora-qkv": {"h.0.attn.c_attn", "h.1.attn.c_attn"},
    "lora-proj": {"h.0.attn.c_proj", "h.1.attn.c_proj"},
    "lora-mlp": {f"h.{i}.mlp.{part}" for i in (0, 1) for part in ("c_fc", "c_proj")},
    "lora-mlp:layers=1": {"h.1.mlp.c_fc", "h.1.mlp.c_proj"},
}


@pytest.mark.parametrize("name", PLACED)
def test_it_goes_where_its_name_says(name):
    model = apply(_method(name), _model(), CLASSIFY)
    found = {
        n.partition("transformer.")[2]
        for n, module in model.named_modules()
        if hasattr(module, "lora_A") or n.endswith(".adapter")
    }
    assert found == PLACED[name]


def test_options_reach_what_is_placed():
    model = apply(_method("lora-qkv:r=6,dropout=0.25"), _model(), CLASSIFY)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.lora_A["default"].weight.shape[0] == 6
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.scaling["default"] == 2


def test_defaults_hold_where_a_method_says_nothing_else():
    plain, own = Arguments(methods=("lora", "lora-mlp:r=2,layers=0"), rank=7, layers="1-3").chosen
    assert plain.options == {"r": 7, "dropout": 0.05, "layers": (1, 3)}
    assert own.options == {"r": 2, "dropout": 0.05, "layers": (0, 0)}


def test_a_list_of_methods_is_parted_at_names_not_at_options():
    assert methods.names(" head, lora: r=4,dropout=0.1 ,adapter-mlp:bottleneck=16,layers=6-11,prefix,") == (
        "head", "lora:r=4,dropout=0.1", "adapter-mlp:bottleneck=16,layers=6-11", "prefix"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ia3", "unknown method 'ia3': choose from head, lora"),
        ("lora:rank=4", "--methods lora:rank=4: no option 'rank': lora takes r, dropout, layers"),
        ("head:r=4", "no option 'r': head takes no options"),
        ("adapter-embed:layers=1", "no option 'layers': adapter-embed takes bottleneck"),
        ("lora:r=0", "r must be a whole number of at least 1, got '0'"),
        ("lora:r=1_0", "r must be a whole number of at least 1, got '1_0'"),
        ("lora:r=99999999999999999999", "r must be a whole number of at least 1"),
        ("lora:r=2,r=4", "--methods lora:r=2,r=4: r is given twice"),
        ("lora:r", "r must be a whole number of at least 1, got 'nothing'"),
        ("lora:dropout=1", "dropout must be a number from 0 up to, not including, 1, got '1'"),
        ("lora:layers=3-1", "layers must be a layer or a range of layers, like 6-11, got '3-1'"),
        ("prompt", "prompt makes no sense with --task classify, leave it out"),
    ],
)
def test_a_method_that_cannot_be_is_refused_by_name(name, message):
    assert message in _refused(name)


def test_a_language_model_has_no_head_of_its_own_to_train():
    assert (
        "head makes no sense with --task lm, leave it out: a language model's head is its token"
        in _refused("head", LM)
    )


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(BadInput, match="--methods lora:layers=1-2: no layer 2: the model has layers 0 to 1"):
        _method("lora:layers=1-2").layers(_model().config)


def test_the_same_method_under_two_names_is_refused():
    with pytest.raises(BadInput, match="each method once"):
        Arguments(methods=("lora", "lora:r=8"))
    asked = Arguments(methods=("lora", "head", "lora:layers=0-1"))
    with pytest.raises(BadInput, match="lora:layers=0-1 comes to the same as lora"):
        preflight.check_fit(asked, preflight.Shape(2, 64))
    preflight.check_fit(asked, preflight.Shape(3, 64))
