"""Attention that drops weights, on the CPU: torch's own, with dropout, takes a random number for each weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft import autograd, masks, reference


def dropping(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scaling: float
) -> Tensor:
    """`dropout(softmax(scaling · q kᵀ + mask)) v`, computed in float32 at least; differentiable once.

    The formula is Vaswani et al.'s, 2017, its dropout GPT-2's; the mask is drawn anew each call, from torch's seed.

    Args:
        query: (B, H, L, D). key, value: (B, H, T, D).
        mask: additive, expandable to (B, H, L, T); None is the causal mask, of L = T.
        dropout_p: probability of dropping a weight, above 0.

    Returns:
        (B, L, H, D) in query's dtype, as transformers' attention functions return it.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    if mask is None:
        length = query.shape[2]
        mask = torch.full((length, length), float("-inf"), dtype=wide, device=query.device).triu_(1)
    parts = [part.to(wide) for part in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):  # which would round what backward reads
        output = _Dropping.apply(*parts, mask.to(wide), dropout_p, scaling)
    return output.to(query.dtype).transpose(1, 2)


class _Dropping(torch.autograd.Function):
    """w are the weights before dropout, d = keep ⊙ w after it, s' is 1 / (1 - p).

        w = softmax(s q kᵀ + mask)          dv = s' dᵀ do          dw = s' keep ⊙ (do vᵀ)
        o = s' d v                          dq = s ds k            dk = s dsᵀ q          ds = dsoftmax(dw, w)

    Heads are joined with the batch, (B·H, L, D).
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        dropout_p: float,
        scaling: float,
    ) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in (query, key, value))
        shape = (*query.shape[:3], key.shape[2])
        scores = torch.bmm(q * scaling, k.transpose(1, 2)).view(shape).add_(mask)
        weights = torch.softmax(scores, -1).flatten(0, 1)
        dropped = masks.draw(weights, dropout_p, exact=False)
        ctx.save_for_backward(q, k, v, weights, dropped)
        ctx.scaling, ctx.keep_scale = scaling, reference.keep_scale(dropout_p)
        return torch.bmm(masks.apply(dropped, weights), v).mul_(ctx.keep_scale).view(query.shape)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if autograd.watched():
            autograd.refuse_second_derivative()
        q, k, v, weights, dropped = ctx.saved_tensors
        shapes = [(*d_out.shape[:2], *part.shape[1:]) for part in (q, k, v)]
        d_out = (d_out * ctx.keep_scale).flatten(0, 1)
        dv = torch.bmm(masks.apply(dropped, weights).transpose(1, 2), d_out)
        d_weights = masks.drop_(dropped, torch.bmm(d_out, v.transpose(1, 2)))
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        dq = torch.bmm(d_scores, k).mul_(ctx.scaling)
        dk = torch.bmm(d_scores.transpose(1, 2), q).mul_(ctx.scaling)
        return *(part.view(shape) for part, shape in zip((dq, dk, dv), shapes, strict=True)), None, None, None
