"""The gradients of a layer's low-rank factors in one pass over its wide rows, and what launches it.

    dB = s dyᵀ xa          dA = s dxaᵀ (keep ⊙ x)

Shapes: dy (M, N), x (M, K), xa and dxa (M, R), dB (N, R), dA (R, K); keep is a dropout mask. Several programs share the
rows of a column, whose sum the last of them finishes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .activations import gelu
from .blocks import arrive_last, dot, input_precision, rounded, sum_in_order, ticket_count
from .dropout import Dropout, keep_tile, mask_arguments
from .groups import GROUP_ARGUMENTS, Groups, group_arguments, share_count, share_of
from .launch import Launcher, fixed, launchers
from .rows import rows_in


@triton.jit
def column_gradient(
    t_ptr, u_ptr, df_ptr, partials_ptr, ticket_ptr, seed_ptr,
    C, R, rank, first, length, rows, number, count,
    stride_tm, stride_tc, stride_dc, stride_dr,
    scaling, drop_below, start_c,
    ACTIVATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """`df = scaling · (keep ⊙ t)ᵀ u` for BLOCK_C columns from `start_c` on, by `count` programs, this being `number`.

    t (M, C), or gelu(t) where ACTIVATED, u (M, R), df (C, R) by strides; each program sums `rows` of the `length` rows
    from `first` on. `partials_ptr` (count, BLOCK_C, R) is these programs' alone. GROUPED: df is zero from `rank` on.
    """
    own_c = tl.arange(0, BLOCK_C)
    offs_c = start_c + own_c
    offs_r = tl.arange(0, RANK)
    mask_c, mask_r = offs_c < C, offs_r < rank
    if not GROUPED:  # all of a grid column's programs
        number, count = tl.program_id(1), tl.num_programs(1)
    start_m, end_m = first + number * rows, first + tl.minimum((number + 1) * rows, length)
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

    mask = mask_c[:, None] & (offs_r < R)[None, :]
    if GROUPED:
        acc = tl.where(mask_r[None, :], acc, 0.0)  # an infinite t times a padding zero is NaN
    if GROUPED and count == 1:
        store_columns(df_ptr, acc * scaling, offs_c, offs_r, stride_dc, stride_dr, mask)
    else:
        partials_ptrs = partials_ptr + own_c[:, None] * R + offs_r[None, :]
        tl.store(partials_ptrs + number * BLOCK_C * R, acc, mask=mask)
        if arrive_last(ticket_ptr, count):
            total = sum_in_order(partials_ptrs, mask, BLOCK_C * R, count) * scaling
            store_columns(df_ptr, total, offs_c, offs_r, stride_dc, stride_dr, mask)


@triton.jit
def store_columns(df_ptr, total, offs_c, offs_r, stride_dc, stride_dr, mask):
    """Columns of a gradient (C, R), in its dtype."""
    df_ptrs = df_ptr + offs_c[:, None] * stride_dc + offs_r[None, :] * stride_dr
    tl.store(df_ptrs, rounded(total, df_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "drop_below", "adapters"])
def gradient_kernel(
    dy_ptr, xa_ptr, db_ptr, x_ptr, dxa_ptr, da_ptr, partials_ptr, tickets_ptr, seed_ptr,
    of_row_ptr, starts_ptr, ranks_ptr, scalings_ptr, below_ptr, adapters,
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
    of the rows of its columns. With `starts_ptr` they are rows of one adapter, and db (G, N, R) and da (G, R, K) each
    adapter's.
    """
    GROUPED: tl.constexpr = starts_ptr is not None
    pid_c = tl.program_id(0)
    ticket_ptr = tickets_ptr + pid_c
    partials_ptr += (pid_c * tl.num_programs(1)).to(tl.int64) * BLOCK_C * R
    if GROUPED:
        g, number, count = share_of(tl.program_id(1), starts_ptr, adapters, rows)
        if number >= count:
            return
        ticket_ptr += g * tl.num_programs(0)
        partials_ptr += (tl.program_id(1) - number).to(tl.int64) * BLOCK_C * R
        rank, scaling = tl.load(ranks_ptr + g), tl.load(scalings_ptr + g)
        first = tl.load(starts_ptr + g)
        length = tl.where(rank > 0, tl.load(starts_ptr + g + 1) - first, 0)
        db_ptr += g.to(tl.int64) * N * R
        da_ptr += g.to(tl.int64) * K * R
        if DROPOUT:
            drop_below = tl.load(below_ptr + g)
    else:
        number, count, rank, first, length = None, None, R, 0, M
    if pid_c < tiles_b:
        column_gradient(
            dy_ptr, xa_ptr, db_ptr, partials_ptr, ticket_ptr, seed_ptr, N, R, rank, first, length, rows, number, count,
            stride_ym, stride_yn, R, 1, scaling, drop_below, pid_c * BLOCK_C,
            False, False, GROUPED, INPUT_PRECISION, BLOCK_M, BLOCK_C, RANK,
        )  # fmt: skip
    else:
        column_gradient(
            x_ptr, dxa_ptr, da_ptr, partials_ptr, ticket_ptr, seed_ptr, K, R, rank, first, length, rows, number, count,
            stride_xm, stride_xk, 1, K, scaling, drop_below, (pid_c - tiles_b) * BLOCK_C,
            ACTIVATED, DROPOUT, GROUPED, INPUT_PRECISION, BLOCK_M, BLOCK_C, RANK,
        )  # fmt: skip


