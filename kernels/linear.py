"""A GEMM with a rank-r term, and what launches it.

    y = x W + b + keep ⊙ (u (s f))          h = gelu(y)

Shapes: x (M, K), W (K, N), b (N,), u (M, R), f (R, N), y and h (M, N); keep is a dropout mask. u is given, or `x aᵀ`,
a (R, K), computed from the tiles that the GEMM loads anyway. What follows y in the same kernel is an `Epilogue`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .activations import activation_gradient, gelu
from .blocks import clear_tickets, dot, dot_apart, grouped_order, input_precision, load, rounded, start_from
from .descriptors import aligned, described
from .dropout import Dropout, keep_tile, mask_arguments
from .groups import GROUP_ARGUMENTS, Groups, adapters_in, group_arguments, rank_in
from .launch import Launcher, fixed, launchers
from .rows import rows_in, sample_rows


@triton.jit
def plus_ranks(
    acc, u_ptr, f_ptr, R, rank, stride_fr, stride_fn, scaling, rows, offs_n, mask_n, first,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`acc + u (scaling · f)`, of the BLOCK_R ranks from `first` on that lie below `rank`."""
    offs_r = first + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rank
    u = tl.load(u_ptr + rows[:, None].to(tl.int64) * R + offs_r[None, :], mask=mask_r[None, :], other=0.0)
    f_ptrs = f_ptr + offs_r[:, None].to(tl.int64) * stride_fr + offs_n[None, :].to(tl.int64) * stride_fn
    f = tl.load(f_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    return dot_apart(u, rounded(f.to(tl.float32) * scaling, u.dtype), acc, INPUT_PRECISION)


@triton.jit
def initial(
    bias_ptr, u_ptr, f_ptr, seed_ptr, of_row_ptr, starts_ptr, ranks_ptr, scalings_ptr, below_ptr,
    M, R,
    stride_fg, stride_fr, stride_fn,
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
    then a float32 f is rounded once. With `of_row_ptr`, f (G, R, N), its rank, the scaling and the dropout's threshold
    are those of each row's adapter.
    """
    BLOCK_R: tl.constexpr = 16  # the loop below needs the shared memory that more would take
    acc = start_from(bias_ptr, offs_n, mask_n, BLOCK_M, BLOCK_N)
    if of_row_ptr is None:
        for r in tl.range(0, RANK, BLOCK_R, num_stages=1):
            acc = plus_ranks(
                acc, u_ptr, f_ptr, R, R, stride_fr, stride_fn, scaling, rows, offs_n, mask_n, r,
                INPUT_PRECISION, BLOCK_R,
            )  # fmt: skip
    else:
        of_row = tl.load(of_row_ptr + rows)
        first, end = adapters_in(of_row_ptr, start_m, M, BLOCK_M)
        for g in tl.range(first, end, num_stages=1):
            rank, scaling = rank_in(starts_ptr, ranks_ptr, g), tl.load(scalings_ptr + g)
            f_g = f_ptr + g * tl.cast(stride_fg, tl.int64)
            for r in tl.range(0, rank, BLOCK_R, num_stages=1):
                updated = plus_ranks(
                    acc, u_ptr, f_g, R, rank, stride_fr, stride_fn, scaling, rows, offs_n, mask_n, r,
                    INPUT_PRECISION, BLOCK_R,
                )  # fmt: skip
                acc = tl.where((of_row == g)[:, None], updated, acc)
        if DROPOUT:
            drop_below = tl.load(below_ptr + of_row)[:, None]
    if DROPOUT:
        acc = tl.where(keep_tile(seed_ptr, start_m, start_n, drop_below, BLOCK_M, BLOCK_N), acc, 0.0)
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
        update = dot_apart(u, f, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), INPUT_PRECISION)
        keep = keep_tile(seed_ptr, start_m, start_n, drop_below, BLOCK_M, BLOCK_N)
        return acc + tl.where(keep, update, 0.0)
    else:
        return dot_apart(u, f, acc, INPUT_PRECISION)


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


@triton.jit(do_not_specialize=["M", "drop_below", "adapters"])
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, u_ptr, f_ptr, pre_ptr, residual_ptr, y_ptr, h_ptr, seed_ptr, tickets_ptr,
    of_row_ptr, starts_ptr, ranks_ptr, scalings_ptr, below_ptr, adapters,
    M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_ar, stride_ak, stride_fg, stride_fr, stride_fn,
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
    With `residual_ptr` the mask falls on y instead, scaled by `drop_scale`, and the residual is added. With
    `of_row_ptr` the update is each row's adapter's, u given.
    """
    MASKED_UPDATE: tl.constexpr = DROPOUT and residual_ptr is None
    clear_tickets(tickets_ptr, TICKETS, adapters)
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
            bias_ptr, u_ptr, f_ptr, seed_ptr, of_row_ptr, starts_ptr, ranks_ptr, scalings_ptr, below_ptr,
            M, R, stride_fg, stride_fr, stride_fn, scaling, drop_below,
            start_m, start_n, rows, offs_n, mask_n, MASKED_UPDATE, INPUT_PRECISION, BLOCK_M, BLOCK_N, RANK,
        )  # fmt: skip

    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + offs_k[:, None].to(tl.int64) * stride_wk + offs_n[None, :].to(tl.int64) * stride_wn
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = load(x_ptrs, mask_k[None, :], MASKED_K)
        w = load(w_ptrs, mask_k[:, None] & mask_n[None, :], MASKED_K or MASKED_N)
        acc = dot_apart(x, w, acc, INPUT_PRECISION)
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


@triton.jit(do_not_specialize=["M", "drop_below", "adapters"])
def linear_descriptor_kernel(
    x_desc, w_desc, bias_ptr, u_ptr, f_ptr, pre_ptr, residual_ptr, y_desc, h_desc, seed_ptr,
    of_row_ptr, starts_ptr, ranks_ptr, scalings_ptr, below_ptr, adapters,
    M, N, K, R,
    stride_fg, stride_fr, stride_fn,
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
            bias_ptr, u_ptr, f_ptr, seed_ptr, of_row_ptr, starts_ptr, ranks_ptr, scalings_ptr, below_ptr,
            M, R, stride_fg, stride_fr, stride_fn, scaling, drop_below,
            start_m, start_n, rows, offs_n, mask_n, MASKED_UPDATE, INPUT_PRECISION, BLOCK_M, BLOCK_N, RANK,
        )  # fmt: skip
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([start_m, k])
            w = w_desc.load([start_n, k]).T if W_TRANSPOSED else w_desc.load([k, start_n])
            acc = dot_apart(x, w, acc, INPUT_PRECISION)
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


class Epilogue(NamedTuple):
    """What follows a GEMM of y (M, N) in its own kernel, and what is stored."""

    stores: str = "y"  # what is stored of y and h = gelu(y): "y", "yh" or "h"
    pre: Tensor | None = None  # (M, N), contiguous: y is multiplied by gelu'(pre)
    residual: Tensor | None = None  # (M, N), contiguous: y becomes `residual + dropout(y)`


PLAIN = Epilogue()

_COMMON = (
    "bias_ptr", "u_ptr", "f_ptr", "pre_ptr", "residual_ptr", "seed_ptr", "M", "scaling", "drop_below", "drop_scale",
    *GROUP_ARGUMENTS,
)  # fmt: skip
_POINTERS = ("x_ptr", "w_ptr", "a_ptr", "y_ptr", "h_ptr", "tickets_ptr")
_DESCRIPTORS = ("x_desc", "w_desc", "y_desc", "h_desc")


class Linear:
    """`y = x weight + bias + keep ⊙ (u (scaling · f))`, u, which is `x aᵀ` where `a` (R, K) is given, and h = gelu(y).

    There is no bias with dropout: the mask falls on all that the accumulator starts from; with a residual it falls on y
    instead, and on nothing else. With `groups` f is (G, R, N), and the scaling and the mask are each adapter's. It is
    prepared for operands of one kind, and called with any that differ from those in values, in the number of rows and
    in groups. Then x may have more leading dimensions, if it is contiguous, and the factors may come transposed: a
    kernel knows them by their addresses.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        f: Tensor,
        how: tiling.Linear,
        *,
        a: Tensor | None = None,
        drops: bool = False,
        tickets: int = 0,
        epilogue: Epilogue = PLAIN,
    ) -> None:
        k, n, rank, tile = x.shape[1], weight.shape[1], f.shape[-2], how.tile
        precision = input_precision(x.dtype)
        key = (
            "linear", how, precision, k, n, rank, epilogue.stores, *fixed(x, weight, bias, f, a),
            epilogue.pre is None, epilogue.residual is None, drops, tickets,
        )  # fmt: skip

        def launcher() -> Launcher:
            args = {
                "N": n, "K": k, "R": rank,
                "stride_fg": f.stride(0) if f.dim() == 3 else None,
                "stride_fr": f.stride(-2), "stride_fn": f.stride(-1),
                "DROPOUT": drops, "INPUT_PRECISION": precision,
                "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                "RANK": tiling.padded_rank(rank), "GROUP_M": 8,
            }  # fmt: skip
            built = tile.num_warps, tile.num_stages
            if how.descriptor:
                args["W_TRANSPOSED"] = weight.stride(1) != 1
                return Launcher(linear_descriptor_kernel, (*_DESCRIPTORS, *_COMMON), args, *built)
            args |= {
                "SINGLE": a is not None,
                "stride_xm": x.stride(0), "stride_xk": x.stride(1),
                "stride_wk": weight.stride(0), "stride_wn": weight.stride(1),
                "stride_ar": 0 if a is None else a.stride(0), "stride_ak": 0 if a is None else a.stride(1),
                "MASKED_N": n % tile.block_n != 0, "MASKED_K": k % tile.block_k != 0, "TICKETS": tickets or 1,
            }  # fmt: skip
            return Launcher(linear_kernel, (*_POINTERS, *_COMMON), args, *built)

        self._launch = launchers.once(key, launcher)
        self._how, self._n, self._rank = how, n, rank
        self._columns, self._transposed = -(-n // tile.block_n), weight.stride(1) != 1

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        f: Tensor,
        scaling: float,
        *,
        u: Tensor | None = None,
        a: Tensor | None = None,
        dropout: Dropout | None = None,
        tickets: Tensor | None = None,
        epilogue: Epilogue = PLAIN,
        groups: Groups | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(y, u, h); of y and h, what isn't stored is None, and the others have x's leading dimensions."""
        m, tile = rows_in(x), self._how.tile
        stores, pre, residual = epilogue
        shape = (*x.shape[:-1], self._n)
        y = x.new_empty(shape) if "y" in stores else None
        h = x.new_empty(shape) if "h" in stores else None
        if u is None:
            u = x.new_empty(m, self._rank)
        tiles = -(-m // tile.block_m) * self._columns
        operands: tuple[Any, ...] = x, weight, a, y, h, tickets
        if self._how.descriptor:
            tiles = min(tiles, self._how.programs)
            operands = self._described(x, weight, y, h)
        seed, drop_below, drop_scale = mask_arguments(dropout)
        common = bias, u, f, pre, residual, seed, m, scaling, drop_below, drop_scale
        self._launch((tiles, 1, 1), *operands, *common, *group_arguments(groups))
        return y, u, h

    def _described(self, x: Tensor, weight: Tensor, *stored: Tensor | None) -> tuple[Any, ...]:
        tile = self._how.tile
        block, out = [tile.block_k, tile.block_n], [tile.block_m, tile.block_n]
        held = weight if weight.stride(1) == 1 else weight.T  # as it lies in memory
        results = (t if t is None else sample_rows(t) for t in stored)
        tensors = aligned(sample_rows(x)), aligned(held), *results
        blocks = [tile.block_m, tile.block_k], block[::-1] if self._transposed else block, out, out
        return described(tensors, blocks)
