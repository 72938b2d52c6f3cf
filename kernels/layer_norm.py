"""A LayerNorm beside its residual: backward sums both gradients of x in one pass.

    forward    h = x̂ ⊙ w + b,  x̂ = (x - mean) · rstd         x goes on as the residual
    backward   dx = rstd · (g - mean(g) - x̂ · mean(g ⊙ x̂)) + d_residual,  g = dh ⊙ w

Shapes: x, h and their gradients (M, K), w and b (K,), frozen; means are over a row. Mean and rstd are computed again
from x, which backward reads anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .blocks import rounded
from .launch import build, describe, differentiable_once, launch, on_device_of

MAX_WIDTH = 2048  # a program holds whole rows; GPT-2 XL has 1600
ELEMENTS = 4096  # of a program's tile: four float32 tiles of it fit the registers of its four warps


@triton.jit
def layer_norm_backward_kernel(
    dh_ptr, x_ptr, weight_ptr, residual_ptr, dx_ptr,
    M, K,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`dx = rstd (g - mean(g) - x̂ mean(g ⊙ x̂)) + d_residual` for BLOCK_M rows; all tensors contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    mask = (rows < M)[:, None] & inside[None, :]
    offsets = rows[:, None] * K + columns[None, :]

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(inside[None, :], x - (tl.sum(x, axis=1) / K)[:, None], 0.0)
    rstd = (1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + eps))[:, None]
    x_hat = centred * rstd
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
    mean_g = (tl.sum(g, axis=1) / K)[:, None]
    mean_gx = (tl.sum(g * x_hat, axis=1) / K)[:, None]
    dx = rstd * (g - mean_g - x_hat * mean_gx)
    dx += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)


def backward(dh: Tensor, x: Tensor, weight: Tensor, d_residual: Tensor, eps: float) -> Tensor:
    """dx, of x's shape and dtype."""
    k = x.shape[-1]
    m, dx = x.numel() // max(k, 1), torch.empty_like(x, memory_format=torch.contiguous_format)
    block_k = triton.next_power_of_2(k)
    block_m = max(1, ELEMENTS // block_k)
    args = {
        "dh_ptr": dh.contiguous(), "x_ptr": x.contiguous(), "weight_ptr": weight,
        "residual_ptr": d_residual.contiguous(), "dx_ptr": dx,
        "M": m, "K": k, "eps": eps, "BLOCK_M": block_m, "BLOCK_K": block_k,
    }  # fmt: skip
    if m > 0 and k > 0:
        launch(layer_norm_backward_kernel, (triton.cdiv(m, block_m),), args, 4, 1)
    return dx


@torch.library.custom_op("fastpeft::layer_norm_backward", mutates_args=())
def _backward(dh: Tensor, x: Tensor, weight: Tensor, d_residual: Tensor, eps: float) -> Tensor:
    with on_device_of(x):
        return backward(dh, x, weight, d_residual, eps)


@_backward.register_fake
def _(dh, x, weight, d_residual, eps):
    return x.new_empty(x.shape)


differentiable_once(_backward)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.layer_norm(x, weight.shape, weight, bias, eps), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, d_residual: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return _backward(dh, x, weight, d_residual, ctx.eps), None, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The LayerNorm of x (..., K) and x, to go on with as the residual; differentiable once, by x alone.

    x, weight and bias (K,) have one dtype, float16, bfloat16 or float32; K is at most `MAX_WIDTH`.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


def ready(x: Tensor, weight: Tensor) -> str | None:
    """None where the kernel of `layer_norm`'s backward is built for these tensors; else why not."""
    return build(("layer_norm", *describe(x, weight)), x, lambda: backward(x, x, weight, x, 1e-5))
