"""Blocks replayed as graphs against a twin without: on a GPU captured, on the CPU run again on the same buffers."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import checkpointing, gpt2, run_again, with_adapters, with_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import fastpeft
from fastpeft import graphs, modules
from fastpeft.block import Packed
from fastpeft.kernels import launch
from fastpeft.kernels.rows import rounded

aten = torch.ops.aten
LENGTHS = [[9, 4, 7], [5, 5, 2], [9, 9, 1], [3, 4, 6]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where models are; on the CPU a graph is replayed by running again what was captured, on the same buffers."""
    if request.param == "cpu":
        monkeypatch.setattr(graphs, "capture", run_again)
        monkeypatch.setattr(graphs, "why_not_device", lambda device: None)
    return request.param


def pair(model, device, **options):
    """The model with graphs, and a twin without."""
    model = model.to(device).train()
    twin = fastpeft.patch(copy.deepcopy(model), graphs=False, **options)
    return fastpeft.patch(model, graphs=True, **options), twin


def lora_pair(device, head=GPT2LMHeadModel, **config):
    if head is GPT2ForTokenClassification:
        config["task_type"] = None  # whose peft model wants nothing of a head
    return pair(with_lora(gpt2(head, use_cache=False, classifier_dropout=0.0), **config), device)


def batch(lengths, device, head=GPT2LMHeadModel, seed=0, padded_to=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(*lengths, padded_to)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, 60, mask.shape, generator=generator) * mask
    labels = ids.masked_fill(mask == 0, -100)
    if head is GPT2ForSequenceClassification:
        labels = ids[:, 0] % 2
    if head is GPT2ForTokenClassification:
        labels = (labels % 2).masked_fill(mask == 0, -100)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in found.items()}


def backward(model, inputs):
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_steps(model, twin, batches):
    """Twice each: a size is captured when it comes for the second time."""
    for inputs in batches:
        for _ in range(2):
            model.zero_grad()
            twin.zero_grad()
            torch.testing.assert_close(backward(model, inputs), backward(twin, inputs))
            assert_same_gradients(model, twin)


def captured(model, inputs):
    """The model, with a graph for batches of this size."""
    for _ in range(2):
        backward(model, inputs)
    assert replays(model)
    model.zero_grad()
    return model


def assert_same_gradients(model, twin):
    found, expected = gradients(model), gradients(twin)
    assert found.keys() == expected.keys() != set()
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def site_of(model):
    return next(m._fastpeft for m in model.modules() if hasattr(getattr(m, "_fastpeft", None), "graphs"))


def replays(model):
    """Whether the last call was replayed."""
    return site_of(model).last.reason.endswith("replayed as a graph")


HEADS = [GPT2LMHeadModel, GPT2DoubleHeadsModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]


@pytest.mark.parametrize("head", HEADS)
def test_steps_on_many_lengths_equal_uncaptured_ones(head, device):
    model, twin = lora_pair(device, head)
    batches = [
        batch(lengths, device, head, seed) for seed, lengths in enumerate([*LENGTHS, [6, 6, 6], [8, 8]])
    ]
    if head is GPT2DoubleHeadsModel:
        batches = [{**each, "mc_token_ids": each["attention_mask"].sum(1) - 1} for each in batches]
    for inputs in [*batches, *batches]:
        assert_same_steps(model, twin, [inputs])
        assert replays(model)
    rows = fastpeft.report(model)
    expected = {row.name: row.calls for row in fastpeft.report(twin) if row.kind == "lora"}
    assert {row.name: row.calls for row in rows if row.kind == "lora"} == expected


@pytest.mark.gpu  # the interpreter would take 40 s, for what the other tests show of the CPU
def test_through_the_kernels_with_new_masks_at_each_replay():
    device = "cuda"
    drops = {"resid_pdrop": 0.2, "attn_pdrop": 0.2}
    model = with_lora(gpt2(n_layer=1, use_cache=False, **drops), lora_dropout=0.3)
    model, twin = pair(model, device, backend="triton")
    inputs = batch([6, 3], device)

    def losses():
        torch.manual_seed(5)
        return [backward(model, inputs).item() for _ in range(3)]

    backward(model, inputs)
    assert replays(model)
    assert {row.path for row in fastpeft.report(model) if row.kind in ("lora", "loss")} == {"triton"}
    drawn = losses()
    assert len(set(drawn)) == 3
    assert drawn == losses()
    for each in (model, twin):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    assert_same_steps(model, twin, [inputs, batch([5, 2], device, seed=3)])
    assert replays(model)


