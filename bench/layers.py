"""A LoRA layer, an adapter and a head in each of the ways they are compared: the same weights, by other code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import checkout  # noqa: F401
import torch
import torch.nn.functional as F
from cases import DTYPES, AdapterCase, HeadCase, LoraCase
from check import Wrong, hold
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.adapters import Adapter

LORA_VARIANTS = ("frozen", "peft", "peft_fp32", "addmm", "compile", "fastpeft")
ADAPTER_VARIANTS = ("eager", "compile", "fastpeft")


class OneLayer(nn.Module):
    """A model of one GPT-2 projection, or of one adapter, for what works on models."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def peft_layer(
    k: int,
    n: int,
    rank: int,
    dropout_p: float,
    dtype: torch.dtype,
    float32_factors: bool = False,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """peft's LoRA over a `Conv1D` (K, N), `lora_B` nonzero; factors in `dtype`, or float32 as peft likes."""
    torch.manual_seed(0)
    with torch.device(device):
        base = OneLayer(Conv1D(n, k)).to(dtype)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=dropout_p, target_modules=["layer"], fan_in_fan_out=True
        )
        model: Any = get_peft_model(base, config, autocast_adapter_dtype=float32_factors)
    layer = model.base_model.model.layer
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer if float32_factors else layer.to(dtype)


def frozen(layer: Any) -> nn.Module:
    """The frozen layer alone."""
    return layer.base_layer


def patched(layer: nn.Module) -> nn.Module:
    """A copy of a LoRA layer or adapter, fused."""
    fused = copy.deepcopy(layer)
    fastpeft.patch(OneLayer(fused), strict=True)
    return fused


class AddmmLora(nn.Module):
    """A LoRA layer by hand over cuBLAS: Unsloth's algorithm, with dropout.

    Nothing is added or scaled but inside a GEMM. `dropout(x)` is kept for backward, which recomputes `xa` and
    computes `dy B` twice.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base = layer.base_layer
        self.lora_a = layer.lora_A["default"].weight
        self.lora_b = layer.lora_B["default"].weight
        self.scaling = layer.scaling["default"]
        self.dropout_p = getattr(layer.lora_dropout["default"], "p", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N)."""
        dropout_p = self.dropout_p if self.training else 0.0
        weight, bias = self.base.weight, self.base.bias
        return _Addmm.apply(x, weight, bias, self.lora_a, self.lora_b, self.scaling, dropout_p)


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout_p: float,
    ) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        dropped, keep = torch.native_dropout(rows, dropout_p, True) if dropout_p > 0 else (rows, None)
        y = torch.addmm(bias, rows, weight).addmm_(dropped @ a.T, b.T, alpha=scaling)
        ctx.save_for_backward(dropped, keep, weight, a, b)
        ctx.scaling, ctx.dropout_p, ctx.shape = scaling, dropout_p, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        dropped, keep, weight, a, b = ctx.saved_tensors
        scaling, dy = ctx.scaling, dy.view(-1, dy.shape[-1])
        d_lora_a = torch.addmm(a, (dy @ b).T, dropped, beta=0, alpha=scaling)
        d_lora_b = torch.addmm(b, dy.T, dropped @ a.T, beta=0, alpha=scaling)
        dx = dy @ weight.T
        if keep is None:
            dx.addmm_(dy @ b, a, alpha=scaling)
        else:
            update = torch.addmm(dx, dy @ b, a, beta=0, alpha=scaling)
            dx += torch.ops.aten.native_dropout_backward(update, keep, 1 / (1 - ctx.dropout_p))
        return dx.view(ctx.shape), None, None, d_lora_a, d_lora_b, None, None


