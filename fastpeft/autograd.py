"""The PyTorch path: each operation forward, and backward by hand, saving what its formula needs and no more.

Backward passes that are themselves differentiated, or mapped over (`create_graph`, `is_grads_batched`), take the plain
formula from the saved inputs; where dropout's mask is all that was saved of an input, they are an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft import masks, reference
from fastpeft.gemm import add_product, mm, product


def watched() -> bool:
    """Whether the backward pass that runs now is differentiated in turn, or mapped over."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def refuse_second_derivative() -> None:
    """Raises RuntimeError: an operation that drops can't do what `watched` sees."""
    raise RuntimeError(
        "fastpeft's dropout is differentiable once, and not in batches (create_graph, is_grads_batched): set dropout "
        "to 0, call model.eval(), or fastpeft.unpatch(model)"
    )


def asked(gradients: Iterable[Tensor | None], needed: Iterable[bool]) -> Iterator[Tensor | None]:
    """Those gradients that autograd asked for."""
    return (g if need else None for g, need in zip(gradients, needed, strict=True))


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in this dtype; where it is already, torch's `to` takes ten times as long to find out."""
    return t if t.dtype == dtype else t.to(dtype)


def _turned(t: Tensor) -> Tensor:
    """tᵀ, contiguous, as stock's gradients are: hooks see their strides, and `autograd.grad` hands them on."""
    return t.T.contiguous()


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """xᵀ dy, the gradient of a weight (K, N), contiguous where the weight is, and as its transpose otherwise."""
    return mm(x.T, dy) if weight.stride(1) == 1 else mm(dy.T, x).T


class Part(NamedTuple):
    """A low-rank update of some rows, or several updates of as many rows each, whose factors are stacked."""

    rows: slice | None  # which; None for all
    scaling: float
    dropout_p: float
    updates: int = 1

    def of(self, t: Tensor) -> Tensor:
        """Its rows of t (M, N), or those of each update, (updates, rows, N); a view."""
        t = t if self.rows is None else t[self.rows]
        return t if self.updates == 1 else t.view(self.updates, -1, t.shape[-1])

    def joined(self, factors: Sequence[Tensor]) -> Tensor:
        """A factor of each update as the products take it."""
        return factors[0] if self.updates == 1 else torch.stack(list(factors))

    def apart(self, gradient: Tensor, factors: Sequence[Tensor]) -> Iterator[Tensor]:
        """The gradient of what was `joined` as that of each factor, contiguous, in a storage of its own."""
        if self.updates == 1:
            return iter([as_dtype(gradient.contiguous(), factors[0].dtype)])
        like = torch.contiguous_format
        pairs = zip(gradient.unbind(), factors, strict=True)
        return (each.to(factor.dtype, copy=True, memory_format=like) for each, factor in pairs)

    @property
    def scale(self) -> float:
        """The scaling, times what dropout multiplies by what it keeps."""
        return self.scaling * reference.keep_scale(self.dropout_p)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: Sequence[Part],
    exact: bool,
    factors: Sequence[Tensor],
    saved: list[Tensor | None] | None = None,
) -> Tensor:
    """What `LoraLinear` computes, without a derivative; what its backward reads of each part is added to `saved`."""
    y, of_part = mm(x, weight, bias), _of_parts(parts, factors)
    for part, (lora_as, lora_bs) in zip(parts, of_part, strict=True):
        lora_a, lora_b = part.joined(lora_as), part.joined(lora_bs)
        wide = torch.promote_types(lora_a.dtype, x.dtype) if exact else x.dtype
        a, b = as_dtype(lora_a, wide), as_dtype(lora_b, wide)
        dropped, mask, updated = part.of(x), None, part.of(y)
        if part.dropout_p > 0.0:
            mask = masks.draw(as_dtype(dropped, wide), part.dropout_p, exact=exact)
            dropped = masks.apply(mask, dropped)
        xa_t = product(a, as_dtype(dropped, wide).mT)
        total = add_product(as_dtype(updated, wide), xa_t.mT, b.mT, part.scale)
        if total is not updated:
            updated.copy_(total)
        if saved is not None:
            saved += (None if mask is None else dropped, mask, xa_t)
    return y


def _of_parts(parts: Sequence[Part], factors: Sequence[Any]) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """What stands with the factors of each part, its lora_a's and its lora_b's."""
    end = 0
    for part in parts:
        start, end = end, end + 2 * part.updates
        yield factors[start:end:2], factors[start + 1 : end : 2]