@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_batches_padded_to_their_longest_share_a_size(head, device):
    model, twin = lora_pair(device, head)
    batches = [batch(lengths, device, head, seed) for seed, lengths in enumerate(LENGTHS)]
    batches.append(batch([9, 3, 8], device, head, padded_to=14))
    if head is GPT2ForSequenceClassification:  # a full one that isn't pooled keeps its grid
        batches.append(batch([6, 6, 6], device, head))
    captured(model, batches[0])
    for inputs in batches:
        for each in (model, twin):
            each.zero_grad()
            backward(each, inputs)
        assert replays(model)
        assert_same_gradients(model, twin)
    assert len(site_of(model).graphs) == 1


def test_sequences_that_share_rows(device):
    model, twin = lora_pair(device)
    for seed, rows in enumerate([[[5, 3], [2, 6]], [[4, 4], [7, 1]], [[8], [3, 5]]]):
        ids = torch.randint(2, 60, (2, 8), generator=torch.Generator().manual_seed(seed))
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
        inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
        assert_same_steps(model, twin, [{n: t.to(device) for n, t in inputs.items()}])
        assert replays(model)


@pytest.mark.parametrize(
    "slots",
    [("post_attn", "post_mlp"), ("post_embed", "post_block"), ("parallel_mlp", "pre_head")],
    ids="-".join,
)
def test_adapters_and_trainable_embeddings(slots, device):
    model = with_adapters(gpt2(GPT2ForSequenceClassification, use_cache=False), *slots)
    model.transformer.wte.weight.requires_grad_()
    model, twin = pair(model, device)
    assert_same_steps(model, twin, [batch(l, device, GPT2ForSequenceClassification) for l in LENGTHS])
    assert replays(model)


def test_mixed_precision(device):
    model, twin = lora_pair(device)
    with torch.autocast(device, torch.bfloat16):
        for lengths in LENGTHS:
            captured(model, batch(lengths, device))
            for each in (model, twin):
                each.zero_grad()
                backward(each, batch(lengths, device))
            assert replays(model)
            for name, grad in gradients(twin).items():
                torch.testing.assert_close(gradients(model)[name], grad, rtol=0.1, atol=2e-3)


def test_gradients_accumulate_and_are_the_callers_own(device):
    model, twin = lora_pair(device)
    for seed in range(3):
        for each in (model, twin):
            backward(each, batch([7, 4, 7], device, seed=seed))
    assert replays(model)
    assert_same_gradients(model, twin)
    kept = {n: g.clone() for n, g in gradients(model).items()}
    model(**batch([7, 4, 7], device, seed=9)).loss.backward(inputs=[model.lm_head.weight.requires_grad_()])
    assert all(torch.equal(kept[n], g) for n, g in gradients(model).items() if n in kept)


def test_optimizer_steps_and_loaded_weights_are_seen(device):
    model, twin = lora_pair(device)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, twin)
    ]
    for lengths in LENGTHS:
        assert_same_steps(model, twin, [batch(lengths, device)])
        for optimizer in optimizers:
            optimizer.step()
    state = {n: p + 0.01 for n, p in twin.state_dict().items()}
    model.load_state_dict(state)
    twin.load_state_dict(state)
    count = len(site_of(model).graphs)
    assert_same_steps(model, twin, [batch(LENGTHS[0], device)])
    assert replays(model)
    assert len(site_of(model).graphs) == count


