"""The kernels of a linear layer with a low-rank update, and what launches them.

    y = x W + b + outer ⊙ (u (s f)), with u = (inner ⊙ x) aᵀ          dB = s dyᵀ xa          dA = s dxaᵀ (keep ⊙ x)

Shapes: x (M, K), W (K, N), b (N,), a (R, K), f (R, N), u, xa and dxa (M, R), y and dy (M, N); inner, outer and keep are
dropout masks. `linear_kernel` is a GEMM with a rank-r term; where no mask falls on what it reads, it can compute u from
the tiles that it loads anyway. `shrink_kernel` is a pass over wide rows that leaves R numbers a row: u beforehand.
`gradient_kernel` is one over x and dy that leaves R numbers a column: dA and dB.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiling, tuning
from .activations import activate, activation_gradient
from .blocks import (
    arrive_last,
    clear_tickets,
    dot,
    grouped_order,
    input_precision,
    load,
    rounded,
    sum_in_order,
    ticket_arguments,
)
from .dropout import Dropout, dropout_arguments, keep_scale, keep_tile
from .launch import launch

# --- kernels


@triton.jit
def initial(
    bias_ptr, u_ptr, f_ptr, seed_ptr,
    R,
    stride_fr, stride_fn,
    scaling, drop_below,
    start_m, start_n, rows, offs_n, mask_n,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """What a tile's accumulator starts from: `bias + u (scaling · f)`, or `keep ⊙ (u f)` with no bias.

    u (M, R) contiguous, f (R, N) by strides; RANK is R padded to a power of two. f takes the scaling, for
    then a float32 f is rounded once.
    """
    BLOCK_R: tl.constexpr = 16  # the loop below needs the shared memory that more would take
    acc = start_from(bias_ptr, offs_n, mask_n, BLOCK_M, BLOCK_N)
    for r in tl.range(0, RANK, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        u = tl.load(u_ptr + rows[:, None].to(tl.int64) * R + offs_r[None, :], mask=mask_r[None, :], other=0.0)
        f_ptrs = f_ptr + offs_r[:, None].to(tl.int64) * stride_fr + offs_n[None, :].to(tl.int64) * stride_fn
        f = tl.load(f_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = dot(u, rounded(f.to(tl.float32) * scaling, u.dtype), acc, INPUT_PRECISION)
    if DROPOUT:
        acc = tl.where(keep_tile(seed_ptr, start_m, start_n, drop_below, BLOCK_M, BLOCK_N), acc, 0.0)
    return acc


@triton.jit
def start_from(bias_ptr, offs_n, mask_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An accumulator holding the bias in every row, or zeros."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def finished(
    acc, u, u_ptr, f_ptr, seed_ptr,
    M, R,
    stride_fr, stride_fn,
    scaling, drop_below,
    start_m, start_n, offs_m, offs_n, mask_n, first_column,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`acc + keep ⊙ (u (scaling · f))` for the u (BLOCK_M, RANK) summed on the way; the first column stores it."""
    offs_r = tl.arange(0, RANK)
    mask_m, mask_r = offs_m < M, offs_r < R
    # An infinite x times a padding zero is NaN.
    u = rounded(tl.where(mask_r[None, :], u, 0.0), u_ptr.dtype.element_ty)
    if first_column:
        u_ptrs = u_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
        tl.store(u_ptrs, u, mask=mask_m[:, None] & mask_r[None, :])
    f_ptrs = f_ptr + offs_r[:, None].to(tl.int64) * stride_fr + offs_n[None, :].to(tl.int64) * stride_fn
    f = tl.load(f_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    f = rounded(f.to(tl.float32) * scaling, u.dtype)
    if DROPOUT:
        update = dot(u, f, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), INPUT_PRECISION)
        keep = keep_tile(seed_ptr, start_m, start_n, drop_below, BLOCK_M, BLOCK_N)
        return acc + tl.where(keep, update, 0.0)
    else:
        return dot(u, f, acc, INPUT_PRECISION)


@triton.jit
def gelu(t):
    """GPT-2's gelu(t), in t's dtype."""
    return rounded(activate(t.to(tl.float32), "gelu_tanh"), t.dtype)


