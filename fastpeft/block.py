"""GPT-2's block with its neighbours in its kernels: GELU, dropouts, residuals, gradients that meet at a norm.

Only packed blocks run so, whose trunk is plain (trunk.py): nothing listens in between. Where no kernel serves a part,
it runs by itself, as in stock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from fastpeft import ops
from fastpeft.adapters import adapt_output
from fastpeft.fused_adapter import FusedAdapter
from fastpeft.lora import FusedLoraLinear, LoraPlan, dropout_p, for_kernels
from fastpeft.modules import FusedGelu
from fastpeft.swap import Site, stands_for


class Packed(NamedTuple):
    """Where the packed tokens are: in the caller's (batch, length) grid, and in attention's padded view."""

    tokens: Tensor  # (T,) flat indices into the grid
    slots: Tensor  # (T,) flat indices into the view
    grid: tuple[int, int]
    view: tuple[int, int]  # (sequences, longest)
    mask: Tensor | None  # (1, 1, longest, longest), additive: eager attention needs it written out
    pooled: Tensor | None  # (batch,) indices among the packed of the tokens that the head reads, if no other
    last: nn.Module | None  # the block after which only the pooled are read

    @property
    def whole(self) -> bool:
        """Whether nothing leaves, so that the caller's grid can stay as it is."""
        return self.pooled is None and len(self.tokens) == self.grid[0] * self.grid[1]

    def in_grid(self, rows: Tensor) -> Tensor:
        """Packed rows (T, N) in the caller's grid, (batch, length, N), zeros where no token is."""
        batch, length = self.grid
        if len(rows) < batch * length:
            rows = rows.new_zeros(batch * length, rows.shape[1]).index_copy(0, self.tokens, rows)
        return rows.view(batch, length, -1)


@stands_for(GPT2MLP)
class FusedMLP(GPT2MLP):
    """GPT-2's MLP, in one operation where Triton serves both projections; stock's forward, unless packed."""

    _fastpeft: Site

    def forward(  # type: ignore[override]
        self,
        hidden_states: Any,
        residual: Tensor | None = None,
        *,
        packed: bool = False,
        shrunk: ops.Shrunk | None = None,
    ) -> Tensor:
        """The MLP of hidden_states (..., width), added to `residual`, of the same shape, if there is one."""
        if not packed:
            return super().forward(hidden_states)
        added = _residual(residual, self.dropout)
        y = _through_kernels(self, hidden_states, added, shrunk)
        if y is None:
            h = first_of(self.c_fc, hidden_states, shrunk)
            return projected(self.c_proj, self.dropout, self.act(h), residual)
        if added is not None:
            return y
        y = self.dropout(y)
        return y if residual is None else residual + y


@stands_for(GPT2Block)
class FusedBlock(GPT2Block):
    """GPT-2's block, which hands its residuals to the projections that they are added to; stock's, unless packed."""

    _fastpeft: Site

    def forward(  # type: ignore[override]
        self, hidden_states: Any, *args: Any, packed: Packed | None = None, **kwargs: Any
    ) -> Tensor:
        """hidden_states (1, T, width), or the whole grid → the same shape, zeros where a head that pools won't look."""
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)
        kept = args[0] if args else None  # the cache, which GPT2Model passes by position
        if packed.pooled is not None and packed.last is self:
            # Keys and values of all tokens, and the rest of the pooled alone.
            attended, _ = self.attn(self.ln_1(hidden_states), packed=packed, kept=kept, pool=True)
            pooled = hidden_states.index_select(1, packed.pooled) + attended
            pooled = _added(self.mlp, pooled, self.ln_2(pooled), packed=True)
            return torch.zeros_like(hidden_states).index_copy(1, packed.pooled, pooled)
        h, x, shrunk = self._normed(self.ln_1, hidden_states, self.attn.c_attn)
        x = _added(self.attn, x, h, packed=packed, kept=kept, shrunk=shrunk)
        h, x, shrunk = self._normed(self.ln_2, x, self.mlp.c_fc)
        return _added(self.mlp, x, h, packed=True, shrunk=shrunk)

    def _normed(self, norm: nn.Module, x: Tensor, layer: Any) -> tuple[Tensor, Tensor, ops.Shrunk | None]:
        """The LayerNorm of x for `layer`, x to go on with as the residual, and what was computed for the layer."""
        if type(norm) is not nn.LayerNorm:
            return norm(x), x, None
        plan = for_kernels(layer, x)
        following, strict = (None, False) if plan is None else (plan.projection(), layer._fastpeft.strict)
        site = self._fastpeft
        if site.plan is None:
            site.plan = ops.Decided()
        return ops.layer_norm(x, norm, site.backend, following, strict, site.plan)