def train(model, batches, device):
    """Each step's loss, norm of what is clipped, loss scale and learning rate; the fifth step overflows."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    seen = []
    for step, inputs in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        scaler.scale(loss * float("inf") if step == 5 else loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, 0.5)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        seen.append([loss.item(), norm.item(), scaler.get_scale(), scheduler.get_last_lr()[0]])
    return torch.tensor(seen, dtype=torch.float64)


def test_a_scaled_loss_clipping_and_a_schedule(device):
    model, twin = (each.double() for each in lora_pair(device))  # steps make much of a last bit
    batches = [batch(lengths, device, seed=seed) for seed, lengths in enumerate([*LENGTHS, *LENGTHS])]
    found, expected = (train(each, batches, device) for each in (model, twin))
    assert replays(model)
    torch.testing.assert_close(found, expected, equal_nan=True)
    norms, scales = found[:, 1], found[:, 2]
    assert (norms > 0.5).sum() > 4  # they were clipped
    assert scales.tolist() == [1024.0] * 4 + [512.0] * 4  # and a step was left out
    for name, one in model.state_dict().items():
        torch.testing.assert_close(one, twin.state_dict()[name], msg=lambda m, n=name: f"{n}: {m}")


def lora_layer(model):
    return model.base_model.model.transformer.h[0].attn.c_attn


def doubled(model):
    norm = copy.deepcopy(model.base_model.model.transformer.h[0].ln_1)
    norm.weight.data *= 2
    return norm


CHANGES = {
    "scaling": lambda m: lora_layer(m).scaling.update(default=0.25),
    "another epsilon": lambda m: setattr(m.base_model.model.transformer.h[1].ln_2, "eps", 0.1),
    "evaluation": lambda m: m.eval(),
    "adapters off": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(),
    "a factor of other memory": lambda m: setattr(
        lora_layer(m).lora_A["default"].weight, "data", lora_layer(m).lora_A["default"].weight.data * 2
    ),
    "a frozen factor": lambda m: lora_layer(m).lora_A["default"].weight.requires_grad_(False),
    "a bias that trains": lambda m: m.base_model.model.transformer.h[
        0
    ].mlp.c_fc.base_layer.bias.requires_grad_(),
    "attention's scale": lambda m: setattr(m.base_model.model.transformer.h[0].attn, "scaling", 0.5),
    "another module": lambda m: setattr(m.base_model.model.transformer.h[0], "ln_1", doubled(m)),
}


@pytest.mark.fidelity("graphs=True, modules, settings or weights changed between calls", "captured anew")
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_calls_is_seen(change, device):
    model, twin = lora_pair(device)
    inputs = [batch(LENGTHS[0], device)]
    assert_same_steps(model, twin, inputs)
    before = backward(model, inputs[0])
    for each in (model, twin):
        CHANGES[change](each)
    if change in ("adapters off", "merged"):
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs[0]).loss, twin(**inputs[0]).loss)
    else:
        assert_same_steps(model, twin, inputs)
    if change not in ("evaluation", "merged", "a frozen factor", "a bias that trains"):
        assert not torch.allclose(before, model(**inputs[0]).loss, atol=1e-5)  # it does change something


@pytest.mark.fidelity(
    "graphs=True, a second forward before the first one's backward", "it runs without a graph"
)
def test_a_forward_before_the_last_ones_backward_runs_by_itself(device):
    model, twin = lora_pair(device)
    one, other = batch([7, 4, 7], device, seed=1), batch([7, 4, 6], device, seed=2)
    backward(model, one)
    model.zero_grad()
    losses = [model(**one).loss]
    assert replays(model)
    losses.append(model(**other).loss)
    assert site_of(model).last.reason.endswith("the backward pass of an earlier call is still to come")
    sum(losses).backward()
    sum(twin(**each).loss for each in (one, other)).backward()
    assert_same_gradients(model, twin)
    loss = model(**one).loss
    assert replays(model)
    del loss  # nobody can ask for its backward pass any more
    assert_same_steps(model, twin, [other])
    assert replays(model)


def test_the_graph_is_kept_as_long_as_backward_keeps_it(device):
    model, twin = lora_pair(device)
    inputs = batch([7, 4, 7], device)
    for each in (model, twin):
        loss = each(**inputs).loss
        loss.backward(retain_graph=True)
        each(**batch([7, 7, 3], device, seed=3)).loss.backward()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert_same_gradients(model, twin)


def test_hooks_on_parameters_are_called_once_a_step(device):
    model, twin = lora_pair(device)
    seen = {}
    for each in (model, twin):
        weight = lora_layer(each).lora_B["default"].weight
        weight.register_hook(
            lambda g, each=each: (seen.setdefault(each is model, []).append(g.clone()), g * 2)[1]
        )
    assert_same_steps(model, twin, [batch(lengths, device) for lengths in LENGTHS])
    assert replays(model)
    assert len(seen[True]) == len(seen[False]) == 2 * len(LENGTHS)


def test_a_weight_changed_before_backward_is_an_error_as_in_stock(device):
    model, _ = lora_pair(device)
    loss = model(**batch([7, 4, 7], device)).loss
    with torch.no_grad():
        lora_layer(model).lora_B["default"].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_an_error(device):
    model, _ = lora_pair(device)
    inputs = batch([7, 4, 7], device)
    weight = lora_layer(captured(model, inputs)).lora_B["default"].weight
    for options in (
        {"create_graph": True},
        {"is_grads_batched": True, "grad_outputs": torch.ones(2, device=device)},
    ):
        with pytest.raises(RuntimeError, match="graphs are differentiable once"):
            torch.autograd.grad(model(**inputs).loss, weight, **options)


def test_dropout_is_drawn_anew_and_repeats_with_the_seed(device):
    model = with_lora(gpt2(use_cache=False, resid_pdrop=0.2, attn_pdrop=0.2), lora_dropout=0.3)
    model, _ = pair(model, device)
    inputs = batch([7, 4, 7], device)

    def losses():
        torch.manual_seed(5)
        return torch.stack([backward(model, inputs) for _ in range(4)])

    captured(model, inputs)
    drawn = losses()
    assert len(set(drawn.tolist())) == 4
    assert torch.equal(drawn, losses())


def test_evaluation_between_steps(device):
    model, twin = lora_pair(device)
    for lengths in [*LENGTHS, *LENGTHS]:
        inputs = batch(lengths, device)
        assert_same_steps(model, twin, [inputs])
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model.eval()(**inputs)
                torch.testing.assert_close(model.eval()(**inputs).loss, twin.eval()(**inputs).loss)
                assert replays(model)
        model.train()
        twin.train()


def test_what_is_not_finite_stays_in_its_call(device):
    model, twin = lora_pair(device, GPT2ForSequenceClassification)
    long, short = (batch(l, device, GPT2ForSequenceClassification) for l in ([9, 9, 8], [2, 5, 3]))
    assert_same_steps(model, twin, [short, long])
    with torch.no_grad():
        model.base_model.model.transformer.wpe.weight[8].fill_(float("nan"))
    assert backward(model, long).isnan()
    assert replays(model)
    assert_same_steps(model, twin, [short])


def test_no_more_sizes_are_captured_than_their_bound(device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    model, twin = lora_pair(device)
    sizes = [(6,) * n for n in range(1, 6)]
    assert_same_steps(model, twin, [batch(lengths, device) for lengths in [*sizes, *sizes]])
    assert len(site_of(model).graphs) == 3
    assert site_of(model).last.reason.endswith("3 sizes are captured, and no more fit")


@pytest.mark.gpu
def test_memory_stays_when_every_size_is_captured():
    model = with_lora(gpt2(use_cache=False, attn_pdrop=0.1)).to("cuda").train()
    fastpeft.patch(model, graphs=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    lengths = torch.randint(1, 25, (30, 4), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [batch(each, "cuda", seed=seed) for seed, each in enumerate(lengths)]

    def held_after(epochs):
        for inputs in batches * epochs:
            backward(model, inputs)
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        return len(site_of(model).graphs), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    held = held_after(3)  # the second takes what came once in the first, the third runs as all that follow
    assert 1 < held[0] <= 4  # 32, 64, 96 and 128 rows
    assert held_after(10) == held


def test_a_size_that_comes_once_is_not_captured(device):
    model, _ = lora_pair(device)
    backward(model, batch([7, 4, 7], device))
    assert site_of(model).last.reason.endswith("a batch of its size comes for the first time")
    assert len(site_of(model).graphs) == 0


def test_an_epoch_of_changes_ends_it(device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    model, twin = lora_pair(device)
    inputs = batch([7, 4, 7], device)
    for step in range(5):
        for each in (model, twin):
            lora_layer(each).scaling["default"] = 1.0 + step
        assert_same_steps(model, twin, [inputs])
    assert site_of(model).last.reason.endswith("its modules change from call to call")


def renewed(model):
    held = lora_layer(model).lora_B["default"]
    held.weight = nn.Parameter(held.weight.data)


def cut(model):
    a, b = (lora_layer(model)._modules[name]["default"].weight for name in ("lora_A", "lora_B"))
    a.data, b.data = a.data[:2], b.data[:, :2]
    a.grad = b.grad = None


@pytest.mark.parametrize("change", [renewed, cut, lambda m: m.load_state_dict(m.state_dict(), assign=True)])
def test_other_parameters_in_the_same_memory(change, device):
    model, twin = lora_pair(device)
    inputs = [batch(LENGTHS[0], device)]
    assert_same_steps(model, twin, inputs)
    for each in (model, twin):
        change(each)
    assert_same_steps(model, twin, inputs)


@pytest.mark.parametrize("what", ["a learnable scaling", "a tensor of one's own"])
def test_tensors_among_attributes_keep_it_uncaptured(what, device):
    model, twin = lora_pair(device)
    assert_same_steps(model, twin, [batch(LENGTHS[0], device)])
    for value in (2.0, 3.0):
        for each in (model, twin):
            if what == "a learnable scaling":
                lora_layer(each).scaling["default"] = nn.Parameter(torch.tensor(value, device=device))
            else:
                each.base_model.model.transformer.h[0].stat = torch.full((3,), value)
        assert_same_steps(model, twin, [batch(LENGTHS[0], device)])
        assert not replays(model)
    if what == "a learnable scaling":
        assert lora_layer(model).scaling["default"].grad is not None


def test_threads_share_a_model(device):
    model, twin = lora_pair(device)
    batches = [batch([9, 5, 7], device, seed=n) for n in range(4)]
    model.eval()
    twin.eval()
    with torch.no_grad():
        expected = [twin(**inputs).loss.item() for inputs in batches]
        for inputs in [*batches, *batches]:
            model(**inputs)
    assert replays(model)

    def losses(n):
        with torch.no_grad():
            return [model(**batches[n]).loss.item() for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for loss, found in zip(expected, pool.map(losses, range(4)), strict=True):
            assert found == pytest.approx([loss] * 20, rel=1e-5)


def test_only_the_last_norm_trains(device):
    model = gpt2(use_cache=False).requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    model, twin = pair(model, device)
    losses = [m(**batch([9, 5, 7], device)).loss for m in (model, model, twin)]  # the second is captured
    later = model(**batch([9, 5, 7], device, seed=4)).loss
    assert replays(model)
    for loss in (losses[1], losses[2]):
        loss.backward()
    del later
    assert_same_gradients(model, twin)


def test_results_are_the_callers_own(device):
    model, _ = lora_pair(device, GPT2ForSequenceClassification)
    transformer = model.base_model.model.transformer
    transformer.ln_f = nn.Identity()
    ids = [torch.full((2, 8), n, device=device) for n in (3, 4)]
    with torch.no_grad():
        for _ in range(2):
            transformer(ids[0])
        first = transformer(ids[0]).last_hidden_state
        assert replays(model)
        kept = first.clone()
        transformer(ids[1])
    assert torch.equal(first, kept)


def test_parameters_that_get_no_gradient_are_not_told_of_one(device):
    model = with_lora(gpt2(use_cache=False))
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    model, twin = pair(model, device)
    told = []
    lora_layer(model).lora_A["other"].weight.register_hook(told.append)
    assert_same_steps(model, twin, [batch([7, 4, 7], device)])
    assert replays(model)
    assert told == []


def test_within_a_checkpoint(device):
    model, twin = lora_pair(device)
    inputs = batch([7, 4, 7], device)
    captured(model, inputs)
    for each in (model, twin):
        checkpoint(lambda each=each: each(**inputs).loss, use_reentrant=False).backward()
    assert "hooks on saved tensors" in site_of(model).last.reason
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_capture_that_fails_leaves_the_model_as_it_was(error, device, monkeypatch):
    model, twin = lora_pair(device)
    inputs = batch([7, 4, 7], device)
    for each in (model, twin):
        backward(each, inputs)
    parameters = list(map(id, model.parameters()))

    def fail(*given):
        raise error("of the test")

    monkeypatch.setattr(graphs, "capture", fail)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        counts = {row.calls for row in fastpeft.report(model) if row.kind == "lora"}
        assert counts == {row.calls for row in fastpeft.report(twin) if row.kind == "lora"}
    else:
        assert_same_steps(model, twin, [inputs])
        assert site_of(model).last.reason.endswith("0 sizes are captured, and no more fit")
    assert list(map(id, model.parameters())) == parameters


def test_gradients_have_versions_of_their_own(device):
    model, _ = lora_pair(device)
    inputs = batch([7, 4, 7], device)
    captured(model, inputs)
    a, b = (lora_layer(model)._modules[name]["default"].weight for name in ("lora_A", "lora_B"))
    da, db = torch.autograd.grad(model(**inputs).loss, [a, b])
    product = (a * da).sum()
    db.mul_(2)
    product.backward()


WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe}
BY_INDEX = {aten.index, aten.index_put, aten.index_put_}  # whose shapes hang on data where an index is a mask


class AsCaptured(TorchDispatchMode):
    """Raises what a capture on `device` would: the host asks for a value or a shape, or holds what is computed with."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seen = device, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = func.overloadpacket
        if operator in BY_INDEX:
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            waits = WAITS & {*func.tags}
        assert not waits, f"the host waits for {func}"
        assert operator is not aten.lift_fresh, "a constant of the host's"
        result = func(*args, **(kwargs or {}))
        places = {
            each.device.type for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)
        }
        assert places <= {self.device}, f"{func} on {places}"
        self.seen.add(operator)
        return result


