"""LayerNorm, by itself or before a LoRA layer whose work its kernel begins."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from fastpeft import routes
from fastpeft.projections import Projection
from fastpeft.routes import Decided, Options


def layer_norm(
    x: Tensor, norm: torch.nn.LayerNorm, options: Options, decided: Decided | None = None
) -> tuple[Tensor, Tensor]:
    """The LayerNorm of x, and x to go on with as the residual; by Triton, their gradients meet in one kernel.

    Where the norm trains, or Triton won't serve it, torch does.
    """
    # The compiler fuses the plain formula by itself.
    if not torch.compiler.is_compiling() and routes.choose(options, x.device).path == "triton":
        from fastpeft.kernels import layer_norm as kernels

        key = *norm_kind(norm), x.shape[-1], x.dtype, x.device, x.data_ptr() % 16, x.numel() > 0
        served = (decided or Decided()).answers.once(key, lambda: norm_served(x, norm))
        if served != "stock":
            return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x), x


def norm_kind(norm: torch.nn.LayerNorm) -> tuple[Hashable, ...]:
    """What it depends on how this LayerNorm is served, but for what is true of x."""
    held = norm._parameters["weight"], norm._parameters["bias"]
    return tuple(p if p is None else (p.dtype, p.shape, p.stride(), p.device, p.requires_grad) for p in held)


def norm_served(
    x: Tensor, norm: torch.nn.LayerNorm, following: Projection | None = None, strict: bool = False
) -> str:
    """How a LayerNorm is served: "stock", "alone", or "shrunk" with the layer that follows, whose xa it leaves."""
    from fastpeft.kernels import launch
    from fastpeft.kernels import layer_norm as kernels

    weight, bias = norm.weight, norm.bias
    if weight is None or bias is None or weight.requires_grad or bias.requires_grad:
        return "stock"
    if x.shape[-1] > kernels.MAX_WIDTH or launch.unsupported(x, 1) or kernels.ready(x, weight):
        return "stock"
    if following is None or following.groups or not _shrinks(x, weight, bias, following, strict):
        return "alone"
    return "shrunk"


def _shrinks(x: Tensor, weight: Tensor, bias: Tensor, following: Projection, strict: bool) -> bool:
    """Whether the LayerNorm's kernel can compute the xa of `following`."""
    from fastpeft.kernels import layer_norm as kernels
    from fastpeft.kernels import tiling

    if x.numel() == 0 or tiling.layer_norm_shrink(x, following.lora_a.shape[0]) is None:
        return False
    failure = kernels.ready_to_shrink(x, weight, bias, following.lora_a, following.dropout_p > 0.0)
    if failure and strict:
        raise RuntimeError(failure)
    return failure is None
