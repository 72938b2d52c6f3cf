"""Input that hurts: the patched model does what stock does, or says clearly what is wrong."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from models import assert_fused, gpt2, randomise, step, with_adapters, with_lora
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

import fastpeft
from fastpeft.fused_adapter import FusedAdapter
from fastpeft.lora import FusedLoraLinear

K, N = 48, 192


def lora_pair(backend="torch", **config):
    """The patched c_fc layer of a tiny GPT-2 and its stock twin."""
    model = with_lora(gpt2(n_layer=1), ["c_fc"], **config).eval()
    stock = next(m for m in model.modules() if isinstance(m, LoraLinear))
    return fastpeft.patch(copy.deepcopy(stock), backend=backend), stock


def adapter_pair(backend="torch"):
    model = with_adapters(gpt2(n_layer=1), "post_mlp").eval()
    stock = model.transformer.h[0].mlp.adapter
    return fastpeft.patch(copy.deepcopy(stock), backend=backend), stock


#: On the PyTorch path, and through the kernels: interpreted where there is no GPU.
PAIRS = {
    "lora": lora_pair,
    "adapter": adapter_pair,
    "lora-triton": functools.partial(lora_pair, "triton"),
    "adapter-triton": functools.partial(adapter_pair, "triton"),
}


def path_of(kind):
    return "triton" if kind.endswith("triton") else "torch"


CASES = {
    "1-D": lambda x: x[0, 0],
    "2-D": lambda x: x[0],
    "4-D": lambda x: x[None],
    "no rows": lambda x: x[:0],
    "no tokens": lambda x: x[:, :0],
    "one token": lambda x: x[:1, :1],
    "offset": lambda x: torch.cat([x, x], -1)[..., K:],
    "permuted": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every other row": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "expanded": lambda x: x[:1, :1].expand(3, 5, K),
}


@pytest.mark.fidelity(
    "batch or sequence of 0; 1-D, 2-D, 4-D; offset, permuted, expanded x; one token", "fused"
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", PAIRS)
def test_shapes_and_strides(kind, case):
    patched, stock = PAIRS[kind]()
    whole = torch.randn(4, 5, K, generator=torch.Generator().manual_seed(0))
    leaves = [whole.clone().requires_grad_(), whole.clone().requires_grad_()]
    xs = [CASES[case](leaf) for leaf in leaves]
    y = patched(xs[0])
    # peft's Conv1D refuses x that is not contiguous; the fused layer takes it
    expected = stock(xs[1].contiguous())
    assert_fused(patched, path=path_of(kind))
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
    for p, q in zip(patched.parameters(), stock.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity("a wrong last dimension", "error naming the layer and both shapes")
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("width", [1, K - 1, K + 1])
def test_a_wrong_width(kind, width):
    patched, _ = PAIRS[kind]()
    layer = next(m for m in patched.modules() if isinstance(m, (FusedLoraLinear, FusedAdapter)))
    with pytest.raises(
        ValueError, match=rf"{layer._fastpeft.name}: x has shape \(2, {width}\).*weight of shape"
    ):
        patched(torch.ones(2, width))


@pytest.mark.fidelity("int, complex, or float64 x in a float32 layer", "stock: its error, or its result")
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float64, torch.bool])
@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # a stock adapter does
def test_other_dtypes_are_left_to_stock(kind, dtype):
    outcomes = []
    for module in PAIRS[kind]():
        try:
            outcomes.append(module(torch.ones(2, K).to(dtype)))
        except (RuntimeError, ValueError, TypeError) as error:
            outcomes.append((type(error), str(error)))
    if torch.is_tensor(outcomes[1]):
        assert outcomes[0].dtype == outcomes[1].dtype
        torch.testing.assert_close(*outcomes)
    else:
        assert outcomes[0] == outcomes[1]


@pytest.mark.fidelity("float64 models", "fused")
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_float64(kind):
    patched, stock = (module.double() for module in PAIRS[kind]())
    x = torch.randn(7, K, dtype=torch.float64)
    torch.testing.assert_close(patched(x), stock(x))
    assert_fused(patched, path=path_of(kind))


@pytest.mark.fidelity("NaN or ±inf in a row", "fused; they stay in their row, as stock")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_nan_and_inf_stay_in_their_row(kind, value):
    patched, stock = PAIRS[kind]()
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(0))
    clean = patched(x)
    x[2, 5] = value
    y, expected = patched(x), stock(x)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[others], clean[others])
    assert not torch.isfinite(y[2]).all()
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.fidelity("overflow in float16", "fused; inf where stock has inf")
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_float16_overflow(kind):
    patched, stock = (module.half() for module in PAIRS[kind]())
    x = torch.full((2, K), 6e4, dtype=torch.float16)
    with torch.no_grad():
        for module in (patched, stock):
            for parameter in module.parameters():
                parameter.abs_().add_(0.5)  # sums of a row overflow
    y, expected = patched(x), stock(x)
    assert torch.isinf(expected).any() or torch.isnan(expected).any()
    assert torch.equal(torch.isfinite(y), torch.isfinite(expected))


@pytest.mark.fidelity("rank 1 to 256", "fused")
@pytest.mark.parametrize("rank", [1, 2, 7, 64, 256])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ranks(rank, backend):
    patched, stock = lora_pair(backend, r=rank)
    x = torch.randn(5, K)
    torch.testing.assert_close(patched(x), stock(x), rtol=1e-4, atol=1e-4)
    assert_fused(patched, path=backend)


@pytest.mark.fidelity("dropout of everything (p=1)", "fused; the base layer's output")
@pytest.mark.parametrize("exact", [False, True])
def test_dropout_of_everything(exact):
    model = with_lora(gpt2(n_layer=1), lora_dropout=1.0)
    stock = copy.deepcopy(model)
    fastpeft.patch(model, exact=exact)
    result, expected = step(model), step(stock)
    assert_fused(model)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.fidelity("tensors on another device", "stock: its error, or its result")
@pytest.mark.parametrize("kind", PAIRS)
def test_another_device(kind):
    outcomes = []
    for module in PAIRS[kind]():
        module.get_submodule("lora_B.default" if "lora" in kind else "up").to("meta")
        try:
            outcomes.append(module(torch.ones(2, K)).device)
        except (RuntimeError, NotImplementedError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.fidelity("two threads on two models", "fused; each as alone")
def test_two_threads_on_two_models():
    models = [fastpeft.patch(with_lora(gpt2(seed=seed)).eval()) for seed in (1, 2)]
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        alone = [model(ids).logits for model in models]
    together = [[], []]

    def work(index):
        with torch.no_grad():
            together[index] += [models[index](ids).logits for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(together[index]) == 20
        assert all(torch.equal(logits, alone[index]) for logits in together[index])


@pytest.mark.fidelity("the same call twice", "fused; bit-equal outputs and gradients")
@pytest.mark.parametrize("exact", [False, True])
def test_the_same_step_twice_is_bit_equal(exact):
    model = fastpeft.patch(with_adapters(with_lora(gpt2(), lora_dropout=0.2), "post_attn"), exact=exact)
    first, second = step(model), step(model)
    assert_fused(model)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.fidelity("double backward", "fused without dropout; with dropout an error that names the remedy")
def test_double_backward():
    results = []
    for adapter in adapter_pair():
        x = torch.linspace(-1, 1, 3 * K).view(3, K).requires_grad_()
        (dx,) = torch.autograd.grad(adapter(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *adapter.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.fidelity("an in-place edit of a tensor saved for backward", "error, as stock")
def test_an_edit_of_a_saved_tensor_is_an_error():
    patched, _ = lora_pair()
    x = torch.randn(3, K, requires_grad=True) * 1
    y = patched(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.fidelity("a base layer without bias", "fused")
def test_a_base_without_bias():
    base = nn.Sequential(nn.Linear(6, 5, bias=False))
    model = randomise(get_peft_model(base, LoraConfig(target_modules=["0"], r=2, lora_bias=False)), "lora_B")
    stock = copy.deepcopy(model)
    x = torch.randn(4, 6)
    torch.testing.assert_close(fastpeft.patch(model)(x), stock(x))
    assert_fused(model)
