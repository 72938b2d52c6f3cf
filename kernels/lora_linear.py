"""A frozen linear layer with its LoRA update, forward and backward.

    forward    xa = (keep ⊙ x) Aᵀ          y = x W + b + s xa Bᵀ
    backward   dxa = dy B                  dx = dy Wᵀ + keep ⊙ (s dxa A)
               dA = s dxaᵀ (keep ⊙ x)      dB = s dyᵀ xa

with keep the dropout mask and s the scaling times dropout's 1 / (1 - p). A GELU beside the layer needs no pass of
its own: `h = gelu(y)` is stored with y, or instead of it where no backward follows, and where x is `gelu(pre)`, dx is
multiplied by gelu'(pre) before it is stored.
Nor does a dropout with its residual: y becomes `residual + dropout(y)`, and dy is dropped before all of the above.
Shapes: x (M, K), W (K, N), b (N,), A (R, K), B (N, R), xa and dxa (M, R), y (M, N). The kernels of `low_rank` do it
all: y and dx are one GEMM with a rank-r term each, dA and dB one pass over x and dy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import low_rank, tiling
from .blocks import input_precision
from .dropout import Dropout, dropped, keep_scale
from .launch import build, describe, differentiable_once, differentiated, eager, on_device_of
from .memo import Memo
from .rows import as_rows, as_taken, rows_in, sample_rows


class Call(NamedTuple):
    """What a call of a layer computes, beside the tensors that gradients go to."""

    scaling: float
    dropout: Dropout | None = None  # of x, before lora_a
    stores: str = "y"  # of y and gelu(y), as `low_rank.Epilogue` has it
    residual_dropout: Dropout | None = None  # of y, before a residual
    xa: Tensor | None = None  # (M, R), contiguous: `dropout(x) Aᵀ`, where it is known


class Layer:
    """The kernels of a layer, forward and backward, prepared at their first calls for operands of one kind.

    It is called with any that differ from those in values, or in the number of rows within one of `tiling.steps`.
    """

    def __init__(self) -> None:
        self._updated: low_rank.Updated | None = None
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
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """y (M, N), xa (M, R) and gelu(y), all in x's dtype; y or gelu(y) is None where it isn't stored.

        Where a `residual` (M, N), contiguous, is given, y is `residual + dropout(y)`. A contiguous x may have more
        leading dimensions, which y and gelu(y) then have too.
        """
        scaling, dropout, stores, residual_dropout, xa = call
        n = weight.shape[1]
        if n == 0 or rows_in(x) == 0:
            y, h = (x.new_empty(*x.shape[:-1], n) if name in stores else None for name in "yh")
            return y, x.new_zeros(rows_in(x), len(lora_a)) if xa is None else xa, h
        epilogue = low_rank.Epilogue(stores, None, residual)
        if self._updated is None:
            self._updated = low_rank.Updated(
                sample_rows(x), weight, bias, lora_a, lora_b.T,
                inner=dropout is not None, outer=residual_dropout is not None, epilogue=epilogue,
            )  # fmt: skip
        return self._updated(
            x, weight, bias, lora_a, lora_b, _scaled(scaling, dropout), dropout, residual_dropout,
            u=xa, epilogue=epilogue,
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
        epilogue = low_rank.Epilogue("y", x, None) if activated else low_rank.PLAIN

        def prepare() -> tuple[Any, ...]:
            rows, drops = sample_rows(dy), dropout is not None
            updated = shrink = gradients = None
            if need_a or need_b:
                dtypes = lora_b.dtype if need_b else None, lora_a.dtype if need_a else None
                tall = rows, sample_rows(x), len(lora_a)
                gradients = low_rank.Gradients(*tall, *dtypes, drops=drops, activated=activated)
            count = 0 if gradients is None else gradients.tickets
            if need_x:
                given = rows, weight.T, None, lora_b.T, lora_a
                updated = low_rank.Updated(*given, outer=drops, tickets=count, epilogue=epilogue)
            elif need_a:
                shrink = low_rank.Shrink(rows, lora_b, tickets=count)
            return updated, shrink, gradients, count

        key = need_x, need_a, need_b, dy.dtype, dy.dim() == 2 and dy.stride(), input_precision(x.dtype)
        updated, shrink, gradients, count = self._backwards.once(key, prepare)
        tickets = dy.new_empty(count, dtype=torch.int32) if count else None
        dx, dxa = None, xa
        if updated is not None:
            given = dy, weight, None, lora_b, lora_a, scaling, None, dropout
            dx, dxa, _ = updated(*given, tickets=tickets, epilogue=epilogue)
        elif shrink is not None:
            dxa = shrink(dy, lora_b, None, tickets)
        elif tickets is not None:
            tickets.zero_()
        if gradients is not None:
            gradients(dy, xa, x, dxa, d_lora_b, d_lora_a, scaling, tickets, dropout)
        return dx, d_lora_a, d_lora_b


def _scaled(scaling: float, dropout: Dropout | None) -> float:
    return scaling if dropout is None else scaling * keep_scale(dropout.p)


# --- for autograd


def _saved(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, xa: Tensor, call: Call, pre: Tensor | None
) -> Any:
    """What backward needs of a call; gelu(pre) is cheaper to compute again than to keep."""
    seeds = (drop and drop.seed for drop in (call.dropout, call.residual_dropout))
    return x if pre is None else pre, weight, lora_a, lora_b, xa, *seeds


def _note(ctx: Any, call: Call, activated: bool) -> None:
    """What backward needs that is no tensor."""
    ctx.scaling, ctx.activated = call.scaling, activated
    ctx.drops = [drop.p if drop else 0.0 for drop in (call.dropout, call.residual_dropout)]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor, needed: Sequence[bool], by_operators: bool) -> list[Tensor | None]:
    """The gradients of x (or pre), weight, bias, lora_a, lora_b and residual, each None unless needed."""
    x, weight, lora_a, lora_b, xa, seed, residual_seed = ctx.saved_tensors
    need_x, need_weight, need_bias, need_a, need_b, need_residual = needed
    dropout_p, residual_dropout = ctx.drops
    d_residual = dy if need_residual else None
    if residual_seed is not None and any(needed[:5]):
        dy = (_dropped if by_operators else dropped)(dy, residual_dropout, residual_seed)
    dx = d_weight = d_bias = d_lora_a = d_lora_b = None
    needs = need_x, need_a, need_b
    tensors = dy, x, weight, lora_a, lora_b, xa
    if any(needs) and by_operators:
        tensors = dy, as_rows(x), *tensors[2:]
        fused = iter(_backward(*tensors, ctx.scaling, dropout_p, seed, *needs, ctx.activated))
        dx, d_lora_a, d_lora_b = (next(fused) if need else None for need in needs)
    elif any(needs):
        dropout = None if seed is None else Dropout(dropout_p, seed)
        given = *tensors, ctx.scaling, dropout, *needs, ctx.activated
        dx, d_lora_a, d_lora_b = ctx.layer.backward(*given)
    if need_weight:
        kept = torch.nn.functional.gelu(x, approximate="tanh") if ctx.activated else x
        d_weight = as_rows(kept).T @ as_rows(dy)
    if need_bias:
        d_bias = as_rows(dy).sum(0)
    return [dx, d_weight, d_bias, d_lora_a, d_lora_b, d_residual]


class _Function(torch.autograd.Function):
    """A layer's call as eager code runs it: an operator of torch's own takes the host three times as long."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        residual: Tensor | None,
        pre: Tensor | None,
        call: Call,
        layer: Layer,
    ) -> tuple[Tensor | None, Tensor | None]:
        with on_device_of(x):
            y, xa, h = layer.forward(x, weight, bias, lora_a, lora_b, call, residual)
        ctx.save_for_backward(*_saved(x, weight, lora_a, lora_b, xa, call, pre))
        _note(ctx, call, pre is not None)
        ctx.layer = layer
        if h is not None:
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 9
        need_x, *needs, need_pre, _, _ = ctx.needs_input_grad
        needs = [need_pre if ctx.activated else need_x, *needs]
        by_operators = differentiated()
        given = as_rows(dy) if by_operators else as_taken(dy)
        with on_device_of(dy):
            dx, *others, d_residual = _gradients(ctx, given, needs, by_operators)
        if given is not dy:  # then everything came as rows
            lead = dy.shape[:-1]
            dx = None if dx is None else dx.view(*lead, dx.shape[-1])
            d_residual = None if d_residual is None else dy
        others = [*others, d_residual]
        return *((None, *others, dx) if ctx.activated else (dx, *others, None)), None, None


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
    stores: str,
    residual: Tensor | None,
    residual_dropout: float,
    residual_seed: Tensor | None,
    xa: Tensor | None,
    pre: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = call_of(scaling, dropout_p, seed, residual_dropout, residual_seed, stores, xa)
    with on_device_of(x):
        results = Layer().forward(x, weight, bias, lora_a, lora_b, call, residual)
    # An operator returns neither None nor what it was given.
    y, xa, h = (x.new_empty(0) if each is None or each is xa else each for each in results)
    return y, xa, h