class LoraLinear(torch.autograd.Function):
    """A frozen product with low-rank updates, each of rows of its own: `reference.lora_linear`, part by part.

    It saves `xa`, dropout's mask, and x or what dropout left. s' is a part's scaling with dropout's 1/(1-p) folded in;
    d is `keep ⊙ x`:
        xa = d Aᵀ          dxa = s' dy B         dB = s' dyᵀ xa
        y = x W + b + s' xa Bᵀ     dx = dy Wᵀ + keep ⊙ (dxa A)    dA = dxaᵀ d

    `xa` and `dxa` are held transposed, (R, M): with the long side last, their float32 GEMMs take a quarter to a half
    of the time. Parts rise and have no row in common; a row in none of them gets no update. Factors are lora_a and
    lora_b of each update, one after the other. They are saved as they came, and stacked anew: torch then sees that
    they changed since.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: Sequence[Part],
        exact: bool,
        *factors: Tensor,
    ) -> Tensor:
        saved: list[Tensor | None] = []
        y = lora_linear(x, weight, bias, parts, exact, factors, saved)
        trains = ctx.needs_input_grad[1]
        if trains:  # which takes x itself, so that backward may as well drop it again
            saved[::3] = [None] * len(parts)
        whole = trains or not all(part.dropout_p > 0.0 for part in parts)
        ctx.save_for_backward(x if whole else None, weight, *factors, *saved)
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        need_x, need_weight, need_bias, _, _, *needed = ctx.needs_input_grad
        if dy is None:
            return (None,) * (5 + len(needed))
        if watched():
            return LoraLinear._plain_backward(ctx, dy)
        x, weight, factors, saved = LoraLinear._saved(ctx)
        dx = mm(dy, weight.T) if need_x else None
        found: list[Tensor | None] = []
        of_part, wanted = _of_parts(ctx.parts, factors), _of_parts(ctx.parts, needed)
        for part, each, (lora_as, lora_bs), wants in zip(ctx.parts, saved, of_part, wanted, strict=True):
            dropped, mask, xa_t = each
            wide, need_a, need_b = xa_t.dtype, any(wants[0]), any(wants[1])
            d_as: Iterable[Tensor | None] = (None,) * part.updates
            d_bs: Iterable[Tensor | None] = d_as
            dy_wide = as_dtype(part.of(dy), wide)
            if need_x or need_a:
                lora_b = as_dtype(part.joined(lora_bs), wide)
                dxa_t = product(lora_b.mT, dy_wide.mT).mul_(part.scale)
            if need_a:
                if dropped is None:
                    dropped = part.of(x) if mask is None else masks.apply(mask, part.of(x))
                d_as = part.apart(product(dxa_t, as_dtype(dropped, wide)), lora_as)
            if need_b:
                d_bs = part.apart(product(xa_t, dy_wide).mul_(part.scale).mT, lora_bs)
            if dx is not None:
                updated, a = part.of(dx), as_dtype(part.joined(lora_as), wide)
                if mask is not None:
                    updated += masks.drop_(mask, product(dxa_t.mT, a))
                elif wide == dx.dtype:
                    add_product(updated, dxa_t.mT, a)
                else:
                    updated += dxa_t.mT @ a
            found += chain.from_iterable(zip(d_as, d_bs, strict=True))
        d_weight = _weight_gradient(x, dy, weight) if need_weight else None
        d_bias = dy.sum(0) if need_bias else None
        return dx, d_weight, d_bias, None, None, *found

    @staticmethod
    def _saved(ctx: Any) -> tuple[Any, Any, Any, Any]:
        """x, the weight, the factors, and of each part what its dropout left, its mask and its xa."""
        x, weight, *rest = ctx.saved_tensors
        count = 2 * sum(part.updates for part in ctx.parts)
        factors, saved = rest[:count], iter(rest[count:])
        return x, weight, factors, zip(saved, saved, saved, strict=True)

    @staticmethod
    def _plain_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """The same gradients by operations that torch differentiates, of saved tensors that are inputs all."""
        x, weight, factors, saved = LoraLinear._saved(ctx)
        need_x, need_weight, need_bias, _, _, *needed = ctx.needs_input_grad
        pieces: list[Tensor] = []
        found: list[Tensor | None] = []
        dx, end = dy @ weight.T, 0
        of_part = _of_parts(ctx.parts, factors)
        for part, (dropped, mask, xa_t), (lora_as, lora_bs) in zip(ctx.parts, saved, of_part, strict=True):
            dropped, keep = part.of(x) if dropped is None else dropped, None
            if mask is not None:
                if torch.is_grad_enabled():  # how x became what dropout left isn't saved
                    refuse_second_derivative()
                keep = masks.apply(mask, torch.ones_like(dropped))
                dropped = dropped * keep
            a, b = (part.joined(each).to(xa_t.dtype) for each in (lora_as, lora_bs))
            part_dy, d = part.of(dy).to(xa_t.dtype), dropped.to(xa_t.dtype)
            dxa = part.scale * (part_dy @ b)
            update = dxa @ a
            update = (update if keep is None else update * keep).to(dy.dtype)
            start, stop, _ = (part.rows or slice(None)).indices(len(dy))
            pieces += dx[end:start], dx[start:stop] + update.reshape(-1, update.shape[-1])
            end = stop
            d_as = part.apart(dxa.mT @ d, lora_as)
            d_bs = part.apart(part.scale * (part_dy.mT @ (d @ a.mT)), lora_bs)
            found += chain.from_iterable(zip(d_as, d_bs, strict=True))
        return (
            torch.cat([*pieces, dx[end:]]) if need_x else None,
            x.T @ dy if need_weight else None,
            dy.sum(0) if need_bias else None,
            None,
            None,
            *asked(found, needed),
        )


class Stacked(torch.autograd.Function):
    """Factors, (rows, columns) each, in one tensor (groups, most rows, most columns), unset past one's own.

    A group that isn't `there` has none. Of different dtypes they are float32. Factors that are all alike need no
    more than `torch.stack`.
    """

    @staticmethod
    def forward(ctx: Any, there: Sequence[bool], *factors: Tensor) -> Tensor:  # type: ignore[override]
        first = factors[0]
        dtype = first.dtype if all(f.dtype == first.dtype for f in factors) else torch.float32
        most = (max(f.shape[0] for f in factors), max(f.shape[1] for f in factors))
        stacked = first.new_empty(len(there), *most, dtype=dtype)
        ctx.like = [(f.shape, f.dtype) for f in factors]
        ctx.there = there
        torch._foreach_copy_(Stacked._views(ctx, stacked), factors)
        return stacked

    @staticmethod
    def _views(ctx: Any, stacked: Tensor) -> list[Tensor]:
        groups = (group for group, there in zip(stacked.unbind(), ctx.there, strict=True) if there)
        return [
            group if group.shape == shape else group[: shape[0], : shape[1]]
            for group, (shape, _) in zip(groups, ctx.like, strict=True)
        ]

    @staticmethod
    def backward(ctx: Any, d_stacked: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        views = Stacked._views(ctx, d_stacked)
        return None, *(view.to(dtype) for view, (_, dtype) in zip(views, ctx.like, strict=True))


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


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What `Adapter` computes, without a derivative, and z, (R, M), of which its backward is made."""
    down, up = down_weight.to(x.dtype), up_weight.to(x.dtype)
    bias = None if down_bias is None else down_bias.to(x.dtype)[:, None]
    if bias is None or x.dtype.itemsize > 2:
        z_t = mm(down, x.T) if bias is None else mm(down, x.T).add_(bias)
    else:  # rounded once, after the bias: a ReLU asks for the sign of a z near 0
        z_t = torch.addmm(bias, down, x.T)
    h_t = reference.ACTIVATIONS[activation](z_t)
    if up_bias is None:
        return torch.addmm(x, h_t.T, up.T, alpha=scale), z_t
    # The copy of x that addmm would make carries the bias.
    return torch.add(x, up_bias.to(x.dtype), alpha=scale).addmm_(h_t.T, up.T, alpha=scale), z_t


class Adapter(torch.autograd.Function):
    """`adapter`, differentiable: `reference.adapter` over rows, saving x and the pre-activation z; h is `act(z)`.

        z = x Wdᵀ + bd             dh = scale · dy Wu        dz = dh ⊙ act'(z)
        y = x + scale · (h Wuᵀ + bu)   dx = dy + dz Wd       dWd = dzᵀ x   dWu = scale · dyᵀ h

    z, h and their gradients are held transposed, (R, M), as in `LoraLinear`.
    """

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:  # type: ignore[override]
        y, z_t = adapter(*operands)
        x, *parameters, ctx.activation, ctx.scale = operands
        ctx.save_for_backward(x, z_t, *parameters)
        ctx.set_materialize_grads(False)
        return y

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
            d_up = _turned(mm(h_t, dy).mul_(ctx.scale)).to(up_weight.dtype)
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
        return *asked(cast, needed[:5]), None, None


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
