"""The fused operations: validate, choose the backend, run it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import autograd, reference, routes
from fastpeft.autocast import autocasts, layer_as_autocast
from fastpeft.chain import Chain, Link, by_kernels, new_seeds, served
from fastpeft.checks import check_adapter, check_lora_linear
from fastpeft.kernels.rows import as_rows, as_taken, unrowed
from fastpeft.projections import Bottleneck, Grouped, Projection, by_torch
from fastpeft.residuals import Residual, added, rows_of
from fastpeft.routes import Decided, Options, Route


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    backend: str = "auto",
    *,
    exact: bool = False,
) -> Tensor:
    """A linear layer with its LoRA update: `y = x W + b + scaling · (dropout(x) Aᵀ) Bᵀ`.

    The formula is `reference.lora_linear`, from Hu et al., 2021.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64, any strides.
        weight: (K, N) in x's dtype, any strides: `Conv1D.weight`, or `nn.Linear.weight.t()`.
        bias: (N,) in x's dtype, or None.
        lora_a: (R, K), as peft stores it; x's dtype, or wider (peft keeps float32 factors on a 16-bit base):
            then the factor is rounded to x's dtype, never x widened.
        lora_b: (N, R), likewise.
        scaling: factor of the update, without unit.
        dropout_p: probability of zeroing an element of x before `lora_a`; the mask is drawn anew each call,
            seeded from torch's generator.
        backend: `auto` (Triton for CUDA tensors where it serves the case, else PyTorch), `triton` or `torch`.
        exact: peft's own dropout masks and float32 factors kept float32, always on the PyTorch path.

    Returns:
        (..., N) in x's dtype (under autocast: in autocast's). Differentiable once, by every tensor argument.

    Raises:
        ValueError: shapes, devices, `dropout_p` or `backend` that don't fit; `backend="triton"` for a case
            Triton can't serve here, with the reason.
        TypeError: a dtype or layout that isn't served, or `weight`, `bias` in another dtype than x.
    """
    projection = Projection(weight, bias, lora_a, lora_b, scaling, dropout_p)
    y, _ = routed_lora_linear(x, projection, Options(backend, exact))
    return y


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    backend: str = "auto",
    *,
    exact: bool = False,
) -> Tensor:
    """A bottleneck adapter with its residual: `y = x + scale · up(act(down(x)))`.

    The formula is `reference.adapter`, from Houlsby et al., 2019.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64, any strides.
        down_weight: (R, K), and `down_bias`: (R,) or None, as `nn.Linear` stores them.
        up_weight: (K, R), and `up_bias`: (K,) or None. Weights wider than x are rounded to x's dtype.
        activation: a name in `reference.ACTIVATIONS`: relu, gelu, gelu_tanh or silu.
        scale: factor of the update, without unit.
        backend: `auto` (Triton for CUDA tensors where it serves the case, else PyTorch), `triton` or `torch`.
        exact: float32 weights kept float32 on a 16-bit x, always on the PyTorch path.

    Returns:
        (..., K) in x's dtype (under autocast too). Differentiable once, by every tensor argument.

    Raises:
        ValueError: shapes, devices, `activation` or `backend` that don't fit; `backend="triton"` for a case
            Triton can't serve here, with the reason.
        TypeError: a dtype or layout that isn't served.
    """
    bottleneck = Bottleneck(down_weight, down_bias, up_weight, up_bias, activation, scale)
    y, _ = routed_adapter(x, bottleneck, Options(backend, exact))
    return y


def routed_lora_linear(
    x: Tensor,
    layer: Projection | Grouped,
    options: Options,
    residual: Residual | None = None,
    decided: Decided | None = None,
) -> tuple[Tensor, Route]:
    """`lora_linear`, added to a residual if there is one, with the route it took, which modules record.

    Of a `Grouped` layer each group of rows has an update of its own; it isn't traced.
    """
    if decided is None:
        for each in [layer] if isinstance(layer, Projection) else layer.apart():
            check_lora_linear(x, each)
    route = (routes.route_for if decided is None else decided.chosen)(options, x.device)
    if decided is None or autocasts(x):
        x, layer = layer_as_autocast(x, layer)
    projection: Projection | None = None
    if route.path == "triton":
        projection = layer.stacked(x.device) if isinstance(layer, Grouped) else layer
        route = route if projection is not None else Route("torch", "no row has an update")
    if projection is not None:
        import fastpeft.kernels.launch as launch

        eager = launch.eager(x)
        rows = as_taken(x) if eager else as_rows(x)
        residual_rows, residual_p = rows_of(residual, rows) if eager else (None, None)
        chain = Chain(rows, residual_rows, [Link(projection, residual_p=residual_p)], ["y"])
        how = served(chain, options, decided)
        route = how.route
        if route.path == "triton":
            if eager:
                y, _ = by_kernels(chain, how)
            else:
                import fastpeft.kernels.lora_linear as kernels

                (seed,) = new_seeds(x, projection.dropout_p)
                y = kernels.lora_linear(rows, *projection[:6], seed)
            y = y if rows is x else unrowed(y, x)
            return y if residual_rows is not None else added(y, residual), route
    rows = as_rows(x)
    if isinstance(layer, Projection) and (torch.compiler.is_compiling() or routes.transformed()):
        # The compiler fuses the plain formula by itself.
        weight, bias, lora_a, lora_b, scaling, dropout_p, _ = layer
        dropped = F.dropout(x, dropout_p).to(lora_a.dtype)
        update = scaling * (dropped @ lora_a.T @ lora_b.T)
        y = (F.linear(x, weight.T, bias) + update).to(x.dtype)
    else:
        y = by_torch(rows, layer, options.exact)
    return added(unrowed(y, x), residual), route


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W + b`, x (..., K) and weight (K, N) as `Conv1D` has it, by `gemm.mm`; differentiable by x alone."""
    return unrowed(autograd.Linear.apply(as_rows(x), weight, bias), x)