def call_of(
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    residual_dropout: float = 0.0,
    residual_seed: Tensor | None = None,
    stores: str = "y",
    xa: Tensor | None = None,
) -> Call:
    """A call whose dropouts have a seed where they drop."""
    dropout = None if seed is None else Dropout(dropout_p, seed)
    of_residual = None if residual_seed is None else Dropout(residual_dropout, residual_seed)
    return Call(scaling, dropout, stores, of_residual, xa)


@_forward.register_fake
def _(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, stores, *rest):
    *_, xa, _ = rest
    m, n = x.shape[0], weight.shape[1]
    y, h = (x.new_empty((m, n) if name in stores else (0,)) for name in "yh")
    return y, x.new_empty((m, lora_a.shape[0]) if xa is None else (0,)), h


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
    activated: bool,
) -> list[Tensor]:
    dropout = None if seed is None else Dropout(dropout_p, seed)
    needs = need_x, need_a, need_b
    with on_device_of(x):
        given = dy, x, weight, lora_a, lora_b, xa, scaling, dropout
        gradients = Layer().backward(*given, *needs, activated)
    return [gradient for gradient in gradients if gradient is not None]


@_backward.register_fake
def _(dy, x, weight, lora_a, lora_b, xa, scaling, dropout_p, seed, need_x, need_a, need_b, activated):
    needed = ((x, need_x), (lora_a, need_a), (lora_b, need_b))
    return [tensor.new_empty(tensor.shape) for tensor, need in needed if need]


