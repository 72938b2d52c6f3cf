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

    x (M, K), weight (K, N), a (R, K), f (R, N); `inner` and `outer` are dropout masks. What the epilogue changes, h and
    `groups`, with which a is (G, R, K), are as in `Linear`. A u that is given is not computed again. It is prepared for
    operands of one kind, for as many rows as tiles are chosen for (`tiling.steps`).
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        f: Tensor,
        *,
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
                    "inner": inner,
                    "outer": outer,
                    "tickets": tickets,
                    "epilogue": epilogue,
                    "groups": groups,
                }
                prepared = Updated(x, weight, bias, a, f, **kind, how=each)
                given: dict[str, Any] = {"epilogue": epilogue, "groups": groups}
                given["tickets"] = tickets_for(x, tickets, groups)
                return prepared(x, weight, bias, a, f, 1.0, *masks, **given)

            rank, n = f.shape[-2:]
            grouped = groups is not None
            how = tuning.fastest(
                "updated",
                x,
                (n, rank, drops, weight.stride(1) == 1, a.dtype, shape, grouped),
                tiling.linear(x, weight, rank, *drops, shape != (False, False, "y"), shape[0], grouped),
                run,
            )
        given = x, weight, bias, f, how
        self._shrink = None
        if how.single:  # the loop has no room to round a wider factor
            self._linear = Linear(*given, a=a.to(x.dtype), drops=outer, tickets=tickets, epilogue=epilogue)
        else:
            self._shrink = Shrink(x, a.mT, drops=inner, tickets=tickets, groups=groups)
            self._linear = Linear(*given, drops=outer, epilogue=epilogue)

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
        given = x, weight, bias, f, scaling
        if self._shrink is None:
            if a.dtype != x.dtype:
                a = a.to(x.dtype)
            return self._linear(*given, a=a, dropout=outer, tickets=tickets, epilogue=epilogue)
        if u is None:
            u = self._shrink(x, a, inner, tickets, groups)
        return self._linear(*given, u=u, dropout=outer, epilogue=epilogue, groups=groups)
