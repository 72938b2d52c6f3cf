"""A frozen linear layer with its LoRA update, forward and backward.

    forward    xa = (keep ⊙ x) Aᵀ          y = x W + b + s xa Bᵀ
    backward   dxa = dy B                  dx = dy Wᵀ + keep ⊙ (s dxa A)
               dA = s dxaᵀ (keep ⊙ x)      dB = s dyᵀ xa

with keep the dropout mask and s the scaling times dropout's 1 / (1 - p). A GELU beside the layer needs no pass of
its own: `h = gelu(y)` is stored with y, or instead of it where no backward follows, and where x is `gelu(pre)`, dx is
multiplied by gelu'(pre) before it is stored.
Nor does a dropout with its residual: y becomes `residual + dropout(y)`, and dy is dropped before all of the above.
Rows may belong to many adapters (`groups`): then A, B, s and p are each row's adapter's, and dA and dB stacked.
Shapes: x (M, K), W (K, N), b (N,), A (R, K), B (N, R), xa and dxa (M, R), y (M, N). y and dx are one
GEMM with a rank-r term each (`low_rank`), dA and dB one pass over x and dy (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import input_precision
from .dropout import Dropout, keep_scale
from .gradients import Gradients
from .groups import Groups, tickets_for
from .linear import PLAIN, Epilogue
from .low_rank import Updated
from .memo import Memo
from .rows import as_rows, rows_in, sample_rows
from .shrink import Shrink


class Call(NamedTuple):
    """What a call of a layer computes, beside the tensors that gradients go to."""

    scaling: float
    dropout: Dropout | None = None  # of x, before lora_a
    stores: str = "y"  # of y and gelu(y), as `Epilogue` has it
    residual_dropout: Dropout | None = None  # of y, before a residual
    groups: Groups | None = None  # with which factors are stacked, and scaling and dropout's p unread


class Layer:
    """The kernels of a layer, forward and backward, prepared at their first calls for operands of one kind.

    It is called with any that differ from those in values, or in the number of rows within one of `tiling.steps`.
    """

    def __init__(self) -> None:
        self._updated: Updated | None = None
        self._backwards = Memo(64)  # a few: by what is needed, and the strides of dy

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        call: Call,
        residual: Tensor | None = None,
        xa: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """y (M, N), xa (M, R) and gelu(y), all in x's dtype; y or gelu(y) is None where it isn't stored.

        Where a `residual` (M, N), contiguous, is given, y is `residual + dropout(y)`; an xa that is given isn't
        computed again. A contiguous x may have more leading dimensions, which y and gelu(y) then have too.
        """
        scaling, dropout, stores, residual_dropout, groups = call
        n = weight.shape[1]
        if n == 0 or rows_in(x) == 0:
            y, h = (x.new_empty(*x.shape[:-1], n) if name in stores else None for name in "yh")
            return y, x.new_zeros(rows_in(x), lora_b.shape[-1]) if xa is None else xa, h
        epilogue = Epilogue(stores, None, residual)
        if self._updated is None:
            self._updated = Updated(
                sample_rows(x), weight, bias, lora_a, lora_b.mT,
                given=xa is not None, inner=dropout is not None, outer=residual_dropout is not None,
                epilogue=epilogue, groups=groups,
            )  # fmt: skip
        return self._updated(
            x, weight, bias, lora_a, lora_b, _scaled(scaling, dropout), dropout, residual_dropout,
            u=xa, epilogue=epilogue, groups=groups,
        )  # fmt: skip

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        xa: Tensor,
        scaling: float,
        dropout: Dropout | None,
        need_x: bool,
        need_a: bool,
        need_b: bool,
        activated: bool = False,
        groups: Groups | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx (M, K), d_lora_a (R, K) and d_lora_b (N, R), each None unless needed.

        Where `activated`, x and dx are the pre-activation, contiguous, and the gradient to it. With more leading
        dimensions dy is contiguous.
        """
        if dy.numel() == 0:
            empty = (x, need_x), (lora_a, need_a), (lora_b, need_b)
            dx, d_lora_a, d_lora_b = (torch.zeros_like(t) if need else None for t, need in empty)
            return dx, d_lora_a, d_lora_b
        scaling = _scaled(scaling, dropout)
        d_lora_a = torch.empty_like(lora_a, memory_format=torch.contiguous_format) if need_a else None
        d_lora_b = torch.empty_like(lora_b, memory_format=torch.contiguous_format) if need_b else None
        epilogue = Epilogue("y", x, None) if activated else PLAIN

        def prepare() -> tuple[Any, ...]:
            rows, drops = sample_rows(dy), dropout is not None
            updated = shrink = gradients = None
            if need_a or need_b:
                dtypes = lora_b.dtype if need_b else None, lora_a.dtype if need_a else None
                tall = rows, sample_rows(x), lora_b.shape[-1]
                many = groups is not None
                gradients = Gradients(*tall, *dtypes, drops=drops, activated=activated, grouped=many)
            count = 0 if gradients is None else gradients.tickets
            if need_x:
                given = rows, weight.T, None, lora_b.mT, lora_a
                updated = Updated(*given, outer=drops, tickets=count, epilogue=epilogue, groups=groups)
            elif need_a:
                shrink = Shrink(rows, lora_b, tickets=count, groups=groups)
            return updated, shrink, gradients, count

        key = need_x, need_a, need_b, dy.dtype, dy.dim() == 2 and dy.stride(), input_precision(x.dtype)
        updated, shrink, gradients, count = self._backwards.once(key, prepare)
        tickets = tickets_for(dy, count, groups)
        dx, dxa = None, xa
        if updated is not None:
            given = dy, weight, None, lora_b, lora_a, scaling, None, dropout
            dx, dxa, _ = updated(*given, tickets=tickets, epilogue=epilogue, groups=groups)
        elif shrink is not None:
            dxa = shrink(dy, lora_b, None, tickets, groups)
        elif tickets is not None:
            tickets.zero_()
        if gradients is not None:
            gradients(dy, xa, x, dxa, d_lora_b, d_lora_a, scaling, tickets, dropout, groups)
        return dx, d_lora_a, d_lora_b


def _scaled(scaling: float, dropout: Dropout | None) -> float:
    return scaling if dropout is None else scaling * keep_scale(dropout.p)


def gradients(
    backward: Callable[..., Sequence[Tensor | None]],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    scaling: float,
    dropout: Dropout | None,
    needed: Sequence[bool],
    activated: bool = False,
    groups: Groups | None = None,
) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias, lora_a and lora_b, each None unless needed; `backward` is like `Layer.backward`."""
    need_x, need_weight, need_bias, need_a, need_b = needed
    dx = d_weight = d_bias = d_lora_a = d_lora_b = None
    if need_x or need_a or need_b:
        given = dy, x, weight, lora_a, lora_b, xa, scaling, dropout
        dx, d_lora_a, d_lora_b = backward(*given, need_x, need_a, need_b, activated, groups)
    if need_weight:
        kept = torch.nn.functional.gelu(x, approximate="tanh") if activated else x
        kept, rows = as_rows(kept), as_rows(dy)
        # Contiguous where the weight is, and as its transpose otherwise, as stock's is.
        d_weight = kept.T @ rows if weight.stride(1) == 1 else (rows.T @ kept).T
    if need_bias:
        d_bias = as_rows(dy).sum(0)
    return dx, d_weight, d_bias, d_lora_a, d_lora_b