@torch.library.custom_op("fastpeft::dropped", mutates_args=())
def _dropped(t: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    with on_device_of(t):
        return dropped(t, dropout_p, seed)


@_dropped.register_fake
def _(t, dropout_p, seed):
    return t.new_empty(t.shape)


def _save(ctx, inputs, output):
    (
        x,
        weight,
        _,
        lora_a,
        lora_b,
        scaling,
        dropout_p,
        seed,
        stores,
        _,
        residual_dropout,
        residual_seed,
        xa,
        pre,
    ) = inputs
    call = call_of(scaling, dropout_p, seed, residual_dropout, residual_seed, stores, xa)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*_saved(x, weight, lora_a, lora_b, output[1] if xa is None else xa, call, pre))
    _note(ctx, call, pre is not None)


def _operators_gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 14
    need_x, *needs, _, _, _, _, need_residual, _, _, _, need_pre = ctx.needs_input_grad
    needs = [need_pre if ctx.activated else need_x, *needs, need_residual]
    dx, d_weight, d_bias, d_lora_a, d_lora_b, d_residual = _gradients(ctx, dy, needs, True)
    dx, d_pre = (None, dx) if ctx.activated else (dx, None)
    rest = (None, None, None, None, d_residual, None, None, None, d_pre)
    return dx, d_weight, d_bias, d_lora_a, d_lora_b, *rest


_forward.register_autograd(_operators_gradients, setup_context=_save)
differentiable_once(_backward)
differentiable_once(_dropped)


