"""A product with a low-rank update of it, from the kernels of both.

    u = (inner ⊙ x) aᵀ          y = x W + b + outer ⊙ (u (s f))

Shapes: x (M, K), W (K, N), b (N,), a (R, K), f (R, N), u (M, R), y (M, N); inner and outer are dropout masks. Forward
it makes y of x, backward dx of dy. Where inner drops, or it is quicker, u takes `shrink`'s pass of its own before.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import tiling, tuning
from .dropout import Dropout, sample_dropout
from .groups import Groups, tickets_for
from .linear import PLAIN, Epilogue, Linear
from .shrink import Shrink


class Updated:
    """`u = (inner ⊙ x) aᵀ` and `y = x weight + bias + outer ⊙ (u (scaling · f))`, as (y, u, h), all in x's dtype.

    x (M, K), weight (K, N), a (R, K), f (R, N); `inner` and `outer` are dropout masks. What the epilogue changes, h
    and `groups`, with which a is (G, R, K), are as in `Linear`. It is prepared for operands of one kind, for as many
    rows as tiles are chosen for (`tiling.steps`); where u is `given`, for calls that bring it, and don't compute it.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        f: Tensor,
        *,
        given: bool = False,
        inner: bool = False,
        outer: bool = False,
        tickets: int = 0,
        epilogue: Epilogue = PLAIN,
        how: tiling.Linear | None = None,
        groups: Groups | None = None,
    ) -> None:
        drops = inner, outer
        shape = epilogue.pre is not None, epilogue.residual is not None, epilogue.stores
        if how is None:

            def run(each: tiling.Linear) -> object:
                masks = (sample_dropout(x) if drop else None for drop in drops)
                kind: dict[str, Any] = {
                    "given": given,
                    "inner": inner,
                    "outer": outer,
                    "tickets": tickets,
                    "epilogue": epilogue,
                    "groups": groups,
                }
                prepared = Updated(x, weight, bias, a, f, **kind, how=each)
                called: dict[str, Any] = {"epilogue": epilogue, "groups": groups}
                called["tickets"] = tickets_for(x, tickets, groups)
                called["u"] = x.new_empty(x.shape[0], rank) if given else None
                return prepared(x, weight, bias, a, f, 1.0, *masks, **called)

            rank, n = f.shape[-2:]
            grouped = groups is not None
            how = tuning.fastest(
                "updated",
                x,
                (n, rank, given, drops, weight.stride(1) == 1, a.dtype, shape, grouped),
                tiling.linear(
                    x, weight, rank, given or inner, outer, shape != (False, False, "y"), shape[0], grouped
                ),
                run,
            )
        operands = x, weight, bias, f, how
        self._shrink, self._single = None, how.single
        if how.single:  # the loop has no room to round a wider factor
            self._linear = Linear(*operands, a=a.to(x.dtype), drops=outer, tickets=tickets, epilogue=epilogue)
        else:
            if not given:
                self._shrink = Shrink(x, a.mT, drops=inner, tickets=tickets, groups=groups)
            self._linear = Linear(*operands, drops=outer, epilogue=epilogue)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        f: Tensor,
        scaling: float,
        inner: Dropout | None = None,
        outer: Dropout | None = None,
        *,
        tickets: Tensor | None = None,
        epilogue: Epilogue = PLAIN,
        u: Tensor | None = None,
        groups: Groups | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(y, u, h), for at least one row."""
        operands = x, weight, bias, f, scaling
        if self._single:
            if a.dtype != x.dtype:
                a = a.to(x.dtype)
            return self._linear(*operands, a=a, dropout=outer, tickets=tickets, epilogue=epilogue)
        if self._shrink is not None:
            u = self._shrink(x, a, inner, tickets, groups)
        return self._linear(*operands, u=u, dropout=outer, epilogue=epilogue, groups=groups)
