"""The language model's loss at the rows whose label counts, with its gradient to hidden, chunk by chunk of rows.

    logits = hidden Wᵀ + b          loss = lse(logits) - (1-ε) logits[label] - ε mean(logits)
    d_hidden = (softmax(logits) - (1-ε) onehot(label) - ε/V) W

Shapes: hidden and d_hidden (M, K), W (V, K), b (V,), labels and losses (M,). Logits are rounded to hidden's dtype, and
everything of them is computed in float32. `head_logits_kernel` leaves of each tile of logits the logarithm of its sum
of exponentials, which `head_loss_kernel` combines, always in the same order; `head_gradient_kernel` makes what it
multiplies of the logits while it multiplies.

Only where a gradient is wanted are logits stored, a chunk at a time, written once and read once: 4 bytes each of 16
bits, in the time of 1,200 operations on the GPU that has most for a byte. Never written, they would be computed again
for each 256 columns of d_hidden, the most that a program's registers sum up: 2 K · K / 256 operations each, 4,600 at
K = 768 and 22,400 at 1600; `bench/traffic.py` counts both. One program for all columns has no room for its sums, and
programs that add to what others summed would need atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .blocks import dot_apart, grouped_order, input_precision, load, rounded, start_from
from .descriptors import described
from .launch import Launcher, build, describe, fixed, launchers, on_device_of

LOSS_ROWS = 32  # of a program of `head_loss_kernel`
_LOG2_E = tl.constexpr(1.4426950408889634)

# --- kernels


@triton.jit
def exp_of_difference(values, top):
    """`exp(values - top)`, where neither's infinity makes a NaN of what is zero."""
    return tl.exp(values - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def left_of_tile(
    acc, labels_ptr, parts_ptr, sums_ptr, losses_ptr,
    M, V,
    pid_n, offs_m, mask_m,
    dtype: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile's logits, -inf past V; stores each row's lse, with `sums_ptr` its sum, and its label's logit.

    A row's label is in one of its tiles.
    """
    logits = rounded(acc, dtype).to(tl.float32)
    start_n, own_n = pid_n * BLOCK_N, tl.arange(0, BLOCK_N)
    mask_n = own_n < V - start_n
    row = tl.cast(pid_n, tl.int64) * M
    if sums_ptr is not None:
        tl.store(sums_ptr + row + offs_m, tl.sum(tl.where(mask_n[None, :], logits, 0.0), axis=1), mask=mask_m)
    own_label = tl.load(labels_ptr + offs_m, mask=mask_m, other=-1).to(tl.int32) - start_n
    of_label = tl.sum(tl.where(own_label[:, None] == own_n[None, :], logits, 0.0), axis=1)
    tl.store(losses_ptr + offs_m, of_label, mask=mask_m & (own_label >= 0) & (own_label < BLOCK_N))
    logits = tl.where(mask_n[None, :], logits, float("-inf"))
    top = tl.max(logits, axis=1)
    lse = top + tl.log(tl.sum(exp_of_difference(logits, top[:, None]), axis=1))
    tl.store(parts_ptr + row + offs_m, lse, mask=mask_m)
    return rounded(logits, dtype)


@triton.jit(do_not_specialize=["M"])
def head_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, parts_ptr, sums_ptr, losses_ptr, logits_ptr,
    M, K, V,
    stride_hm, stride_hk, stride_wv, stride_wk, stride_lm,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    MASKED_K: tl.constexpr,
):  # fmt: skip
    """`logits = hidden weightᵀ + bias`, one tile a program, and of each tile what the loss needs of it.

    Parts and sums are (tiles of a row, M). With `logits_ptr` logits are stored, rows `stride_lm` apart, -inf past V.
    """
    pid_m, pid_n = grouped_order(tl.program_id(0), M, V, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < V
    rows, columns = tl.where(mask_m, offs_m, 0), tl.where(mask_n, offs_n, 0)  # past the end the first again

    acc = start_from(bias_ptr, offs_n, mask_n, BLOCK_M, BLOCK_N)
    hidden_ptrs = (
        hidden_ptr + rows[:, None].to(tl.int64) * stride_hm + offs_k[None, :].to(tl.int64) * stride_hk
    )
    weight_ptrs = (
        weight_ptr + offs_k[:, None].to(tl.int64) * stride_wk + columns[None, :].to(tl.int64) * stride_wv
    )
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        hidden = load(hidden_ptrs, mask_k[None, :], MASKED_K)
        weight = load(weight_ptrs, mask_k[:, None], MASKED_K)
        acc = dot_apart(hidden, weight, acc, INPUT_PRECISION)
        hidden_ptrs += BLOCK_K * tl.cast(stride_hk, tl.int64)
        weight_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)

    logits = left_of_tile(
        acc, labels_ptr, parts_ptr, sums_ptr, losses_ptr, M, V,
        pid_n, offs_m, mask_m, hidden_ptr.dtype.element_ty, BLOCK_N,
    )  # fmt: skip
    if logits_ptr is not None:
        mask = mask_m[:, None] & (offs_n < stride_lm)[None, :]
        tl.store(logits_ptr + offs_m[:, None].to(tl.int64) * stride_lm + offs_n[None, :], logits, mask=mask)


@triton.jit(do_not_specialize=["M"])
def head_logits_descriptor_kernel(
    hidden_desc, weight_desc, bias_ptr, labels_ptr, parts_ptr, sums_ptr, losses_ptr, logits_desc,
    M, K, V,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """`head_logits_kernel` with a persistent grid and tensor descriptors, which read zeros past a tensor's end."""
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(V, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pid_m, pid_n = grouped_order(tile, M, V, BLOCK_M, BLOCK_N, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < M, offs_n < V
        acc = start_from(bias_ptr, offs_n, mask_n, BLOCK_M, BLOCK_N)
        for k in range(0, K, BLOCK_K):
            weight = weight_desc.load([start_n, k]).T
            acc = dot_apart(hidden_desc.load([start_m, k]), weight, acc, INPUT_PRECISION)
        logits = left_of_tile(
            acc, labels_ptr, parts_ptr, sums_ptr, losses_ptr, M, V,
            pid_n, offs_m, mask_m, hidden_desc.dtype, BLOCK_N,
        )  # fmt: skip
        if logits_desc is not None:
            logits_desc.store([start_m, start_n], logits)


@triton.jit(do_not_specialize=["M"])
def head_loss_kernel(
    parts_ptr, sums_ptr, lse_ptr, losses_ptr,
    M, V, tiles,
    smoothing,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """lse and losses of BLOCK_M rows from what `tiles` tiles left of each, `losses_ptr` holding its label's logit."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_T)
    mask_m = offs_m < M
    rows = tl.where(mask_m, offs_m, 0)
    offsets = offs_t[:, None].to(tl.int64) * M + rows[None, :]

    tops = tl.full((BLOCK_T, BLOCK_M), float("-inf"), dtype=tl.float32)
    for t in range(0, tiles, BLOCK_T):
        mask = (offs_t < tiles - t)[:, None]
        parts = tl.load(parts_ptr + tl.cast(t, tl.int64) * M + offsets, mask=mask, other=float("-inf"))
        tops = tl.maximum(tops, parts)
    top = tl.max(tops, axis=0)
    acc = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    for t in range(0, tiles, BLOCK_T):
        mask = (offs_t < tiles - t)[:, None]
        parts = tl.load(parts_ptr + tl.cast(t, tl.int64) * M + offsets, mask=mask, other=float("-inf"))
        acc += exp_of_difference(parts, top[None, :])
    lse = top + tl.log(tl.sum(acc, axis=0))
    loss = lse - (1.0 - smoothing) * tl.load(losses_ptr + rows)
    if sums_ptr is not None:
        acc = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
        for t in range(0, tiles, BLOCK_T):
            mask = (offs_t < tiles - t)[:, None]
            acc += tl.load(sums_ptr + tl.cast(t, tl.int64) * M + offsets, mask=mask, other=0.0)
        loss -= smoothing * (tl.sum(acc, axis=0) / V)
    tl.store(losses_ptr + offs_m, loss, mask=mask_m)
    if lse_ptr is not None:
        tl.store(lse_ptr + offs_m, lse, mask=mask_m)


@triton.jit
def gradient_to_logits(logits, lse, labels, offs_v, smoothing, uniform, SMOOTHED: tl.constexpr):
    """`softmax(logits) - (1 - smoothing) onehot(labels) - uniform` at columns `offs_v`, in the logits' dtype."""
    d_logits = tl.exp2(logits.to(tl.float32) * _LOG2_E - (lse * _LOG2_E)[:, None])
    if SMOOTHED:
        d_logits -= uniform
    here = labels[:, None] == offs_v[None, :]
    return rounded(tl.where(here, d_logits - (1.0 - smoothing), d_logits), logits.dtype)


@triton.jit
def store_of_run(acc, out_ptr, M, K, offs_m, offs_n, mask_m, mask_n):
    """A tile of what this run sums, in `out_ptr` (runs, M, K)."""
    out_ptr += tl.program_id(1).to(tl.int64) * M * K
    offsets = offs_m[:, None].to(tl.int64) * K + offs_n[None, :]
    tl.store(
        out_ptr + offsets, rounded(acc, out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :]
    )


@triton.jit(do_not_specialize=["M"])
def head_gradient_kernel(
    logits_ptr, lse_ptr, labels_ptr, weight_ptr, out_ptr,
    M, K, V, columns,
    stride_lm, stride_wv, stride_wk,
    smoothing, uniform,
    SMOOTHED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED_N: tl.constexpr,
):  # fmt: skip
    """`out = (softmax(logits) - (1 - smoothing) onehot(label) - uniform) weight`, one tile of a run a program.

    A run sums `columns` of V, BLOCK_K at a time. BLOCK_K divides `stride_lm`, and logits are -inf past V.
    """
    num_pid_n = tl.cdiv(K, BLOCK_N)  # the programs that read the same logits are neighbours
    offs_m = tl.program_id(0) // num_pid_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < K
    rows = tl.where(mask_m, offs_m, 0)
    lse, labels = tl.load(lse_ptr + rows), tl.load(labels_ptr + rows).to(tl.int32)
    start_v = tl.program_id(1) * columns
    end_v = tl.minimum(start_v + columns, V)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    logits_ptrs = logits_ptr + start_v + rows[:, None].to(tl.int64) * stride_lm + offs_v[None, :]
    weight_ptrs = weight_ptr + start_v * tl.cast(stride_wv, tl.int64)
    weight_ptrs += offs_v[:, None].to(tl.int64) * stride_wv + offs_n[None, :].to(tl.int64) * stride_wk
    for v in range(start_v, end_v, BLOCK_K):
        mask = (offs_v < V - v)[:, None]
        if MASKED_N:
            mask = mask & mask_n[None, :]
        logits = tl.load(logits_ptrs)
        weight = tl.load(weight_ptrs, mask=mask, other=0.0)
        d_logits = gradient_to_logits(logits, lse, labels - v, offs_v, smoothing, uniform, SMOOTHED)
        acc = dot_apart(d_logits, weight, acc, INPUT_PRECISION)
        logits_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * tl.cast(stride_wv, tl.int64)

    store_of_run(acc, out_ptr, M, K, offs_m, offs_n, mask_m, mask_n)


@triton.jit(do_not_specialize=["M"])
def head_gradient_descriptor_kernel(
    logits_desc, lse_ptr, labels_ptr, weight_desc, out_ptr,
    M, K, V, columns,
    smoothing, uniform,
    SMOOTHED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`head_gradient_kernel` with tensor descriptors, which read zeros past the weight's end."""
    num_pid_n = tl.cdiv(K, BLOCK_N)
    start_m, start_n = tl.program_id(0) // num_pid_n * BLOCK_M, tl.program_id(0) % num_pid_n * BLOCK_N
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    offs_v = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < K
    rows = tl.where(mask_m, offs_m, 0)
    lse, labels = tl.load(lse_ptr + rows), tl.load(labels_ptr + rows).to(tl.int32)
    start_v = tl.program_id(1) * columns
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for v in range(start_v, tl.minimum(start_v + columns, V), BLOCK_K):
        logits, weight = logits_desc.load([start_m, v]), weight_desc.load([v, start_n])
        d_logits = gradient_to_logits(logits, lse, labels - v, offs_v, smoothing, uniform, SMOOTHED)
        acc = dot_apart(d_logits, weight, acc, INPUT_PRECISION)
    store_of_run(acc, out_ptr, M, K, offs_m, offs_n, mask_m, mask_n)


# --- launchers: allocation and grid


def losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row (M,), float32, and where `gradient`, that of their sum to hidden (M, K), in its dtype.

    hidden (M, K) and weight (V, K), by strides, have one dtype; labels (M,), int64, are all in range. The gradient
    isn't divided by their number: float16 would lose what is small.
    """
    (m, k), labels = hidden.shape, labels.contiguous()
    found = hidden.new_empty(m, dtype=torch.float32)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if gradient else None
    size = tiling.head_rows(m, k) if gradient else max(m, 1)  # without a gradient nothing of a chunk is large
    with on_device_of(hidden):
        for start in range(0, m, size):
            some = slice(start, start + size)
            rows = hidden[some]
            given = weight, labels[some], float(smoothing)
            how = tiling.head_logits(rows, weight)
            logits, lse = head_losses(rows, *given, bias, found[some], gradient, how)
            if d_hidden is not None and k > 0:
                assert logits is not None
                assert lse is not None
                how, runs = tiling.head_gradient(rows, weight)
                head_gradient(logits, lse, *given, d_hidden[some], how, runs)
            del logits  # before the next are made
    return found, d_hidden


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: float,
    bias: Tensor | None,
    found: Tensor,
    stores: bool,
    how: tiling.Linear,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills `found`; the logits, which are padded with -inf, and lse, where it `stores` them."""
    (m, k), v, precision, tile = hidden.shape, len(weight), input_precision(hidden.dtype), how.tile
    tiles = -(-v // tile.block_n)
    padded = -(-v // tiling.HEAD_ALIGNED) * tiling.HEAD_ALIGNED
    logits, lse = (hidden.new_empty(m, padded), found.new_empty(m)) if stores else (None, None)
    parts, sums = found.new_empty(tiles, m), found.new_empty(tiles, m) if smoothing else None
    kind = v, stores, smoothing != 0.0

    def launcher() -> Launcher:
        args = {
            "K": k, "V": v, "INPUT_PRECISION": precision,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
            "GROUP_M": 32,  # a chunk, so that the weight is read once: hidden stays in L2
        }  # fmt: skip
        common = ("bias_ptr", "labels_ptr", "parts_ptr", "sums_ptr", "losses_ptr", "M")
        if how.descriptor:
            changing = ("hidden_desc", "weight_desc", "logits_desc", *common)
            return Launcher(head_logits_descriptor_kernel, changing, args, tile.num_warps, tile.num_stages)
        args |= {
            "stride_hm": hidden.stride(0), "stride_hk": hidden.stride(1),
            "stride_wv": weight.stride(0), "stride_wk": weight.stride(1), "stride_lm": padded,
            "MASKED_K": k % tile.block_k != 0,
        }  # fmt: skip
        changing = ("hidden_ptr", "weight_ptr", "logits_ptr", *common)
        return Launcher(head_logits_kernel, changing, args, tile.num_warps, tile.num_stages)

    key = "head logits", how, precision, k, *kind, *fixed(hidden, weight, bias)
    programs = -(-m // tile.block_m) * tiles
    operands: tuple[Any, ...] = hidden, weight, logits
    if how.descriptor:
        programs = min(programs, how.programs)
        blocks = [tile.block_m, tile.block_k], [tile.block_n, tile.block_k], [tile.block_m, tile.block_n]
        operands = described(operands, blocks)
    launchers.once(key, launcher)((programs, 1, 1), *operands, bias, labels, parts, sums, found, m)

    def loss_launcher() -> Launcher:
        args = {"V": v, "tiles": tiles, "BLOCK_M": LOSS_ROWS, "BLOCK_T": 32}
        changing = ("parts_ptr", "sums_ptr", "lse_ptr", "losses_ptr", "M", "smoothing")
        return Launcher(head_loss_kernel, changing, args, 4, 1)

    loss = launchers.once(("head loss", tiles, *kind, found.get_device()), loss_launcher)
    loss((-(-m // LOSS_ROWS), 1, 1), parts, sums, lse, found, m, smoothing)
    return logits, lse


def head_gradient(
    logits: Tensor,
    lse: Tensor,
    weight: Tensor,
    labels: Tensor,
    smoothing: float,
    d_hidden: Tensor,
    how: tiling.Linear,
    runs: int,
) -> None:
    """Fills `d_hidden` (M, K), contiguous, by so many runs over V."""
    (m, k), v, precision, tile = d_hidden.shape, len(weight), input_precision(logits.dtype), how.tile
    columns = -(-v // (runs * tile.block_k)) * tile.block_k
    runs = -(-v // columns)
    out = d_hidden.new_empty(runs, m, k, dtype=torch.float32) if runs > 1 else d_hidden

    def launcher() -> Launcher:
        args = {
            "K": k, "V": v, "SMOOTHED": smoothing != 0.0, "INPUT_PRECISION": precision,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        }  # fmt: skip
        common = ("out_ptr", "lse_ptr", "labels_ptr", "M", "columns", "smoothing", "uniform")
        if how.descriptor:
            changing = ("logits_desc", "weight_desc", *common)
            return Launcher(head_gradient_descriptor_kernel, changing, args, tile.num_warps, tile.num_stages)
        args |= {
            "stride_lm": logits.stride(0), "stride_wv": weight.stride(0), "stride_wk": weight.stride(1),
            "MASKED_N": k % tile.block_n != 0,
        }  # fmt: skip
        changing = ("logits_ptr", "weight_ptr", *common)
        return Launcher(head_gradient_kernel, changing, args, tile.num_warps, tile.num_stages)

    key = "head gradient", how, precision, k, v, smoothing != 0.0, out.dtype, *fixed(logits, weight)
    operands: tuple[Any, ...] = logits, weight
    if how.descriptor:
        operands = described(operands, ([tile.block_m, tile.block_k], [tile.block_k, tile.block_n]))
    grid = (-(-m // tile.block_m) * -(-k // tile.block_n), runs, 1)
    changing = out, lse, labels, m, columns, smoothing, smoothing / v
    launchers.once(key, launcher)(grid, *operands, *changing)
    if runs > 1:
        d_hidden.copy_(out.sum(0))


def ready(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where every kernel of `losses` is built for these tensors; else why not."""

    def exercise() -> None:
        labels = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        for smoothing in (0.0, 0.1):
            for gradient in (True, False):
                losses(hidden, weight, labels, bias, smoothing=smoothing, gradient=gradient)

    key = ("lm_head", tiling.steps(hidden.shape[0]), *describe(hidden, rows=True), *describe(weight, bias))
    return build(key, hidden, exercise)
