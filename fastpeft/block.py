"""GPT-2's block with its neighbours in its kernels: GELU, dropouts, residuals, gradients that meet at a norm.

Only blocks of a plain trunk run so (trunk.py), on packed tokens or on the caller's grid: nothing listens in between.
Where no kernel serves a part, it runs by itself, as in stock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from fastpeft.adapters import adapted, adapts
from fastpeft.chain import Link, lora_chain
from fastpeft.groups import Groups
from fastpeft.lora import FusedLoraLinear, dropout_p, for_kernels
from fastpeft.modules import FusedGelu
from fastpeft.norms import layer_norm
from fastpeft.projections import Projection
from fastpeft.residuals import Residual, dropped
from fastpeft.routes import Decided
from fastpeft.swap import Site, stands_for


def spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """Rows (T, N) at these places (T,) of (size, N), zeros elsewhere."""
    # For backward `index_copy_` would keep the rows, of which it asks the shape.
    return rows.new_zeros(size, rows.shape[1]).index_put_((places,), rows)


class Packed(NamedTuple):
    """Where the packed tokens are: in the caller's (batch, length) grid, and in attention's padded view."""

    tokens: Tensor  # (T,) flat indices into the grid
    slots: Tensor  # (T,) flat indices into the view
    grid: tuple[int, int]
    view: tuple[int, int]  # (sequences, longest)
    mask: Tensor | None  # (1, 1, longest, longest), additive: eager attention needs it written out
    pooled: Tensor | None  # (batch,) indices among the packed of the tokens that the head reads, if no other
    last: nn.Module | None  # the block after which only the pooled are read
    walked: list[Any]  # what the trunk was seen to be, while the call runs that saw it
    spare: bool = False  # whether there may be more rows than tokens, whose slot is the one past the view
    graph: Callable[[nn.Module, Tensor], Tensor] | None = None  # what does all blocks' work, called by each
    groups: Groups | None = None  # of the tokens that use different adapters
    moved: bool = False  # whether rows of the grid changed places, to stand by their adapters

    @property
    def whole(self) -> bool:
        """Whether nothing leaves or moves, so that the caller's grid can stay as it is."""
        full = len(self.tokens) == self.grid[0] * self.grid[1]
        return full and self.pooled is None and not self.moved

    def at(self, pooled: Tensor | None) -> Packed:
        """The same for what goes on of the pooled tokens alone, where these are given."""
        if pooled is None or self.groups is None:
            return self
        return self._replace(groups=self.groups.at_pooled())

    def in_grid(self, rows: Tensor) -> Tensor:
        """Packed rows (T, N) in the caller's grid, (batch, length, N), zeros where no token is."""
        batch, length = self.grid
        if self.moved or len(rows) < batch * length:
            rows = spread(rows, self.tokens, batch * length)
        return rows.view(batch, length, -1)


class Grid(NamedTuple):
    """A call that isn't packed: rows are the caller's grid, and attention is stock's, with its mask and its cache."""

    walked: list[Any]  # as `Packed` has it
    attend: Any  # stock's function of query, key and value
    mask: Tensor | None = None  # as stock made it
    graph: None = None
    pooled: None = None
    last: None = None
    groups: None = None

    def at(self, pooled: Tensor | None) -> Grid:
        """Itself: nothing leaves."""
        return self


class Stage(NamedTuple):
    """A layer of a block, with what stands before and behind it."""

    layer: Any
    norm: Any = None  # a LayerNorm, of what comes in, which goes on as the residual
    act: Any = None  # a GELU that follows
    dropout: Any = None  # of the result, before the residual is added; None: it isn't


@stands_for(GPT2MLP)
class FusedMLP(GPT2MLP):
    """GPT-2's MLP, in one operation where Triton serves both projections; stock's forward, unless packed."""

    _fastpeft: Site

    def forward(self, hidden_states: Any, *, packed: Packed | Grid | None = None) -> Tensor:  # type: ignore[override]
        """The MLP of hidden_states (..., width)."""
        if packed is None:
            return super().forward(hidden_states)
        stages = [Stage(self.c_fc, act=self.act), Stage(self.c_proj)]
        y, _ = through(stages, hidden_states, None, self._fastpeft, packed)
        return _dropped(y, self.dropout)


@stands_for(GPT2Block)
class FusedBlock(GPT2Block):
    """GPT-2's block, which hands its residuals to the projections that they are added to; stock's, unless packed."""

    _fastpeft: Site

    def forward(  # type: ignore[override]
        self, hidden_states: Any, *args: Any, packed: Packed | Grid | None = None, **kwargs: Any
    ) -> Tensor:
        """hidden_states (1, T, width), or the whole grid → the same shape, zeros where a head that pools won't look."""
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)
        if packed.graph is not None:
            return packed.graph(self, hidden_states)
        attn, mlp, site = self.attn, self.mlp, self._fastpeft
        kept = args[0] if args else None  # the cache, which GPT2Model passes by position
        if isinstance(packed, Grid):
            packed = packed._replace(mask=args[1])  # likewise, or this is an error
        # Of the last block, keys and values of all tokens, and the rest of the pooled alone.
        pooled = packed.pooled if packed.last is self else None
        if adapts(attn) or adapts(mlp):
            rest = packed.at(pooled)
            h, x = _normed(self.ln_1, hidden_states, site)
            attended, _ = attn.forward(h, packed=packed, kept=kept, pooled=pooled)
            h, x = _normed(self.ln_2, adapted(attn, attended, None, _at(pooled, x), rest.groups), site)
            y = adapted(mlp, mlp.forward(h, packed=rest), h, x, rest.groups)
        else:
            h, residual = through([Stage(attn.c_attn, self.ln_1)], hidden_states, None, site, packed)
            stages = [
                Stage(attn.c_proj, dropout=attn.resid_dropout),
                Stage(mlp.c_fc, self.ln_2, mlp.act),
                Stage(mlp.c_proj, dropout=mlp.dropout),
            ]
            attended = attn.attended(h, packed, kept, pooled)
            y, _ = through(stages, attended, _at(pooled, residual), site, packed.at(pooled))
        return y if pooled is None else torch.zeros_like(hidden_states).index_copy(1, pooled, y)


