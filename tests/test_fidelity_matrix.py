"""What is done to a model, over every head, padding, scope, mode and attention: patched equals stock in each cell.

`PACKS` says which cells run on packed tokens; docs/fidelity.md shows it.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import describe, pairwise
from models import assert_stock, gpt2, randomise, with_adapters, with_lora
from test_packing import batch
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

import fastpeft

HEADS = {
    head.__name__: head
    for head in (
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        GPT2DoubleHeadsModel,
        GPT2ForTokenClassification,
        GPT2ForQuestionAnswering,
        GPT2Model,
    )
}
LENGTHS = {"none": [12, 12, 12], "right": [12, 4, 9], "left": [12, 4, 9], "one row": [7]}
#: Heads that, with labels that count at no hidden position, read no padding.
KNOWN = list(HEADS)[:4]


def packs(head: str, padding: str, scope: str) -> bool:
    """Whether a cell's batch runs on packed tokens, as far as head and scope decide it."""
    return scope != "exact" and (padding == "none" or scope == "model" or head in KNOWN)


def two_adapters(model):
    model.add_adapter("more", copy.deepcopy(model.peft_config["default"]))
    randomise(model, ".more.")
    model.base_model.set_adapter(["default", "more"])


def without_adapter(model):
    model.base_model.disable_adapter_layers()


def hooked(model):
    transformer_of(model).h[0].register_forward_hook(lambda module, args, output: output * 1.5)


def base_hooked(model):
    transformer_of(model).h[1].mlp.c_fc.base_layer.register_forward_hook(lambda module, args, y: y * 1.5)


def edited(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def unfrozen(model):
    transformer_of(model).h[1].mlp.c_proj.base_layer.weight.requires_grad_(True)


def scaled(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 0.5


def checkpointed(model):
    transformer_of(model).gradient_checkpointing_enable({"use_reentrant": False})


#: What is done after patching, whether LoRA layers stay fused, and whether packing stays possible.
DONE = {
    "nothing": (lambda model: None, True, True),
    "two active adapters": (two_adapters, True, True),
    "adapters disabled": (without_adapter, False, True),
    "adapters merged": (lambda model: model.merge_adapter(), False, True),
    "a hook on a block": (hooked, True, False),
    "a hook on a base layer": (base_hooked, None, False),
    "weights edited in place": (edited, True, True),
    "a base weight unfrozen": (unfrozen, True, True),
    "scaling changed": (scaled, True, True),
    "gradient checkpointing": (checkpointed, True, True),
}
CELLS = list(
    pairwise(
        done=list(DONE),
        head=list(HEADS),
        padding=list(LENGTHS),
        scope=["auto", "model", "exact"],
        training=[True, False],
        attention=["sdpa", "eager"],
        adapters=[True, False],
    )
)


def transformer_of(model):
    return next(m for m in model.modules() if isinstance(m, GPT2Model))


def arguments(head, inputs, scope):
    """Labels that count where neither they nor the position before is hidden."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    shown = mask & F.pad(mask[:, :-1], (1, 0))
    first = inputs["attention_mask"].argmax(1)
    if head == "GPT2ForSequenceClassification":
        return {"labels": ids[:, 0] % 2}
    if head == "GPT2ForTokenClassification":
        return {"labels": (ids % 2).masked_fill(~mask, -100)}
    if head == "GPT2ForQuestionAnswering":  # its loss reads the padding
        return {} if scope == "model" else {"start_positions": first, "end_positions": first + 1}
    if head == "GPT2Model":
        return {}
    labels = {"labels": ids.masked_fill(~shown, -100)}
    return labels | ({"mc_token_ids": first + 2} if head == "GPT2DoubleHeadsModel" else {})


def outcome(model, inputs, given, training, only_shown):
    model.train(training).zero_grad()
    with torch.set_grad_enabled(training):
        output = model(**inputs, **given, use_cache=False)
    shown = inputs["attention_mask"].bool()
    tensors = {name: t for name, t in output.items() if torch.is_tensor(t)}
    if only_shown:
        tensors = {n: t[shown] if t.shape[:2] == shown.shape else t for n, t in tensors.items()}
    if training:
        total = sum(t.sin().sum() for t in tensors.values())
        if total.requires_grad:  # merged adapters take no part
            total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach() for n, t in tensors.items()} | grads


@pytest.mark.parametrize("cell", CELLS, ids=describe)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.filterwarnings("ignore:Already|.*merge")
def test_patched_equals_stock(cell):
    done, head, padding, scope = (cell[name] for name in ("done", "head", "padding", "scope"))
    do, fused, packable = DONE[done]
    model = with_lora(
        gpt2(
            HEADS[head],
            attn_implementation=cell["attention"],
            classifier_dropout=0.0,
            summary_type="cls_index",
            summary_first_dropout=0.0,
        ),
        task_type=None,
    )
    model = (with_adapters(model, "post_mlp") if cell["adapters"] else model).double()
    stock, patched = copy.deepcopy(model), copy.deepcopy(model)
    if scope == "exact":
        fastpeft.patch(patched, exact=True)
    else:
        fastpeft.patch(patched, scope=scope)
    inputs = batch(LENGTHS[padding], "left" if padding == "left" else "right")
    given = arguments(head, inputs, scope)
    packed = packable and packs(head, padding, scope)
    results = []
    for each in (patched, stock):
        do(each)
        results.append(outcome(each, inputs, given, cell["training"], packed))
    assert_stock(stock)
    torch.testing.assert_close(*results)
    rows = {kind: [] for kind in ("packing", "lora")}
    for row in fastpeft.report(patched):
        rows.setdefault(row.kind, []).append(row)
    if scope != "exact":
        [row] = rows["packing"]
        assert (row.path, row.calls) == (("torch", 1) if packed else ("stock", 0)), row
    paths = {row.path for row in rows["lora"]}
    assert paths == ({"torch"} if fused else {"torch", "stock"} if fused is None else {"stock"}), rows["lora"]
