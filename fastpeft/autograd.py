"""The PyTorch path: each operation forward, and backward by hand, saving what its formula needs and no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft import masks, reference
from fastpeft.gemm import mm


class LoraLinear(torch.autograd.Function):
    """`reference.lora_linear` over rows, saving `xa`, dropout's mask, and x or what dropout left.

    s' is the scaling with dropout's 1/(1-p) folded in; d is `keep ⊙ x`:
        xa = d Aᵀ          dxa = s' dy B         dB = s' dyᵀ xa
        y = x W + b + s' xa Bᵀ     dx = dy Wᵀ + keep ⊙ (dxa A)    dA = dxaᵀ d

    `xa` and `dxa` are held transposed, (R, M): with the long side last, their float32 GEMMs take a quarter to a half
    of the time.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout_p: float,
        exact: bool,
    ) -> Tensor:
        wide = torch.promote_types(lora_a.dtype, x.dtype) if exact else x.dtype
        a, b = lora_a.to(wide), lora_b.to(wide)
        dropped, mask = x, None
        if dropout_p > 0.0:
            mask = masks.draw(x.to(wide), dropout_p, exact=exact)
            dropped = masks.apply(mask, x)
            scaling *= reference.keep_scale(dropout_p)
        xa_t = mm(a, dropped.to(wide).T)
        y = mm(x, weight, bias)
        y = (
            y.addmm_(xa_t.T, b.T, alpha=scaling)
            if wide == y.dtype
            else torch.addmm(y.to(wide), xa_t.T, b.T, alpha=scaling).to(y.dtype)
        )
        # A frozen weight never asks for x itself, so backward needn't drop again.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else dropped, weight, lora_a, lora_b, xa_t, mask)
        ctx.scaling, ctx.wide = scaling, wide
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 8
        x, weight, lora_a, lora_b, xa_t, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        dx = d_weight = d_bias = d_lora_a = d_lora_b = None
        a, b = lora_a.to(ctx.wide), lora_b.to(ctx.wide)
        dy_wide = dy.to(ctx.wide)
        if need_b:
            d_lora_b = mm(xa_t, dy_wide).mul_(ctx.scaling).T.to(lora_b.dtype)
        if need_x or need_a:
            dxa_t = mm(b.T, dy_wide.T).mul_(ctx.scaling)
        if need_a:
            dropped = x if mask is None or not need_weight else masks.apply(mask, x)
            d_lora_a = mm(dxa_t, dropped.to(ctx.wide)).to(lora_a.dtype)
        if need_x:
            dx = mm(dy, weight.T)
            if mask is not None:
                dx += masks.drop_(mask, mm(dxa_t.T, a))
            elif ctx.wide == dx.dtype:
                dx.addmm_(dxa_t.T, a)
            else:
                dx += dxa_t.T @ a
        if need_weight:
            d_weight = mm(x.T, dy)
        if need_bias:
            d_bias = dy.sum(0)
        return dx, d_weight, d_bias, d_lora_a, d_lora_b, None, None, None


class Linear(torch.autograd.Function):
    """`x W + b` over rows, of a weight and a bias that don't train: the weight is all that it saves.

    Its backward is such a product again, so that it can be differentiated any number of times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return mm(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return Linear.apply(dy, weight.T, None), None, None


class Adapter(torch.autograd.Function):
    """`reference.adapter` over rows, saving x and the pre-activation z; h is `act(z)`.

        z = x Wdᵀ + bd             dh = scale · dy Wu        dz = dh ⊙ act'(z)
        y = x + scale · (h Wuᵀ + bu)   dx = dy + dz Wd       dWd = dzᵀ x   dWu = scale · dyᵀ h

    z, h and their gradients are held transposed, (R, M), as in `LoraLinear`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        down_weight: Tensor,
        down_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        activation: str,
        scale: float,
    ) -> Tensor:
        down, up = down_weight.to(x.dtype), up_weight.to(x.dtype)
        bias = None if down_bias is None else down_bias.to(x.dtype)[:, None]
        if bias is None or x.dtype.itemsize > 2:
            z_t = mm(down, x.T) if bias is None else mm(down, x.T).add_(bias)
        else:  # rounded once, after the bias: a ReLU asks for the sign of a z near 0
            z_t = torch.addmm(bias, down, x.T)
        h_t = reference.ACTIVATIONS[activation](z_t)
        ctx.save_for_backward(x, z_t, down_weight, down_bias, up_weight, up_bias)
        ctx.activation, ctx.scale = activation, scale
        ctx.set_materialize_grads(False)
        if up_bias is None:
            return torch.addmm(x, h_t.T, up.T, alpha=scale)
        # The copy of x that addmm would make carries the bias.
        return torch.add(x, up_bias.to(x.dtype), alpha=scale).addmm_(h_t.T, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 7
        x, z_t, down_weight, down_bias, up_weight, up_bias = ctx.saved_tensors
        need_x, need_down, need_down_bias, need_up, need_up_bias, *_ = ctx.needs_input_grad
        dx = d_down = d_down_bias = d_up = d_up_bias = None
        if need_x or need_down or need_down_bias:
            dh_t = mm(up_weight.to(dy.dtype).T, dy.T).mul_(ctx.scale)
            dz_t = _ACTIVATION_GRADS[ctx.activation](dh_t, z_t)
        if need_x:
            dx = torch.addmm(dy, dz_t.T, down_weight.to(dy.dtype))
        if need_down:
            d_down = mm(dz_t, x).to(down_weight.dtype)
        if need_down_bias:
            d_down_bias = dz_t.sum(1).to(down_bias.dtype)
        if need_up:
            h_t = reference.ACTIVATIONS[ctx.activation](z_t)
            d_up = mm(h_t, dy).mul_(ctx.scale).T.to(up_weight.dtype)
        if need_up_bias:
            d_up_bias = dy.sum(0).mul_(ctx.scale).to(up_bias.dtype)
        return dx, d_down, d_down_bias, d_up, d_up_bias, None, None


class Dropout(torch.autograd.Function):
    """`F.dropout` with a mask of `masks`, which is all that it saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout_p: float) -> Tensor:  # type: ignore[override]
        mask = masks.draw(x, dropout_p, exact=False)
        ctx.save_for_backward(mask)
        ctx.scale = reference.keep_scale(dropout_p)
        return masks.drop_(mask, (x * ctx.scale).contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        return masks.drop_(mask, (dy * ctx.scale).contiguous()), None


_aten = torch.ops.aten
#: dz from dh and the pre-activation z, as torch's own autograd computes it.
_ACTIVATION_GRADS = {
    "relu": lambda dh, z: _aten.threshold_backward(dh, z, 0),
    "gelu": lambda dh, z: _aten.gelu_backward(dh, z),
    "gelu_tanh": lambda dh, z: _aten.gelu_backward(dh, z, approximate="tanh"),
    "silu": lambda dh, z: _aten.silu_backward(dh, z),
}