def _at(pooled: Tensor | None, x: Any) -> Any:
    """x (1, T, width), or of the pooled tokens alone."""
    return x if pooled is None else x.index_select(1, pooled)


def through(
    stages: list[Stage], x: Tensor, residual: Tensor | None, site: Site, packed: Packed | Grid
) -> tuple[Tensor, Tensor | None]:
    """What comes of these stages, and the residual to go on with, None where it was added.

    As many of them at once as one operation serves, which in most blocks are all, and each other by itself.
    """
    while stages:
        done = _at_once(stages, x, residual, packed)
        if done is not None:
            x, residual, count = done
            stages = stages[count:]
            continue
        layer, norm, act, dropout = stages[0]
        if norm is not None:
            x, residual = _normed(norm, x, site)
            stages = [stages[0]._replace(norm=None), *stages[1:]]
            continue
        if dropout is None:
            x = called(layer, x, packed)
        else:
            x, residual = projected(layer, dropout, x, residual, packed), None
        x = x if act is None else act(x)
        stages = stages[1:]
    return x, residual


def _at_once(
    stages: list[Stage], x: Tensor, residual: Tensor | None, packed: Packed | Grid
) -> tuple[Tensor, Tensor | None, int] | None:
    """What comes of the first stages, the residual, and how many they were; None where none gain by going at once."""
    plans: list[Any] = []
    width, walked = x.shape[-1], packed.walked[0] if packed.walked else None
    for stage in stages:
        plan = for_kernels(stage.layer, x, width, walked, packed.groups)
        if plan is None:
            break
        plans.append(plan)
        width = plan.widths[1]
    alone = 0 if stages[0].norm is not None else 1  # a layer by itself is its module's to call
    if len(plans) <= alone:
        return None
    projections = [plan.projection(packed.groups) for plan in plans]
    for count in range(len(plans), alone, -1):
        links = _links(stages[:count], projections)
        if links is None:
            continue
        site = stages[0].layer._fastpeft
        decided = plans[0].before(plans[1:count])
        served = lora_chain(x, residual, links, site.options, decided)
        if served is None:
            continue
        for stage, link, route in zip(stages, links, served.routes, strict=False):
            stage.layer._fastpeft.record(route)
            if link.activates:
                stage.act._fastpeft.record(route)
        last = stages[count - 1]
        return served.y if last.act is None else last.act(served.y), served.residual, count
    return None


def _links(stages: list[Stage], projections: list[Projection]) -> list[Link] | None:
    """The stages as one operation takes them; None where something between them isn't what it knows."""
    links = []
    for i, (_, norm, act, dropout) in enumerate(stages):
        activates = act is not None and i < len(stages) - 1
        if activates and (type(act) is not FusedGelu or act._fastpeft.options.exact):
            return None
        p = None if dropout is None else _drops(dropout)
        if (dropout is not None and p is None) or (norm is not None and type(norm) is not nn.LayerNorm):
            return None
        links.append(Link(projections[i], norm, activates, p))
    return links


def _normed(norm: nn.Module, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The LayerNorm of x, and x to go on with as the residual."""
    if type(norm) is not nn.LayerNorm:
        return norm(x), x
    if site.plan is None:
        site.plan = Decided()
    return layer_norm(x, norm, site.options, site.plan)


def called(layer: Any, x: Tensor, packed: Packed | Grid, residual: Residual | None = None) -> Any:
    """A layer of x, with an adapter of its own for each group of rows where there are groups.

    Of a LoRA layer added to a residual, where one is given.
    """
    if type(layer) is not FusedLoraLinear:
        return layer(x)
    if packed.walked:  # so that there are no hooks to call
        return layer.forward(x, residual=residual, groups=packed.groups, walked=packed.walked[0])
    return layer(x, residual=residual, groups=packed.groups)


def projected(
    c_proj: Any, dropout: nn.Module, x: Tensor, residual: Tensor | None, packed: Packed | Grid
) -> Tensor:
    """`dropout(c_proj(x))`, added to a residual if there is one, in one operation where that can be."""
    added = _residual(residual, dropout)
    if added is not None and type(c_proj) is FusedLoraLinear:
        y: Tensor = called(c_proj, x, packed, added)
        return y
    y = _dropped(called(c_proj, x, packed), dropout)
    return y if residual is None else residual + y


def _drops(dropout: nn.Module) -> float | None:
    """The probability with which `dropout` drops now; None where a call of it is more than that."""
    return dropout_p(dropout) if type(dropout) is nn.Dropout else None


def _residual(residual: Tensor | None, dropout: nn.Module) -> Residual | None:
    """A residual for an operation to add; None where there is none, or dropout isn't all that happens on the way."""
    p = _drops(dropout)
    return None if residual is None or p is None else Residual(residual, p)


def _dropped(x: Tensor, dropout: nn.Module) -> Tensor:
    p = _drops(dropout)
    return dropout(x) if p is None else dropped(x, p)
