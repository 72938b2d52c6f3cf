"""LoRA layers in a row with what stands between them, as one operation: LayerNorms, GELUs, dropouts and residuals.

    a link     h = LayerNorm(x), x going on as the residual      if it has a norm, whose kernel may leave the layer's xa
               y = W h + b + s B A h                             `lora_layer`
               gelu(y)                                           if it activates; backward keeps y alone
               residual + dropout(y)                             if it adds

A block of GPT-2 is two such chains, one before its attention and one after. Each is one autograd Function: what it
takes the host to enter and leave one, forward and backward, is as much as what it takes to launch a layer's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layer_norm, tiling
from .dropout import Dropout, dropped
from .launch import build, describe, differentiated, on_device_of, once_differentiable
from .lora_layer import Call, Layer, gradients
from .rows import rows_in


class Norm(NamedTuple):
    """A LayerNorm before a layer, frozen."""

    weight: Tensor
    bias: Tensor
    eps: float
    shrinks: bool  # whether its kernel computes the layer's xa


class Link(NamedTuple):
    """A layer of a chain, with what stands before and behind it.

    The layer is its weight (K, N), bias (N,) or None, lora_a (R, K) and lora_b (N, R), both stacked where the call has
    groups, with which no norm shrinks. `prepared` is what was called before for such operands, with such a call.
    """

    layer: tuple[Tensor, Tensor | None, Tensor, Tensor]
    call: Call
    prepared: Layer
    norm: Norm | None = None
    adds: bool = False  # the residual, to the dropped result


def lora_chain(x: Tensor, residual: Tensor | None, links: Sequence[Link]) -> tuple[Tensor, Tensor | None]:
    """The result of the links, and the residual to go on with, None where the last has added it.

    x (M, K) is of any strides, or (..., K) and contiguous; the residual, contiguous, is of the shape of what it is
    added to, and None where the first link has a norm. A link that activates (its call stores "h", or "yh" where
    backward comes through it) is followed by another. Differentiable once, by all tensors but those of the norms.
    """
    if torch.is_grad_enabled():
        tensors = chain.from_iterable(link.layer for link in links)
        return _Chain.apply(x, residual, links, *tensors)
    with on_device_of(x):
        return _forward(x, residual, links, None)


def stores(
    x: Tensor, residual: Tensor | None, layers: Sequence[Sequence[Any]], activated: Sequence[bool]
) -> list[str]:
    """What each layer's call stores: before a GELU, y only where backward will read it."""
    asked = torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad))
    found = []
    for layer, activates in zip(layers, activated, strict=True):
        asked = asked or (
            torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in layer[:4])
        )
        found.append("y" if not activates else "yh" if asked else "h")
    return found


def _forward(
    x: Tensor, residual: Tensor | None, links: Sequence[Link], saved: list[Tensor | None] | None
) -> tuple[Tensor, Tensor | None]:
    """`lora_chain`; backward reads what is added to `saved`, `_SAVED` of each link."""
    pre = None
    for layer, call, prepared, norm, adds in links:
        xa = None
        if norm is not None:
            residual = x
            x, xa = _normed(x, norm, layer[2], call.dropout)
        y, xa, h = prepared.forward(x, *layer, call, residual if adds else None, xa)
        if saved is not None:
            weight, _, lora_a, lora_b = layer
            _, dropout, _, residual_dropout, _ = call
            saved += (
                x if pre is None else pre, weight, lora_a, lora_b, xa, dropout and dropout.seed,
                residual_dropout and residual_dropout.seed, *(_NO_NORM if norm is None else (residual, norm.weight)),
            )  # fmt: skip
        # gelu(pre) is cheaper to compute again than to keep.
        x, pre = (y, None) if h is None else (h, y)
        if adds:
            residual = None
    return x, residual


def _normed(x: Tensor, norm: Norm, lora_a: Tensor, dropout: Dropout | None) -> tuple[Tensor, Tensor | None]:
    """The LayerNorm of x, and the xa of the layer behind it where its kernel computes that."""
    weight, bias, eps, shrinks = norm
    if shrinks:
        return layer_norm.shrink(x, weight, bias, eps, lora_a, dropout)
    return F.layer_norm(x, weight.shape, weight, bias, eps), None


