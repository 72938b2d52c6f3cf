"""What the kernels share: loads, the dot product, the order of programs, the ordered sum of partials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, launch, tf32_allowed

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
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """`acc + a b`, in float32."""
    if _INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


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
def sum_partials_kernel(partials_ptr, out_ptr, size, num_partials, BLOCK: tl.constexpr):
    """`out = Σ partials` in order: partials (num_partials, size) float32, out (size,)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    ptrs = partials_ptr + offs
    for _ in range(num_partials):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += tl.cast(size, tl.int64)
    tl.store(out_ptr + offs, rounded(acc, out_ptr.dtype.element_ty), mask=mask)


def sum_partials(partials: Tensor, out: Tensor) -> Tensor:
    """`out`, filled with the sum of the float32 `partials` (P, *out.shape) over P, in order."""
    args = {"partials_ptr": partials, "out_ptr": out, "size": out.numel(), "num_partials": partials.shape[0]}
    block = 1024
    launch(sum_partials_kernel, (triton.cdiv(out.numel(), block),), {**args, "BLOCK": block}, 4, 1)
    return out