def test_nothing_waits_within_what_is_captured(device, monkeypatch):
    watch, real = AsCaptured(device), graphs.capture

    def watched(*given):
        with watch:
            return real(*given)

    monkeypatch.setattr(modules, "HARMLESS_MODES", {AsCaptured})
    monkeypatch.setattr(graphs, "capture", watched)
    drops = 0.0 if device == "cpu" else 0.1  # the CPU draws what it drops by numpy
    model, _ = pair(with_lora(gpt2(GPT2ForSequenceClassification, use_cache=False, attn_pdrop=drops)), device)
    captured(model, batch([9, 4, 7], device, GPT2ForSequenceClassification))
    assert aten.cat in watch.seen


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Tensors of the meta device, which hold nothing to read, say that they are of CUDA's.

    FakeTensorMode's own of CUDA have no backward pass without a GPU: autograd asks CUDA for its streams.
    """
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"))
    monkeypatch.setattr(Tensor, "is_meta", False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # the meta device has no autocast
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(graphs, "capture", run_again)
    monkeypatch.setattr(modules, "HARMLESS_MODES", {AsCaptured})
    monkeypatch.setattr(launch, "unsupported_device", lambda device: None)
    monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_captured_needs_nothing_of_the_host(backend, as_on_cuda):
    """Blocks with an adapter, without, and with no more rows than a head pools; kernels are launched on nothing."""
    lora = with_lora(gpt2(n_layer=3, attn_pdrop=0.1, resid_pdrop=0.1), lora_dropout=0.1)
    model = with_adapters(lora, "post_attn", layers=(0,)).to("meta").train()
    transformer = fastpeft.patch(model, graphs=True, backend=backend).base_model.model.transformer
    trunk, blocks = transformer._fastpeft.trunk, transformer.h
    assert trunk.why_not(transformer) is None
    with torch.device("meta"):
        hidden = torch.empty(1, 20, 48, requires_grad=True)
        tokens, slots, pooled = (torch.empty(n, dtype=torch.int64) for n in (20, 20, 3))
    packed = Packed(tokens, slots, (3, 9), (3, 32), None, pooled, blocks[-1], [trunk.seen.mark], spare=True)
    with AsCaptured("meta") as watch, launch.record() as launches:
        replayed = graphs._Captured(blocks, trunk.seen.called, hidden, packed, None, None)
        replayed.load(hidden, packed)
        y = replayed.forward(20)
        d_hidden, *found = replayed.backward(torch.empty_like(y))
    assert y.shape == d_hidden.shape == hidden.shape
    assert [g.shape for g in found] == [p.shape for p in replayed.trained] != []
    paths = {row.kind: row.path for row in fastpeft.report(model) if row.kind in ("lora", "adapter")}
    assert paths == {"lora": backend, "adapter": backend}
    assert bool(launches) == (backend == "triton")
    assert {aten.index_put_, aten.cat} <= watch.seen


def test_the_one_wait_outside_is_for_the_number_of_tokens(device, monkeypatch):
    waits = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(modules, "HARMLESS_MODES", {Watched})

    model, _ = lora_pair(device, GPT2ForSequenceClassification)
    inputs = batch([9, 4, 7], device, GPT2ForSequenceClassification)
    with Watched():
        model.base_model.model.transformer(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], reads=_pooled(inputs)
        )
    assert site_of(model).last.path == "packed"
    assert "a dispatch mode looks on" in site_of(model).last.reason
    assert len(waits) <= 1


def _pooled(inputs):
    from fastpeft.packing import Reads

    return Reads(pooled=inputs["attention_mask"].sum(1) - 1)


def test_trainer_with_lengths_that_vary(device, tmp_path):
    model, twin = lora_pair(device, GPT2ForSequenceClassification)
    if device == "cuda":  # so many steps of Adam make much of a last bit
        model.double(), twin.double()
    texts = [batch([n], "cpu", GPT2ForSequenceClassification, seed=n) for n in range(2, 20)]
    data = [{"input_ids": t["input_ids"][0].tolist(), "labels": int(t["labels"])} for t in texts]

    def collate(rows):
        longest = max(len(r["input_ids"]) for r in rows)
        ids = [r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in rows]
        ids = torch.tensor(ids)
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "labels": torch.tensor([r["labels"] for r in rows]),
        }

    for each in (model, twin):
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2,
            max_steps=200 if device == "cuda" else 9, learning_rate=1e-3, eval_strategy="epoch",
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=device == "cpu",
            remove_unused_columns=False,
        )  # fmt: skip
        Trainer(each, arguments, data_collator=collate, train_dataset=data, eval_dataset=data[:6]).train()
    assert replays(model)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


REASONS = {
    "a cache is made": lambda m: setattr(m.config, "use_cache", True),
    "gradient checkpointing": checkpointing,
    "eager attention": lambda m: m.set_attn_implementation("eager"),
}


@pytest.mark.fidelity(
    "graphs=True with a cache, gradient checkpointing or eager attention",
    "as without graphs, with the reason",
)
@pytest.mark.parametrize("reason", REASONS)
def test_what_cant_be_captured_runs_as_without_and_says_why(reason, device):
    model, twin = lora_pair(device, GPT2ForSequenceClassification)
    for each in (model, twin):
        REASONS[reason](each)
    inputs = batch(LENGTHS[0], device, GPT2ForSequenceClassification, padded_to=12)
    assert_same_steps(model, twin, [inputs])
    assert f"no graph: {reason}" in site_of(model).last.reason
    assert len(site_of(model).graphs) == 0


def test_on_the_cpu_there_are_none():
    model = fastpeft.patch(with_lora(gpt2(use_cache=False)), graphs=True)
    model(**batch([7, 4, 7], "cpu"))
    assert site_of(model).last.reason.endswith("no graph: no CUDA graphs on cpu")


@pytest.mark.parametrize("options", [{"scope": "layers"}, {"exact": True}])
def test_where_nothing_is_packed_they_are_an_error(options):
    model = with_lora(gpt2())
    with pytest.raises(ValueError, match="graphs=True runs packed calls"):
        fastpeft.patch(model, graphs=True, **options)
    assert not any(hasattr(m, "_fastpeft") for m in model.modules())


def test_copies_and_pickles_begin_without_any(device):
    import pickle

    model, twin = lora_pair(device)
    backward(model, batch(LENGTHS[0], device))
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(site_of(each).graphs) == 0
        twin.zero_grad()
        assert_same_steps(each, twin, [batch(LENGTHS[1], device)])
        assert replays(each)


@given(st.integers(1, 1 << 20), st.sampled_from([4, 8]))
def test_sizes_are_few_and_little_is_wasted(size, steps):
    found = rounded(size, steps)
    assert found >= size
    assert rounded(found, steps) == found
    assert found - size < max(32, size / steps)
    assert len({rounded(n, steps) for n in range(size, 2 * size, max(1, size // 100))}) <= 2 * steps + 1


class Own(nn.Module):
    def forward(self, x):
        return x


def test_a_trunk_that_isnt_plain_runs_stock(device):
    model, twin = lora_pair(device)
    for each in (model, twin):
        each.base_model.model.transformer.drop = Own()
    assert_same_steps(model, twin, [batch(LENGTHS[0], device)])
    assert site_of(model).last.path == "stock"
