"""Whatever peft does to a model, the patched model does too."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing

import pytest
import torch
from models import (
    assert_fused,
    assert_same_files,
    assert_stock,
    checkpointing,
    gpt2,
    randomise,
    step,
    with_lora,
)
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import GPT2ForSequenceClassification

import fastpeft
from fastpeft.lora import FusedLoraLinear

IDS = torch.arange(2, 14).view(2, 6)


def pair(**config):
    """A patched LoRA model and its stock twin, both in eval mode."""
    model = with_lora(gpt2(), **config).eval()
    return fastpeft.patch(copy.deepcopy(model), exact=True), model


def both(models, change):
    for model in models:
        change(model)


def assert_same_logits(models):
    patched, stock = models
    with torch.no_grad():
        torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits)


def lora_paths(model):
    return {row.path for row in fastpeft.report(model) if row.kind == "lora"}


def lora_config(**config):
    defaults = {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    return LoraConfig(**{**defaults, **config})


@pytest.mark.fidelity("disable_adapter, also left by an exception", "stock inside, fused after")
def test_disable_adapter_and_an_exception_inside_it():
    models = pair()
    for model in models:
        with contextlib.suppress(KeyError), model.disable_adapter():
            model(IDS)
            raise KeyError
    assert lora_paths(models[0]) == {"stock"}
    assert_same_logits(models)
    assert_fused(models[0], ("lora",))


@pytest.mark.fidelity("merge_adapter and unmerge_adapter, safe_merge too", "stock while merged, fused after")
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe):
    models = pair()
    both(models, lambda m: m.merge_adapter(safe_merge=safe))
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name))
    assert_same_logits(models)
    assert lora_paths(models[0]) == {"stock"}
    both(models, lambda m: m.unmerge_adapter())
    assert_same_logits(models)
    assert_fused(models[0], ("lora",))


@pytest.mark.fidelity("merge_and_unload", "a plain GPT-2, as stock")
def test_merge_and_unload_leaves_a_plain_model():
    models = [model.merge_and_unload() for model in pair()]
    assert not any(isinstance(module, LoraLinear) for module in models[0].modules())
    assert [*models[0].state_dict()] == [*models[1].state_dict()]
    assert_same_logits(models)


@pytest.mark.fidelity(
    "add_adapter, set_adapter and delete_adapter after patch", "fused; new layers after patch again"
)
def test_adapters_added_chosen_and_deleted_after_patch():
    models = pair(targets=["c_attn"])
    both(models, lambda m: m.add_adapter("second", lora_config()))
    both(models, lambda m: randomise(m, ".second."))
    both(models, lambda m: m.set_adapter("second"))
    assert_same_logits(models)
    rows = {
        row.name.rsplit(".", 1)[-1]: (row.path, row.reason)
        for row in fastpeft.report(models[0])
        if row.kind == "lora"
    }
    assert rows["c_attn"][0] == "torch"
    assert rows["c_fc"] == ("stock", "not patched: call fastpeft.patch")
    fastpeft.patch(models[0], exact=True)
    assert_same_logits(models)
    assert_fused(models[0], ("lora",))
    both(models, lambda m: m.set_adapter("default"))
    assert_same_logits(models)
    both(models, lambda m: m.delete_adapter("second"))
    assert_same_logits(models)
    assert any(
        row.path == "stock" and row.reason == "no adapter is active here"
        for row in fastpeft.report(models[0])
    )


@pytest.mark.fidelity("adapter_names: another adapter for each row of a batch", "fused")
def test_adapter_names_in_a_batch():
    models = pair()
    both(models, lambda m: m.add_adapter("second", lora_config(target_modules=["c_attn"])))
    both(models, lambda m: randomise(m, ".second."))
    with torch.no_grad():
        outputs = [m(IDS, adapter_names=["second", "__base__"]).logits for m in models]
    torch.testing.assert_close(*outputs)
    assert_fused(models[0], ("lora",))
    assert_same_logits(models)
    assert_fused(models[0], ("lora",))


@pytest.mark.fidelity("rsLoRA, lora_bias, rank_pattern, alpha_pattern", "fused")
@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"c_fc": 9}},
        {"alpha_pattern": {"c_fc": 1}},
    ],
    ids=str,
)
def test_variants_of_plain_lora_are_fused(config):
    model = with_lora(gpt2(), **config)
    patched, stock = fastpeft.patch(copy.deepcopy(model), exact=True), model
    result, expected = step(patched), step(stock)
    assert_fused(patched, ("lora",))
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity("init_lora_weights: pissa, olora, gaussian, orthogonal", "fused")
@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal"])
def test_other_initialisations_are_fused(init):
    targets = (
        ["attn.c_proj"] if init == "olora" else ["c_attn", "c_fc"]
    )  # peft's OLoRA takes Conv1D if square
    models = pair(targets=targets, init_lora_weights=init)
    assert_same_logits(models)
    assert_fused(models[0], ("lora",))


@pytest.mark.fidelity("DoRA and aLoRA", "stock, with the reason")
@pytest.mark.parametrize("config", [{"use_dora": True}, {"alora_invocation_tokens": [5, 6]}], ids=str)
def test_lora_variants_stay_stock(config):
    models = pair(**config)
    assert_same_logits(models)
    assert lora_paths(models[0]) == {"stock"}
    reasons = {row.reason for row in fastpeft.report(models[0]) if row.kind == "lora"}
    assert all("not plain LoRA" in reason or reason == "called with extra arguments" for reason in reasons)


class Quantised(LoraLinear):
    """Stands for the LoRA layers over bitsandbytes and GPTQ bases, which are classes of their own."""


@pytest.mark.fidelity("LoRA over a quantised base (bitsandbytes, GPTQ, ...)", "stock, with the reason")
def test_a_subclass_of_lora_linear_is_left_alone():
    models = pair()
    fastpeft.unpatch(models[0])
    layer = next(m for m in models[0].modules() if type(m) is LoraLinear)
    layer.__class__ = Quantised
    fastpeft.patch(models[0], exact=True)
    assert type(layer) is Quantised
    assert_same_logits(models)
    (reason,) = (
        row.reason for row in fastpeft.report(models[0]) if row.path == "stock" and row.kind == "lora"
    )
    assert "Quantised isn't peft's lora.Linear" in reason


@pytest.mark.fidelity("meta tensors", "stock, with the reason")
def test_a_model_on_the_meta_device():
    model = fastpeft.patch(with_lora(gpt2()).to("meta"))
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    assert layer(torch.empty(2, 48, device="meta")).is_meta
    row = next(row for row in fastpeft.report(model) if row.kind == "lora")
    assert (row.path, row.reason, row.calls) == ("stock", "tensors on meta and meta", 0)


@pytest.mark.fidelity("in-place edits of weights, load_state_dict", "fused, with the new weights")
def test_new_weights_are_read():
    models = pair()
    assert_same_logits(models)
    with torch.no_grad():
        both(models, lambda m: [p.mul_(1.5) for p in m.parameters()])
    assert_same_logits(models)
    state = with_lora(gpt2(seed=5)).state_dict()
    both(models, lambda m: m.load_state_dict(state))
    assert_same_logits(models)
    assert_fused(models[0], ("lora",))


@pytest.mark.fidelity(".to(dtype), .half(), .double()", "fused")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_after_patch(dtype):
    models = pair()
    both(models, lambda m: m.to(dtype))
    with torch.no_grad():
        outputs = [m(IDS).logits for m in models]
    assert outputs[0].dtype == dtype
    assert_fused(models[0], ("lora",))
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.02)


@pytest.mark.fidelity("unfreezing a base weight after patch", "fused; it gets its gradient")
def test_an_unfrozen_base_weight_gets_its_gradient():
    models = pair()
    both(
        models,
        lambda m: m.get_submodule("base_model.model.transformer.h.0.mlp.c_fc.base_layer").requires_grad_(
            True
        ),
    )
    result, expected = (step(m) for m in models)
    assert sum("base_layer" in name for name in expected) == 2
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


def _logits_into(queue, model):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(IDS).logits.numpy())


@pytest.mark.fidelity("process fork", "fused")
def test_a_forked_process_computes_the_same():
    patched, _ = pair()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_logits_into, args=(queue, patched))
    worker.start()
    logits = torch.from_numpy(queue.get(timeout=60))
    worker.join(60)
    with torch.no_grad():
        torch.testing.assert_close(logits, patched(IDS).logits)


@pytest.mark.fidelity("DataParallel replicas", "fused")
def test_replicas_for_data_parallel():
    patched, stock = pair()
    layer = next(m for m in patched.modules() if isinstance(m, FusedLoraLinear))
    replica = layer._replicate_for_data_parallel()
    assert type(replica) is FusedLoraLinear
    assert replica.__dict__["_fastpeft"] is layer._fastpeft
    assert stock is not None


@pytest.mark.fidelity("save_pretrained patched, loaded in plain peft, and back", "same keys, same bytes")
def test_save_pretrained_both_ways(tmp_path):
    models = pair()
    for name, model in zip(("patched", "stock"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    assert_same_files(tmp_path / "stock", tmp_path / "patched")
    assert not list(tmp_path.rglob("*.bin"))
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "patched").eval()
    assert_stock(loaded)
    assert_same_logits((fastpeft.patch(loaded), models[1]))


@pytest.mark.fidelity("patch of a model that is half patched", "fused")
def test_a_half_patched_model():
    models = pair()
    half = [m for m in models[0].modules() if isinstance(m, FusedLoraLinear)][::2]
    for module in half:
        fastpeft.unpatch(module)
        assert type(module) is LoraLinear
    assert_same_logits(models)
    fastpeft.patch(models[0], exact=True)
    assert_same_logits(models)
    assert_fused(models[0], ("lora",))


@pytest.mark.fidelity("autocast in float16 and bfloat16, GradScaler", "fused")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(dtype):
    models = pair()
    grads = []
    for model in models:
        scaler = torch.amp.GradScaler("cpu")
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        with torch.autocast("cpu", dtype):
            loss = model(IDS).logits.float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        scaler.step(optimiser)
    assert_fused(models[0], ("lora",))
    largest = max(g.abs().max().item() for g in grads[1].values())
    for name in grads[1]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=0.1, atol=0.02 * largest)


@pytest.mark.fidelity("gradient accumulation", "fused")
def test_gradients_accumulate():
    models = pair()
    for model in models:
        for seed in (1, 2):
            ids = torch.randint(2, 61, (2, 5), generator=torch.Generator().manual_seed(seed))
            model(ids).logits.square().sum().backward()
    for (name, parameter), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.fidelity("prompt tuning and IA3", "as stock; the activation is fused")
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_peft_methods_work_as_stock(config):
    model = get_peft_model(gpt2(), config)
    stock = copy.deepcopy(model)
    fastpeft.patch(model)
    result, expected = step(model), step(stock)
    assert_fused(model, ("activation",))
    assert len(expected) > 1
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity("prefix tuning with gradient checkpointing", "error: peft's ValueError")
def test_prefix_tuning_with_checkpointing_keeps_pefts_error():
    from peft import PrefixTuningConfig

    def error(patched):
        model = gpt2()
        checkpointing(model)
        model = fastpeft.patch(model) if patched else model
        with pytest.raises(ValueError, match="checkpointing") as caught:
            get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        return str(caught.value)

    assert error(patched=True) == error(patched=False)


@pytest.mark.fidelity("modules_to_save: the head peft trains beside LoRA", "fused; the head is stock")
def test_the_head_that_peft_trains():
    model = with_lora(gpt2(GPT2ForSequenceClassification), lora_dropout=0.1)
    patched, stock = fastpeft.patch(copy.deepcopy(model), exact=True), model
    result, expected = step(patched), step(stock)
    assert any("score" in name for name in expected)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity("several active adapters, with and without dropout", "fused")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_two_active_adapters(dropout):
    models = pair(lora_dropout=dropout)
    both(models, lambda m: m.add_adapter("second", lora_config(lora_dropout=dropout)))
    both(models, lambda m: randomise(m, ".second."))
    both(models, lambda m: m.base_model.set_adapter(["default", "second"]))
    result, expected = (step(m) for m in models)
    assert_fused(models[0], ("lora",))
    assert sum("second" in name for name in expected) == 8
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity("scaling changed or set to 0, dropout changed after patch", "fused, read at each call")
def test_settings_are_read_at_each_call():
    models = pair(lora_dropout=0.1)

    def change(scale, dropout):
        for module in (m for model in models for m in model.modules() if isinstance(m, LoraLinear)):
            module.set_scale("default", scale)
            module.lora_dropout["default"].p = dropout

    for scale, dropout in ((0.0, 0.1), (1.0, 0.5), (2.0, 0.0), (1.0, 1.0)):
        change(scale, dropout)
        result, expected = (step(m) for m in models)
        for name in expected:
            torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)
    assert_fused(models[0], ("lora",))


def test_layers_outside_gpt2_take_part():
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), LoraConfig(target_modules=["0", "2"], r=2)
    )
    stock = copy.deepcopy(randomise(model, "lora_B"))
    fastpeft.patch(model)
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), stock(x))
    assert_fused(model, ("lora",))