_GRADIENT = (
    "dy_ptr", "xa_ptr", "db_ptr", "x_ptr", "dxa_ptr", "da_ptr", "partials_ptr", "tickets_ptr", "seed_ptr",
    "M", "rows", "scaling", "drop_below", *GROUP_ARGUMENTS,
)  # fmt: skip


class Gradients:
    """Fills `d_lora_b` (N, R) with `scaling · dyᵀ xa` and `d_lora_a` (R, K) with `scaling · dxaᵀ (keep ⊙ x)`.

    dy (M, N), x (M, K), xa and dxa (M, R); where `activated`, x is the pre-activation, and gelu(x) stands for it. With
    `groups` the gradients are (G, N, R) and (G, R, K), zeros past each adapter's rank, and each has the same bits in
    any company. It is prepared as `linear.Linear` is, for those of the two that are needed, in these dtypes; `tickets`
    are so many, as `tickets_for` has them, that an earlier launch must have cleared.
    """

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        rank: int,
        dtype_b: torch.dtype | None,
        dtype_a: torch.dtype | None,
        *,
        drops: bool = False,
        activated: bool = False,
        grouped: bool = False,
        splits: int = 0,
    ) -> None:
        n, k, precision = dy.shape[1], x.shape[1], input_precision(x.dtype)
        strip = tiling.gradient(x, rank, grouped)
        tiles_b = 0 if dtype_b is None else -(-n // strip.block_c)
        tiles = tiles_b + (0 if dtype_a is None else -(-k // strip.block_c))

        def launcher() -> Launcher:
            args = {
                "N": n, "K": k, "R": rank, "tiles_b": tiles_b,
                "stride_ym": dy.stride(0), "stride_yn": dy.stride(1),
                "stride_xm": x.stride(0), "stride_xk": x.stride(1),
                "ACTIVATED": activated, "DROPOUT": drops, "INPUT_PRECISION": precision,
                "BLOCK_M": strip.block_m, "BLOCK_C": strip.block_c, "RANK": tiling.padded_rank(rank),
            }  # fmt: skip
            return Launcher(gradient_kernel, _GRADIENT, args, strip.num_warps, strip.num_stages)

        sizes = strip, precision, n, k, rank, tiles_b
        key = ("gradients", *sizes, *fixed(dy, x), dtype_b, dtype_a, drops, activated)
        self._launch = launchers.once(key, launcher)
        self._strip, self._tiles, self._rank = strip, tiles, rank
        self._splits = splits or tiling.splits(x.device, max(tiles, 1), rank)
        self._rows = tiling.group_rows(self._splits, strip)
        self.tickets = ticket_count(tiles)

    def __call__(
        self,
        dy: Tensor,
        xa: Tensor,
        x: Tensor,
        dxa: Tensor,
        d_lora_b: Tensor | None,
        d_lora_a: Tensor | None,
        scaling: float,
        tickets: Tensor,
        dropout: Dropout | None = None,
        groups: Groups | None = None,
    ) -> None:
        """Fill what is given, contiguous."""
        m, strip = rows_in(dy), self._strip
        if self._tiles == 0:
            return
        if groups is None:
            rows = tiling.run(m, self._splits, strip)
            splits = -(-m // rows)
        else:
            rows = self._rows
            splits = share_count(m, len(groups.ranks), rows)
        db = d_lora_a if d_lora_b is None else d_lora_b
        da = d_lora_b if d_lora_a is None else d_lora_a
        partials = x.new_empty(self._tiles, splits, strip.block_c, self._rank, dtype=torch.float32)
        seed, drop_below, _ = mask_arguments(dropout)
        pointers = dy, xa, db, x, dxa, da, partials, tickets, seed
        changing = *pointers, m, rows, scaling, drop_below, *group_arguments(groups)
        self._launch((self._tiles, splits, 1), *changing)
