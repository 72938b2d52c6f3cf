"""Batches that can't be packed: fused blocks on the caller's grid, with stock's masks, caches and attention."""

from __future__ import annotations

import copy

import pytest
import torch
from models import (
    assert_as_good_over_draws,
    assert_fused,
    checkpointing,
    draws_of,
    gpt2,
    with_adapters,
    with_lora,
)
from peft import PrefixTuningConfig, get_peft_model
from test_packing import batch, packing_row
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GPT2ForQuestionAnswering,
    GPT2Model,
    StaticCache,
)

import fastpeft
from fastpeft import packing


@pytest.fixture
def grids(monkeypatch):
    """The calls that took the grid, as they come."""
    taken = []

    class Counted(packing.Grid):
        def __new__(cls, *given):
            taken.append(cls)
            return super().__new__(cls, *given)

    monkeypatch.setattr(packing, "Grid", Counted)
    return taken


def padded(side="right", seed=0):
    return batch([9, 4, 6], side, seed, width=9)


def trained(model, inputs):
    """What a step gives, read everywhere: so that nothing can be packed."""
    model.train().zero_grad()
    output = model(**inputs)
    read = [t for t in output.to_tuple() if isinstance(t, torch.Tensor) and t.dim() > 1]
    sum(t.double().square().sum() for t in read).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**{f"output {i}": t.detach() for i, t in enumerate(read)}, **grads}


TRAINED = {
    "a bare model": lambda **how: with_lora(gpt2(GPT2Model, **how), task_type="FEATURE_EXTRACTION"),
    "a language model without labels": lambda **how: with_lora(gpt2(**how)),
    "question answering": lambda **how: with_lora(
        gpt2(GPT2ForQuestionAnswering, **how), task_type="QUESTION_ANS"
    ),
    "adapters": lambda **how: with_adapters(gpt2(GPT2Model, **how), "post_attn", "post_mlp"),
    "parallel adapters": lambda **how: with_adapters(gpt2(GPT2Model, **how), "parallel_mlp"),
}


@pytest.mark.fidelity(
    "padding that is read: no labels, question answering, a GPT2Model by itself",
    "fused blocks; attention, its masks and the batch's shape stay stock's",
)
@pytest.mark.parametrize(("side", "attention"), [("right", "sdpa"), ("left", "eager")])
@pytest.mark.parametrize("kind", TRAINED)
def test_training_where_all_is_read(kind, side, attention, grids):
    patched = TRAINED[kind](attn_implementation=attention, use_cache=False)
    stock, truth = copy.deepcopy(patched), copy.deepcopy(patched).double()
    fastpeft.patch(patched)
    draws = draws_of(patched)
    assert_as_good_over_draws(
        (patched, stock, truth), lambda model, draw: trained(model, padded(side, draw)), draws
    )
    assert len(grids) == draws
    if kind != "parallel adapters":  # which stay stock, beside layers that don't
        assert_fused(patched, ("adapter",) if kind == "adapters" else ("lora",))