@triton.jit
def to_pre_activation(acc, pre_ptr, offsets, mask):
    """A gradient to gelu(pre) made one to pre; `acc` itself where `pre_ptr` is None."""
    if pre_ptr is not None:
        pre = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        acc *= activation_gradient(pre, "gelu_tanh")
    return acc


@triton.jit
def plus_residual(
    acc, residual_ptr, seed_ptr, offsets, mask, drop_below, drop_scale, start_m, start_n,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`residual + drop_scale · (keep ⊙ acc)`; `acc` itself where `residual_ptr` is None."""
    if residual_ptr is not None:
        if DROPOUT:
            keep = keep_tile(seed_ptr, start_m, start_n, drop_below, BLOCK_M, BLOCK_N)
            acc = tl.where(keep, acc * drop_scale, 0.0)
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, u_ptr, f_ptr, pre_ptr, residual_ptr, y_ptr, h_ptr, seed_ptr, tickets_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_ar, stride_ak, stride_fr, stride_fn,
    scaling, drop_below, drop_scale,
    SINGLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    GROUP_M: tl.constexpr,
    MASKED_N: tl.constexpr,
    MASKED_K: tl.constexpr,
    TICKETS: tl.constexpr,
):  # fmt: skip
    """`y = x w + bias + keep ⊙ (u (scaling · f))`, one tile a program; SINGLE computes u = x aᵀ on the way.

    With `pre_ptr`, y is multiplied by gelu'(pre); with `h_ptr`, `h = gelu(y)` is stored too, or alone without `y_ptr`.
    With `residual_ptr` the mask falls on y instead, scaled by `drop_scale`, and the residual is added.
    """
    MASKED_UPDATE: tl.constexpr = DROPOUT and residual_ptr is None
    clear_tickets(tickets_ptr, TICKETS)
    pid_m, pid_n = grouped_order(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows = tl.where(mask_m, offs_m, 0)  # rows past the end repeat row 0 and are never stored

    if SINGLE:
        acc = start_from(bias_ptr, offs_n, mask_n, BLOCK_M, BLOCK_N)
        u = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
        offs_r = tl.arange(0, RANK)
        mask_r = offs_r < R
        a_ptrs = a_ptr + offs_k[:, None].to(tl.int64) * stride_ak + offs_r[None, :].to(tl.int64) * stride_ar
    else:
        acc = initial(
            bias_ptr, u_ptr, f_ptr, seed_ptr, R, stride_fr, stride_fn, scaling, drop_below,
            start_m, start_n, rows, offs_n, mask_n, MASKED_UPDATE, INPUT_PRECISION, BLOCK_M, BLOCK_N, RANK,
        )  # fmt: skip

    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + offs_k[:, None].to(tl.int64) * stride_wk + offs_n[None, :].to(tl.int64) * stride_wn
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = load(x_ptrs, mask_k[None, :], MASKED_K)
        w = load(w_ptrs, mask_k[:, None] & mask_n[None, :], MASKED_K or MASKED_N)
        acc = dot(x, w, acc, INPUT_PRECISION)
        if SINGLE:
            if MASKED_K:
                a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            else:
                a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0)
            u = dot(x, a, u, INPUT_PRECISION)
            a_ptrs += BLOCK_K * tl.cast(stride_ak, tl.int64)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)

    if SINGLE:
        acc = finished(
            acc, u, u_ptr, f_ptr, seed_ptr, M, R, stride_fr, stride_fn, scaling, drop_below,
            start_m, start_n, offs_m, offs_n, mask_n, pid_n == 0,
            MASKED_UPDATE, INPUT_PRECISION, BLOCK_M, BLOCK_N, RANK,
        )  # fmt: skip

    offsets = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    acc = to_pre_activation(acc, pre_ptr, offsets, mask)
    acc = plus_residual(
        acc, residual_ptr, seed_ptr, offsets, mask, drop_below, drop_scale, start_m, start_n,
        DROPOUT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    y = rounded(acc, x_ptr.dtype.element_ty)
    if y_ptr is not None:
        tl.store(y_ptr + offsets, y, mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + offsets, gelu(y), mask=mask)


@triton.jit
def linear_descriptor_kernel(
    x_desc, w_desc, bias_ptr, u_ptr, f_ptr, pre_ptr, residual_ptr, y_desc, h_desc, seed_ptr,
    M, N, K, R,
    stride_fr, stride_fn,
    scaling, drop_below, drop_scale,
    DROPOUT: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """`linear_kernel` with a persistent grid and tensor descriptors, which read zeros past a tensor's end.

    W_TRANSPOSED: `w_desc` describes (N, K), the weight of an nn.Linear, rather than (K, N).
    """
    MASKED_UPDATE: tl.constexpr = DROPOUT and residual_ptr is None
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pid_m, pid_n = grouped_order(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask_m = offs_m < M
        rows = tl.where(mask_m, offs_m, 0)
        acc = initial(
            bias_ptr, u_ptr, f_ptr, seed_ptr, R, stride_fr, stride_fn, scaling, drop_below,
            start_m, start_n, rows, offs_n, mask_n, MASKED_UPDATE, INPUT_PRECISION, BLOCK_M, BLOCK_N, RANK,
        )  # fmt: skip
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([start_m, k])
            w = w_desc.load([start_n, k]).T if W_TRANSPOSED else w_desc.load([k, start_n])
            acc = dot(x, w, acc, INPUT_PRECISION)
        offsets = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        acc = to_pre_activation(acc, pre_ptr, offsets, mask)
        acc = plus_residual(
            acc, residual_ptr, seed_ptr, offsets, mask, drop_below, drop_scale, start_m, start_n,
            DROPOUT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        y = rounded(acc, x_desc.dtype)
        if y_desc is not None:
            y_desc.store([start_m, start_n], y)
        if h_desc is not None:
            h_desc.store([start_m, start_n], gelu(y))


@triton.jit
def shrink_kernel(
    t_ptr, f_ptr, u_ptr, seed_ptr, tickets_ptr,
    M, C, R,
    stride_tm, stride_tc, stride_fc, stride_fr,
    drop_below,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
    MASKED_C: tl.constexpr,
    TICKETS: tl.constexpr,
):  # fmt: skip
    """`u = (keep ⊙ t) f`: t (M, C), f (C, R), u (M, R); a program for every BLOCK_M rows."""
    clear_tickets(tickets_ptr, TICKETS)
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, RANK)
    mask_m, mask_r = offs_m < M, offs_r < R
    rows = tl.where(mask_m, offs_m, 0)

    acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    t_ptrs = t_ptr + rows[:, None].to(tl.int64) * stride_tm + offs_c[None, :].to(tl.int64) * stride_tc
    f_ptrs = f_ptr + offs_c[:, None].to(tl.int64) * stride_fc + offs_r[None, :].to(tl.int64) * stride_fr
    for c in range(0, C, BLOCK_C):
        mask_c = offs_c < C - c
        t = load(t_ptrs, mask_c[None, :], MASKED_C)
        f = tl.load(f_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            t = tl.where(keep_tile(seed_ptr, start_m, c, drop_below, BLOCK_M, BLOCK_C), t, 0.0)
        acc = dot(t, rounded(f, t.dtype), acc, INPUT_PRECISION)
        t_ptrs += BLOCK_C * tl.cast(stride_tc, tl.int64)
        f_ptrs += BLOCK_C * tl.cast(stride_fc, tl.int64)

    u_ptrs = u_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    tl.store(u_ptrs, rounded(acc, u_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def column_gradient(
    t_ptr, u_ptr, df_ptr, partials_ptr, ticket_ptr, seed_ptr,
    M, C, R, rows,
    stride_tm, stride_tc, stride_dc, stride_dr,
    scaling, drop_below, start_c,
    ACTIVATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`df = scaling · (keep ⊙ t)ᵀ u` for BLOCK_C columns from `start_c` on, by the programs of one grid column.

    t (M, C), or gelu(t) where ACTIVATED, u (M, R), df (C, R) by strides; `partials_ptr` (programs, BLOCK_C, R) is
    this grid column's alone.
    """
    pid_m, num_pid_m = tl.program_id(1), tl.num_programs(1)
    own_c = tl.arange(0, BLOCK_C)
    offs_c = start_c + own_c
    offs_r = tl.arange(0, RANK)
    mask_c, mask_r = offs_c < C, offs_r < R
    start_m, end_m = pid_m * rows, tl.minimum((pid_m + 1) * rows, M)
    offs_m = start_m + tl.arange(0, BLOCK_M)

    acc = tl.zeros((BLOCK_C, RANK), dtype=tl.float32)
    t_ptrs = t_ptr + offs_m[:, None].to(tl.int64) * stride_tm + offs_c[None, :].to(tl.int64) * stride_tc
    u_ptrs = u_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    for m in range(start_m, end_m, BLOCK_M):
        mask_m = offs_m < end_m - (m - start_m)
        t = tl.load(t_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        u = tl.load(u_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if ACTIVATED:
            t = gelu(t)
        if DROPOUT:
            t = tl.where(keep_tile(seed_ptr, m, start_c, drop_below, BLOCK_M, BLOCK_C), t, 0.0)
        acc = dot(tl.trans(t), u, acc, INPUT_PRECISION)
        t_ptrs += BLOCK_M * tl.cast(stride_tm, tl.int64)
        u_ptrs += BLOCK_M * R

    mask = mask_c[:, None] & mask_r[None, :]
    partials_ptrs = partials_ptr + own_c[:, None] * R + offs_r[None, :]
    tl.store(partials_ptrs + pid_m * BLOCK_C * R, acc, mask=mask)
    if arrive_last(ticket_ptr, num_pid_m):
        total = sum_in_order(partials_ptrs, mask, BLOCK_C * R, num_pid_m) * scaling
        df_ptrs = df_ptr + offs_c[:, None] * stride_dc + offs_r[None, :] * stride_dr
        tl.store(df_ptrs, rounded(total, df_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_kernel(
    dy_ptr, xa_ptr, db_ptr, x_ptr, dxa_ptr, da_ptr, partials_ptr, tickets_ptr, seed_ptr,
    M, N, K, R, tiles_b, rows,
    stride_ym, stride_yn, stride_xm, stride_xk,
    scaling, drop_below,
    ACTIVATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`db = scaling · dyᵀ xa` and `da = scaling · dxaᵀ (keep ⊙ x)`, with gelu(x) for x where ACTIVATED.

    The first `tiles_b` columns of the grid have BLOCK_C columns of dy each, the others of x; a program sums `rows`
    of the rows of its columns.
    """
    pid_c = tl.program_id(0)
    ticket_ptr = tickets_ptr + pid_c
    partials_ptr += (pid_c * tl.num_programs(1)).to(tl.int64) * BLOCK_C * R
    if pid_c < tiles_b:
        column_gradient(
            dy_ptr, xa_ptr, db_ptr, partials_ptr, ticket_ptr, seed_ptr, M, N, R, rows,
            stride_ym, stride_yn, R, 1, scaling, drop_below, pid_c * BLOCK_C,
            False, False, INPUT_PRECISION, BLOCK_M, BLOCK_C, RANK,
        )  # fmt: skip
    else:
        column_gradient(
            x_ptr, dxa_ptr, da_ptr, partials_ptr, ticket_ptr, seed_ptr, M, K, R, rows,
            stride_xm, stride_xk, 1, K, scaling, drop_below, (pid_c - tiles_b) * BLOCK_C,
            ACTIVATED, DROPOUT, INPUT_PRECISION, BLOCK_M, BLOCK_C, RANK,
        )  # fmt: skip


# --- launchers: allocation and grid


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    f: Tensor,
    scaling: float,
    how: tiling.Linear,
    *,
    u: Tensor | None = None,
    a: Tensor | None = None,
    dropout: Dropout | None = None,
    tickets: Tensor | None = None,
    pre: Tensor | None = None,
    residual: Tensor | None = None,
    stores: str = "y",
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`y = x weight + bias + keep ⊙ (u (scaling · f))`, u, which is `x aᵀ` where `a` (R, K) is given, and h.

    There is no bias with dropout: the mask falls on all that the accumulator starts from. Where `pre` (M, N),
    contiguous, is given, y is multiplied by gelu'(pre). Where `residual` (M, N), contiguous, is given, y becomes
    `residual + dropout(y)`, and the mask falls on nothing else. h is gelu(y); `stores` names what is stored of the two,
    "y", "yh" or "h", and the other is None.
    """
    (m, k), n, rank = x.shape, weight.shape[1], f.shape[0]
    y, h = (x.new_empty(m, n) if name in stores else None for name in "yh")
    if u is None:
        u = x.new_empty(m, rank)
    tile = how.tile
    args = {
        "bias_ptr": bias, "u_ptr": u, "f_ptr": f, "pre_ptr": pre, "residual_ptr": residual,
        "M": m, "N": n, "K": k, "R": rank,
        "stride_fr": f.stride(0), "stride_fn": f.stride(1),
        "scaling": scaling, "INPUT_PRECISION": input_precision(x.dtype),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "RANK": tiling.padded_rank(rank), "GROUP_M": 8,
        **dropout_arguments(dropout), "drop_scale": 1.0 if dropout is None else keep_scale(dropout.p),
    }  # fmt: skip
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    if how.descriptor:
        transposed = weight.stride(1) != 1
        stored, block = (
            (weight.T, [tile.block_n, tile.block_k]) if transposed else (weight, [tile.block_k, tile.block_n])
        )
        out = [tile.block_m, tile.block_n]
        args |= {
            "x_desc": TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
            "w_desc": TensorDescriptor.from_tensor(stored, block),
            "y_desc": None if y is None else TensorDescriptor.from_tensor(y, out),
            "h_desc": None if h is None else TensorDescriptor.from_tensor(h, out),
            "W_TRANSPOSED": transposed,
        }
        grid = (min(tiles, how.programs),)
        launch(linear_descriptor_kernel, grid, args, tile.num_warps, tile.num_stages)
    else:
        args |= {
            "x_ptr": x, "w_ptr": weight, "a_ptr": a, "y_ptr": y, "h_ptr": h, "SINGLE": a is not None,
            "stride_xm": x.stride(0), "stride_xk": x.stride(1),
            "stride_wk": weight.stride(0), "stride_wn": weight.stride(1),
            "stride_ar": 0 if a is None else a.stride(0), "stride_ak": 0 if a is None else a.stride(1),
            "MASKED_N": n % tile.block_n != 0, "MASKED_K": k % tile.block_k != 0,
            **ticket_arguments(tickets),
        }  # fmt: skip
        launch(linear_kernel, (tiles,), args, tile.num_warps, tile.num_stages)
    return y, u, h


def shrink(
    t: Tensor,
    f: Tensor,
    *,
    dropout: Dropout | None = None,
    tickets: Tensor | None = None,
    strip: tiling.Strip | None = None,
) -> Tensor:
    """`u = (keep ⊙ t) f` in t's dtype: t (M, C), f (C, R), u (M, R)."""
    (m, c), rank = t.shape, f.shape[1]
    if strip is None:
        strip = tuning.fastest(
            "shrink",
            t,
            (rank, dropout is not None),
            tiling.shrink(t, rank),
            lambda each: shrink(t, f, dropout=dropout, tickets=tickets, strip=each),
        )
    u = t.new_empty(m, rank)
    args = {
        "t_ptr": t, "f_ptr": f, "u_ptr": u,
        "M": m, "C": c, "R": rank,
        "stride_tm": t.stride(0), "stride_tc": t.stride(1),
        "stride_fc": f.stride(0), "stride_fr": f.stride(1),
        "INPUT_PRECISION": input_precision(t.dtype),
        "BLOCK_M": strip.block_m, "BLOCK_C": strip.block_c, "RANK": tiling.padded_rank(rank),
        "MASKED_C": c % strip.block_c != 0,
        **dropout_arguments(dropout), **ticket_arguments(tickets),
    }  # fmt: skip
    launch(shrink_kernel, (triton.cdiv(m, strip.block_m),), args, strip.num_warps, strip.num_stages)
    return u


def updated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    f: Tensor,
    scaling: float,
    *,
    inner: Dropout | None = None,
    outer: Dropout | None = None,
    tickets: Tensor | None = None,
    pre: Tensor | None = None,
    residual: Tensor | None = None,
    stores: str = "y",
    u: Tensor | None = None,
    how: tiling.Linear | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`u = (inner ⊙ x) aᵀ` and `y = x weight + bias + outer ⊙ (u (scaling · f))`, as (y, u, h), all in x's dtype.

    x (M, K), weight (K, N), a (R, K), f (R, N); `inner` and `outer` are dropout masks. What `pre`, `residual` and
    `stores` change, and h, are as in `linear`. A u that is given is not computed again.
    """
    (m, _), n, rank = x.shape, weight.shape[1], a.shape[0]
    if m == 0 or n == 0:
        if tickets is not None:
            tickets.zero_()
        y, h = (x.new_empty(m, n) if name in stores else None for name in "yh")
        return y, x.new_zeros(m, rank) if u is None else u, h
    rest: dict[str, Any] = {"pre": pre, "residual": residual, "stores": stores}
    if how is None:
        drops = inner is not None, outer is not None
        epilogue = pre is not None, residual is not None, stores
        how = tuning.fastest(
            "updated",
            x,
            (n, rank, drops, weight.stride(1) == 1, a.dtype, epilogue),
            tiling.linear(x, weight, rank, *drops, epilogue != (False, False, "y"), pre is not None),
            lambda each: updated(
                x,
                weight,
                bias,
                a,
                f,
                scaling,
                inner=inner,
                outer=outer,
                tickets=tickets,
                how=each,
                u=u,
                **rest,
            ),
        )
    if how.single:  # the loop has no room to round a wider factor
        return linear(
            x, weight, bias, f, scaling, how, a=a.to(x.dtype), dropout=outer, tickets=tickets, **rest
        )
    if u is None:
        u = shrink(x, a.T, dropout=inner, tickets=tickets)
    return linear(x, weight, bias, f, scaling, how, u=u, dropout=outer, **rest)


def gradients(
    dy: Tensor,
    xa: Tensor,
    x: Tensor,
    dxa: Tensor,
    d_lora_b: Tensor | None,
    d_lora_a: Tensor | None,
    scaling: float,
    tickets: Tensor,
    *,
    dropout: Dropout | None = None,
    activated: bool = False,
    splits: int = 0,
) -> None:
    """Fill `d_lora_b` with `scaling · dyᵀ xa` and `d_lora_a` with `scaling · dxaᵀ (keep ⊙ x)`; None is left out.

    Where `activated`, x is the pre-activation, and gelu(x) stands for it.
    dy (M, N), x (M, K), xa and dxa (M, R); d_lora_b (N, R) and d_lora_a (R, K) are contiguous. An earlier launch
    has cleared the `tickets`, one for each BLOCK_C columns of what is filled.
    """
    (m, n), k, rank = dy.shape, x.shape[1], xa.shape[1]
    strip = tiling.gradient(x, rank)
    tiles_b = 0 if d_lora_b is None else triton.cdiv(n, strip.block_c)
    tiles = tiles_b + (0 if d_lora_a is None else triton.cdiv(k, strip.block_c))
    if tiles == 0:
        return
    splits = splits or tiling.splits(x.device, tiles, rank)
    rows = triton.cdiv(triton.cdiv(m, splits), strip.block_m) * strip.block_m
    splits = triton.cdiv(m, rows)
    args = {
        "dy_ptr": dy, "xa_ptr": xa, "db_ptr": d_lora_a if d_lora_b is None else d_lora_b,
        "x_ptr": x, "dxa_ptr": dxa, "da_ptr": d_lora_b if d_lora_a is None else d_lora_a,
        "partials_ptr": x.new_empty(tiles, splits, strip.block_c, rank, dtype=torch.float32),
        "tickets_ptr": tickets,
        "M": m, "N": n, "K": k, "R": rank, "tiles_b": tiles_b, "rows": rows,
        "stride_ym": dy.stride(0), "stride_yn": dy.stride(1),
        "stride_xm": x.stride(0), "stride_xk": x.stride(1),
        "scaling": scaling, "ACTIVATED": activated, "INPUT_PRECISION": input_precision(x.dtype),
        "BLOCK_M": strip.block_m, "BLOCK_C": strip.block_c, "RANK": tiling.padded_rank(rank),
        **dropout_arguments(dropout),
    }  # fmt: skip
    launch(gradient_kernel, (tiles, splits), args, strip.num_warps, strip.num_stages)
