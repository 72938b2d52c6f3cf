"""A patched model computes what peft and the eager modules compute: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from models import (
    assert_as_good_over_draws,
    assert_fused,
    assert_stock,
    draws_of,
    gpt2,
    step,
    twins,
    with_adapters,
    with_lora,
)
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import fastpeft

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_parity(model, *, kinds=("lora",), length=9, draws=None, **options):
    """Patch `model` and hold its steps against its stock twin's, both against a float64 twin's."""
    draws = draws or draws_of(model)
    patched, stock, truth = twins(model)
    assert_stock(stock)
    assert_stock(truth)
    fastpeft.patch(patched, backend="torch", **options)
    assert_as_good_over_draws(
        (patched, stock, truth), lambda model, draw: step(model, seed=draw, length=length), draws
    )
    assert_stock(stock)
    assert_fused(patched, kinds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_lora_equals_peft(head, dtype):
    assert_parity(with_lora(gpt2(head)).to(dtype))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_lora_draws_pefts_own_masks(dtype, dropout):
    assert_parity(with_lora(gpt2(), lora_dropout=dropout).to(dtype), exact=True)


def test_exact_lora_equals_peft_on_a_16_bit_base_with_float32_factors():
    model = with_lora(gpt2().bfloat16(), lora_dropout=0.1)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert_parity(model, exact=True)


def test_fast_lora_rounds_float32_factors_and_still_matches_peft_with_rounded_factors():
    model = with_lora(gpt2().bfloat16())
    patched, stock, truth = twins(model)
    stock.bfloat16()  # the yardstick rounds the factors too
    fastpeft.patch(patched)

    def rounded(model, draw):
        result = step(model, seed=draw)
        return result if model is truth else {name: tensor.bfloat16() for name, tensor in result.items()}

    assert_as_good_over_draws((patched, stock, truth), rounded)
    assert_fused(patched, ("lora",))


@pytest.mark.parametrize(
    "targets",
    [["c_attn"], ["attn.c_proj"], ["mlp.c_proj"], ["c_fc"], ["c_proj"], "all-linear", r".*\.(c_fc|c_attn)"],
    ids=str,
)
def test_every_spelling_of_target_modules_is_fused(targets):
    assert_parity(with_lora(gpt2(), targets))


def test_lora_over_linear_layers_of_another_architecture():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=61, hidden_size=48, num_hidden_layers=2, ffn_dim=96, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=48, dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    assert_parity(with_lora(OPTForCausalLM(config), ["q_proj", "v_proj", "fc1", "fc2"]))


def test_square_projection_is_not_transposed():
    assert_parity(with_lora(gpt2(n_embd=64, n_layer=1), ["attn.c_proj"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_adapters_equal_the_eager_module(activation, dtype):
    model = with_adapters(
        gpt2(),
        "post_embed",
        "post_attn",
        "post_mlp",
        "post_block",
        "pre_head",
        activation=activation,
        scale=0.7,
    )
    assert_parity(model.to(dtype), kinds=("adapter",))


def test_adapters_and_lora_together():
    assert_parity(
        with_adapters(with_lora(gpt2(), lora_dropout=0.1), "post_mlp"), kinds=("lora", "adapter"), exact=True
    )


def test_gelu_in_one_pass_equals_gelu_new():
    model = gpt2(GPT2ForSequenceClassification)
    model.transformer.requires_grad_(False)
    assert_parity(model, kinds=("activation",))


@pytest.mark.parametrize("layers", [1, pytest.param(12, marks=pytest.mark.full)])
def test_lora_and_adapters_on_gpt2_small(layers):
    shape = {"n_layer": layers, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    model = with_adapters(
        with_lora(gpt2(**shape), r=8, lora_dropout=0.1), "post_attn", "post_mlp", bottleneck=64
    )
    assert_parity(model, kinds=("lora", "adapter"), length=17, draws=1, exact=True)


def test_lora_without_dropout_on_the_layers_of_gpt2_small():
    model = with_lora(gpt2(n_layer=2, n_embd=768, n_head=12), r=8)
    assert_parity(model, length=31, draws=1)


def test_base_weights_that_train_get_their_gradients():
    model = with_lora(gpt2())
    for name, parameter in model.named_parameters():
        if "c_attn.base_layer" in name or "mlp.c_proj.base_layer" in name:
            parameter.requires_grad_(True)
    assert_parity(model)


def test_a_patched_model_trains_then_loads_in_plain_peft_with_the_same_logits(tmp_path):
    from peft import PeftModel

    model = fastpeft.patch(with_lora(gpt2(), lora_dropout=0.1))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = step(model)["logits"]
    for _ in range(3):
        step(model)
        optimiser.step()
    assert_fused(model, ("lora",))
    fastpeft.unpatch(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert_stock(plain)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        trained = model.eval()(ids).logits
        assert torch.equal(plain(ids).logits, trained)
        assert not torch.allclose(fastpeft.patch(plain)(ids).logits, before[:1, :1].expand_as(trained))
        torch.testing.assert_close(plain(ids).logits, trained)
