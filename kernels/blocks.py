"""What the kernels share: loads, the dot product, the order of programs, the ordered sum of partials.

A sum that several programs share is finished in the same launch: each stores its partial and draws a ticket, and
the one that draws the last adds up all partials, always in the same order, so that gradients repeat bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, tf32_allowed

_INTERPRETED = tl.constexpr(INTERPRETED)


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies operands of `dtype`: float32 as TF32 only where torch does that itself."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if tf32_allowed() else "ieee"


@triton.jit
def load(ptrs, mask, MASKED: tl.constexpr):
    """A tile, zero where it leaves the tensor; MASKED is False where the tensor's sizes rule that out."""
    if MASKED:
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def start_from(bias_ptr, offs_n, mask_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An accumulator holding the bias in every row, or zeros."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """`acc + a b`, in float32."""
    if _INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def dot_apart(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """`dot`, of float32 in full summed apart from `acc`: one chain for the whole sum errs more than cuBLAS does."""
    if a.dtype == tl.float32 and INPUT_PRECISION == "ieee":
        # With a limit to what is summed imprecisely, the compiler doesn't join the two sums.
        return acc + tl.dot(a, b, input_precision=INPUT_PRECISION, max_num_imprecise_acc=a.shape[1])
    else:
        return dot(a, b, acc, INPUT_PRECISION)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """`value` in `dtype`, to nearest."""
    if (
        _INTERPRETED and dtype == tl.bfloat16 and value.dtype == tl.float32
    ):  # where the interpreter would cut the low bits off
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def grouped_order(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Program `pid`'s tile (pid_m, pid_n), GROUP_M rows of tiles at a time: neighbours share L2."""
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * num_pid_n)
    first_m = group * GROUP_M
    size_m = tl.minimum(num_pid_m - first_m, GROUP_M)
    in_group = pid % (GROUP_M * num_pid_n)
    return first_m + in_group % size_m, in_group // size_m


@triton.jit
def clear_tickets(tickets_ptr, TICKETS: tl.constexpr, adapters=None):
    """The first program zeroes the tickets of a kernel launched later, of every adapter where there are several.

    Nothing where `tickets_ptr` is None.
    """
    if tickets_ptr is not None:  # noqa: SIM102 - this is decided when compiling, the next when running
        if tl.program_id(0) == 0:
            if adapters is None:
                tl.store(tickets_ptr + tl.arange(0, TICKETS), tl.zeros((TICKETS,), dtype=tl.int32))
            else:
                for g in range(adapters):
                    own = tickets_ptr + g * TICKETS + tl.arange(0, TICKETS)
                    tl.store(own, tl.zeros((TICKETS,), dtype=tl.int32))


@triton.jit
def arrive_last(ticket_ptr, count):
    """Whether this program is the last of `count` to arrive here; what the others stored before is then visible."""
    tl.debug_barrier()  # every thread's stores come before the ticket
    return tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == count - 1


@triton.jit
def sum_in_order(ptrs, mask, stride, count):
    """`Σ ptrs + i · stride` over i < count, float32, in that order: partials that other programs stored."""
    # From L2: L1 may not have seen the stores.
    acc = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    for _ in range(1, count):
        ptrs += tl.cast(stride, tl.int64)
        acc += tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    return acc


def ticket_count(sums: int) -> int:
    """How many tickets to make for so many sums: of few sizes, for a kernel is compiled for each."""
    return max(64, 1 << (sums - 1).bit_length())
