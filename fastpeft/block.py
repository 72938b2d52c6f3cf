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
from fastpeft.modules import (
    FusedAdapter,
    FusedGelu,
    FusedLoraLinear,
    dropout_p,
    projection_of,
    why_not_lora,
    why_not_tensors,
)
from fastpeft.swap import Site, stands_for


class Packed(NamedTuple):
    """Where the packed tokens are: in the caller's (batch, length) grid, and in attention's padded view."""

    tokens: Tensor  # (T,) flat indices into the grid
    slots: Tensor  # (T,) flat indices into the view
    grid: tuple[int, int]
    view: tuple[int, int]  # (batch, longest)
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

    def forward(  # type: ignore[override]
        self, hidden_states: Any, residual: Tensor | None = None, *, packed: bool = False
    ) -> Tensor:
        """The MLP of hidden_states (..., width), added to `residual`, of the same shape, if there is one."""
        if not packed:
            return super().forward(hidden_states)
        added = _residual(residual, self.dropout)
        y = _through_kernels(self, hidden_states, added)
        if y is None:
            return projected(self.c_proj, self.dropout, self.act(self.c_fc(hidden_states)), residual)
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
        h, x = self._normed(self.ln_1, hidden_states, self.attn, "c_attn")
        x = _added(self.attn, x, h, packed=packed, kept=kept)
        h, x = self._normed(self.ln_2, x, self.mlp, "c_fc")
        return _added(self.mlp, x, h, packed=True)

    def _normed(self, norm: nn.Module, x: Tensor, branch: Any, first: str) -> tuple[Tensor, Tensor]:
        """The LayerNorm of x for `branch`, whose first layer is named, and x to go on with as the residual."""
        if type(norm) is not nn.LayerNorm:
            return norm(x), x
        layer: Any = getattr(branch, first)
        given = _for_kernels(layer, x)
        strict = given is not None and layer._fastpeft.strict
        return ops.layer_norm(x, norm, self._fastpeft.backend, given, strict)


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


def _for_kernels(layer: Any, x: Tensor) -> ops.Projection | None:
    """What a call of this LoRA layer computes, where kernels may do it beside other work; else None."""
    if type(layer) is not FusedLoraLinear:
        return None
    site = layer._fastpeft
    if ops.choose(site.backend, site.exact, x.device).path != "triton":
        return None
    if why_not_lora(layer) or why_not_tensors(x, layer.base_layer.weight):
        return None
    projection, rest = projection_of(layer)
    return None if rest else projection


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


def _through_kernels(mlp: Any, x: Tensor, residual: ops.Residual | None) -> Tensor | None:
    """`c_proj(act(c_fc(x)))`, added to a residual if there is one; None where its layers had better go one by one."""
    fc, act, proj = mlp.c_fc, mlp.act, mlp.c_proj
    if type(act) is not FusedGelu or act._fastpeft.exact:
        return None
    first, second = _for_kernels(fc, x), _for_kernels(proj, x)
    if first is None or second is None:
        return None
    site = fc._fastpeft
    try:
        served = ops.lora_mlp(x, first, second, site.backend, site.strict, residual)
    except ValueError as error:
        raise ValueError(f"{site.name} and {proj._fastpeft.name}: {error}") from None
    if served is None:
        return None
    y, route = served
    for each in (fc, act, proj):
        each._fastpeft.record(route)
    return y
