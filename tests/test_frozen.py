"""Frozen linear layers beside LoRA and adapters: by oneDNN itself where that is faster, as stock elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from models import assert_as_good_over_draws, gpt2, step, twins, with_adapters, with_lora
from peft import IA3Config, PrefixTuningConfig, get_peft_model
from test_gemm import Products, needs_bfloat16, needs_onednn
from torch import nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft import gemm
from fastpeft.modules import FusedConv1D, FusedLinear

pytestmark = [
    needs_onednn,
    pytest.mark.filterwarnings("ignore:fastpeft.patch found nothing to fuse"),  # but for frozen layers
]


@pytest.fixture(autouse=True)
def any_machine_and_size(monkeypatch):
    monkeypatch.setattr(gemm, "_served", lambda dtype: gemm.ALL)
    monkeypatch.setattr(gemm, "SMALL", 1)


def frozen(model):
    return model.requires_grad_(False)


def patched(*layers):
    """Frozen layers, beside what alone would have them left as they are: something else to fuse."""
    fastpeft.patch(nn.ModuleList([*map(frozen, layers), NewGELUActivation()]))
    return nn.Sequential(*layers)


def rows(model):
    return [row for row in fastpeft.report(model) if row.kind == "frozen"]


def prefixed(model):
    return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


MODELS = {
    "adapters": (lambda: with_adapters(gpt2(), "post_attn", "post_mlp"), 9),
    "a prefix": (lambda: prefixed(gpt2()), 9),
    "LoRA in some layers": (lambda: with_lora(gpt2(), ["c_attn"]), 7),
    "LoRA in all but the head": (lambda: with_lora(gpt2()), 1),
    "IA3": (
        lambda: get_peft_model(
            gpt2(), IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
        ),
        9,
    ),
}


@pytest.mark.fidelity(
    "frozen linear layers on a CPU", "by oneDNN itself where that is faster, and so reported; else stock"
)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_stock_and_its_products_go_to_onednn(name):
    build, sites = MODELS[name]
    patched, stock, truth = twins(build())
    fastpeft.patch(patched)
    assert len(rows(patched)) == sites
    with Products() as onednn:
        step(stock)
        assert onednn.count == 0
        step(patched)
    assert onednn.count >= 2 * sites - 1  # forward and backward, but for the embeddings
    assert [row[2:] for row in rows(patched)] == [("torch", "oneDNN", 1)] * sites
    assert_as_good_over_draws((patched, stock, truth), step)


@needs_bfloat16
def test_bfloat16_layers_with_a_bias_go_to_onednn():
    patched, stock, truth = twins(with_adapters(gpt2(), "post_attn", "post_mlp").bfloat16())
    fastpeft.patch(patched, scope="layers")
    assert len(rows(patched)) == 8
    assert not any(row.name.endswith("lm_head") for row in rows(patched))
    assert_as_good_over_draws((patched, stock, truth), step)
    assert all(row.calls for row in rows(patched))


def test_what_trains_and_what_lora_and_adapters_hold_is_left_alone():
    model = with_adapters(with_lora(gpt2(), ["c_fc"]), "post_mlp")
    head = model.base_model.model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    fastpeft.patch(model)
    assert {row.name.split(".")[-1] for row in rows(model)} == {"c_attn", "c_proj"}
    assert type(head) is nn.Linear
    assert type(model.base_model.model.transformer.h[0].mlp.c_fc.base_layer) is Conv1D


def without_gelu():
    """A frozen model of which nothing else is fused when it generates."""
    return frozen(gpt2(n_layer=1, activation_function="relu")).eval()


def half(model):
    return model.half()


def unfreeze(model):
    return model.requires_grad_(True)


def without_onednn(model):
    torch.backends.mkldnn.enabled = False
    return model


ASIDE = {
    "oneDNN is off, or no faster at such products of torch.float16 on this cpu": half,
    "it trains": unfreeze,
    "oneDNN is off, or no faster at such products of torch.float32 on this cpu": without_onednn,
}


@pytest.mark.parametrize("reason", ASIDE)
def test_a_change_after_patch_gives_the_layer_back_to_stock(reason, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    model = fastpeft.patch(without_gelu(), scope="layers")
    stock = fastpeft.unpatch(copy.deepcopy(model))
    model, stock = (ASIDE[reason](each) for each in (model, stock))
    assert {row[2:] for row in rows(model)} == {("stock", reason, 0)}
    with torch.set_grad_enabled(reason == "it trains"):
        results = [each(torch.ones(2, 5, dtype=torch.long)).logits for each in (model, stock)]
    assert torch.equal(*results)
    assert {row[2:] for row in rows(model)} == {("stock", reason, 0)}
    assert not rows(fastpeft.patch(copy.deepcopy(model)))
    if reason == "it trains":
        for each, logits in zip((model, stock), results, strict=True):
            logits.sum().backward()
            assert all(p.grad is not None for p in each.parameters())


def test_exact_gives_them_back_to_stock():
    model = without_gelu()
    ids = torch.ones(2, 5, dtype=torch.long)
    stock = copy.deepcopy(model)
    fastpeft.patch(model)
    assert len(rows(model)) == 5
    fastpeft.patch(model, exact=True)
    assert not any(isinstance(m, FusedConv1D | FusedLinear) for m in model.modules())
    assert torch.equal(model(ids).logits, stock(ids).logits)


def test_autocast_stays_stock():
    model = without_gelu()
    ids = torch.ones(2, 5, dtype=torch.long)
    stock = copy.deepcopy(model)
    fastpeft.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids).logits, stock(ids).logits)
    assert {row[2:] for row in rows(model)} == {("stock", "autocast", 0)}


def second_derivative(layer, x):
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(dx.pow(2).sum(), x)[0]


def by_functional_gradient(layer, x):
    return torch.func.vmap(torch.func.grad(lambda row: layer(row).pow(2).sum()))(x)


def by_tracing(layer, x):
    return torch.jit.trace(layer, x)(x)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("use", [second_derivative, by_functional_gradient, by_tracing])
@pytest.mark.parametrize("layer", [Conv1D(6, 4), nn.Linear(4, 6)], ids=str)
def test_what_stock_layers_can_do(use, layer):
    layer = frozen(copy.deepcopy(layer))
    model = patched(copy.deepcopy(layer))
    x = torch.randn(3, 4)
    torch.testing.assert_close(use(model, x), use(layer, x))
    assert isinstance(model[0], FusedConv1D | FusedLinear)


def test_the_verdict_on_a_model_is_the_same_on_every_machine():
    for model in gpt2(n_layer=1, activation_function="relu"), nn.Sequential(nn.Linear(4, 6)):
        with pytest.raises(ValueError, match="can't fuse anything"):
            fastpeft.patch(frozen(model), strict=True, scope="layers")
        with pytest.warns(UserWarning, match="nothing to fuse"):
            fastpeft.patch(model)
        assert bool(rows(model)) == isinstance(model, GPT2LMHeadModel)  # whose packed calls run them too


@pytest.mark.parametrize("layer", [Conv1D(6, 4), nn.Linear(4, 6), nn.Linear(4, 6, bias=False)], ids=str)
def test_a_layer_takes_any_leading_dimensions_and_keeps_stocks_errors(layer):
    model = patched(copy.deepcopy(layer))
    assert type(model[0]) is (FusedConv1D if type(layer) is Conv1D else FusedLinear)
    for shape in ((4,), (3, 4), (2, 0, 4), (2, 3, 5, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), layer(x))
    for x in (torch.randn(2, 5), torch.ones(2, 4, dtype=torch.long), torch.tensor(1.0)):
        errors = []
        for each in (model, layer):
            with pytest.raises((RuntimeError, IndexError)) as raised:
                each(x)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]


def test_a_layer_that_was_moved_is_stocks():
    model = patched(Conv1D(6, 4))
    x = torch.randn(3, 4)
    model(x)
    model.to("meta")
    assert model(x.to("meta")).shape == (3, 6)
    reason = "oneDNN is off, or no faster at such products of torch.float32 on this meta"
    assert rows(model)[0][2:] == ("stock", reason, 1)


def test_with_avx2_alone_a_call_of_many_rows_is_stocks_and_one_of_few_isnt(monkeypatch):
    monkeypatch.setattr(gemm, "_served", lambda dtype: gemm.SOME)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = patched(nn.Linear(4, 6), nn.Linear(6, 2**14))
    stock = fastpeft.unpatch(copy.deepcopy(model))
    for shape, paths in (((2, 16, 4), ["torch", "torch"]), ((3, 11, 4), ["stock", "torch"])):
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), stock(x))
        assert [row.path for row in rows(model)] == paths


def test_a_head_that_sets_get_copies_of_is_plain_again():
    model = fastpeft.patch(frozen(gpt2(GPT2ForSequenceClassification)))
    assert isinstance(model.score, FusedLinear)
    fastpeft.add_adapters(model, fastpeft.AdapterConfig(), modules_to_save=["score"])
    assert "_fastpeft" not in vars(model.score)
    assert type(model.score.own_default) is nn.Linear


def test_small_layers_are_left_alone(monkeypatch):
    monkeypatch.setattr(gemm, "SMALL", 16 * 48 * 144)
    model = fastpeft.patch(frozen(gpt2(n_layer=1)))
    assert [row.name.split(".")[-1] for row in rows(model)] == ["c_attn", "c_fc", "c_proj"]
    assert "attn.c_proj" not in str(fastpeft.report(model))


def test_the_compiler_sees_stocks_products():
    model = patched(Conv1D(6, 4))
    graphs = []
    compiled = torch.compile(model, backend=lambda g, _: graphs.append(str(g.graph)) or g, fullgraph=True)
    x = torch.randn(3, 4)
    assert torch.equal(compiled(x), fastpeft.unpatch(copy.deepcopy(model))(x))
    assert ["addmm" in graph for graph in graphs] == [True]


def test_lora_added_after_patch_is_fused_by_the_next_and_unpatch_gives_all_back():
    model = frozen(gpt2())
    classes = [type(m) for m in model.modules()]
    fastpeft.patch(model)
    assert len(rows(model)) == 9
    tuned = with_lora(model)
    assert type(tuned.base_model.model.transformer.h[0].mlp.c_fc.base_layer) is FusedConv1D
    expected = step(copy.deepcopy(fastpeft.unpatch(copy.deepcopy(tuned))))
    fastpeft.patch(tuned)
    result = step(tuned)
    assert type(tuned.base_model.model.transformer.h[0].mlp.c_fc.base_layer) is Conv1D
    assert [row.kind for row in fastpeft.report(tuned)].count("lora") == 8
    assert all(row.path == "torch" and row.calls for row in fastpeft.report(tuned) if row.kind == "lora")
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)
    plain = fastpeft.unpatch(tuned.unload())
    assert isinstance(plain, GPT2LMHeadModel)
    assert [type(m) for m in plain.modules()] == classes
    assert not any("_fastpeft" in m.__dict__ for m in plain.modules())
