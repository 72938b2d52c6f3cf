"""Rows of one batch that use different adapters, against peft: its `adapter_names`, and each adapter by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import assert_fused, gpt2, randomise, with_lora
from peft import LoraConfig
from tolerances import assert_as_good_as
from torch import Tensor, nn
from transformers import (
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

import fastpeft
from fastpeft import ops
from fastpeft.projections import Grouped, Update
from fastpeft.routes import Options
from fastpeft.trunk import Trunk

#: Ranks, scalings and targets that differ; "b" is rank-stabilised, "c" isn't in c_attn and "d" is nowhere else.
OTHERS: dict[str, dict[str, Any]] = {
    "b": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["c_attn", "c_proj"]},
    "c": {"r": 2, "lora_alpha": 3, "target_modules": ["c_fc", "c_proj"]},
    "d": {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn"]},
}
APART = ["b", "default", "__base__", "c", "b", "d"]  # an adapter's rows lie apart
TOGETHER = ["b", "b", "default", "default", "c", "c"]
LENGTHS = [9, 4, 7, 1, 8, 3]
PADDED = pytest.mark.parametrize("side", [None, "right", "left"])


def model(head: Any = GPT2LMHeadModel, dropout: float = 0.0, **overrides: Any) -> nn.Module:
    """A GPT-2 with four adapters of different kinds, all of which train."""
    task = {GPT2LMHeadModel: "CAUSAL_LM", GPT2ForTokenClassification: "TOKEN_CLS"}.get(head, "SEQ_CLS")
    found: Any = with_lora(gpt2(head, **overrides), lora_dropout=dropout, task_type=task)
    for name, config in OTHERS.items():
        found.add_adapter(
            name, LoraConfig(task_type=task, fan_in_fan_out=True, lora_dropout=dropout, **config)
        )
    found.set_requires_grad([*OTHERS, "default"])
    return randomise(found, "lora_B").eval()


def batch(side: str | None, lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    """Rows of these lengths, padded on this side; all of the longest where there is none."""
    longest = max(lengths)
    ids = torch.randint(2, 61, (len(lengths), longest), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths if side else []):
        mask[row, slice(length, None) if side == "right" else slice(0, longest - length)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def labelled(inputs: dict[str, Tensor], head: Any) -> dict[str, Tensor]:
    if head is GPT2ForSequenceClassification:
        return {**inputs, "labels": torch.arange(len(inputs["input_ids"])) % 2}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = (ids % 2 if head is GPT2ForTokenClassification else ids).masked_fill(mask == 0, -100)
    if head is GPT2LMHeadModel:  # what follows the padding would be predicted from it
        labels[:, 1:][mask[:, :-1] == 0] = -100
    return {**inputs, "labels": labels}


def packing_of(patched: nn.Module) -> tuple[str, str]:
    (row,) = [row for row in fastpeft.report(patched) if row.kind == "packing"]
    return row.path, row.reason


@PADDED
@pytest.mark.parametrize("names", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification])
def test_adapter_names_as_peft_has_them(head, names, side):
    stock = model(head)
    patched, truth = fastpeft.patch(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    inputs = labelled(batch(side), head)
    with torch.no_grad():
        found = [m(**inputs, adapter_names=names) for m in (patched, stock, truth)]
    assert packing_of(patched)[0] == "torch", packing_of(patched)
    assert_fused(patched, ("lora",))
    read = slice(None) if head is GPT2ForSequenceClassification else inputs["attention_mask"].bool()
    assert_as_good_as(*(output.logits[read] for output in found), "logits")
    losses = [output.loss for output in found]
    assert_as_good_as(*losses[:2], losses[2].double(), "loss")  # of a language model's logits in float32


def test_rows_that_get_adapters_have_only_hooks_looked_at_anew(monkeypatch):
    """Not every module; and what trains is what trains by then."""
    patched: Any = fastpeft.patch(model())
    inputs = labelled(batch("right", [4, 6]), GPT2LMHeadModel)
    patched.set_requires_grad(list(OTHERS), False)
    patched(**inputs)
    inner: Any = next(m for m in patched.modules() if isinstance(m, GPT2Model))
    trunk = inner._fastpeft.trunk
    patched.set_requires_grad(list(OTHERS))
    before = len(set(trunk.trained()))
    monkeypatch.setattr(Trunk, "walk", lambda *_: pytest.fail("walked"))
    for names in (["default", "b"], ["c", "__base__"]):
        with fastpeft.adapter_rows(patched, names):
            patched(**inputs)
            assert packing_of(patched)[0] == "torch", packing_of(patched)
        patched(**inputs)
    assert before < len(set(trunk.trained())) == sum(p.requires_grad for p in inner.parameters())


def test_a_layer_that_is_held_twice_is_told_once():
    found: Any = model()
    layer = found.get_base_model().transformer.h[0].attn.c_attn
    found.again = layer
    with fastpeft.adapter_rows(found, ["default"]):
        assert len(layer._forward_pre_hooks) == 1
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_as_peft_does(beams):
    stock = model()
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = batch("left", [5, 3, 4, 5, 1, 2])
    given = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "adapter_names": APART}
    assert torch.equal(*(m.generate(**inputs, **given) for m in (patched, stock)))
    assert_fused(patched, ("lora",))


@pytest.mark.parametrize("scope", ["auto", "layers"])
@PADDED
@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_an_adapter_learns_from_its_rows_alone(head, side, scope):
    patched = assert_learns_alone(model(head), labelled(batch(side), head), APART, scope=scope)
    assert_fused(patched, ("lora",))


def test_an_adapter_learns_from_its_rows_alone_by_the_kernels(device):
    """In chains with LayerNorms, GELU and residuals, of a packed batch."""
    stock = model(n_layer=1).to(device)
    inputs = {key: t.to(device) for key, t in labelled(batch("right"), GPT2LMHeadModel).items()}
    patched = assert_learns_alone(stock, inputs, APART, backend="triton")
    assert packing_of(patched)[0] == "triton", packing_of(patched)
    assert_fused(patched, ("lora",), path="triton")
    rows = [row for row in fastpeft.report(patched) if "GELU included" in row.reason]
    assert [row.name.split(".")[-1] for row in rows] == ["c_fc", "c_proj", "act"], str(
        fastpeft.report(patched)
    )


def assert_learns_alone(
    stock: nn.Module, inputs: dict[str, Tensor], names: Sequence[str], **options: Any
) -> nn.Module:
    """An adapter's gradients are as in batches of only its rows, each under the one adapter, by peft."""
    patched, truth = fastpeft.patch(copy.deepcopy(stock), **options), copy.deepcopy(stock).double()
    counted = inputs["labels"].view(len(names), -1)
    counted = counted[:, counted.shape[1] > 1 :] != -100  # a language model's first label is nobody's
    with fastpeft.adapter_rows(patched.train(), names):
        loss = patched(**inputs).loss * counted.sum()
    loss.backward()
    for reference in (stock, truth):
        for name in dict.fromkeys(names):
            rows = [row for row, each in enumerate(names) if each == name]
            if name == "__base__":
                continue
            reference.set_adapter(name)
            own = {key: value[rows] for key, value in inputs.items()}
            (reference.train()(**own).loss * counted[rows].sum()).backward()
    gradients = [
        {name: p.grad for name, p in m.named_parameters() if "lora" in name} for m in (patched, stock, truth)
    ]
    for name in ("default", *OTHERS):
        every = [
            torch.cat([g.flatten() for key, g in each.items() if f".{name}." in key]) for each in gradients
        ]
        assert_as_good_as(*every, f"gradient of {name}")
    return patched