_NO_NORM = (None, None)
_SAVED = 9


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, residual: Tensor | None, links: Sequence[Link], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        saved: list[Tensor | None] = []
        with on_device_of(x):
            y, carried = _forward(x, residual, links, saved)
        ctx.save_for_backward(*saved)
        ctx.links = links  # of whose tensors backward reads none but those of groups, which nobody trains
        ctx.reached, through_residual = _reached(ctx.needs_input_grad, links)
        if carried is not None and not through_residual:
            ctx.mark_non_differentiable(carried)
        return y, carried

    @staticmethod
    def backward(ctx: Any, dy: Tensor, d_residual: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved, dy = ctx.saved_tensors, dy.resolve_neg()
        if d_residual is not None:
            d_residual = d_residual.resolve_neg()
        if differentiated():
            return once_differentiable(lambda *given: _backward(ctx, *given), dy, d_residual, *saved)
        return _backward(ctx, dy, d_residual, *saved)


def _reached(needed: Sequence[bool], links: Sequence[Link]) -> tuple[list[bool], bool]:
    """Whether a gradient goes on before each link, and whether one goes to the residual that is handed on."""
    wanted, through_residual, *_ = needed
    reached = []
    for i, link in enumerate(links):
        reached.append(wanted)
        if link.norm is not None:
            through_residual = wanted
        wanted = wanted or any(needed[3 + 4 * i : 7 + 4 * i]) or (link.adds and through_residual)
    return reached, through_residual


def _backward(ctx: Any, dy: Tensor, d_residual: Tensor | None, *saved: Tensor | None) -> tuple[Any, ...]:
    links, needed, found = ctx.links, ctx.needs_input_grad, []
    d: Tensor | None = dy if dy.dim() == 2 else dy.contiguous()
    with on_device_of(dy):
        for i in range(len(links) - 1, -1, -1):
            _, (scaling, dropout, _, residual_dropout, groups), prepared, norm, adds = links[i]
            x, weight, lora_a, lora_b, xa, seed, residual_seed, normed, norm_weight = saved[_SAVED * i :][
                :_SAVED
            ]
            needs = ctx.reached[i], *needed[3 + 4 * i : 7 + 4 * i]
            if adds:
                d_residual = d
            if d is None or not any(needs):
                found += (None,) * 4
                continue
            if residual_dropout is not None:
                d = dropped(d, residual_dropout.p, residual_seed)
            mask = None if dropout is None else Dropout(dropout.p, seed)
            tensors = d, x, weight, lora_a, lora_b, xa, scaling, mask
            activated = i > 0 and links[i - 1].call.stores == "yh"
            d, *others = gradients(prepared.backward, *tensors, needs, activated, groups)
            found += reversed(others)
            if norm is not None and d is not None:
                d, d_residual = layer_norm.backward(d, normed, norm_weight, d_residual, norm.eps), None
    return d, d_residual if needed[1] else None, None, *reversed(found)


def exercise(x: Tensor, residual: Tensor | None, links: Sequence[Link]) -> None:
    """Launch every kernel that these links can need, forward and backward. To be recorded, not run."""
    pre = None
    for layer, call, _, norm, adds in links:
        prepared, xa = Layer(), None
        if norm is not None:
            residual = x
            x, xa = _normed(x, norm, layer[2], call.dropout)
            layer_norm.backward(residual, residual, norm.weight, residual, norm.eps)
        y, xa, h = prepared.forward(x, *layer, call, residual if adds else None, xa)
        dy = h if y is None else y
        if call.residual_dropout is not None:
            dy = dropped(dy, *call.residual_dropout)
        weight, _, lora_a, lora_b = layer
        for need_x in (True, False):  # without dx another kernel leaves dxa
            given = dy, x if pre is None else pre, weight, lora_a, lora_b, xa, 1.0, call.dropout
            prepared.backward(*given, need_x, True, True, pre is not None, call.groups)
        x, pre = (y, None) if h is None else (h, y)


def ready(x: Tensor, residual: Tensor | None, links: Sequence[Link]) -> str | None:
    """None where every kernel of `lora_chain` and of its backward is built for these operands; else why not.

    Launches and draws nothing. The first call of a kind compiles; a failure warns once and is remembered.
    """
    kinds = [
        (*describe(*link.layer[:2]), *describe(*link.layer[2:], rows=link.call.groups is not None),
         link.call.dropout is None, link.call.residual_dropout is None, link.call.stores,
         link.adds, link.norm and (*describe(*link.norm[:2]), link.norm.shrinks))
        for link in links
    ]  # fmt: skip
    key = ("lora_chain", tiling.steps(rows_in(x)), *describe(x, residual, rows=True), *kinds)
    return build(key, x, lambda: exercise(x, residual, links))
