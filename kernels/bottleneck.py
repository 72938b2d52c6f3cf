"""The kernels of a bottleneck adapter with its residual, forward and backward, and what launches them.

    forward    z = x Dᵀ + bd                  y = x + s · (act(z) Uᵀ + bu)
    backward   dz = s · (dy U) ⊙ act'(z)      dx = dy + dz D
               dD = dzᵀ x    dbd = Σ dz       dU = s · dyᵀ act(z)    dbu = s · Σ dy

Shapes: x and y (M, K), D (R, K), bd (R,), U (K, R), bu (K,), z and dz (M, R). The forward is one kernel, and
so is dx with dz: a program holds its rows' bottleneck between two passes over them, the second out of cache. Where x is
a block's branch, the forward adds the block's residual too, whose gradient is dy.
All gradients of weights and biases are a third kernel's, one pass over x and dy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tile_table, tiling, tuning
from .activations import activate, activation_gradient
from .blocks import (
    arrive_last,
    clear_tickets,
    dot_apart,
    input_precision,
    rounded,
    sum_in_order,
    ticket_count,
)
from .launch import Launcher, fixed, launchers


@triton.jit
def rows_times(
    t_ptr, f_ptr,
    rows, mask_m, offs_r, mask_r,
    K,
    stride_tm, stride_tk, stride_fk, stride_fr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`t f` for BLOCK_M rows of t (M, K): f (K, R), float32 (BLOCK_M, RANK)."""
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    t_ptrs = t_ptr + rows[:, None] * stride_tm + offs_k[None, :].to(tl.int64) * stride_tk
    f_ptrs = f_ptr + offs_k[:, None].to(tl.int64) * stride_fk + offs_r[None, :].to(tl.int64) * stride_fr
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        t = tl.load(t_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        f = tl.load(f_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        acc = dot_apart(t, rounded(f, t.dtype), acc, INPUT_PRECISION)
        t_ptrs += BLOCK_K * tl.cast(stride_tk, tl.int64)
        f_ptrs += BLOCK_K * tl.cast(stride_fk, tl.int64)
    return acc


@triton.jit
def residual_plus(
    t_ptr, u, f_ptr, bias_ptr, residual_ptr, out_ptr,
    rows, mask_m, offs_r, mask_r,
    K,
    stride_tm, stride_tk, stride_fr, stride_fk,
    scale,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stores `out = t + scale · (u f + bias)` for BLOCK_M rows of t (M, K): u (BLOCK_M, RANK), f (R, K).

    A residual (M, K), contiguous, is added unless `residual_ptr` is None.
    """
    offs_k = tl.arange(0, BLOCK_K)
    t_ptrs = t_ptr + rows[:, None] * stride_tm + offs_k[None, :].to(tl.int64) * stride_tk
    f_ptrs = f_ptr + offs_r[:, None].to(tl.int64) * stride_fr + offs_k[None, :].to(tl.int64) * stride_fk
    offsets = rows[:, None] * K + offs_k[None, :]
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        mask = mask_m[:, None] & mask_k[None, :]
        f = tl.load(f_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        update = dot_apart(
            u, rounded(f, u.dtype), tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32), INPUT_PRECISION
        )
        if bias_ptr is not None:
            update += tl.load(bias_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        out = tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32) + scale * update
        if residual_ptr is not None:
            out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, rounded(out, out_ptr.dtype.element_ty), mask=mask)
        t_ptrs += BLOCK_K * tl.cast(stride_tk, tl.int64)
        f_ptrs += BLOCK_K * tl.cast(stride_fk, tl.int64)
        offsets += BLOCK_K


@triton.jit(do_not_specialize=["M"])
def adapter_forward_kernel(
    x_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, residual_ptr, z_ptr, y_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_dr, stride_dk, stride_uk, stride_ur,
    scale,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`z = x downᵀ + down_bias`, `y = x + scale · (act(z) upᵀ + up_bias)`, plus a residual if there is one."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RANK)
    mask_m, mask_r = rows < M, offs_r < R

    z = rows_times(
        x_ptr, down_ptr, rows, mask_m, offs_r, mask_r, K, stride_xm, stride_xk, stride_dk, stride_dr,
        INPUT_PRECISION, BLOCK_M, BLOCK_K, RANK,
    )  # fmt: skip
    if down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    z = tl.where(mask_r[None, :], z, 0.0)  # an infinite x times a padding zero is NaN
    z = rounded(z, z_ptr.dtype.element_ty)
    tl.store(z_ptr + rows[:, None] * R + offs_r[None, :], z, mask=mask_m[:, None] & mask_r[None, :])

    h = rounded(activate(z.to(tl.float32), ACTIVATION), z.dtype)
    residual_plus(
        x_ptr, h, up_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, mask_m, offs_r, mask_r, K,
        stride_xm, stride_xk, stride_ur, stride_uk, scale, INPUT_PRECISION, BLOCK_M, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def adapter_backward_kernel(
    dy_ptr, down_ptr, up_ptr, z_ptr, h_ptr, dz_ptr, dx_ptr, tickets_ptr,
    M, K, R,
    stride_ym, stride_yk, stride_dr, stride_dk, stride_uk, stride_ur,
    scale,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    TICKETS: tl.constexpr,
):  # fmt: skip
    """`h = act(z)`, `dz = scale · (dy up) ⊙ act'(z)` and, unless dx_ptr is None, `dx = dy + dz down`."""
    clear_tickets(tickets_ptr, TICKETS)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RANK)
    mask_m, mask_r = rows < M, offs_r < R

    dh = rows_times(
        dy_ptr, up_ptr, rows, mask_m, offs_r, mask_r, K, stride_ym, stride_yk, stride_uk, stride_ur,
        INPUT_PRECISION, BLOCK_M, BLOCK_K, RANK,
    )  # fmt: skip
    offsets, mask = rows[:, None] * R + offs_r[None, :], mask_m[:, None] & mask_r[None, :]
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dz = tl.where(mask_r[None, :], scale * dh * activation_gradient(z, ACTIVATION), 0.0)
    dz = rounded(dz, dz_ptr.dtype.element_ty)
    tl.store(h_ptr + offsets, rounded(activate(z, ACTIVATION), h_ptr.dtype.element_ty), mask=mask)
    tl.store(dz_ptr + offsets, dz, mask=mask)

    if dx_ptr is not None:
        residual_plus(
            dy_ptr, dz, down_ptr, None, None, dx_ptr, rows, mask_m, offs_r, mask_r, K,
            stride_ym, stride_yk, stride_dr, stride_dk, 1.0, INPUT_PRECISION, BLOCK_M, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def adapter_gradient_kernel(
    dy_ptr, x_ptr, h_ptr, dz_ptr, out_ptr, partials_ptr, tickets_ptr,
    M, K, R, rows_each,
    stride_ym, stride_yk, stride_xm, stride_xk,
    scale,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`d_down = dzᵀ x`, `d_up = scale · dyᵀ h`, `d_down_bias = Σ dz`, `d_up_bias = scale · Σ dy`.

    Program (i, j) sums `rows_each` rows of BLOCK_K columns: the j-th partial of their part of `out`, which
    holds d_down (R, K), d_up (K, R), d_down_bias (R,) and d_up_bias (K,), one after the other, and so does each
    of the float32 `partials`.
    """
    pid_k, pid_m = tl.program_id(0), tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RANK)
    mask_k, mask_r = offs_k < K, offs_r < R
    start = pid_m.to(tl.int64) * rows_each
    end = tl.minimum(start + rows_each, M)

    rows = start + offs_m
    dy_ptrs = dy_ptr + rows[:, None] * stride_ym + offs_k[None, :].to(tl.int64) * stride_yk
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    offsets = rows[:, None] * R + offs_r[None, :]
    h_ptrs, dz_ptrs = h_ptr + offsets, dz_ptr + offsets
    # Sums over rows are products with ones: sixteen equal columns, the fewest a matrix instruction has.
    ones = rounded(tl.full((BLOCK_M, 16), 1.0, dtype=tl.float32), x_ptr.dtype.element_ty)
    d_down = tl.zeros((BLOCK_K, RANK), dtype=tl.float32)  # transposed, as d_up lies
    d_up = tl.zeros((BLOCK_K, RANK), dtype=tl.float32)
    d_down_bias = tl.zeros((16, RANK), dtype=tl.float32)
    d_up_bias = tl.zeros((BLOCK_K, 16), dtype=tl.float32)
    for m in range(start, end, BLOCK_M):
        mask_m = offs_m < end - m
        mask, mask_h = mask_m[:, None] & mask_k[None, :], mask_m[:, None] & mask_r[None, :]
        dy = tl.trans(tl.load(dy_ptrs, mask=mask, other=0.0))
        d_up = dot_apart(dy, tl.load(h_ptrs, mask=mask_h, other=0.0), d_up, INPUT_PRECISION)
        d_up_bias = dot_apart(dy, ones, d_up_bias, INPUT_PRECISION)
        dz = tl.load(dz_ptrs, mask=mask_h, other=0.0)
        d_down = dot_apart(tl.trans(tl.load(x_ptrs, mask=mask, other=0.0)), dz, d_down, INPUT_PRECISION)
        d_down_bias = dot_apart(tl.trans(ones), dz, d_down_bias, INPUT_PRECISION)
        dy_ptrs += BLOCK_M * tl.cast(stride_ym, tl.int64)
        x_ptrs += BLOCK_M * tl.cast(stride_xm, tl.int64)
        h_ptrs += BLOCK_M * R
        dz_ptrs += BLOCK_M * R

    size = K * R
    stride = 2 * size + K + R  # of a partial
    own_ptr = partials_ptr + pid_m.to(tl.int64) * stride
    mask = mask_k[:, None] & mask_r[None, :]
    down_offsets = offs_r[None, :] * K + offs_k[:, None]
    up_offsets = size + offs_k[:, None] * R + offs_r[None, :]
    down_bias_offsets, up_bias_offsets = 2 * size + offs_r, 2 * size + R + offs_k
    mask_down_bias = offs_r < tl.where(
        pid_k == 0, R, 0
    )  # the sum of dz is the same in every column of the grid
    tl.store(own_ptr + down_offsets, d_down, mask=mask)
    tl.store(own_ptr + up_offsets, d_up * scale, mask=mask)
    tl.store(own_ptr + down_bias_offsets, tl.sum(d_down_bias, axis=0) / 16, mask=mask_down_bias)
    tl.store(own_ptr + up_bias_offsets, tl.sum(d_up_bias, axis=1) * (scale / 16), mask=mask_k)
    count = tl.num_programs(1)
    if arrive_last(tickets_ptr + pid_k, count):
        dtype = out_ptr.dtype.element_ty
        total = sum_in_order(partials_ptr + down_offsets, mask, stride, count)
        tl.store(out_ptr + down_offsets, rounded(total, dtype), mask=mask)
        total = sum_in_order(partials_ptr + up_offsets, mask, stride, count)
        tl.store(out_ptr + up_offsets, rounded(total, dtype), mask=mask)
        sums = sum_in_order(partials_ptr + down_bias_offsets, mask_down_bias, stride, count)
        tl.store(out_ptr + down_bias_offsets, rounded(sums, dtype), mask=mask_down_bias)
        sums = sum_in_order(partials_ptr + up_bias_offsets, mask_k, stride, count)
        tl.store(out_ptr + up_bias_offsets, rounded(sums, dtype), mask=mask_k)


_FORWARD = (
    "x_ptr", "down_ptr", "down_bias_ptr", "up_ptr", "up_bias_ptr", "residual_ptr", "z_ptr", "y_ptr", "M", "scale"
)  # fmt: skip
_BACKWARD = (
    "dy_ptr", "down_ptr", "up_ptr", "z_ptr", "h_ptr", "dz_ptr", "dx_ptr", "tickets_ptr", "M", "scale"
)  # fmt: skip
_GRADIENT = (
    "dy_ptr", "x_ptr", "h_ptr", "dz_ptr", "out_ptr", "partials_ptr", "tickets_ptr", "M", "rows_each", "scale"
)  # fmt: skip


def forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    residual: Tensor | None = None,
    strip: tile_table.Strip | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, K), to which a residual (M, K), contiguous, is added, and the pre-activation z (M, R), in x's dtype."""
    (m, k), rank = x.shape, down_weight.shape[0]
    y, z = x.new_empty(m, k), x.new_empty(m, rank)
    if m == 0 or k == 0:
        return y, z
    if strip is None:
        strip = tuning.fastest(
            "adapter_forward",
            x,
            (rank, activation, residual is not None),
            tiling.adapter(x, rank),
            lambda each: forward(
                x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual, each
            ),
        )
    parameters, chosen = (down_weight, down_bias, up_weight, up_bias), strip

    def launcher() -> Launcher:
        args = {
            "stride_xm": x.stride(0), "stride_xk": x.stride(1),
            **_common(x, down_weight, up_weight, activation, chosen),
        }  # fmt: skip
        return Launcher(adapter_forward_kernel, _FORWARD, args, chosen.num_warps, chosen.num_stages)

    key = (
        "adapter",
        strip,
        k,
        rank,
        activation,
        input_precision(x.dtype),
        residual is None,
        *fixed(x, *parameters),
    )
    launchers.once(key, launcher)(
        (-(-m // strip.block_m), 1, 1), x, *parameters, residual, z, y, m, float(scale)
    )
    return y, z


def backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    activation: str,
    scale: float,
    dtype: torch.dtype,
    need_x: bool,
    need_parameters: bool,
    strip: tile_table.Strip | None = None,
    gradient_strip: tile_table.Strip | None = None,
    splits: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """dx (M, K), and the gradients of all parameters in `dtype`, laid out as `split_gradients` reads them."""
    (m, k), rank = x.shape, down_weight.shape[0]
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_x else None
    if m == 0 or k == 0:
        return dx, x.new_zeros(2 * k * rank + k + rank, dtype=dtype) if need_parameters else None
    if strip is None:
        strip = tuning.fastest(
            "adapter_backward",
            x,
            (rank, activation, need_x),
            tiling.adapter(x, rank),
            lambda each: backward(
                dy, x, down_weight, up_weight, z, activation, scale, dtype, need_x, False, each
            ),
        )
    gradient_strip = gradient_strip or tiling.adapter_gradient(x, rank)
    columns = -(-k // gradient_strip.block_c)
    tickets = x.new_empty(ticket_count(columns), dtype=torch.int32)
    h, dz, chosen = torch.empty_like(z), torch.empty_like(z), strip

    def launcher() -> Launcher:
        args = {
            "stride_ym": dy.stride(0), "stride_yk": dy.stride(1), "TICKETS": len(tickets),
            **_common(x, down_weight, up_weight, activation, chosen),
        }  # fmt: skip
        return Launcher(adapter_backward_kernel, _BACKWARD, args, chosen.num_warps, chosen.num_stages)

    precision = input_precision(x.dtype)
    sizes = k, rank, precision, len(tickets)
    key = ("adapter backward", strip, activation, dx is None, *sizes, *fixed(dy, down_weight, up_weight))
    changing = dy, down_weight, up_weight, z, h, dz, dx, tickets, m, float(scale)
    launchers.once(key, launcher)((-(-m // strip.block_m), 1, 1), *changing)
    if not need_parameters:
        return dx, None

    splits = splits or tiling.splits(x.device, 2 * columns, rank)
    rows_each = -(-m // (splits * gradient_strip.block_m)) * gradient_strip.block_m
    splits = -(-m // rows_each)
    out = x.new_empty(2 * k * rank + k + rank, dtype=dtype)

    def gradient_launcher() -> Launcher:
        args = {
            "K": k, "R": rank,
            "stride_ym": dy.stride(0), "stride_yk": dy.stride(1),
            "stride_xm": x.stride(0), "stride_xk": x.stride(1),
            "INPUT_PRECISION": precision,
            "BLOCK_M": gradient_strip.block_m, "BLOCK_K": gradient_strip.block_c,
            "RANK": tiling.padded_rank(rank),
        }  # fmt: skip
        how = gradient_strip.num_warps, gradient_strip.num_stages
        return Launcher(adapter_gradient_kernel, _GRADIENT, args, *how)

    key = ("adapter gradient", gradient_strip, *sizes, dtype, *fixed(dy, x))
    partials = x.new_empty(splits, out.numel(), dtype=torch.float32)
    given = dy, x, h, dz, out, partials, tickets, m, rows_each, float(scale)
    launchers.once(key, gradient_launcher)((columns, splits, 1), *given)
    return dx, out


def _common(
    x: Tensor, down_weight: Tensor, up_weight: Tensor, activation: str, strip: tile_table.Strip
) -> dict[str, Any]:
    """The staying arguments that the two kernels over rows share."""
    k, rank = x.shape[1], down_weight.shape[0]
    return {
        "K": k, "R": rank,
        "stride_dr": down_weight.stride(0), "stride_dk": down_weight.stride(1),
        "stride_uk": up_weight.stride(0), "stride_ur": up_weight.stride(1),
        "ACTIVATION": activation, "INPUT_PRECISION": input_precision(x.dtype),
        "BLOCK_M": strip.block_m, "BLOCK_K": strip.block_c, "RANK": tiling.padded_rank(rank),
    }  # fmt: skip


def split_gradients(out: Tensor, k: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_down (R, K), d_down_bias (R,), d_up (K, R), d_up_bias (K,): views of `backward`'s second result."""
    d_down, d_up, d_down_bias, d_up_bias = out.split((k * rank, k * rank, rank, k))
    return d_down.view(rank, k), d_down_bias, d_up.view(k, rank), d_up_bias
