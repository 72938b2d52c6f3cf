"""`lora_linear`, a LoRA layer by itself: a chain of one link, or a custom operator where it is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dropout import Dropout
from .launch import differentiable_once, eager, on_device_of
from .lora_chain import Link, lora_chain
from .lora_layer import Call, Layer, gradients


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
) -> tuple[Tensor, Tensor]:
    with on_device_of(x):
        y, xa, _ = Layer().forward(x, weight, bias, lora_a, lora_b, Call(scaling, _dropout(dropout_p, seed)))
    assert y is not None
    return y, xa


def _dropout(dropout_p: float, seed: Tensor | None) -> Dropout | None:
    return None if seed is None else Dropout(dropout_p, seed)


@_forward.register_fake
def _(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed):
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_a.shape[0])


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
) -> list[Tensor]:
    with on_device_of(x):
        given = dy, x, weight, lora_a, lora_b, xa, scaling, _dropout(dropout_p, seed)
        found = Layer().backward(*given, need_x, need_a, need_b)
    return [gradient for gradient in found if gradient is not None]


@_backward.register_fake
def _(dy, x, weight, lora_a, lora_b, xa, scaling, dropout_p, seed, need_x, need_a, need_b):
    needed = ((x, need_x), (lora_a, need_a), (lora_b, need_b))
    return [tensor.new_empty(tensor.shape) for tensor, need in needed if need]


def _save(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1], seed)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    *tensors, seed = ctx.saved_tensors

    def backward(*given: Any) -> list[Tensor | None]:
        *operands, scaling, _, need_x, need_a, need_b, _, _ = given
        found = iter(_backward(*operands, scaling, ctx.dropout_p, seed, need_x, need_a, need_b))
        return [next(found) if need else None for need in (need_x, need_a, need_b)]

    found = gradients(backward, dy, *tensors, ctx.scaling, None, ctx.needs_input_grad[:5])
    return *found, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
differentiable_once(_backward)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`y = x W + b + scaling · (dropout(x) Aᵀ) Bᵀ` by the kernels; differentiable once, by all but the seed.

    Args:
        x: (M, K) float16, bfloat16 or float32, any strides.
        weight: (K, N) in x's dtype, any strides. bias: (N,) or None.
        lora_a: (R, K) and lora_b: (N, R), in x's dtype or wider, R at most 256; rounded to x's dtype.
        dropout_p: probability of dropping an element of x before lora_a.
        seed: int64 of one element on x's device, from which the mask is drawn; None where dropout_p is 0.

    Returns:
        (M, N) in x's dtype.
    """
    layer = weight, bias, lora_a, lora_b
    if eager(x):
        return lora_chain(x, None, [Link(layer, Call(scaling, _dropout(dropout_p, seed)), Layer())])[0]
    return _forward(x, *layer, scaling, dropout_p, seed)[0]
