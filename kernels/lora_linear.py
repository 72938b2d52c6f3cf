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

import torch
import triton
from torch import Tensor

from . import low_rank, tiling
from .blocks import new_tickets
from .dropout import Dropout, dropped, keep_scale
from .launch import build, describe, differentiable_once, on_device_of


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    stores: str = "y",
    residual: Tensor | None = None,
    residual_dropout: float = 0.0,
    residual_seed: Tensor | None = None,
    xa: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """y (M, N), xa (M, R) and gelu(y), all in x's dtype; y or gelu(y) is None where `stores` lacks "y" or "h".

    Where a `residual` (M, N), contiguous, is given, y is `residual + dropout(y)`. An `xa` that is given, contiguous,
    is what x, `dropout_p` and `seed` make.
    """
    inner = None if seed is None else Dropout(dropout_p, seed)
    outer = None if residual_seed is None else Dropout(residual_dropout, residual_seed)
    scaling *= keep_scale(dropout_p)
    return low_rank.updated(
        x, weight, bias, lora_a, lora_b.T, scaling,
        inner=inner, outer=outer, residual=residual, stores=stores, u=xa,
    )  # fmt: skip


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
    activated: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (M, K), d_lora_a (R, K) and d_lora_b (N, R), each None unless needed.

    Where `activated`, x and dx are the pre-activation, contiguous, and the gradient to it.
    """
    (m, n), (rank, k) = dy.shape, lora_a.shape
    if m == 0:
        empty = (x, need_x), (lora_a, need_a), (lora_b, need_b)
        dx, d_lora_a, d_lora_b = (torch.zeros_like(t) if need else None for t, need in empty)
        return dx, d_lora_a, d_lora_b
    dropout = None if seed is None else Dropout(dropout_p, seed)
    scaling *= keep_scale(dropout_p)
    d_lora_a = torch.empty_like(lora_a, memory_format=torch.contiguous_format) if need_a else None
    d_lora_b = torch.empty_like(lora_b, memory_format=torch.contiguous_format) if need_b else None
    block_c = tiling.gradient(x, rank).block_c
    tickets = new_tickets(dy, triton.cdiv(n, block_c) + triton.cdiv(k, block_c))
    dx, dxa = None, xa
    if need_x:
        pre = x if activated else None
        dx, dxa, _ = low_rank.updated(
            dy, weight.T, None, lora_b.T, lora_a, scaling, outer=dropout, tickets=tickets, pre=pre
        )
    elif need_a:
        dxa = low_rank.shrink(dy, lora_b, tickets=tickets)
    else:
        tickets.zero_()
    if need_a or need_b:
        low_rank.gradients(
            dy, xa, x, dxa, d_lora_b, d_lora_a, scaling, tickets, dropout=dropout, activated=activated
        )
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
    stores: str,
    residual: Tensor | None,
    residual_dropout: float,
    residual_seed: Tensor | None,
    xa: Tensor | None,
    pre: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    added = (residual, residual_dropout, residual_seed, xa)
    with on_device_of(x):
        results = forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, stores, *added)
    # An operator returns neither None nor what it was given.
    y, xa, h = (x.new_empty(0) if each is None or each is xa else each for each in results)
    return y, xa, h


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
    with on_device_of(x):
        gradients = backward(
            dy, x, weight, lora_a, lora_b, xa, scaling, dropout_p, seed, need_x, need_a, need_b, activated
        )
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
    x, weight, _, lora_a, lora_b, scaling, dropout_p, seed, *rest = inputs
    _, _, residual_dropout, residual_seed, given_xa, pre = rest
    _, xa, h = output
    ctx.mark_non_differentiable(xa, h)
    xa = xa if given_xa is None else given_xa
    # gelu(pre) is cheaper to compute again than to keep.
    ctx.save_for_backward(x if pre is None else pre, weight, lora_a, lora_b, xa, seed, residual_seed)
    ctx.scaling, ctx.dropout_p, ctx.residual_dropout = scaling, dropout_p, residual_dropout
    ctx.activated = pre is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 14
    x, weight, lora_a, lora_b, xa, seed, residual_seed = ctx.saved_tensors
    need_x, need_weight, need_bias, need_a, need_b, *_, need_residual, _, _, _, need_pre = (
        ctx.needs_input_grad
    )
    d_residual = dy if need_residual else None
    needs = need_pre if ctx.activated else need_x, need_a, need_b
    fused = iter(())
    if residual_seed is not None and any((*needs, need_weight, need_bias)):
        dy = _dropped(dy, ctx.residual_dropout, residual_seed)
    if any(needs):
        masks = ctx.scaling, ctx.dropout_p, seed
        fused = iter(_backward(dy, x, weight, lora_a, lora_b, xa, *masks, *needs, ctx.activated))
    dx, d_lora_a, d_lora_b = (next(fused) if need else None for need in needs)
    if need_weight and ctx.activated:
        x = torch.nn.functional.gelu(x, approximate="tanh")
    d_weight = x.T @ dy if need_weight else None
    d_bias = dy.sum(0) if need_bias else None
    dx, d_pre = (None, dx) if ctx.activated else (dx, None)
    rest = (None, None, None, None, d_residual, None, None, None, d_pre)
    return dx, d_weight, d_bias, d_lora_a, d_lora_b, *rest


_forward.register_autograd(_gradients, setup_context=_save)
differentiable_once(_backward)
differentiable_once(_dropped)


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
    given = (residual, residual_dropout, residual_seed, xa, pre)
    return _forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, "y", *given)[0]


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
    stores = stored(x, weight, bias, lora_a, lora_b)
    given = (None, 0.0, None, xa, None)  # neither a residual nor a pre-activation
    y, _, h = _forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, stores, *given)
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

    def seed_of(p: float) -> Tensor | None:
        return torch.empty(1, dtype=torch.int64, device=x.device) if p > 0 else None

    seed, outer = seed_of(dropout_p), seed_of(residual_dropout)
    added = (residual, residual_dropout, outer)
    y, xa, h = forward(x, weight, bias, lora_a, lora_b, 1.0, dropout_p, seed, stores, *added)
    kept, activated = (x, False) if pre is None else (pre, True)
    dy = h if y is None else y
    if outer is not None:
        dy = dropped(dy, residual_dropout, outer)
    for need_x in (True, False):  # without dx another kernel leaves dxa
        needs = need_x, True, True
        backward(dy, kept, weight, lora_a, lora_b, xa, 1.0, dropout_p, seed, *needs, activated)
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
    key = ("lora_linear", x.device, dropout_p > 0, residual_dropout > 0, *describe(x, *given, residual))
    return build(key, x, lambda: exercise(x, *given, dropout_p, **added))