def adapter_layer(
    width: int, bottleneck: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> nn.Module:
    """The eager adapter, `up` nonzero."""
    torch.manual_seed(0)
    with torch.device(device):
        layer = Adapter(width, bottleneck).to(dtype)
    nn.init.normal_(layer.up.weight, std=0.02)
    return layer


class Head(nn.Module):
    """A frozen head and its mean loss, by `loss(hidden, weight, labels)`."""

    def __init__(self, case: HeadCase, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        weight = 0.02 * torch.randn(case.vocabulary, case.width, generator=numbers)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.labels: Tensor
        labels = torch.randint(case.vocabulary, (case.tokens,), generator=numbers)
        ignored = torch.randperm(case.tokens, generator=numbers)[round(case.counting * case.tokens) :]
        self.register_buffer("labels", labels.index_fill(0, ignored, -100))
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K), of as many rows as labels → ()."""
        return self.loss(x.flatten(0, -2), self.weight, self.labels)


def _of_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers has it."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def _torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int | None = None) -> Tensor:
    """With `rows` in a chunk, or as many as torch likes."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


def _torch_two_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As many as fastpeft takes for `cases.head_cases` on CUDA, where all labels count; on the CPU it takes none."""
    return _torch_chunked(hidden, weight, labels, -(-len(hidden) // 2))


HEAD_VARIANTS = {
    "stock": _of_logits,
    "torch_chunked": _torch_chunked,
    "torch_two_chunks": _torch_two_chunks,
    "fastpeft": fastpeft.lm_head_loss,
}


def lora_variant(case: LoraCase, variant: str, device: str) -> nn.Module:
    """The layer of one of `LORA_VARIANTS`, in training mode, once it agrees with peft's."""
    k, n = case.projection.k, case.projection.n
    stock = peft_layer(k, n, case.rank, case.dropout, DTYPES[case.dtype], variant == "peft_fp32", device)
    return frozen(stock) if variant == "frozen" else _variant(stock, variant, k)


def adapter_variant(case: AdapterCase, variant: str, device: str) -> nn.Module:
    """The layer of one of `ADAPTER_VARIANTS`, in training mode, once it agrees with the eager one."""
    stock = adapter_layer(case.width, case.bottleneck, DTYPES[case.dtype], device)
    return _variant(stock, variant, case.width)


def head_variant(case: HeadCase, variant: str, device: str) -> nn.Module:
    """The head of one of `HEAD_VARIANTS`, once its gradients agree with stock's, which settle all of a loss but
    a constant: the loss itself is one number, and torch's in bfloat16.
    """
    stock, head = (
        Head(case, HEAD_VARIANTS[name]).to(device, DTYPES[case.dtype]) for name in ("stock", variant)
    )
    _agree(variant, head, stock, (1, case.tokens, case.width), but=("y",))
    return head.train()


def _variant(stock: nn.Module, variant: str, width: int) -> nn.Module:
    torch._dynamo.reset()  # each variant its own graphs, below the limit on recompilations
    others = {
        "addmm": AddmmLora,
        "compile": lambda layer: torch.compile(layer, dynamic=False),
        "fastpeft": patched,
    }
    layer = others.get(variant, lambda layer: layer)(stock)
    _agree(variant, layer, stock, (4, 32, width))
    (row,) = fastpeft.report(OneLayer(layer if variant == "fastpeft" else stock))
    if (row.path != "stock" and row.calls > 0) != (variant == "fastpeft"):
        raise Wrong(f"{variant} doesn't run the code it is named for: {row}")
    return layer.train()


def _agree(
    variant: str, layer: nn.Module, stock: nn.Module, shape: tuple[int, ...], but: tuple[str, ...] = ()
) -> None:
    """Hold a layer's results for an input of a shape, `but` some, to what stock's err."""
    truth = copy.deepcopy(stock).double()
    found, expected, exact = (_results(each.eval(), shape) for each in (layer, stock, truth))
    for part in [each for each in exact if each not in but]:
        hold(f"{variant}: {part}", found[part], expected[part], exact[part])


def _results(layer: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Output and gradients for the same numbers in every dtype."""
    first = next(layer.parameters())
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    x = numbers.to(first.device, first.dtype).requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(y)
    gradients = torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)
    return {"y": y.detach(), **{f"gradient {i}": each for i, each in enumerate(gradients)}}
