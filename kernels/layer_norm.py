"""A LayerNorm beside its residual: backward sums both gradients of x in one pass.

    forward    h = x̂ ⊙ w + b,  x̂ = (x - mean) · rstd         x goes on as the residual
               xa = (keep ⊙ h) Aᵀ                            for the LoRA layer that h goes to
    backward   dx = rstd · (g - mean(g) - x̂ · mean(g ⊙ x̂)) + d_residual,  g = dh ⊙ w

Shapes: x, h and their gradients (M, K), w and b (K,), frozen, A (R, K), xa (M, R); means are over a row. Mean and rstd
are computed again from x, which backward reads anyway. xa is that of `Shrink`, its gradient that layer's affair.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .blocks import dot, input_precision, rounded
from .dropout import Dropout, keep_tile, mask_arguments, sample_dropout
from .launch import (
    Launcher,
    build,
    describe,
    differentiable_once,
    differentiated,
    eager,
    fixed,
    launchers,
    on_device_of,
)

MAX_WIDTH = 2048  # a program holds whole rows; GPT-2 XL has 1600
ELEMENTS = 4096  # of a program's tile: four float32 tiles of it fit the registers of its four warps


@triton.jit(do_not_specialize=["M", "drop_below"])
def layer_norm_shrink_kernel(
    x_ptr, weight_ptr, bias_ptr, a_ptr, h_ptr, xa_ptr, seed_ptr,
    M, K, R,
    stride_ar, stride_ak,
    eps, drop_below,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`h = x̂ ⊙ w + b` and `xa = (keep ⊙ h) aᵀ` for BLOCK_M rows; all but a contiguous. Without a seed all is kept.

    Three sweeps over the rows: the last two find them in the cache.
    """
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, RANK)
    mask_m, mask_r = offs_m < M, offs_r < R
    x_ptr += start_m.to(tl.int64) * K
    h_ptr += start_m.to(tl.int64) * K
    offsets = tl.where(mask_m, offs_m - start_m, 0)[:, None] * K + offs_k[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for k in range(0, K, BLOCK_C):
        total += tl.load(x_ptr + k + offsets, mask=(offs_k < K - k)[None, :], other=0.0).to(tl.float32)
    mean = (tl.sum(total, axis=1) / K)[:, None]
    squares = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for k in range(0, K, BLOCK_C):
        mask_k = offs_k < K - k
        x = tl.load(x_ptr + k + offsets, mask=mask_k[None, :], other=0.0).to(tl.float32)
        centred = tl.where(mask_k[None, :], x - mean, 0.0)
        squares += centred * centred
    rstd = (1.0 / tl.sqrt(tl.sum(squares, axis=1) / K + eps))[:, None]

    acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    a_ptrs = a_ptr + offs_k[:, None].to(tl.int64) * stride_ak + offs_r[None, :].to(tl.int64) * stride_ar
    for k in range(0, K, BLOCK_C):
        mask_k = offs_k < K - k
        x = tl.load(x_ptr + k + offsets, mask=mask_k[None, :], other=0.0).to(tl.float32)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        weight = tl.load(weight_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        h = rounded((x - mean) * rstd * weight[None, :] + bias[None, :], h_ptr.dtype.element_ty)
        tl.store(h_ptr + k + offsets, h, mask=mask_m[:, None] & mask_k[None, :])
        if seed_ptr is not None:
            h = tl.where(keep_tile(seed_ptr, start_m, k, drop_below, BLOCK_M, BLOCK_C), h, 0.0)
        acc = dot(h, rounded(a, h.dtype), acc, INPUT_PRECISION)
        a_ptrs += BLOCK_C * tl.cast(stride_ak, tl.int64)

    xa_ptrs = xa_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    tl.store(xa_ptrs, rounded(acc, xa_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M"])
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


def shrink(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    lora_a: Tensor,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """h, the LayerNorm of x and of its shape, and xa (M, R), both in x's dtype."""
    rank, k = lora_a.shape
    m, h = x.numel() // max(k, 1), torch.empty_like(x, memory_format=torch.contiguous_format)
    xa = x.new_empty(m, rank)
    strip, precision = tiling.layer_norm_shrink(x, rank), input_precision(x.dtype)
    assert strip is not None, f"a LayerNorm leaves no {rank} numbers a row"  # the caller has asked

    def launcher() -> Launcher:
        args = {
            "K": k, "R": rank,
            "stride_ar": lora_a.stride(0), "stride_ak": lora_a.stride(1),
            "INPUT_PRECISION": precision,
            "BLOCK_M": strip.block_m, "BLOCK_C": strip.block_c, "RANK": tiling.padded_rank(rank),
        }  # fmt: skip
        changing = (
            "x_ptr", "weight_ptr", "bias_ptr", "a_ptr", "h_ptr", "xa_ptr", "seed_ptr", "M", "eps", "drop_below"
        )  # fmt: skip
        return Launcher(layer_norm_shrink_kernel, changing, args, strip.num_warps, strip.num_stages)

    if m > 0:
        dtypes = x.dtype, weight.dtype, bias.dtype
        key = ("layer_norm_shrink", k, rank, precision, dropout is None, *dtypes, *fixed(lora_a))
        seed, drop_below, _ = mask_arguments(dropout)
        changing = x.contiguous(), weight, bias, lora_a, h, xa, seed, m, float(eps), drop_below
        launchers.once(key, launcher)((-(-m // strip.block_m), 1, 1), *changing)
    return h, xa


def backward(dh: Tensor, x: Tensor, weight: Tensor, d_residual: Tensor, eps: float) -> Tensor:
    """dx, of x's shape and dtype."""
    k = x.shape[-1]
    m, dx = x.numel() // max(k, 1), torch.empty_like(x, memory_format=torch.contiguous_format)
    if m == 0 or k == 0:
        return dx
    block_k = 1 << (k - 1).bit_length()
    block_m = max(1, ELEMENTS // block_k)

    def launcher() -> Launcher:
        args = {"K": k, "BLOCK_M": block_m, "BLOCK_K": block_k}
        changing = ("dh_ptr", "x_ptr", "weight_ptr", "residual_ptr", "dx_ptr", "M", "eps")
        return Launcher(layer_norm_backward_kernel, changing, args, 4, 1)

    key = ("layer_norm_backward", k, x.get_device(), *(t.dtype for t in (dh, x, weight, d_residual)))
    changing = dh.contiguous(), x.contiguous(), weight, d_residual.contiguous(), dx, m, float(eps)
    launchers.once(key, launcher)((-(-m // block_m), 1, 1), *changing)
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
        dh, d_residual = dh.resolve_neg(), d_residual.resolve_neg()
        by_operator = differentiated() or not eager(x)
        with on_device_of(x):
            dx = (_backward if by_operator else backward)(dh, x, weight, d_residual, ctx.eps)
        return dx, None, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The LayerNorm of x (..., K) and x, to go on with as the residual; differentiable once, by x alone.

    x, weight and bias (K,) have one dtype, float16, bfloat16 or float32; K is at most `MAX_WIDTH`.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


def ready(x: Tensor, weight: Tensor) -> str | None:
    """None where the kernel of `layer_norm`'s backward is built for these tensors; else why not."""
    return build(
        ("layer_norm", *describe(x.flatten(0, -2), rows=True), *describe(weight)),
        x,
        lambda: backward(x, x, weight, x, 1e-5),
    )


def ready_to_shrink(x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, drops: bool) -> str | None:
    """None where the kernel of `shrink` is built for these tensors; else why not."""
    operands = *describe(x.flatten(0, -2), rows=True), *describe(weight, bias, lora_a)
    dropout = sample_dropout(x) if drops else None
    key = "layer_norm_shrink", drops, *operands
    return build(key, x, lambda: shrink(x, weight, bias, 1e-5, lora_a, dropout))
