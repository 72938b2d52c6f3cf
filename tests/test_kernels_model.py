"""Whole models trained through the kernels: the report says so, and the losses follow the PyTorch path's."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_checks import adapter_arguments, lora_arguments
from models import assert_fused, gpt2, with_adapters, with_lora
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.kernels import dropout, launch, lora_layer
from fastpeft.norms import layer_norm
from fastpeft.routes import Options


def losses(model, steps=4):
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(2, model.config.vocab_size, (3, 9)).to(next(model.parameters()).device)
    seen = []
    for _ in range(steps):
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_a_gpt2_trained_through_the_kernels_follows_the_pytorch_path(kind, device):
    def make():
        model = gpt2(n_layer=1)  # every kind of layer is in one block
        return with_lora(model) if kind == "lora" else with_adapters(model, "post_attn", "post_mlp")

    through_kernels = fastpeft.patch(make().to(device), backend="triton")
    seen = losses(through_kernels)
    expected = losses(fastpeft.patch(make().to(device), backend="torch"))
    assert_fused(through_kernels, (kind,), path="triton")
    assert seen == pytest.approx(expected, rel=1e-5)
    assert seen[-1] < seen[0] - 0.05


def test_a_language_models_loss_and_gradients_by_the_kernels(device):
    """The head's and all others, also where labels are ignored, from outputs whose logits nobody reads."""
    model = with_lora(gpt2(n_layer=1)).to(device)
    ids = torch.randint(2, 61, (3, 9), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.masked_fill(torch.arange(9, device=device) < 3, -100)
    results = []
    for patched in (model, fastpeft.patch(copy.deepcopy(model), backend="triton")):
        loss = patched(input_ids=ids, labels=labels).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in patched.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert_fused(patched, ("loss",), path="triton")


def test_dropout_at_the_same_seed_gives_the_same_training(device):
    def run():
        model = with_lora(gpt2(n_layer=1), lora_dropout=0.3).to(device)
        return losses(fastpeft.patch(model, backend="triton"), steps=2)

    assert run() == run()


def test_gradient_checkpointing_redraws_the_same_mask(device):
    x, weight, bias, a, b = lora_arguments(33, 24, 16, 3, "fp32", device).values()
    results = []
    for checkpointed in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]

        def forward(x, a, b):
            return fastpeft.lora_linear(x, weight, bias, a, b, 1.0, 0.5, backend="triton")

        torch.manual_seed(4)
        y = checkpoint(forward, *leaves, use_reentrant=False) if checkpointed else forward(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_autocast_runs_the_kernels_in_its_dtype(device):
    x, weight, bias, a, b = lora_arguments(33, 24, 16, 3, "fp32", device).values()
    a.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = fastpeft.lora_linear(x, weight, bias, a, b, 1.0, backend="triton")
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert a.grad.dtype == torch.float32


def test_leading_dimensions_are_kept(device):
    x, weight, bias, a, b = lora_arguments(12, 24, 16, 3, "fp32", device).values()
    flat = fastpeft.lora_linear(x, weight, bias, a, b, 1.0, backend="triton")
    deep = fastpeft.lora_linear(x.view(2, 3, 2, 24), weight, bias, a, b, 1.0, backend="triton")
    assert torch.equal(deep.view(12, 16), flat)
    assert torch.equal(fastpeft.lora_linear(x[3], weight, bias, a, b, 1.0, backend="triton"), flat[3])


def assert_compiled_is_the_same(f, leaves):
    """Without a graph break, and with the same numbers."""
    torch._dynamo.reset()
    torch.manual_seed(4)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    torch.manual_seed(4)
    expected = torch.autograd.grad(f(*leaves), leaves)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_compile_traces_through_without_a_break(dropout, device):
    x, weight, bias, a, b = lora_arguments(12, 24, 16, 3, "fp32", device).values()

    def f(x, a, b):
        return fastpeft.lora_linear(x, weight, bias, a, b, 1.0, dropout, backend="triton").square().sum()

    assert_compiled_is_the_same(f, [t.requires_grad_() for t in (x, a, b)])


def test_torch_compile_traces_through_an_adapter_without_a_break(device):
    leaves = [t.requires_grad_() for t in adapter_arguments(12, 24, 3, "fp32", device).values()]
    assert_compiled_is_the_same(
        lambda *given: fastpeft.adapter(*given, "gelu", 0.5, backend="triton").square().sum(), leaves
    )


def test_torch_compile_traces_through_a_layer_norm_without_a_break(device):
    norm = torch.nn.LayerNorm(24, device=device).requires_grad_(False)
    x = torch.randn(12, 24, device=device, requires_grad=True)

    def f(x, normed=lambda x: layer_norm(x, norm, Options("triton"))):
        h, residual = normed(x)
        return h.sin().sum() + residual.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(f(x, normed=lambda x: (norm(x), x)), x)
    for each in (f, compiled):
        torch.testing.assert_close(torch.autograd.grad(each(x), x), expected)


@pytest.mark.fidelity('torch.compile with mode="reduce-overhead", by Triton', "fused; drawn by the compiler")
def test_the_compilers_own_graphs_take_the_operators_and_draw_anew(device):
    """On a GPU nothing keeps them from being captured and replayed; on the CPU the compiler says that it has none."""
    x, weight, bias, a, b = lora_arguments(12, 24, 16, 3, "fp32", device).values()
    leaves, dy = [t.requires_grad_() for t in (x, a, b)], torch.randn(12, 16, device=device)

    def f(x, a, b):
        return fastpeft.lora_linear(x, weight, bias, a, b, 1.0, 0.5, backend="triton")

    def step(f):
        y = f(*leaves)
        return [t.detach().clone() for t in (y, *torch.autograd.grad(y, leaves, dy))]

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, mode="reduce-overhead")
    counters.clear()
    # Torch's own numbers, so that nothing is left to compile in C++, which takes half a minute.
    with (
        fresh_inductor_cache(),
        torch._inductor.config.patch(fallback_random=device == "cpu", compile_threads=1),
    ):
        torch.manual_seed(0)
        seen = [step(compiled) for _ in range(4)]  # a warm-up, a capture, and replays
        torch.manual_seed(0)
        again = [step(compiled) for _ in range(4)]
    assert (counters["inductor"]["cudagraph_skips"] == 0) == (device == "cuda")
    assert len({y.sum().item() for y, *_ in seen}) == 4
    torch.testing.assert_close(seen, again)
    for y, dx, da, db in seen:  # masks are the same in both passes: y is linear in x, and in a and b
        update = (dy * (y - bias - x.detach() @ weight)).sum()
        for gradient, factor in ((da, a), (db, b)):
            torch.testing.assert_close((gradient * factor).sum().detach(), update, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close((dx * x).sum().detach(), (dy * (y - bias)).sum(), rtol=1e-4, atol=1e-3)
    if device == "cpu":
        torch.manual_seed(0)
        assert all(torch.equal(one, other) for one, other in zip(seen[0], step(f), strict=True))


def test_the_kernels_bytes_are_what_they_must_be():
    """Of x and y, forward with dropout moves x twice and y once; nothing else is as large."""
    m, k, n = 64, 48, 80
    arguments = lora_arguments(m, k, n, 4, "bf16", "cpu")
    seed = torch.tensor([1])
    with launch.record() as launches:
        lora_layer.Layer().forward(**arguments, call=lora_layer.Call(1.0, dropout.Dropout(0.1, seed)))
    tensors = [t for each in launches for t in each.args.values() if isinstance(t, torch.Tensor)]
    descriptors = [d.base for each in launches for d in each.args.values() if hasattr(d, "base")]
    rows = [t for t in (*tensors, *descriptors) if t.dim() == 2 and t.shape[0] == m]
    assert sorted(t.shape[1] for t in rows) == [4, 4, k, k, n]
