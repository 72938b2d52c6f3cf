"""A bottleneck adapter with its residual as an operation, differentiable once: `y = x + s · (act(x Dᵀ + bd) Uᵀ + bu)`.

Its kernels are `bottleneck`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tiling
from .bottleneck import backward, forward, split_gradients
from .launch import build, describe, differentiable_once, differentiated, eager, on_device_of


@torch.library.custom_op("fastpeft::adapter", mutates_args=())
def _forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with on_device_of(x):
        return forward(x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual)


@_forward.register_fake
def _(x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], down_weight.shape[0])


@torch.library.custom_op("fastpeft::adapter_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    activation: str,
    scale: float,
    dtype: torch.dtype,
    need_x: bool,
    need_parameters: bool,
) -> list[Tensor]:
    with on_device_of(x):
        gradients = backward(
            dy, x, down_weight, up_weight, z, activation, scale, dtype, need_x, need_parameters
        )
    return [gradient for gradient in gradients if gradient is not None]


@_backward.register_fake
def _(dy, x, down_weight, up_weight, z, activation, scale, dtype, need_x, need_parameters):
    rank, k = down_weight.shape
    dx, flat = x.new_empty(x.shape), x.new_empty(2 * k * rank + k + rank, dtype=dtype)
    return [tensor for tensor, need in ((dx, need_x), (flat, need_parameters)) if need]


def _note(ctx: Any, given: Sequence[Any], z: Tensor) -> None:
    """What backward needs of a call."""
    x, down_weight, down_bias, up_weight, up_bias, activation, scale, _ = given
    ctx.save_for_backward(x, down_weight, up_weight, z)
    ctx.dtypes = [None if p is None else p.dtype for p in (down_weight, down_bias, up_weight, up_bias)]
    ctx.activation, ctx.scale = activation, scale
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, by_operator: bool) -> tuple[Any, ...]:
    """The gradients of x, of the four parameters and of the residual, in the places that the operation takes them."""
    if dy is None:
        return (None,) * 8
    x, down_weight, up_weight, z = ctx.saved_tensors
    need_x, *need_each = ctx.needs_input_grad[:5]
    dtypes = {dtype for dtype in ctx.dtypes if dtype is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    need_any = any(need_each)
    given = dy, x, down_weight, up_weight, z, ctx.activation, ctx.scale, dtype, need_x, need_any
    if by_operator:
        fused = iter(_backward(*given))
        dx, out = next(fused) if need_x else None, next(fused) if need_any else None
    else:
        with on_device_of(x):
            dx, out = backward(*given)
    each = (None,) * 4 if out is None else split_gradients(out, *reversed(down_weight.shape))
    cast = (g.to(own) if need else None for g, own, need in zip(each, ctx.dtypes, need_each, strict=True))
    return dx, *cast, None, None, dy if ctx.needs_input_grad[7] else None


class _Adapter(torch.autograd.Function):
    """An adapter's call as eager code runs it: an operator of torch's own takes the host three times as long."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # type: ignore[override]
        with on_device_of(given[0]):
            y, z = forward(*given)
        _note(ctx, given, z)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return _gradients(ctx, None if dy is None else dy.resolve_neg(), differentiated())


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _note(ctx, inputs, output[1])


_forward.register_autograd(lambda ctx, dy, _: _gradients(ctx, dy, True), setup_context=_save)
differentiable_once(_backward)


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    residual: Tensor | None = None,
) -> Tensor:
    """`y = x + scale · up(activation(down(x)))` by the kernels; differentiable once, by every tensor.

    Args:
        x: (M, K) float16, bfloat16 or float32, any strides.
        down_weight: (R, K) and up_weight: (K, R), in x's dtype or wider, R at most 256; rounded to x's
            dtype as they load. down_bias: (R,) or None; up_bias: (K,) or None.
        activation: relu, gelu, gelu_tanh or silu.
        residual: (M, K) in x's dtype, contiguous, to add to y; or None.

    Returns:
        (M, K) in x's dtype.
    """
    given = x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual
    if not eager(x):
        return _forward(*given)[0]
    if torch.is_grad_enabled():
        return _Adapter.apply(*given)
    with on_device_of(x):
        return forward(*given)[0]


def ready(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> str | None:
    """None where every kernel of `adapter` and of its backward is built for these tensors; else why not.

    Launches nothing. The first call of a kind compiles; a failure warns once and is remembered.
    """

    def call() -> None:
        y, z = forward(x, down_weight, down_bias, up_weight, up_bias, activation, 1.0, residual)
        backward(y, x, down_weight, up_weight, z, activation, 1.0, down_weight.dtype, True, True)

    of_rows = describe(x, residual, rows=True)
    parameters = describe(down_weight, down_bias, up_weight, up_bias)
    key = ("adapter", tiling.steps(x.shape[0]), activation, *of_rows, *parameters)
    return build(key, x, call)