def test_adapters_without_rows_get_no_gradient():
    patched = fastpeft.patch(model())
    with fastpeft.adapter_rows(patched, ["b", "__base__"]):
        patched(**labelled(batch("right", [4, 6]), GPT2LMHeadModel)).loss.backward()
    having = {name.split(".")[-2] for name, p in patched.named_parameters() if p.grad is not None}
    assert having == {"b"}


def test_heads_go_with_their_rows():
    """Those that peft saves with an adapter, in training: each as in a batch of its rows alone."""
    stock: Any = with_lora(gpt2(GPT2ForSequenceClassification))
    stock.add_adapter("b", LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True))
    stock.set_requires_grad(["b", "default"])
    randomise(randomise(stock, "lora_B"), "modules_to_save.b")
    patched, truth = fastpeft.patch(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    names, inputs = ["b", "default", "b"], batch("right", [3, 8, 5])
    with fastpeft.adapter_rows(patched.train(), names):
        logits = patched(**inputs).logits
    logits.double().square().sum().backward()
    assert packing_of(patched)[0] == "torch", packing_of(patched)
    apart = []
    for m in (stock, truth):
        outputs = torch.empty(3, 2, dtype=next(m.parameters()).dtype)
        for name in ("b", "default"):
            m.set_adapter(name)
            rows = [row for row, each in enumerate(names) if each == name]
            found = m.train()(**{key: value[rows] for key, value in inputs.items()}).logits
            found.double().square().sum().backward()
            outputs[rows] = found.detach()
        apart.append(outputs)
    assert_as_good_as(logits, *apart, "logits")
    heads = [
        torch.stack([p.grad for n, p in m.named_parameters() if "modules_to_save" in n])
        for m in (patched, stock, truth)
    ]
    assert_as_good_as(*heads, "gradients of the heads")


def test_each_adapter_drops_by_its_own_law():
    """Of y = keep / (1 - p), with every factor the identity."""
    x, eye, zeros = torch.ones(3, 200, 64), torch.eye(64), torch.zeros(64, 64)
    laws = (0.0, 0.2, 0.75)
    layer = Grouped(zeros, None, [Update(eye, eye, 1.0, p) for p in laws], (0, 200, 400, 600))
    masks = []
    for _ in range(2):
        y, _ = ops.routed_lora_linear(x, layer, Options())
        for i, p in enumerate(laws):
            assert set(y[i].unique().tolist()) == {0.0, 1 / (1 - p)} - ({0.0} if p == 0.0 else set())
            assert abs((y[i] == 0).double().mean().item() - p) < 5 * (p * (1 - p) / 12800) ** 0.5 + 1e-12
        masks.append(y != 0)
    agree = (masks[0] == masks[1])[1:].double().mean((1, 2))
    for share, p in zip(agree.tolist(), laws[1:], strict=True):  # two draws know nothing of each other
        assert abs(share - (p**2 + (1 - p) ** 2)) < 0.03


def test_dropout_in_training_keeps_gradients_and_values_together():
    """A gradient of the drawn function: the loss is linear in one lora_B, whose gradient then gives its share."""
    patched = fastpeft.patch(model(dropout=0.3))
    inputs = labelled(batch("right"), GPT2LMHeadModel)
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        with fastpeft.adapter_rows(patched.train(), APART):
            losses.append(patched(**inputs).loss)
    assert losses[0] == losses[1]
    b = patched.base_model.model.transformer.h[0].attn.c_attn.lora_B["d"].weight
    losses[0].backward()
    step, slopes = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            b += sign * step * b.grad / b.grad.norm()
        torch.manual_seed(5)
        with fastpeft.adapter_rows(patched, APART):
            slopes.append(sign * patched(**inputs).loss.item())
        with torch.no_grad():
            b -= sign * step * b.grad / b.grad.norm()
    assert sum(slopes) / (2 * step) == pytest.approx(b.grad.norm().item(), rel=0.02)


def test_second_derivatives():
    stock = model(attn_implementation="eager")
    patched, truth = fastpeft.patch(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    inputs, found = batch(None, [5, 5, 5]), []
    for m in (patched, stock, truth):
        factors = [
            p for n, p in m.named_parameters() if ".c_attn.lora" in n and ".d." not in n and ".c." not in n
        ]
        given = {"adapter_names": ["b", "default", "b"]}
        first = torch.autograd.grad(m(**inputs, **given).logits.square().mean(), factors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), factors)
        found.append(torch.cat([g.flatten() for g in second]))
    assert_as_good_as(*found, "second derivatives")
    assert_fused(patched, ("lora",))


def test_wide_factors_on_a_16_bit_base():
    stock = model().to(torch.bfloat16)
    for name, parameter in stock.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    patched, truth = fastpeft.patch(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    inputs = batch("right")
    with torch.no_grad():
        found = [m(**inputs, adapter_names=APART).logits for m in (patched, stock, truth)]
    assert_fused(patched, ("lora",))
    assert_as_good_as(*found, "logits")


def test_the_next_call_without_names_uses_the_active_adapter():
    stock = model()
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = labelled(batch("right"), GPT2LMHeadModel)
    for given in ({"adapter_names": APART}, {}, {"adapter_names": TOGETHER}, {}):
        with torch.no_grad():
            assert torch.allclose(*(m(**inputs, **given).loss for m in (patched, stock)))
        assert packing_of(patched)[0] == "torch", packing_of(patched)


@pytest.mark.parametrize("lora_around", [True, False])
def test_what_else_takes_names_runs_stock(lora_around):
    targets = {"target_modules": ["c_attn", "wte"]} if lora_around else {"modules_to_save": ["wte"]}
    stock: Any = with_lora(gpt2(tie_word_embeddings=False), **targets)
    stock.add_adapter("b", stock.peft_config["default"])
    randomise(stock, "lora_").eval()
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = labelled(batch("right", [4, 6]), GPT2LMHeadModel)
    with torch.no_grad():
        assert torch.allclose(*(m(**inputs, adapter_names=["b", "default"]).loss for m in (patched, stock)))
    assert packing_of(patched) == (
        "stock",
        "adapter_names for what isn't a LoRA layer that fastpeft fuses",
    )


def test_dora_is_peft_to_refuse():
    patched = model()
    patched.add_adapter("dora", LoraConfig(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True))
    fastpeft.patch(patched)
    with pytest.raises(ValueError, match="when DoRA is enabled"), torch.no_grad():
        patched(**batch(None, [4, 4]), adapter_names=["dora", "b"])


def test_errors_before_anything_runs():
    patched = fastpeft.patch(model())
    inputs = batch(None, [4, 4])
    assert_refused(patched, ["y", "b", "x"], "no adapter is named x, y: the model has b, c, d, default")
    assert_refused(patched, "b", "sequence of adapters' names")
    with fastpeft.adapter_rows(patched, ["b", "c"]):
        assert_refused(patched, ["b", "c"], "have adapters already")
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            patched(**batch(None, [4, 4, 4]))
        patched(**inputs)
    for module in patched.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert_refused(patched, ["b", "c"], "gradient_checkpointing_disable")
    assert not any(m._forward_pre_hooks for m in patched.modules())
    assert_refused(gpt2(), ["b"], "the model has none")


@pytest.mark.parametrize("names", [{"b", "c"}, {"b": 1, "c": 2}, (name for name in "bc"), None])
def test_names_without_an_order_are_refused(names):
    assert_refused(model(), names, "names must be a sequence of adapters' names")


def test_contexts_that_overlap_leave_compilation_as_it_was():
    """It is one for the process: the first may end while a second, of another model or thread, goes on."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def doubled(x: Tensor) -> Tensor:
        return x + x

    first, second = (fastpeft.adapter_rows(gpt2_with_one(), ["default"]) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    doubled(torch.ones(2))
    assert not graphs
    second.__exit__(None, None, None)
    doubled(torch.ones(2))
    assert len(graphs) == 1


def gpt2_with_one() -> nn.Module:
    return with_lora(gpt2(n_layer=1))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_exact_draws_the_masks_of_peft(dropout):
    """Which goes through the names in no order of theirs; so such a call is peft's own."""
    stock = model(dropout=dropout)
    patched = fastpeft.patch(copy.deepcopy(stock), exact=True)
    inputs, found = labelled(batch("right"), GPT2LMHeadModel), []
    for m in (patched, stock):
        torch.manual_seed(4)
        with fastpeft.adapter_rows(m.train(), APART):
            loss = m(**inputs).loss
        loss.backward()
        found.append([loss, *(p.grad for p in m.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found)
    reasons = {row.reason for row in fastpeft.report(patched) if row.kind == "lora" and row.path == "stock"}
    if dropout:
        assert reasons == {
            "exact=True keeps peft's masks, which it draws for one adapter after another, of a set"
        }
        with torch.no_grad(), fastpeft.adapter_rows(patched.eval(), APART):
            patched(**inputs)
    assert_fused(patched, ("lora",))


def assert_refused(model: nn.Module, names: Any, words: str) -> None:
    context = fastpeft.adapter_rows(model, names)
    with pytest.raises((TypeError, ValueError), match=words), context:
        pass


def test_unpatched_models_too():
    """Hooks of peft's own are all that it takes, so that the same loop runs before `patch` and after `unpatch`."""
    stock, inputs = model(), labelled(batch("right"), GPT2LMHeadModel)
    losses = []
    for m in (stock, fastpeft.patch(copy.deepcopy(stock))):
        with fastpeft.adapter_rows(m.train(), APART):
            losses.append(m(**inputs).loss)
    assert torch.allclose(*losses)
