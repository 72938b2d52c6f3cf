"""One LoRA layer and one adapter in each of the ways they are compared: the same weights, by other code."""

from __future__ import annotations

import copy
from typing import Any

import checkout  # noqa: F401
import torch
from cases import DTYPES, AdapterCase, LoraCase
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


def lora_variant(case: LoraCase, variant: str, device: str) -> nn.Module:
    """The layer of one of `LORA_VARIANTS`, in training mode, once it agrees with peft's."""
    k, n = case.projection.k, case.projection.n
    stock = peft_layer(k, n, case.rank, case.dropout, DTYPES[case.dtype], variant == "peft_fp32", device)
    return frozen(stock) if variant == "frozen" else _variant(stock, variant, k)


def adapter_variant(case: AdapterCase, variant: str, device: str) -> nn.Module:
    """The layer of one of `ADAPTER_VARIANTS`, in training mode, once it agrees with the eager one."""
    stock = adapter_layer(case.width, case.bottleneck, DTYPES[case.dtype], device)
    return _variant(stock, variant, case.width)


def _variant(stock: nn.Module, variant: str, width: int) -> nn.Module:
    torch._dynamo.reset()  # each variant its own graphs, below the limit on recompilations
    others = {
        "addmm": AddmmLora,
        "compile": lambda layer: torch.compile(layer, dynamic=False),
        "fastpeft": patched,
    }
    layer = others.get(variant, lambda layer: layer)(stock)
    truth = copy.deepcopy(stock).double()
    found, expected, exact = (_results(each.eval(), width) for each in (layer, stock, truth))
    for part in exact:
        hold(f"{variant}: {part}", found[part], expected[part], exact[part])
    (row,) = fastpeft.report(OneLayer(layer if variant == "fastpeft" else stock))
    if (row.path != "stock" and row.calls > 0) != (variant == "fastpeft"):
        raise Wrong(f"{variant} doesn't run the code it is named for: {row}")
    return layer.train()


def _results(layer: nn.Module, width: int) -> dict[str, Tensor]:
    """Output and gradients for the same numbers in every dtype."""
    first = next(layer.parameters())
    numbers = torch.randn(4, 32, width, generator=torch.Generator().manual_seed(2)).bfloat16()
    x = numbers.to(first.device, first.dtype).requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(y)
    gradients = torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)
    return {"y": y.detach(), **{f"gradient {i}": each for i, each in enumerate(gradients)}}
