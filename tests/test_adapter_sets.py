"""Several sets of bottleneck adapters in one model: the one in use, rows that use different ones, and their files."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_fused, gpt2, randomise, with_lora
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_adapter_rows import batch, labelled, packing_of
from tolerances import assert_as_good_as
from torch import nn
from transformers import GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel

import fastpeft
from fastpeft import AdapterConfig
from fastpeft.adapters import CONFIG_FILE, WEIGHTS_FILE

#: Slots that sets share and slots of their own, in all layers or in one; shapes, activations and scales that differ.
SETS = {
    "default": [AdapterConfig(("post_attn", "post_mlp"), 4, "relu")],
    "a": [AdapterConfig(("post_attn", "post_block", "pre_head"), 7, "gelu", 0.5)],
    "b": [AdapterConfig(("post_mlp",), 3, "silu", layers=(1,)), AdapterConfig(("post_embed",), 5, "gelu_tanh", 2.0)],
}
APART = ["b", "default", "__base__", "a", "b", "default"]
TOGETHER = ["a", "a", "b", "b", "default", "__base__"]
ACTIVATIONS: dict[str, Any] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
IDS = torch.arange(2, 12)[None]


def with_sets(model: nn.Module, *names: str) -> nn.Module:
    """`model` with these sets, or all, none of which is zero."""
    for name in names or SETS:
        for config in SETS[name]:
            fastpeft.add_adapters(model, config, name)
    return randomise(model, "adapter").eval()


def transformer_of(model: nn.Module) -> Any:
    return next(m for name, m in model.named_modules() if name.split(".")[-1] == "transformer")


def hosts(transformer: Any, slot: str, layers: Any) -> list[nn.Module]:
    if slot in ("post_embed", "pre_head"):
        return [transformer.drop if slot == "post_embed" else transformer.ln_f]
    blocks = [transformer.h[i] for i in layers or range(len(transformer.h))]
    return [{"post_attn": b.attn, "post_mlp": b.mlp, "post_block": b}[slot] for b in blocks]


def alone(model: nn.Module, name: str) -> nn.Module:
    """A copy of an unpatched model where nothing but this set adapts anything, by the formula written out."""
    found = copy.deepcopy(model)
    transformer = transformer_of(found)
    for module in transformer.modules():
        module._forward_hooks.clear()
    for config in SETS.get(name, []):
        for host in (host for slot in config.slots for host in hosts(transformer, slot, config.layers)):
            adapter = host._modules["adapter" if name == "default" else f"adapter_{name}"]

            def adapt(_: Any, args: Any, output: Any, adapter: Any = adapter, config: Any = config) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                h = ACTIVATIONS[config.activation](x @ adapter.down.weight.T + adapter.down.bias)
                y = x + config.scale * (h @ adapter.up.weight.T + adapter.up.bias)
                return (y, *output[1:]) if isinstance(output, tuple) else y

            host.register_forward_hook(adapt)
    return found


def use(model: Any, name: str, lora: tuple[str, ...] = ()) -> nn.Module:
    """A model of `alone` with peft's adapter of this name, or none."""
    if name in lora:
        model.set_adapter(name)
        model.set_requires_grad(list(lora))
    elif lora:
        model.base_model.disable_adapter_layers()
        model.base_model.model.get_submodule("transformer").requires_grad_(False)
    return model


def rows_apart(stock: nn.Module, names: list[str], inputs: Any, lora: tuple[str, ...] = ()) -> dict[str, Any]:
    """Logits, and the gradients of the summed loss, of a batch whose rows are run by name, each alone."""
    counted = counts(inputs)
    logits: list[Any] = [None] * len(names)
    gradients: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        rows = [row for row, each in enumerate(names) if each == name]
        m = use(alone(stock, name), name, lora)
        output = m(**{key: value[rows] for key, value in inputs.items()})
        if output.loss.requires_grad:
            (output.loss * counted[rows].sum()).backward()
        for row, found in zip(rows, output.logits.detach(), strict=True):
            logits[row] = found
        for key, p in m.named_parameters():
            if p.grad is not None:
                gradients[key] = gradients.get(key, 0) + p.grad
    return {"logits": torch.stack(logits), **gradients}


def counts(inputs: Any) -> Any:
    labels = inputs["labels"]
    return (labels if labels.dim() == 1 else labels[:, 1:])[:, None].flatten(1) != -100


def together(model: nn.Module, names: list[str], inputs: Any) -> dict[str, Any]:
    with fastpeft.adapter_rows(model, names):
        output = model(**inputs)
    (output.loss * counts(inputs).sum()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_same(found: Any, stock: Any, truth: Any, read: Any = slice(None)) -> None:
    assert found.keys() == stock.keys() == truth.keys()
    assert_as_good_as(found["logits"][read], stock["logits"][read], truth["logits"][read].double(), "logits")
    of: dict[str, list[str]] = {}  # by set, or head: of a few numbers one draw compares luck
    for key in found.keys() - {"logits"}:
        of.setdefault(key.split(".")[-3], []).append(key)
    for what, keys in of.items():
        every = (torch.cat([each[key].flatten() for key in keys]) for each in (found, stock, truth))
        assert_as_good_as(*every, f"gradient of {what}")


HOW: dict[str, Any] = {"auto": {}, "layers": {"scope": "layers"}, "exact": {"exact": True}, "unpatched": None}


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_a_row_uses_the_set_of_its_name_alone(head, how, side):
    """As in a batch of the rows of that set, in outputs and in gradients, a shared head's included."""
    stock = with_sets(gpt2(head))
    inputs, names = labelled(batch(side), head), TOGETHER if side == "left" else APART
    found = copy.deepcopy(stock)
    if HOW[how] is not None:
        fastpeft.patch(found, **HOW[how])
    read = slice(None) if head is GPT2ForSequenceClassification else inputs["attention_mask"].bool()
    apart = [rows_apart(m, names, inputs) for m in (stock, copy.deepcopy(stock).double())]
    assert_same(together(found, names, inputs), *apart, read)
    if how != "unpatched":
        assert_fused(found, ("adapter",))
    if how == "auto":
        assert packing_of(found)[0] == "torch", packing_of(found)
        fastpeft.unpatch(found).zero_grad()
        assert_same(together(found, names, inputs), *apart, read)
