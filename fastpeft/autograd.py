"""The PyTorch path: each operation forward, and backward by hand, saving what its formula needs and no more.

Backward passes that are themselves differentiated, or mapped over (`create_graph`, `is_grads_batched`), take the plain
formula from the saved inputs; where dropout's mask is all that was saved of an input, they are an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft import masks, reference
from fastpeft.gemm import mm


def watched() -> bool:
    """Whether the backward pass that runs now is differentiated in turn, or mapped over."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def refuse_second_derivative() -> None:
    """Raises RuntimeError: an operation that drops can't do what `watched` sees."""
    raise RuntimeError(
        "fastpeft's dropout is differentiable once, and not in batches (create_graph, is_grads_batched): set dropout "
        "to 0, call model.eval(), or fastpeft.unpatch(model)"
    )


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
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 8
        if watched():
            return LoraLinear._plain_backward(ctx, dy)
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

    @staticmethod
    def _plain_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """The same gradients by operations that torch differentiates, of saved tensors that are inputs all."""
        x, weight, lora_a, lora_b, _, mask = ctx.saved_tensors
        dropped = x
        if mask is not None:
            if torch.is_grad_enabled():  # how x became what dropout left isn't saved
                refuse_second_derivative()
            keep = masks.apply(mask, torch.ones_like(x))
            dropped = x * keep
        a, b = lora_a.to(ctx.wide), lora_b.to(ctx.wide)
        dy_wide, dropped = dy.to(ctx.wide), dropped.to(ctx.wide)
        dxa = ctx.scaling * (dy_wide @ b)
        update = dxa @ a
        gradients = (
            dy @ weight.T + (update if mask is None else update * keep).to(dy.dtype),
            x.T @ dy,
            dy.sum(0),
            (dxa.T @ dropped).to(lora_a.dtype),
            (ctx.scaling * (dy_wide.T @ (dropped @ a.T))).to(lora_b.dtype),
        )
        needed = ctx.needs_input_grad
        return *(g if need else None for g, need in zip(gradients, needed, strict=False)), None, None, None


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
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 7
        if watched():
            return Adapter._plain_backward(ctx, dy)
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

    @staticmethod
    def _plain_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """The same gradients by operations that torch differentiates, of saved tensors that are inputs all."""
        x, _, *parameters = ctx.saved_tensors
        down: Any
        up: Any
        down, down_bias, up, _ = (None if p is None else p.to(dy.dtype) for p in parameters)
        z = torch.nn.functional.linear(x, down, down_bias)
        dz = _PLAIN_GRADS[ctx.activation](ctx.scale * (dy @ up), z)
        h = reference.ACTIVATIONS[ctx.activation](z)
        gradients = dy + dz @ down, dz.T @ x, dz.sum(0), ctx.scale * (dy.T @ h), ctx.scale * dy.sum(0)
        cast = (g if p is None else g.to(p.dtype) for g, p in zip(gradients, (dy, *parameters), strict=True))
        needed = ctx.needs_input_grad
        return *(g if need else None for g, need in zip(cast, needed, strict=False)), None, None


class Dropout(torch.autograd.Function):
    """`F.dropout` with a mask of `masks`, which is all that it saves; a mask is given where it was drawn before.

    Its backward is such a dropout again, so that it can be differentiated any number of times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout_p: float, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        mask = masks.draw(x, dropout_p, exact=False) if mask is None else mask
        ctx.save_for_backward(mask)
        ctx.dropout_p = dropout_p
        return masks.drop_(mask, (x * reference.keep_scale(dropout_p)).contiguous())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        if torch._C._are_functorch_transforms_active():
            keep = masks.apply(mask, torch.ones(dy.shape, dtype=dy.dtype, device=dy.device))
            return dy * (keep * reference.keep_scale(ctx.dropout_p)), None, None
        return Dropout.apply(dy, ctx.dropout_p, mask), None, None


_aten = torch.ops.aten
#: dz from dh and the pre-activation z, as torch's own autograd computes it.
_ACTIVATION_GRADS = {
    "relu": lambda dh, z: _aten.threshold_backward(dh, z, 0),
    "gelu": lambda dh, z: _aten.gelu_backward(dh, z),
    "gelu_tanh": lambda dh, z: _aten.gelu_backward(dh, z, approximate="tanh"),
    "silu": lambda dh, z: _aten.silu_backward(dh, z),
}
#: The same by operations that torch differentiates in turn.
_PLAIN_GRADS = _ACTIVATION_GRADS | {
    "silu": lambda dh, z: dh * torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z))),
}