def applied(
    x: Tensor,
    layer: tuple[Any, ...],
    call: Call,
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    prepared: Layer | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """y and gelu(y) of a call, x (M, K), or contiguous (..., K), of a layer's weight, bias, lora_a and lora_b.

    They are as `lora_linear` takes them; `prepared` is what was called for such operands before. What the call doesn't
    store is None, or empty where it is traced.
    """
    if eager(x):
        prepared = prepared or Layer()
        if torch.is_grad_enabled():
            return _Function.apply(x, *layer, residual, pre, call, prepared)
        with on_device_of(x):
            y, _, h = prepared.forward(x, *layer, call, residual)
        return y, h
    drops = [(drop.p, drop.seed) if drop else (0.0, None) for drop in (call.dropout, call.residual_dropout)]
    rows, residual, pre = (t if t is None else as_rows(t) for t in (x, residual, pre))
    y, _, h = _forward(rows, *layer, call.scaling, *drops[0], call.stores, residual, *drops[1], call.xa, pre)
    if x.dim() != 2:
        y, h = (t.view(*x.shape[:-1], t.shape[1]) if t.dim() == 2 else t for t in (y, h))
    return y, h


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    xa: Tensor | None = None,
    pre: Tensor | None = None,
    residual: Tensor | None = None,
    residual_dropout: float = 0.0,
    residual_seed: Tensor | None = None,
) -> Tensor:
    """`y = x W + b + scaling · (dropout(x) Aᵀ) Bᵀ` by the kernels; differentiable once, by all but the seeds.

    Args:
        x: (M, K) float16, bfloat16 or float32, any strides.
        weight: (K, N) in x's dtype, any strides. bias: (N,) or None.
        lora_a: (R, K) and lora_b: (N, R), in x's dtype or wider, R at most 256; rounded to x's dtype.
        dropout_p: probability of dropping an element of x before lora_a.
        seed: int64 of one element on x's device, from which the mask is drawn; None where dropout_p is 0.
        xa: (M, R): `dropout(x) Aᵀ`, unscaled, where it is known, of this `dropout_p` and `seed`, as
            `layer_norm.layer_norm_shrink` gives it. No gradient goes to it: it goes to x and lora_a.
        pre: (M, K), contiguous: x is gelu(pre), the tanh GELU, as `lora_linear_gelu` gives both. The gradient
            then goes to pre, and none to x.
        residual: (M, N) in x's dtype, contiguous: the result is `residual + dropout(y)`, a dropout with
            probability `residual_dropout` and from `residual_seed`, None where that is 0.

    Returns:
        (M, N) in x's dtype.
    """
    layer = weight, bias, lora_a, lora_b
    call = call_of(scaling, dropout_p, seed, residual_dropout, residual_seed, xa=xa)
    y, _ = applied(x, layer, call, residual, pre)
    assert y is not None
    return y


def lora_linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    xa: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """`lora_linear` and, stored by the same kernel, the tanh GELU of it, which carries no gradient.

    Where nothing here asks for a gradient, the first is None, and nothing is stored for it.
    """
    layer = weight, bias, lora_a, lora_b
    stores = stored(x, *layer)
    y, h = applied(x, layer, call_of(scaling, dropout_p, seed, stores=stores, xa=xa))
    assert h is not None
    return (y if "y" in stores else None), h


def stored(*layer: Tensor | None) -> str:
    """What `lora_linear_gelu` stores for x and its layer: y only where backward will read it."""
    asked = any(t is not None and t.requires_grad for t in layer)
    return "yh" if asked and torch.is_grad_enabled() else "h"


def exercise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dropout_p: float,
    *,
    pre: Tensor | None = None,
    residual: Tensor | None = None,
    residual_dropout: float = 0.0,
    stores: str = "y",
) -> tuple[Tensor | None, Tensor | None]:
    """Launch every kernel that a layer can need, forward and backward; y and h. To be recorded, not run."""

    def drop(p: float) -> Dropout | None:
        return Dropout(p, torch.empty(1, dtype=torch.int64, device=x.device)) if p > 0 else None

    call, layer = Call(1.0, drop(dropout_p), stores, drop(residual_dropout)), Layer()
    y, xa, h = layer.forward(x, weight, bias, lora_a, lora_b, call, residual)
    kept, activated = (x, False) if pre is None else (pre, True)
    dy = h if y is None else y
    assert dy is not None
    if call.residual_dropout is not None:
        dy = dropped(dy, *call.residual_dropout)
    for need_x in (True, False):  # without dx another kernel leaves dxa
        needs = need_x, True, True
        layer.backward(dy, kept, weight, lora_a, lora_b, xa, 1.0, call.dropout, *needs, activated)
    return y, h


def ready(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    residual_dropout: float = 0.0,
) -> str | None:
    """None where every kernel of `lora_linear` and of its backward is built for these tensors; else why not.

    Launches and draws nothing. The first call of a kind compiles; a failure warns once and is remembered.
    """
    given, added = (
        (weight, bias, lora_a, lora_b),
        {"residual": residual, "residual_dropout": residual_dropout},
    )
    drops = dropout_p > 0, residual_dropout > 0
    of_rows = describe(x, residual, rows=True)
    key = ("lora_linear", tiling.steps(x.shape[0]), *drops, *of_rows, *describe(*given))
    return build(key, x, lambda: exercise(x, *given, dropout_p, **added))
