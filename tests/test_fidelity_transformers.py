"""Whatever transformers does with a model, the patched model does too."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models import assert_fused, assert_stock, checkpointing, gpt2, randomise, step, with_adapters, with_lora
from torch import nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, Trainer, TrainingArguments

import fastpeft

IDS = torch.arange(2, 14).view(2, 6)


def pair(head=GPT2LMHeadModel, lora=None, **overrides):
    """A model with LoRA and adapters, patched exactly, and its stock twin, both in eval mode."""
    model = with_adapters(with_lora(gpt2(head, **overrides), **(lora or {})), "post_attn", "post_mlp").eval()
    return fastpeft.patch(copy.deepcopy(model), exact=True), model


@pytest.mark.fidelity("generate, greedy and sampled, with and without a cache", "fused")
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"do_sample": True}, {"num_beams": 2}], ids=str
)
def test_generate(options):
    texts = []
    for model in pair():
        torch.manual_seed(0)
        texts.append(
            model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, **options)
        )
    assert texts[0].shape[1] > IDS.shape[1]
    assert torch.equal(*texts)


@pytest.mark.fidelity("output_hidden_states and output_attentions", "fused")
@pytest.mark.parametrize("when", ["asked before patch", "asked after patch"])
def test_hidden_states_and_attentions(when):
    model = with_adapters(with_lora(gpt2(attn_implementation="eager")), "post_attn", "post_block").eval()
    asked = {"output_hidden_states": True, "output_attentions": True}
    if when == "asked before patch":
        model(IDS, **asked)
    patched, stock = fastpeft.patch(copy.deepcopy(model), exact=True), model
    with torch.no_grad():
        outputs, expected = patched(IDS, **asked), stock(IDS, **asked)
    assert_fused(patched)
    assert len(expected.hidden_states) == 3
    assert len(expected.attentions) == 2
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states)
    torch.testing.assert_close(outputs.attentions, expected.attentions)


@pytest.mark.fidelity(
    "eager and sdpa attention, reorder_and_upcast_attn, scale_attn_by_inverse_layer_idx", "fused"
)
@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
        {"attn_implementation": "eager", "reorder_and_upcast_attn": True},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_kinds_of_attention(config):
    models = pair(**config)
    result, expected = (step(model) for model in models)
    assert_fused(models[0])
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity("cross-attention", "fused")
def test_cross_attention():
    models = pair(add_cross_attention=True)
    states = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [model(IDS, encoder_hidden_states=states).logits for model in models]
        without = models[0](IDS).logits
    assert_fused(models[0])
    assert not torch.allclose(outputs[0], without)
    torch.testing.assert_close(*outputs)


@pytest.mark.fidelity("padding masks, left and right; position_ids; inputs_embeds", "fused")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    mask = mask.flip(1) if side == "right" else mask
    models = pair(GPT2ForSequenceClassification)
    with torch.no_grad():
        outputs = [model(input_ids=IDS * mask, attention_mask=mask).logits for model in models]
        torch.testing.assert_close(*outputs)
        embeds = models[1].get_input_embeddings()(IDS)
    models = pair()
    with torch.no_grad():
        positions = torch.arange(3, 9)[None]
        outputs = [model(inputs_embeds=embeds, position_ids=positions).logits for model in models]
    torch.testing.assert_close(*outputs)


@pytest.mark.fidelity("gradient checkpointing, reentrant or not, with dropout", "fused; the same mask again")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_gradient_checkpointing(reentrant, exact):
    results = []
    for again in (False, True):
        model = with_adapters(with_lora(gpt2(), lora_dropout=0.3), "post_mlp", "post_block")
        model.enable_input_require_grads()
        if again:
            checkpointing(model, use_reentrant=reentrant)
        fastpeft.patch(model, exact=exact)
        results.append(step(model))
        calls = {row.calls for row in fastpeft.report(model) if row.kind == "lora"}
        assert calls == ({2} if again else {1})
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name])


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(2, 61, (7,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0]) % 2}


def trainer(folder, model, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=6, save_steps=3, eval_steps=3,
        eval_strategy="steps", logging_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True, seed=3,
        use_cpu=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.fidelity(
    "Trainer with evaluation, and resumed from a checkpoint", "fused; resumed equals uninterrupted"
)
def test_trainer_resumes_as_if_uninterrupted(tmp_path):
    def fresh():
        return fastpeft.patch(with_lora(gpt2(GPT2ForSequenceClassification), lora_dropout=0.2))

    whole = trainer(tmp_path / "a", fresh())
    whole.train()
    assert_fused(whole.model, ("lora",))
    assert any("eval_loss" in record for record in whole.state.log_history)
    resumed = trainer(tmp_path / "b", fresh())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    expected = trained_weights(whole.model)
    result = trained_weights(resumed.model)
    assert any("lora_A" in name for name in expected)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


@pytest.mark.fidelity("30 steps of training from the same seed", "fused; the same loss curve as stock")
@pytest.mark.parametrize("kind", ["lora", "adapters"])
def test_training_converges_as_stock_does(kind):
    """Both curves against float64's: patched strays from it no more than twice as far as stock."""

    def losses(patched, dtype=torch.float32):
        model = gpt2()
        model = (
            with_lora(model, lora_dropout=0.1)
            if kind == "lora"
            else with_adapters(model, "post_attn", "post_mlp")
        )
        model.to(dtype).train()
        fastpeft.patch(model, exact=True) if patched else assert_stock(model)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        torch.manual_seed(0)
        curve = []
        for index in range(30):
            ids = torch.randint(2, 61, (4, 8), generator=torch.Generator().manual_seed(index % 5))
            loss = model(input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        if patched:
            assert_fused(model, ("lora",) if kind == "lora" else ("adapter",))
        return torch.tensor(curve, dtype=torch.float64)

    fused, stock, truth = losses(True), losses(False), losses(False, torch.float64)
    assert truth[-5:].mean() < truth[:5].mean() - 0.05, "the model must learn something"
    eps = torch.finfo(torch.float32).eps
    assert (fused - truth).norm() <= 2 * (stock - truth).norm() + eps * truth.norm()


def to_compile(dynamic):
    """One of each operation suffices with dynamic shapes, which take the compiler half a minute for three."""
    if dynamic:
        return with_adapters(with_lora(gpt2(n_layer=1), ["c_fc"]), "post_attn")
    return with_adapters(with_lora(gpt2(n_layer=1)), "post_attn", "post_block")


def through_compiler(model, dynamic):
    """How often the model was compiled for some calls, and their outputs and gradients."""
    graphs, results = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in (6, 6, 6, *((9, 11) if dynamic else ())):
        ids = torch.randint(2, 61, (2, length), generator=torch.Generator().manual_seed(length))
        model.zero_grad()
        logits = compiled(input_ids=ids, use_cache=False).logits
        logits.square().sum().backward()
        results += [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return len(graphs), results


@functools.cache
def stock_compiled(dynamic):
    return through_compiler(to_compile(dynamic), dynamic)


@pytest.mark.fidelity(
    "torch.compile: fullgraph, static and dynamic shapes", "fused; no graph break, no recompilation"
)
@pytest.mark.parametrize(
    ("exact", "dynamic"),
    # What dynamic shapes add is the same in either; they take a minute to compile.
    [(False, False), (False, True), (True, False), pytest.param(True, True, marks=pytest.mark.full)],
)
@pytest.mark.xdist_group("compiled")  # stock is compiled once
def test_compile(dynamic, exact):
    model = fastpeft.patch(to_compile(dynamic), exact=exact)
    (graphs, results), (stock_graphs, expected) = through_compiler(model, dynamic), stock_compiled(dynamic)
    assert graphs == stock_graphs
    assert dynamic or graphs == 1
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_adapter_is_one_site():
    model = with_adapters(gpt2(n_layer=1), "post_mlp")
    compiled = torch.compile(model.transformer.h[0].mlp.adapter, backend="eager")
    assert len(fastpeft.report(compiled)) == 1


@pytest.mark.fidelity("torch.compile with dropout", "fused; drawn by the compiler")
def test_compile_with_dropout_keeps_the_right_share():
    from torch._dynamo.backends.common import aot_autograd  # noqa: F401 - fails early where dynamo is absent

    torch._dynamo.reset()
    layer = next(
        m for m in with_lora(gpt2(n_layer=1), ["c_fc"], lora_dropout=0.5).modules() if hasattr(m, "lora_A")
    )
    base = layer.base_layer
    fastpeft.patch(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4000, 48)
    with torch.no_grad():
        update = (compiled(x) - base(x)).mean(0)
        expected = (layer.eval()(x) - base(x)).mean(0)
    assert not torch.equal(update, expected)
    torch.testing.assert_close(update, expected, rtol=0.3, atol=0.05)


@pytest.mark.fidelity("user hooks on patched modules", "fused; hooks run")
def test_user_hooks_run_and_may_change_the_output():
    models = pair()
    for model in models:
        for name, module in model.named_modules():
            if name.endswith(("c_fc", "mlp.adapter", "mlp.act")):
                module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
                module.register_forward_hook(lambda module, args, output: output + 1)
    result, expected = (step(model) for model in models)
    assert_fused(models[0])
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity("a model of another family", "LoRA fused, the rest left alone")
def test_a_model_without_gpt2s_parts_keeps_its_classes():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    before = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match="nothing to fuse"):
        fastpeft.patch(model)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.fidelity("save_pretrained and from_pretrained of a whole patched model", "same keys, same bytes")
def test_a_whole_model_is_saved_as_stock(tmp_path):
    model = randomise(gpt2(GPT2ForSequenceClassification), "score")
    model.save_pretrained(tmp_path / "stock")
    fastpeft.patch(model)
    model.save_pretrained(tmp_path / "patched")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == ["config.json", "model.safetensors"]
    for name in names:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    loaded = GPT2ForSequenceClassification.from_pretrained(tmp_path / "patched").eval()
    assert_stock(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)