def routed_adapter(
    x: Tensor,
    bottleneck: Bottleneck,
    options: Options,
    residual: Tensor | None = None,
    decided: Decided | None = None,
) -> tuple[Tensor, Route]:
    """`adapter`, added to a block's residual if there is one, with the route it took, which modules record."""
    outer = None if residual is None else Residual(residual, 0.0)
    if decided is None:
        check_adapter(x, bottleneck)
        route = routes.route_for(options, x.device)
    else:
        route = decided.chosen(options, x.device)
    rows, parameters = as_rows(x), bottleneck[:4]
    activation, scale = bottleneck.activation, float(bottleneck.scale)
    if route.path == "triton":
        from fastpeft.kernels import adapter as kernels
        from fastpeft.kernels import launch, tuning

        residual_rows, _ = rows_of(outer, rows)

        def through_kernels(x: Any, down: Any, down_bias: Any, up: Any, up_bias: Any, more: Any) -> Tensor:
            return kernels.adapter(x, down, down_bias, up, up_bias, activation, scale, more)

        def through_pytorch(x: Any, *tensors: Any) -> Any:
            y = autograd.Adapter.apply(x, *tensors[:4], activation, scale)
            return y if residual_rows is None else y + tensors[4]

        given = (rows, *parameters, residual_rows)

        def found() -> Route:
            return routes.confirm(
                options,
                launch.unsupported(rows, bottleneck.down_weight.shape[0], *given),
                lambda: kernels.ready(rows, *parameters, activation, residual_rows),
                lambda: tuning.slower_than("adapter", given, (activation,), through_kernels, through_pytorch),
            )

        route = decided.answers.once(routes.kind_of(rows, residual_rows), found) if decided else found()
        if route.path == "triton":
            y = unrowed(through_kernels(*given), x)
            return y if residual_rows is not None else added(y, outer), route
    wide = torch.promote_types(x.dtype, bottleneck.down_weight.dtype) if options.exact else x.dtype
    if torch.compiler.is_compiling() or routes.transformed():
        # The compiler fuses the plain formula by itself.
        wider = Bottleneck._make((*(p if p is None else p.to(wide) for p in parameters), activation, scale))
        y = reference.adapter(x.to(wide), *wider)
        return added(y.to(x.dtype), outer), route
    operands = rows.to(wide), *parameters, activation, scale
    # The residual keeps x's dtype, so x's dtype rules and autocast has no say.
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        y = autograd.Adapter.apply(*operands) if torch.is_grad_enabled() else autograd.adapter(*operands)[0]
    return added(unrowed(y.to(x.dtype), x), outer), route
