"""GPT-2's MLP of two LoRA linear layers, `proj(gelu(fc(x)))`: no GELU passes over memory of its own.

The first layer's kernel stores the pre-activation and its GELU; the second's backward multiplies dx by gelu'(pre)
before it stores it. Between forward and backward only the pre-activation is kept; where no backward follows, only the
GELU is stored.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import lora_linear, tiling
from .launch import build, describe

#: weight, bias, lora_a and lora_b of a layer, as `lora_linear.lora_linear` takes them.
Layer = tuple[Any, ...]


def lora_mlp(
    x: Tensor,
    fc: Layer,
    fc_scaling: float,
    fc_dropout: float,
    fc_seed: Tensor | None,
    proj: Layer,
    proj_scaling: float,
    proj_dropout: float,
    proj_seed: Tensor | None,
    residual: Tensor | None = None,
    residual_dropout: float = 0.0,
    residual_seed: Tensor | None = None,
    xa: Tensor | None = None,
) -> Tensor:
    """`proj(gelu(fc(x)))` with the tanh GELU, x (M, K), each layer as `lora_linear.lora_linear` describes it.

    Where a residual (M, N) is given, it is `residual + dropout(proj(gelu(fc(x))))`. An `xa` is the first layer's.
    """
    call_of = lora_linear.call_of
    calls = (
        call_of(fc_scaling, fc_dropout, fc_seed, stores=lora_linear.stored(x, *fc), xa=xa),
        call_of(proj_scaling, proj_dropout, proj_seed, residual_dropout, residual_seed),
    )
    return applied(x, fc, proj, calls, residual)


def applied(
    x: Tensor,
    fc: Layer,
    proj: Layer,
    calls: tuple[lora_linear.Call, lora_linear.Call],
    residual: Tensor | None,
    prepared: tuple[lora_linear.Layer | None, lora_linear.Layer | None] = (None, None),
) -> Tensor:
    """`lora_mlp` of these calls; `prepared` is what was called for such operands before."""
    first, second = prepared
    pre, h = lora_linear.applied(x, fc, calls[0], prepared=first)
    assert h is not None
    pre = pre if "y" in calls[0].stores else None
    y, _ = lora_linear.applied(h, proj, calls[1], residual, pre, second)
    assert y is not None
    return y


def ready(
    x: Tensor,
    fc: Layer,
    fc_dropout: float,
    proj: Layer,
    proj_dropout: float,
    residual: Tensor | None = None,
    residual_dropout: float = 0.0,
) -> str | None:
    """None where every kernel of `lora_mlp` and of its backward is built for these tensors; else why not.

    Launches and draws nothing. The first call of a kind compiles; a failure warns once and is remembered.
    """

    stores = lora_linear.stored(x, *fc)

    def call() -> None:
        pre, h = lora_linear.exercise(x, *fc, fc_dropout, stores=stores)
        assert h is not None
        added: dict[str, Any] = {"residual": residual, "residual_dropout": residual_dropout}
        lora_linear.exercise(h, *proj, proj_dropout, pre=pre, **added)

    drops = (p > 0 for p in (fc_dropout, proj_dropout, residual_dropout))
    of_rows = describe(x, residual, rows=True)
    key = ("lora_mlp", tiling.steps(x.shape[0]), stores, *drops, *of_rows, *describe(*fc, *proj))
    return build(key, x, call)