GENERATED = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.fidelity(
    "generate with beams, a static cache, and padding or none", "fused blocks; the same tokens"
)
@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("how", GENERATED)
def test_generate(how, side, grids):
    stock = with_lora(gpt2()).eval()
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = padded("left")
    if side == "none":
        inputs = {"input_ids": padded()["input_ids"][:1]}
    given = {**inputs, **GENERATED[how], "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    asked = {"return_dict_in_generate": True, "output_logits": True}
    found, expected = (model.generate(**given, **asked) for model in (patched, stock))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert len(grids) >= 7 or (how == "no cache" and side == "none")
    assert_fused(patched, ("lora",))


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
    "of an encoder and a decoder": lambda config: EncoderDecoderCache(
        DynamicCache(config=config), DynamicCache(config=config)
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_hold_what_stocks_do(kind, grids):
    stock = with_lora(gpt2()).eval()
    patched = fastpeft.patch(copy.deepcopy(stock))
    ids, held = padded()["input_ids"], []
    for model in (patched, stock):
        cache = CACHES[kind](model.config)
        with torch.no_grad():
            parts = [
                model(input_ids=part, past_key_values=cache).logits for part in ids.split([4, 1, 4], dim=1)
            ]
        own = getattr(cache, "self_attention_cache", cache)
        held.append((parts, [(layer.keys, layer.values) for layer in own.layers], cache.get_seq_length()))
    torch.testing.assert_close(*held, rtol=1e-4, atol=1e-5)
    assert len(grids) == 3


@pytest.mark.fidelity("a cache of one's own class", "stock's blocks, their layers fused one by one")
def test_a_cache_of_ones_own_runs_stock(grids):
    class Own(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            return super().update(2 * key_states, value_states, layer_idx, *args, **kwargs)

    stock = with_lora(gpt2()).eval()
    patched = fastpeft.patch(copy.deepcopy(stock))
    results = []
    for model in (patched, stock):
        cache = Own(config=model.config)
        with torch.no_grad():
            results.append([model(input_ids=padded()["input_ids"][:, :4], past_key_values=cache).logits])
    torch.testing.assert_close(*results)
    assert not grids
    assert packing_row(patched)[2:4] == ("stock", "a cache that is a Own")


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_without_tokens_it_is_stocks_result_or_error(shape, grids):
    stock = with_lora(gpt2()).eval()
    found = []
    for model in (fastpeft.patch(copy.deepcopy(stock)), stock):
        try:
            found.append(str(model(input_ids=torch.ones(shape, dtype=torch.long)).logits.shape))
        except (RuntimeError, IndexError) as error:
            found.append(str(error))
    assert found[0] == found[1]
    assert not grids


@pytest.mark.fidelity("prefix tuning's gradient", "through fused blocks")
def test_prefix_tuning_trains_through_fused_blocks(grids):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    patched = get_peft_model(gpt2(), config)
    stock, truth = copy.deepcopy(patched), copy.deepcopy(patched).double()
    fastpeft.patch(patched)

    def outcome(model, draw):
        model.train().zero_grad()
        logits = model(**padded(seed=draw)).logits
        logits.double().square().sum().backward()
        (prompt,) = (p for p in model.parameters() if p.grad is not None)
        return {"logits": logits.detach(), "grad of prompt.weight": prompt.grad.clone()}

    assert_as_good_over_draws((patched, stock, truth), outcome, 4)
    assert len(grids) == 4


def test_given_embeddings_and_finished_masks(grids):
    stock = with_lora(gpt2(use_cache=False)).eval()
    patched = fastpeft.patch(copy.deepcopy(stock))
    inputs = padded()
    mask = (torch.ones(9, 9).tril()[None, None] * inputs["attention_mask"][:, None, None]).bool()
    mask |= torch.eye(9, dtype=torch.bool)
    given = {"inputs_embeds": stock.get_input_embeddings()(inputs["input_ids"]).detach()}
    for each in ({**given, "attention_mask": inputs["attention_mask"]}, {**inputs, "attention_mask": mask}):
        with torch.no_grad():
            torch.testing.assert_close(patched(**each).logits, stock(**each).logits, rtol=1e-4, atol=1e-5)
    assert len(grids) == 2


@pytest.mark.parametrize("look", ["a hook", "output_hidden_states", "output_attentions"])
def test_who_looks_in_between_sees_stock(look, grids):
    """Each module is called with what stock calls it with."""
    stock = with_lora(gpt2(attn_implementation="eager")).eval()
    patched = fastpeft.patch(copy.deepcopy(stock))
    found = []
    for model in (patched, stock):
        seen = []
        if look == "a hook":
            block = model.base_model.model.transformer.h[1]
            for module in block.modules():
                module.register_forward_hook(
                    lambda module, args, output, seen=seen: seen.append(type(module).__name__)
                )
        output = model(**padded(), use_cache=True, **({} if look == "a hook" else {look: True}))
        found.append((seen, len(output)))
    assert found[0] == found[1]
    assert not grids


def test_checkpointed_blocks_draw_and_compute_again(grids):
    model = with_lora(gpt2(GPT2Model, resid_pdrop=0.2), task_type="FEATURE_EXTRACTION", lora_dropout=0.3)
    results = []
    for checkpoints in (False, True):
        each = fastpeft.patch(copy.deepcopy(model)).train()
        if checkpoints:
            checkpointing(each.base_model.model)
        torch.manual_seed(4)
        each(**padded(), use_cache=False)[0].square().sum().backward()
        results.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*results)
    assert len(grids) == 2


def test_by_the_kernels(device, grids):
    model = with_lora(gpt2(n_layer=1)).eval().to(device)
    patched = fastpeft.patch(copy.deepcopy(model), backend="triton")
    ids = padded()["input_ids"][:2, :4].to(device)
    found, expected = [], []
    for each, logits in ((patched, found), (model, expected)):
        cache = DynamicCache(config=each.config)
        with torch.no_grad():
            for part in ids.split([3, 1], dim=1):
                logits.append(each(input_ids=part, past_key_values=cache).logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(grids) == 2
    assert_fused(patched, ("lora",), path="triton")


def test_a_hook_that_comes_before_checkpointed_blocks_run_again_is_called(grids):
    stock = with_lora(gpt2(GPT2Model), task_type="FEATURE_EXTRACTION")
    checkpointing(stock.base_model.model)
    patched, called = fastpeft.patch(copy.deepcopy(stock)), []
    for model in (patched, stock):
        loss = model.train()(**padded(), use_cache=False)[0].square().sum()
        layer = model.base_model.model.h[1].attn.c_attn
        layer.register_forward_hook(lambda *given, model=model: called.append(model is stock))
        loss.backward()
    assert called == [False, True]
    assert len(grids) == 1


def test_attention_drops_in_training_alone(grids):
    """All of it, so that masks of one's own make no difference."""
    stock = with_lora(
        gpt2(GPT2Model, attn_pdrop=1.0, attn_implementation="eager"), task_type="FEATURE_EXTRACTION"
    )
    patched = fastpeft.patch(copy.deepcopy(stock))
    found = []
    for training in (True, False):
        with torch.no_grad():
            dropped, expected = (m.train(training)(**padded(), use_cache=False)[0] for m in (patched, stock))
        torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-5)
        found.append(dropped)
    assert not torch.allclose(*found)
    assert len(grids) == 2
