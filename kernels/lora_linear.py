"""A frozen linear layer with its LoRA update, forward and backward.

    forward    xa = (keep ⊙ x) Aᵀ          y = x W + b + s xa Bᵀ
    backward   dxa = s dy B                dx = dy Wᵀ + keep ⊙ (dxa A)
               dA = dxaᵀ (keep ⊙ x)        dB = s dyᵀ xa

with keep the dropout mask and s the scaling times dropout's 1 / (1 - p).
Shapes: x (M, K), W (K, N), b (N,), A (R, K), B (N, R), xa and dxa (M, R), y (M, N). Three shapes of work do
it all: `linear_kernel` (a GEMM whose accumulator starts from a rank-r term: y and dx), `shrink_kernel` (a
pass over wide rows that leaves R numbers a row: xa and dxa) and `gradient_kernel` (one that leaves R numbers
a column: dA and dB). `shrink_gradient_kernel` is the last two in one pass over dy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiling, tuning
from .blocks import dot, grouped_order, input_precision, load, rounded, sum_partials
from .dropout import keep_scale, keep_tile, threshold
from .launch import build, describe, differentiable_once, launch, on_device_of

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
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, u_ptr, f_ptr, y_ptr, seed_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_ar, stride_ak, stride_fr, stride_fn,
    scaling, drop_below,
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
):  # fmt: skip
    """`y = x w + bias + keep ⊙ (u (scaling · f))`, one tile a program.

    SINGLE computes u = x aᵀ on the way, from the same tiles of x (there is no dropout then); the first column
    of programs stores it.
    """
    pid_m, pid_n = grouped_order(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RANK)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    rows = tl.where(mask_m, offs_m, 0)  # rows past the end repeat row 0 and are never stored

    if SINGLE:
        acc = start_from(bias_ptr, offs_n, mask_n, BLOCK_M, BLOCK_N)
        u = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
        a_ptrs = a_ptr + offs_k[:, None].to(tl.int64) * stride_ak + offs_r[None, :].to(tl.int64) * stride_ar
    else:
        acc = initial(
            bias_ptr, u_ptr, f_ptr, seed_ptr, R, stride_fr, stride_fn, scaling, drop_below,
            start_m, start_n, rows, offs_n, mask_n, DROPOUT, INPUT_PRECISION, BLOCK_M, BLOCK_N, RANK,
        )  # fmt: skip

    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + offs_k[:, None].to(tl.int64) * stride_wk + offs_n[None, :].to(tl.int64) * stride_wn
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = load(x_ptrs, mask_k[None, :], MASKED_K)
        w = load(w_ptrs, mask_k[:, None] & mask_n[None, :], MASKED_K or MASKED_N)
        acc = dot(x, w, acc, INPUT_PRECISION)
        if SINGLE:
            a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            u = dot(x, a, u, INPUT_PRECISION)
            a_ptrs += BLOCK_K * tl.cast(stride_ak, tl.int64)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)

    if SINGLE:
        u = tl.where(mask_r[None, :], u, 0.0)  # an infinite x times a padding zero is NaN
        if pid_n == 0:
            u_ptrs = u_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
            tl.store(u_ptrs, rounded(u, u_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
        f_ptrs = f_ptr + offs_r[:, None].to(tl.int64) * stride_fr + offs_n[None, :].to(tl.int64) * stride_fn
        f = tl.load(f_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        dtype = u_ptr.dtype.element_ty
        acc = dot(rounded(u, dtype), rounded(f.to(tl.float32) * scaling, dtype), acc, INPUT_PRECISION)

    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(y_ptrs, rounded(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def linear_descriptor_kernel(
    x_desc, w_desc, bias_ptr, u_ptr, f_ptr, y_desc, seed_ptr,
    M, N, K, R,
    stride_fr, stride_fn,
    scaling, drop_below,
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
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pid_m, pid_n = grouped_order(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        rows = tl.where(offs_m < M, offs_m, 0)
        acc = initial(
            bias_ptr, u_ptr, f_ptr, seed_ptr, R, stride_fr, stride_fn, scaling, drop_below,
            start_m, start_n, rows, offs_n, mask_n, DROPOUT, INPUT_PRECISION, BLOCK_M, BLOCK_N, RANK,
        )  # fmt: skip
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([start_m, k])
            w = w_desc.load([start_n, k]).T if W_TRANSPOSED else w_desc.load([k, start_n])
            acc = dot(x, w, acc, INPUT_PRECISION)
        y_desc.store([start_m, start_n], rounded(acc, y_desc.dtype))


@triton.jit
def shrink_kernel(
    t_ptr, f_ptr, u_ptr, seed_ptr,
    M, C, R,
    stride_tm, stride_tc, stride_fc, stride_fr,
    scaling, drop_below,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
    MASKED_C: tl.constexpr,
):  # fmt: skip
    """`u = scaling · keep(t) f`: t (M, C), f (C, R), u (M, R); a program for every BLOCK_M rows."""
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
    tl.store(u_ptrs, rounded(acc * scaling, u_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def shrink_gradient_kernel(
    t_ptr, f_ptr, u_ptr, du_ptr, df_ptr,
    M, C, R, columns,
    stride_tm, stride_tc, stride_fc, stride_fr,
    scaling,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`du = scaling · t f` and `df = scaling · tᵀ u` in one pass: t (M, C), f and df (C, R), u and du (M, R).

    Program (i, j) walks over `columns` columns of BLOCK_M rows; it leaves the i-th partial of their df and
    the j-th partial of its rows' du.
    """
    pid_m, pid_c = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RANK)
    mask_m, mask_r = offs_m < M, offs_r < R
    start_c, end_c = pid_c * columns, tl.minimum((pid_c + 1) * columns, C)
    offs_c = start_c + tl.arange(0, BLOCK_C)

    u_offsets = offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    u_mask = mask_m[:, None] & mask_r[None, :]
    u = tl.load(u_ptr + u_offsets, mask=u_mask, other=0.0)
    du = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    t_ptrs = t_ptr + offs_m[:, None].to(tl.int64) * stride_tm + offs_c[None, :].to(tl.int64) * stride_tc
    f_ptrs = f_ptr + offs_c[:, None].to(tl.int64) * stride_fc + offs_r[None, :].to(tl.int64) * stride_fr
    df_ptrs = df_ptr + (pid_m.to(tl.int64) * C + offs_c[:, None]) * R + offs_r[None, :]
    for c in range(start_c, end_c, BLOCK_C):
        mask_c = offs_c < end_c - (c - start_c)
        t = tl.load(t_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        f = tl.load(f_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        du = dot(t, rounded(f, t.dtype), du, INPUT_PRECISION)
        df = dot(tl.trans(t), u, tl.zeros((BLOCK_C, RANK), dtype=tl.float32), INPUT_PRECISION)
        tl.store(
            df_ptrs, rounded(df * scaling, df_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_r[None, :]
        )
        t_ptrs += BLOCK_C * tl.cast(stride_tc, tl.int64)
        f_ptrs += BLOCK_C * tl.cast(stride_fc, tl.int64)
        df_ptrs += BLOCK_C * R

    du_ptrs = du_ptr + pid_c.to(tl.int64) * M * R + u_offsets
    tl.store(du_ptrs, rounded(du * scaling, du_ptr.dtype.element_ty), mask=u_mask)


@triton.jit
def gradient_kernel(
    t_ptr, u_ptr, df_ptr, seed_ptr,
    M, C, R, rows,
    stride_tm, stride_tc, stride_dc, stride_dr,
    scaling, drop_below,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`df = scaling · keep(t)ᵀ u`: t (M, C), u (M, R), df (C, R) by strides.

    Program (i, j) sums `rows` rows of BLOCK_C columns: the j-th partial of their df.
    """
    pid_c, pid_m = tl.program_id(0), tl.program_id(1)
    start_c = pid_c * BLOCK_C
    offs_c = start_c + tl.arange(0, BLOCK_C)
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
        if DROPOUT:
            t = tl.where(keep_tile(seed_ptr, m, start_c, drop_below, BLOCK_M, BLOCK_C), t, 0.0)
        acc = dot(tl.trans(t), u, acc, INPUT_PRECISION)
        t_ptrs += BLOCK_M * tl.cast(stride_tm, tl.int64)
        u_ptrs += BLOCK_M * R

    df_ptrs = df_ptr + pid_m.to(tl.int64) * C * R + offs_c[:, None] * stride_dc + offs_r[None, :] * stride_dr
    tl.store(df_ptrs, rounded(acc * scaling, df_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_r[None, :])


# --- launchers: allocation and grid


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    f: Tensor,
    scaling: float,
    *,
    u: Tensor | None = None,
    a: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    how: tiling.Linear | None = None,
) -> tuple[Tensor, Tensor]:
    """`y = x weight + bias + keep ⊙ (u (scaling · f))` and u, which is `x aᵀ` where `a` (R, K) is given.

    There is no bias with dropout: the mask falls on all that the accumulator starts from.
    """
    (m, k), n, rank = x.shape, weight.shape[1], f.shape[0]
    if how is None:
        how = tuning.fastest(
            "linear",
            x,
            (n, rank, dropout_p > 0, weight.stride(1) == 1),
            tiling.linear(x, weight, a, rank, dropout_p),
            lambda each: linear(
                x, weight, bias, f, scaling, u=u, a=a, dropout_p=dropout_p, seed=seed, how=each
            ),
        )
    y = x.new_empty(m, n)
    if u is None:
        u = x.new_empty(m, rank)
    if m == 0 or n == 0:
        return y, u
    tile = how.tile
    args = {
        "bias_ptr": bias, "u_ptr": u, "f_ptr": f, "seed_ptr": seed,
        "M": m, "N": n, "K": k, "R": rank,
        "stride_fr": f.stride(0), "stride_fn": f.stride(1),
        "scaling": scaling, "drop_below": threshold(dropout_p),
        "DROPOUT": seed is not None, "INPUT_PRECISION": input_precision(x.dtype),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "RANK": tiling.padded_rank(rank), "GROUP_M": 8,
    }  # fmt: skip
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    if how.descriptor:
        transposed = weight.stride(1) != 1
        stored, block = (
            (weight.T, [tile.block_n, tile.block_k]) if transposed else (weight, [tile.block_k, tile.block_n])
        )
        args |= {
            "x_desc": TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
            "w_desc": TensorDescriptor.from_tensor(stored, block),
            "y_desc": TensorDescriptor.from_tensor(y, [tile.block_m, tile.block_n]),
            "W_TRANSPOSED": transposed,
        }
        grid = (min(tiles, how.programs),)
        launch(linear_descriptor_kernel, grid, args, tile.num_warps, tile.num_stages)
    else:
        args |= {
            "x_ptr": x, "w_ptr": weight, "a_ptr": a, "y_ptr": y, "SINGLE": a is not None,
            "stride_xm": x.stride(0), "stride_xk": x.stride(1),
            "stride_wk": weight.stride(0), "stride_wn": weight.stride(1),
            "stride_ar": 0 if a is None else a.stride(0), "stride_ak": 0 if a is None else a.stride(1),
            "MASKED_N": n % tile.block_n != 0, "MASKED_K": k % tile.block_k != 0,
        }  # fmt: skip
        launch(linear_kernel, (tiles,), args, tile.num_warps, tile.num_stages)
    return y, u


def shrink(
    t: Tensor,
    f: Tensor,
    scaling: float = 1.0,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    strip: tiling.Strip | None = None,
) -> Tensor:
    """`u = scaling · dropout(t) f` in t's dtype: t (M, C), f (C, R), u (M, R)."""
    (m, c), rank = t.shape, f.shape[1]
    if m == 0:
        return t.new_empty(m, rank)
    if strip is None:
        strip = tuning.fastest(
            "shrink",
            t,
            (rank, dropout_p > 0),
            tiling.shrink(t, rank),
            lambda each: shrink(t, f, scaling, dropout_p=dropout_p, seed=seed, strip=each),
        )
    u = t.new_empty(m, rank)
    args = {
        "t_ptr": t, "f_ptr": f, "u_ptr": u, "seed_ptr": seed,
        "M": m, "C": c, "R": rank,
        "stride_tm": t.stride(0), "stride_tc": t.stride(1),
        "stride_fc": f.stride(0), "stride_fr": f.stride(1),
        "scaling": scaling, "drop_below": threshold(dropout_p),
        "DROPOUT": seed is not None, "INPUT_PRECISION": input_precision(t.dtype),
        "BLOCK_M": strip.block_m, "BLOCK_C": strip.block_c, "RANK": tiling.padded_rank(rank),
        "MASKED_C": c % strip.block_c != 0,
    }  # fmt: skip
    launch(shrink_kernel, (triton.cdiv(m, strip.block_m),), args, strip.num_warps, strip.num_stages)
    return u


def shrink_gradient(
    t: Tensor, f: Tensor, u: Tensor, scaling: float, *, splits: int = 0, strip: tiling.Strip | None = None
) -> tuple[Tensor, Tensor]:
    """`du = scaling · t f` in t's dtype, `df = scaling · tᵀ u` in f's: t (M, C), f (C, R), u (M, R)."""
    (m, c), rank = t.shape, f.shape[1]
    if m == 0 or c == 0:
        return t.new_zeros(m, rank), f.new_zeros(c, rank)
    if strip is None:
        strip = tuning.fastest(
            "shrink_gradient",
            t,
            (rank,),
            tiling.shrink_gradient(t, rank),
            lambda each: shrink_gradient(t, f, u, scaling, strip=each),
        )
    blocks = triton.cdiv(m, strip.block_m)
    splits = splits or tiling.splits(t.device, 2 * blocks, rank)
    columns = triton.cdiv(triton.cdiv(c, splits), strip.block_c) * strip.block_c
    splits = triton.cdiv(c, columns)
    du, df = t.new_empty(m, rank), f.new_empty(c, rank)
    du_partials = du if splits == 1 else t.new_empty(splits, m, rank, dtype=torch.float32)
    df_partials = df if blocks == 1 else t.new_empty(blocks, c, rank, dtype=torch.float32)
    args = {
        "t_ptr": t, "f_ptr": f, "u_ptr": u, "du_ptr": du_partials, "df_ptr": df_partials,
        "M": m, "C": c, "R": rank, "columns": columns,
        "stride_tm": t.stride(0), "stride_tc": t.stride(1),
        "stride_fc": f.stride(0), "stride_fr": f.stride(1),
        "scaling": scaling, "INPUT_PRECISION": input_precision(t.dtype),
        "BLOCK_M": strip.block_m, "BLOCK_C": strip.block_c, "RANK": tiling.padded_rank(rank),
    }  # fmt: skip
    launch(shrink_gradient_kernel, (blocks, splits), args, strip.num_warps, strip.num_stages)
    if splits > 1:
        sum_partials(du_partials, du)
    if blocks > 1:
        sum_partials(df_partials, df)
    return du, df


def gradient(
    t: Tensor,
    u: Tensor,
    df: Tensor,
    scaling: float = 1.0,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    splits: int = 0,
    strip: tiling.Strip | None = None,
) -> Tensor:
    """`df`, filled with `scaling · (keep ⊙ t)ᵀ u`: t (M, C), u (M, R), df (C, R) dense in either order."""
    (m, c), rank = t.shape, u.shape[1]
    if m == 0 or c == 0:
        return df.zero_()
    strip = strip or tiling.gradient(t, rank)
    splits = splits or tiling.splits(t.device, triton.cdiv(c, strip.block_c), rank)
    rows = triton.cdiv(triton.cdiv(m, splits), strip.block_m) * strip.block_m
    splits = triton.cdiv(m, rows)
    partials = (
        df
        if splits == 1
        else torch.empty_strided(
            (splits, c, rank), (c * rank, *df.stride()), dtype=torch.float32, device=t.device
        )
    )
    args = {
        "t_ptr": t, "u_ptr": u, "df_ptr": partials, "seed_ptr": seed,
        "M": m, "C": c, "R": rank, "rows": rows,
        "stride_tm": t.stride(0), "stride_tc": t.stride(1),
        "stride_dc": df.stride(0), "stride_dr": df.stride(1),
        "scaling": scaling, "drop_below": threshold(dropout_p),
        "DROPOUT": seed is not None, "INPUT_PRECISION": input_precision(t.dtype),
        "BLOCK_M": strip.block_m, "BLOCK_C": strip.block_c, "RANK": tiling.padded_rank(rank),
    }  # fmt: skip
    launch(gradient_kernel, (triton.cdiv(c, strip.block_c), splits), args, strip.num_warps, strip.num_stages)
    return df if splits == 1 else sum_partials(partials, df)


# --- the operation


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    how: tiling.Linear | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and xa (M, R), both in x's dtype."""
    rank = lora_a.shape[0]
    if how is None:
        how = tuning.fastest(
            "forward",
            x,
            (weight.shape[1], rank, dropout_p > 0, weight.stride(1) == 1, lora_a.dtype),
            tiling.linear(x, weight, lora_a, rank, dropout_p),
            lambda each: forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, each),
        )
    scaling *= keep_scale(dropout_p)
    if how.single:  # the loop has no room to round a wider factor
        return linear(x, weight, bias, lora_b.T, scaling, a=lora_a.to(x.dtype), how=how)
    xa = shrink(x, lora_a.T, dropout_p=dropout_p, seed=seed)
    return linear(x, weight, bias, lora_b.T, scaling, u=xa, how=how)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (M, K), d_lora_a (R, K) and d_lora_b (N, R), each None unless needed."""
    dx = d_lora_a = d_lora_b = None
    scaling *= keep_scale(dropout_p)
    if need_b and (need_x or need_a) and tiling.one_pass(dy, lora_a.shape[0]):
        dxa, d_lora_b = shrink_gradient(dy, lora_b, xa, scaling)
    else:
        if need_x or need_a:
            dxa = shrink(dy, lora_b, scaling)
        if need_b:
            d_lora_b = gradient(
                dy, xa, torch.empty_like(lora_b, memory_format=torch.contiguous_format), scaling
            )
    if need_x:
        dx, _ = linear(dy, weight.T, None, lora_a, 1.0, u=dxa, dropout_p=dropout_p, seed=seed)
    if need_a:
        d_lora_a = torch.empty_like(lora_a, memory_format=torch.contiguous_format)
        gradient(x, dxa, d_lora_a.T, dropout_p=dropout_p, seed=seed)
    return dx, d_lora_a, d_lora_b


# --- the operators


@torch.library.custom_op("fastpeft::lora_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with on_device_of(x):
        return forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)


@_forward.register_fake
def _(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_a.shape[0])


@torch.library.custom_op("fastpeft::lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> list[Tensor]:
    with on_device_of(x):
        gradients = backward(
            dy, x, weight, lora_a, lora_b, xa, scaling, dropout_p, seed, need_x, need_a, need_b
        )
    return [gradient for gradient in gradients if gradient is not None]


@_backward.register_fake
def _(dy, x, weight, lora_a, lora_b, xa, scaling, dropout_p, seed, need_x, need_a, need_b):
    needed = ((x, need_x), (lora_a, need_a), (lora_b, need_b))
    return [tensor.new_empty(tensor.shape) for tensor, need in needed if need]


def _save(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, scaling, dropout_p, seed = inputs
    _, xa = output
    ctx.mark_non_differentiable(xa)
    ctx.save_for_backward(x, weight, lora_a, lora_b, xa, seed)
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    x, weight, lora_a, lora_b, xa, seed = ctx.saved_tensors
    need_x, need_weight, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    fused = iter(())
    if need_x or need_a or need_b:
        fused = iter(
            _backward(
                dy, x, weight, lora_a, lora_b, xa, ctx.scaling, ctx.dropout_p, seed, need_x, need_a, need_b
            )
        )
    dx, d_lora_a, d_lora_b = (next(fused) if need else None for need in (need_x, need_a, need_b))
    d_weight = x.T @ dy if need_weight else None
    d_bias = dy.sum(0) if need_bias else None
    return dx, d_weight, d_bias, d_lora_a, d_lora_b, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
differentiable_once(_backward)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`y = x W + b + scaling · (dropout(x) Aᵀ) Bᵀ` by the kernels; differentiable once, by all but the seed.

    Args:
        x: (M, K) float16, bfloat16 or float32, any strides.
        weight: (K, N) in x's dtype, any strides. bias: (N,) or None.
        lora_a: (R, K) and lora_b: (N, R), in x's dtype or wider, R at most 256; rounded to x's dtype.
        dropout_p: probability of dropping an element of x before lora_a.
        seed: int64 of one element on x's device, from which the mask is drawn; None where dropout_p is 0.

    Returns:
        (M, N) in x's dtype.
    """
    y, _ = _forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)
    return y


def ready(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dropout_p: float = 0.0,
) -> str | None:
    """None where every kernel of `lora_linear` and of its backward is built for these tensors; else why not.

    Launches and draws nothing. The first call of a kind compiles; a failure warns once and is remembered.
    """

    def call() -> None:
        seed = torch.empty(1, dtype=torch.int64, device=x.device) if dropout_p > 0 else None
        y, xa = forward(x, weight, bias, lora_a, lora_b, 1.0, dropout_p, seed)
        backward(y, x, weight, lora_a, lora_b, xa, 1.0, dropout_p, seed, True, True, True)

    key = ("lora_linear", x.device, dropout_p > 0, *describe(x, weight, bias, lora_a, lora_b))
    return build(key, x, call)