def first_of(layer: Any, h: Tensor, shrunk: ops.Shrunk | None) -> Tensor:
    """A branch's first layer of h, with what the LayerNorm of h computed for it."""
    return layer(h) if shrunk is None else layer(h, shrunk=shrunk)


def projected(c_proj: Any, dropout: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """`dropout(c_proj(x))`, added to a residual if there is one, in one operation where that can be."""
    added = _residual(residual, dropout)
    if added is not None and type(c_proj) is FusedLoraLinear:
        return c_proj(x, residual=added)
    y = _dropped(c_proj(x), dropout)
    return y if residual is None else residual + y


def _added(branch: Any, x: Tensor, h: Tensor, **given: Any) -> Tensor:
    """`x + branch(h)` for a block's attention or MLP, in one operation with what the branch ends with."""
    adapter = getattr(branch, "adapter", None)
    if adapter is None:
        return _first(branch(h, residual=x, **given))
    if isinstance(adapter, FusedAdapter) and adapt_output in branch._forward_hooks.values():
        return adapter(_first(branch.forward(h, **given)), residual=x)
    return x + _first(branch(h, **given))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _drops(dropout: nn.Module) -> float | None:
    """The probability with which `dropout` drops now; None where a call of it is more than that."""
    return dropout_p(dropout) if type(dropout) is nn.Dropout else None


def _residual(residual: Tensor | None, dropout: nn.Module) -> ops.Residual | None:
    """A residual for an operation to add; None where there is none, or dropout isn't all that happens on the way."""
    p = _drops(dropout)
    return None if residual is None or p is None else ops.Residual(residual, p)


def _dropped(x: Tensor, dropout: nn.Module) -> Tensor:
    p = _drops(dropout)
    return dropout(x) if p is None else ops.dropped(x, p)


class _Both(NamedTuple):
    """What was found out about an MLP whose layers have these plans."""

    layers: tuple[LoraPlan, LoraPlan]
    decided: ops.Decided


def _through_kernels(
    mlp: Any, x: Tensor, residual: ops.Residual | None, shrunk: ops.Shrunk | None
) -> Tensor | None:
    """`c_proj(act(c_fc(x)))`, added to a residual if there is one; None where its layers had better go one by one."""
    fc, act, proj = mlp.c_fc, mlp.act, mlp.c_proj
    if type(act) is not FusedGelu or act._fastpeft.exact:
        return None
    first = for_kernels(fc, x)
    second = None if first is None else for_kernels(proj, x, first.widths[1])
    if first is None or second is None:
        return None
    both = mlp._fastpeft.plan
    if both is None or both.layers[0] is not first or both.layers[1] is not second:
        both = mlp._fastpeft.plan = _Both((first, second), ops.Decided())
    site = fc._fastpeft
    layers = first.projection(), second.projection()
    try:
        served = ops.lora_mlp(x, *layers, site.backend, site.strict, residual, shrunk, both.decided)
    except ValueError as error:
        raise ValueError(f"{site.name} and {proj._fastpeft.name}: {error}") from None
    if served is None:
        return None
    y, route = served
    for each in (fc, act, proj):
        each._fastpeft.record(route)
    return y
