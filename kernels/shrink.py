"""A pass over wide rows that leaves R numbers a row, and what launches it.

    u = (keep ⊙ t) f

Shapes: t (M, C), f (C, R), u (M, R); keep is a dropout mask. It computes xa of x and lora_aᵀ, and dxa of dy and lora_b.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tile_table, tiling, tuning
from .blocks import clear_tickets, dot, input_precision, load, rounded
from .dropout import Dropout, keep_tile, mask_arguments, sample_dropout
from .groups import GROUP_ARGUMENTS, Groups, adapters_in, group_arguments, rank_in
from .launch import Launcher, fixed, launchers
from .rows import rows_in


@triton.jit
def shrunk(
    t_ptr, f_ptr, seed_ptr,
    C, rank,
    stride_tm, stride_tc, stride_fc, stride_fr,
    drop_below, start_m, rows,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
    MASKED_C: tl.constexpr,
):  # fmt: skip
    """`(keep ⊙ t) f` of BLOCK_M rows, in float32: zeros from `rank` on, where t is finite."""
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, RANK)
    mask_r = offs_r < rank
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
    return acc


@triton.jit(do_not_specialize=["M", "drop_below", "adapters"])
def shrink_kernel(
    t_ptr, f_ptr, u_ptr, seed_ptr, tickets_ptr,
    of_row_ptr, starts_ptr, ranks_ptr, scalings_ptr, below_ptr, adapters,
    M, C, R,
    stride_tm, stride_tc, stride_fg, stride_fc, stride_fr,
    drop_below,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,
    MASKED_C: tl.constexpr,
    TICKETS: tl.constexpr,
):  # fmt: skip
    """`u = (keep ⊙ t) f`: t (M, C), f (C, R), u (M, R); a program for every BLOCK_M rows.

    With `of_row_ptr`, f (G, C, R) is each row's adapter's, and u means nothing past its rank.
    """
    clear_tickets(tickets_ptr, TICKETS, adapters)
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RANK)
    mask_m, mask_r = offs_m < M, offs_r < R
    rows = tl.where(mask_m, offs_m, 0)

    if of_row_ptr is None:
        acc = shrunk(
            t_ptr, f_ptr, seed_ptr, C, R, stride_tm, stride_tc, stride_fc, stride_fr, drop_below, start_m, rows,
            DROPOUT, INPUT_PRECISION, BLOCK_M, BLOCK_C, RANK, MASKED_C,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
        of_row = tl.load(of_row_ptr + rows)
        first, end = adapters_in(of_row_ptr, start_m, M, BLOCK_M)
        for g in tl.range(first, end, num_stages=1):
            rank = rank_in(starts_ptr, ranks_ptr, g)
            if DROPOUT:
                drop_below = tl.load(below_ptr + g)
            u = shrunk(
                t_ptr, f_ptr + g * tl.cast(stride_fg, tl.int64), seed_ptr, tl.where(rank > 0, C, 0), rank,
                stride_tm, stride_tc, stride_fc, stride_fr, drop_below, start_m, rows,
                DROPOUT, INPUT_PRECISION, BLOCK_M, BLOCK_C, RANK, MASKED_C,
            )  # fmt: skip
            acc = tl.where((of_row == g)[:, None], u, acc)

    u_ptrs = u_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    tl.store(u_ptrs, rounded(acc, u_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


class Shrink:
    """`u = (keep ⊙ t) f` in t's dtype: t (M, C), f (C, R), u (M, R). It is prepared as `linear.Linear` is.

    With `groups` f is (G, C, R), and u means nothing past each adapter's rank.
    """

    def __init__(
        self,
        t: Tensor,
        f: Tensor,
        strip: tile_table.Strip | None = None,
        *,
        drops: bool = False,
        tickets: int = 0,
        groups: Groups | None = None,
    ) -> None:
        """The strip is the table's, or the one measured to be fastest, with these groups, unless it is given."""
        (c, rank), precision = f.shape[-2:], input_precision(t.dtype)

        def run(each: tile_table.Strip) -> Tensor:
            return Shrink(t, f, each, drops=drops)(t, f, sample_dropout(t) if drops else None, groups=groups)

        kind = rank, drops, groups is not None
        strip = strip or tuning.fastest("shrink", t, kind, tiling.shrink(t, rank, groups is not None), run)
        key = ("shrink", strip, precision, c, rank, *fixed(t, f), drops, tickets)

        def launcher() -> Launcher:
            args = {
                "C": c, "R": rank,
                "stride_tm": t.stride(0), "stride_tc": t.stride(1),
                "stride_fg": f.stride(0) if f.dim() == 3 else None,
                "stride_fc": f.stride(-2), "stride_fr": f.stride(-1),
                "DROPOUT": drops, "INPUT_PRECISION": precision,
                "BLOCK_M": strip.block_m, "BLOCK_C": strip.block_c, "RANK": tiling.padded_rank(rank),
                "MASKED_C": c % strip.block_c != 0, "TICKETS": tickets or 1,
            }  # fmt: skip
            changing = (
                "t_ptr",
                "f_ptr",
                "u_ptr",
                "seed_ptr",
                "tickets_ptr",
                "M",
                "drop_below",
                *GROUP_ARGUMENTS,
            )
            return Launcher(shrink_kernel, changing, args, strip.num_warps, strip.num_stages)

        self._launch = launchers.once(key, launcher)
        self._rows, self._rank = strip.block_m, rank

    def __call__(
        self,
        t: Tensor,
        f: Tensor,
        dropout: Dropout | None = None,
        tickets: Tensor | None = None,
        groups: Groups | None = None,
    ) -> Tensor:
        """u."""
        m = rows_in(t)
        u = t.new_empty(m, self._rank)
        seed, drop_below, _ = mask_arguments(dropout)
        changing = t, f, u, seed, tickets, m, drop_below, *group_arguments(groups)
        self._launch((-(-m // self._rows), 1, 1), *changing)
        return u
