"""The fused operations: validate, choose the backend, run it."""

from __future__ import annotations

import importlib.metadata
import numbers
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor
from torch.autograd import forward_ad

from fastpeft import autograd, reference
from fastpeft.backends import BACKENDS
from fastpeft.kernels.memo import Memo
from fastpeft.kernels.rows import as_rows, as_taken, rows_in

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Route(NamedTuple):
    """Which implementation serves a call, `triton` or `torch`, and why."""

    path: str
    reason: str


class Projection(NamedTuple):
    """A linear layer with its LoRA update, as `lora_linear` takes it."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float


class Residual(NamedTuple):
    """What a layer's result is added to, `x + dropout(result)`."""

    x: Tensor
    dropout_p: float


class Shrunk(NamedTuple):
    """`xa = dropout(x) Aᵀ` that the kernel of a LayerNorm computed beside x, for the layer of this A."""

    xa: Tensor
    seeds: Sequence[Tensor]  # of this mask, and of two more that the layer's operation may draw
    lora_a: Tensor
    dropout_p: float


class Confirmed(NamedTuple):
    """The route that was confirmed for a call, and where its kernels keep what they prepare for such calls."""

    route: Route
    prepared: Any = None


class Decided:
    """What was found out about a kind of call, for the next of its kind not to ask again.

    Whoever holds one vouches for the operands' shapes, dtypes, strides and device, and for its options; what else
    counts is in the keys. They hold no number of rows but the steps in which tiles are chosen: there are few.
    """

    def __init__(self) -> None:
        self.route: Route | None = None
        self.answers = Memo(256)

    def chosen(self, backend: str, exact: bool, device: torch.device) -> Route:
        """`choose`, asked once."""
        if self.route is None:
            self.route = choose(backend, exact, device)
        return self.route


def _once(
    decided: Decided | None,
    rows: Tensor,
    residual: Tensor | None,
    drops: tuple[float, ...],
    confirm: Callable[[], Confirmed],
) -> Confirmed:
    """What `confirm` says; asked once for such rows, a residual or none, and dropouts that drop or don't."""
    return confirm() if decided is None else decided.answers.once(_kind_of(rows, residual, drops), confirm)


def _kind_of(rows: Tensor, residual: Tensor | None, drops: tuple[float, ...]) -> Hashable:
    """Of a call, what counts for its kernels beside the operands that a `Decided` is for."""
    from fastpeft.kernels import launch, tiling

    aligned = (rows.data_ptr() | (0 if residual is None else residual.data_ptr())) % 16 == 0
    tf32 = rows.dtype == torch.float32 and launch.tf32_allowed()
    some = tuple(p > 0.0 for p in drops)
    return (
        tiling.steps(rows_in(rows)),
        rows.dtype,
        rows.dim() == 2 and rows.stride(),
        aligned,
        residual is None,
        some,
        tf32,
    )


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
        TypeError: a dtype that isn't served, or `weight`, `bias` in another dtype than x.
    """
    projection = Projection(weight, bias, lora_a, lora_b, scaling, dropout_p)
    y, _ = routed_lora_linear(x, projection, backend, exact)
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
        TypeError: a dtype that isn't served.
    """
    y, _ = routed_adapter(x, down_weight, down_bias, up_weight, up_bias, activation, scale, backend, exact)
    return y


def routed_lora_linear(
    x: Tensor,
    projection: Projection,
    backend: str,
    exact: bool,
    strict: bool = False,
    residual: Residual | None = None,
    shrunk: Shrunk | None = None,
    decided: Decided | None = None,
) -> tuple[Tensor, Route]:
    """`lora_linear`, added to a residual if there is one, with the route it took, which modules record.

    `shrunk` is what `layer_norm` gave with x for this projection.
    """
    if decided is None:
        _check_lora_linear(x, projection)
        route = _route(backend, exact, x.device)
    else:
        route = decided.chosen(backend, exact, x.device)
    x, projection = _as_autocast(x, projection)
    if route.path == "triton":
        rows = as_taken(x)
        residual_rows, residual_p = _rows_of(residual, x.dtype)
        given = rows, projection, residual_rows, residual_p
        drops = projection.dropout_p, residual_p
        route, prepared = _once(
            decided, rows, residual_rows, drops, lambda: _confirmed_layer(route, backend, strict, *given)
        )
        if route.path == "triton":
            shrunk = _fitting(shrunk, projection)
            y = _layer_by_kernels(*given, shrunk, prepared)
            route = _INCLUDED if shrunk else route
            y = y if rows is x else _unrowed(y, x)
            return y if residual_rows is not None else added(y, residual), route
    rows = as_rows(x)
    weight, bias, lora_a, lora_b, scaling, dropout_p = projection
    if torch.compiler.is_compiling() or transformed():  # the compiler fuses the plain formula by itself
        dropped = F.dropout(x, dropout_p).to(lora_a.dtype)
        update = scaling * (dropped @ lora_a.T @ lora_b.T)
        y = (F.linear(x, weight.T, bias) + update).to(x.dtype)
    else:
        y = autograd.LoraLinear.apply(rows, weight, bias, lora_a, lora_b, scaling, dropout_p, exact)
    return added(_unrowed(y, x), residual), route


def _layer_by_kernels(
    rows: Tensor,
    projection: Projection,
    residual: Tensor | None,
    residual_p: float,
    shrunk: Shrunk | None = None,
    prepared: Any = None,
) -> Tensor:
    """A layer of rows by the kernels, with what they have `prepared` for such calls."""
    from fastpeft.kernels import lora_linear as kernels

    weight, bias, lora_a, lora_b, scaling, dropout_p = projection
    layer = weight, bias, lora_a, lora_b
    xa, drawn = (None, None) if shrunk is None else (shrunk.xa, shrunk.seeds)
    seed, residual_seed = _new_seeds(rows, dropout_p, residual_p, drawn=drawn)
    call = kernels.call_of(scaling, dropout_p, seed, residual_p, residual_seed, xa=xa)
    y, _ = kernels.applied(rows, layer, call, residual, None, prepared)
    assert y is not None
    return y


def _with(projection: Projection, weight: Any, bias: Any, lora_a: Any, lora_b: Any) -> Projection:
    return projection._replace(weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)


def _confirmed_layer(
    route: Route,
    backend: str,
    strict: bool,
    rows: Tensor,
    projection: Projection,
    residual: Tensor | None,
    residual_p: float,
) -> Confirmed:
    """`_confirm` for a layer's call."""
    from fastpeft.kernels import launch, tuning
    from fastpeft.kernels import lora_linear as kernels

    weight, bias, lora_a, lora_b, scaling, dropout_p = projection
    layer = weight, bias, lora_a, lora_b
    rows, residual = as_rows(rows), None if residual is None else as_rows(residual)

    def through_kernels(x: Any, *tensors: Any) -> Tensor:
        return _layer_by_kernels(x, _with(projection, *tensors[:4]), tensors[4], residual_p)

    def through_pytorch(*tensors: Any) -> Any:
        y = autograd.LoraLinear.apply(*tensors[:5], scaling, dropout_p, False)
        return y if residual is None else added(y, Residual(tensors[5], residual_p))

    given = (rows, *layer, residual)
    drops = (dropout_p, residual_p)
    confirmed = _confirm(
        route,
        backend,
        strict,
        launch.unsupported(rows, projection.lora_a.shape[0], *layer, residual),
        lambda: kernels.ready(rows, *layer, dropout_p, residual, residual_p),
        lambda: tuning.slower_than("lora_linear", given, drops, through_kernels, through_pytorch),
    )
    return Confirmed(confirmed, kernels.Layer())


_INCLUDED = Route("triton", "fused kernels, LayerNorm included")


def _unrowed(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) in the grid of x (..., K)."""
    return y if x.dim() == y.dim() else y.view(*x.shape[:-1], y.shape[-1])


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W + b`, x (..., K) and weight (K, N) as `Conv1D` has it, by `gemm.mm`; differentiable by x alone."""
    return _unrowed(autograd.Linear.apply(as_rows(x), weight, bias), x)


def lora_mlp(
    x: Tensor,
    fc: Projection,
    proj: Projection,
    backend: str,
    strict: bool = False,
    residual: Residual | None = None,
    shrunk: Shrunk | None = None,
    decided: Decided | None = None,
) -> tuple[Tensor, Route] | None:
    """`proj(gelu(fc(x)))`, the tanh GELU, added to a residual if there is one, and its route, by the kernels.

    For devices that `choose` gives to Triton; None where it won't serve this call after all. Outside the kernels
    there is nothing to gain over layer by layer. `shrunk` is what `layer_norm` gave with x for `fc`.
    """
    if decided is None:
        _check_lora_linear(x, fc)
    shrunk = _fitting(shrunk, fc)
    (x, fc), (_, proj) = _as_autocast(x, fc), _as_autocast(x, proj)
    rows = as_taken(x)
    residual_rows, residual_p = _rows_of(residual, x.dtype)
    given = rows, fc, proj, residual_rows, residual_p
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, *fc[:4]))
    drops = fc.dropout_p, proj.dropout_p, residual_p, float(trains)
    route, prepared = _once(
        decided, rows, residual_rows, drops, lambda: _confirmed_mlp(backend, strict, *given)
    )
    if route.path != "triton":
        return None
    y = _mlp_by_kernels(*given, shrunk, prepared)
    y = y if rows is x else _unrowed(y, x)
    route = _MLP_INCLUDED if shrunk else route
    return y if residual_rows is not None else added(y, residual), route


def _mlp_by_kernels(
    rows: Tensor,
    fc: Projection,
    proj: Projection,
    residual: Tensor | None,
    residual_p: float,
    shrunk: Shrunk | None = None,
    prepared: Any = (None, None),
) -> Tensor:
    """An MLP of rows by the kernels, with what they have `prepared` for such calls."""
    from fastpeft.kernels import lora_linear, lora_mlp

    xa, drawn = (None, None) if shrunk is None else (shrunk.xa, shrunk.seeds)
    first, second, last = _new_seeds(rows, fc.dropout_p, proj.dropout_p, residual_p, drawn=drawn)
    stores = lora_linear.stored(rows, *fc[:4])
    calls = (
        lora_linear.call_of(fc.scaling, fc.dropout_p, first, stores=stores, xa=xa),
        lora_linear.call_of(proj.scaling, proj.dropout_p, second, residual_p, last),
    )
    return lora_mlp.applied(rows, fc[:4], proj[:4], calls, residual, prepared)


def _confirmed_mlp(
    backend: str,
    strict: bool,
    rows: Tensor,
    fc: Projection,
    proj: Projection,
    residual: Tensor | None,
    residual_p: float,
) -> Confirmed:
    """`_confirm` for an MLP's call."""
    from fastpeft.kernels import launch, lora_linear, lora_mlp, tuning

    rows, residual = as_rows(rows), None if residual is None else as_rows(residual)

    def through_kernels(x: Any, *tensors: Any) -> Tensor:
        layers = _with(fc, *tensors[:4]), _with(proj, *tensors[4:8])
        return _mlp_by_kernels(x, *layers, tensors[8], residual_p)

    def through_pytorch(x: Any, *tensors: Any) -> Any:
        h = reference.gelu_new(autograd.LoraLinear.apply(x, *tensors[:4], *fc[4:], False))
        y = autograd.LoraLinear.apply(h, *tensors[4:8], *proj[4:], False)
        return y if residual is None else added(y, Residual(tensors[8], residual_p))

    given = (rows, *fc[:4], *proj[:4], residual)
    drops = (fc.dropout_p, proj.dropout_p, residual_p)
    rank = max(fc.lora_a.shape[0], proj.lora_a.shape[0])
    confirmed = _confirm(
        _MLP,
        backend,
        strict,
        launch.unsupported(rows, rank, *given[1:]),
        lambda: lora_mlp.ready(rows, fc[:4], fc.dropout_p, proj[:4], proj.dropout_p, residual, residual_p),
        lambda: tuning.slower_than("lora_mlp", given, drops, through_kernels, through_pytorch),
    )
    return Confirmed(confirmed, (lora_linear.Layer(), lora_linear.Layer()))


_MLP = Route("triton", "fused kernels, GELU included")
_MLP_INCLUDED = Route("triton", "fused kernels, LayerNorm and GELU included")


def layer_norm(
    x: Tensor,
    norm: torch.nn.LayerNorm,
    backend: str,
    following: Projection | None = None,
    strict: bool = False,
    decided: Decided | None = None,
) -> tuple[Tensor, Tensor, Shrunk | None]:
    """The LayerNorm of x, and x to go on with as the residual; by Triton, their gradients meet in one kernel.

    Where the norm trains, or Triton won't serve it, torch does. Where a layer that drops is known to come next, the
    same kernel computes its `dropout(h) Aᵀ`, the third, for that layer to be given.
    """
    # The compiler fuses the plain formula by itself.
    if not torch.compiler.is_compiling() and choose(backend, False, x.device).path == "triton":
        from fastpeft.kernels import layer_norm as kernels

        weight, bias = norm.weight, norm.bias
        if weight is None or bias is None or weight.requires_grad or bias.requires_grad:
            return norm(x), x, None
        given = (x, weight, bias, norm.eps)
        lora_a = following.lora_a if following is not None and following.dropout_p > 0.0 else None
        served = (decided or Decided()).answers.once(
            _norm_kind(x, weight, bias, lora_a), lambda: _norm_served(x, weight, bias, following, strict)
        )
        if served == "shrunk" and lora_a is not None and following is not None:
            seeds = _drawn(x, 3)
            h, x, xa = kernels.layer_norm_shrink(*given, lora_a, following.dropout_p, seeds[0])
            return h, x, Shrunk(xa, seeds, lora_a, following.dropout_p)
        if served != "stock":
            return *kernels.layer_norm(*given), None
    return norm(x), x, None


def _norm_kind(x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor | None) -> Hashable:
    """All that it depends on how this LayerNorm is served."""
    from fastpeft.kernels import launch

    tf32 = x.dtype == torch.float32 and launch.tf32_allowed()
    flags = x.numel() > 0, torch.is_autocast_enabled(x.device.type), torch.is_inference_mode_enabled(), tf32
    return (
        x.shape[-1], x.dtype, x.device, x.data_ptr() % 16, *launch.fixed(weight, bias, lora_a),
        weight.shape, lora_a if lora_a is None else lora_a.shape, *flags,
    )  # fmt: skip


def _norm_served(x: Tensor, weight: Tensor, bias: Tensor, following: Projection | None, strict: bool) -> str:
    """How a LayerNorm is served: "stock", "alone", or "shrunk" with what follows."""
    from fastpeft.kernels import launch
    from fastpeft.kernels import layer_norm as kernels

    if x.shape[-1] > kernels.MAX_WIDTH or launch.unsupported(x, 1) or kernels.ready(x, weight):
        return "stock"
    if following is None or following.dropout_p == 0.0 or not _shrinks(x, weight, bias, following, strict):
        return "alone"
    return "shrunk"


def _shrinks(x: Tensor, weight: Tensor, bias: Tensor, following: Projection, strict: bool) -> bool:
    """Whether the LayerNorm's kernel can compute what `following` needs, which drops its result."""
    from fastpeft.kernels import launch, tiling
    from fastpeft.kernels import layer_norm as kernels

    lora_a, lora_b = following.lora_a, following.lora_b
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    if any(t.dtype != x.dtype for t in (weight, bias, following.weight)):
        return False
    if x.numel() == 0 or not weight.shape == lora_a.shape[1:] == x.shape[-1:]:
        return False
    rank = lora_a.shape[0]
    if launch.unsupported(x, rank, lora_a, lora_b) or tiling.layer_norm_shrink(x, rank) is None:
        return False
    failure = kernels.ready_to_shrink(x, weight, bias, lora_a)
    if failure and strict:
        raise RuntimeError(failure)
    return failure is None


def _fitting(shrunk: Shrunk | None, projection: Projection) -> Shrunk | None:
    """What a LayerNorm computed for this very projection; None where it was for another."""
    if shrunk is None or shrunk.lora_a is not projection.lora_a or shrunk.dropout_p != projection.dropout_p:
        return None
    return shrunk


def _rows_of(residual: Residual | None, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """A residual as the kernels add it, and its dropout; None where there is none, or it is wider than `dtype`."""
    if residual is None or residual.x.dtype != dtype:
        return None, 0.0
    return residual.x.contiguous(), residual.dropout_p


def added(y: Tensor, residual: Residual | None) -> Tensor:
    """y, added to a residual if there is one."""
    return y if residual is None else residual.x + dropped(y, residual.dropout_p)


def dropped(x: Tensor, dropout_p: float) -> Tensor:
    """`F.dropout(x, dropout_p)`, on the CPU with fewer random numbers."""
    if dropout_p == 0.0 or not on_cpu(x) or torch.compiler.is_compiling() or transformed():
        return F.dropout(x, dropout_p)
    return autograd.Dropout.apply(x, dropout_p)


def routed_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    backend: str,
    exact: bool,
    strict: bool = False,
    residual: Tensor | None = None,
    decided: Decided | None = None,
) -> tuple[Tensor, Route]:
    """`adapter`, added to a block's residual if there is one, with the route it took, which modules record."""
    outer = None if residual is None else Residual(residual, 0.0)
    if decided is None:
        _check_adapter(x, down_weight, down_bias, up_weight, up_bias, activation, scale)
        route = _route(backend, exact, x.device)
    else:
        route = decided.chosen(backend, exact, x.device)
    rows, scale = as_rows(x), float(scale)
    if route.path == "triton":
        from fastpeft.kernels import adapter as kernels
        from fastpeft.kernels import launch, tuning

        residual_rows, _ = _rows_of(outer, x.dtype)
        residual_rows = None if residual_rows is None else as_rows(residual_rows)

        def through_kernels(x: Any, down: Any, down_bias: Any, up: Any, up_bias: Any, more: Any) -> Tensor:
            return kernels.adapter(x, down, down_bias, up, up_bias, activation, scale, more)

        def through_pytorch(*tensors: Any) -> Any:
            y = autograd.Adapter.apply(*tensors[:5], activation, scale)
            return y if residual_rows is None else y + tensors[5]

        given = (rows, down_weight, down_bias, up_weight, up_bias, residual_rows)

        def confirm() -> Confirmed:
            confirmed = _confirm(
                route,
                backend,
                strict,
                launch.unsupported(rows, down_weight.shape[0], *given),
                lambda: kernels.ready(*given[:5], activation, residual_rows),
                lambda: tuning.slower_than("adapter", given, (activation,), through_kernels, through_pytorch),
            )
            return Confirmed(confirmed)

        route, _ = _once(decided, rows, residual_rows, (), confirm)
        if route.path == "triton":
            y = through_kernels(*given).view(x.shape)
            return y if residual_rows is not None else added(y, outer), route
    wide = torch.promote_types(x.dtype, down_weight.dtype) if exact else x.dtype
    if torch.compiler.is_compiling() or transformed():  # the compiler fuses the plain formula by itself
        down_weight, up_weight = down_weight.to(wide), up_weight.to(wide)
        down_bias = None if down_bias is None else down_bias.to(wide)
        up_bias = None if up_bias is None else up_bias.to(wide)
        y = reference.adapter(x.to(wide), down_weight, down_bias, up_weight, up_bias, activation, scale)
        return added(y.to(x.dtype), outer), route
    rows = rows.to(wide)
    # The residual keeps x's dtype, so x's dtype rules and autocast has no say.
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        y = autograd.Adapter.apply(rows, down_weight, down_bias, up_weight, up_bias, activation, scale)
    return added(y.to(x.dtype).view(x.shape), outer), route


def on_cpu(t: Tensor) -> bool:
    """Whether what is written for the CPU alone serves t."""
    return t.is_cpu


def transformed() -> str | None:
    """What makes of the computation more than a forward and a backward pass, which only stock's operations bear."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms it"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


def choose(backend: str, exact: bool, device: torch.device) -> Route:
    """The route that calls on `device` take, as far as the device decides it.

    Raises ValueError for an unknown backend, or where `backend="triton"` can't run there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if exact:
        return Route("torch", "exact=True keeps torch's arithmetic")
    if backend == "torch":
        return Route("torch", "backend='torch'")
    if backend == "auto" and device.type != "cuda":
        return Route("torch", f"PyTorch path on {device.type}")
    if _TRITON_TOO_OLD:
        return _refuse(backend, _TRITON_TOO_OLD)
    try:
        from fastpeft.kernels import launch
    except ImportError:
        return _refuse(backend, "triton is not installed")
    reason = launch.unsupported_device(device)
    return _refuse(backend, reason) if reason else Route("triton", "fused kernels")


def _route(backend: str, exact: bool, device: torch.device) -> Route:
    """`choose` for a call, whose circumstances count too."""
    reason = transformed()
    return _refuse(backend, reason) if reason else choose(backend, exact, device)


def _triton_too_old() -> str | None:
    """That the installed triton lacks what the kernels use, asked of its metadata, without importing it."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return f"triton {version} is older than 3.6" if Version(version) < Version("3.6") else None


_TRITON_TOO_OLD = _triton_too_old()

#: Devices that have an autocast; of another torch mustn't be asked whether it is on. Known at import: Dynamo of torch
#: 2.11 can't trace the question.
_AUTOCASTS = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla"))
)


def _refuse(backend: str, reason: str) -> Route:
    if backend == "triton":
        raise ValueError(f"backend='triton' can't serve this: {reason}")
    return Route("torch", reason)


def _confirm(
    route: Route,
    backend: str,
    strict: bool,
    unsupported: str | None,
    ready: Callable[[], str | None],
    slower: Callable[[], str | None],
) -> Route:
    """`route` where the kernels serve the call, are built and not measured slower; before a seed is drawn."""
    if unsupported:
        return _refuse(backend, unsupported)
    if torch.compiler.is_compiling():  # tensors have no addresses yet, which is what kernels are built for
        return route
    failure = ready()
    if failure and strict:
        raise RuntimeError(failure)
    reason = failure or (slower() if backend == "auto" else None)
    return Route("torch", reason) if reason else route


def _new_seeds(x: Tensor, *dropouts: float, drawn: Sequence[Tensor] | None = None) -> list[Tensor | None]:
    """A seed for each of these dropouts that drops, of those `drawn` already or drawn at once."""
    count = sum(p > 0.0 for p in dropouts)
    seeds = iter(drawn if drawn is not None else _drawn(x, count) if count else ())
    return [next(seeds) if p > 0.0 else None for p in dropouts]


def _drawn(x: Tensor, count: int) -> Sequence[Tensor]:
    """Seeds from torch's generator on x's device, int64, of which a kernel reads the first element."""
    # 16 bytes apart: kernels are built for pointers so aligned.
    return torch.randint(2**63 - 1, (count, 2), device=x.device).unbind()


def _as_autocast(x: Tensor, projection: Projection) -> tuple[Tensor, Projection]:
    """x and the layer as autocast would have them; TypeError where weight or bias still differ from x."""
    x, weight, bias, lora_a, lora_b = _autocast(x, *projection[:4])
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    scaling, dropout_p = float(projection.scaling), float(projection.dropout_p)
    return x, Projection(weight, bias, lora_a, lora_b, scaling, dropout_p)


def _autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast does to a linear layer's inputs: everything but float64 in its dtype."""
    device = x.device.type
    on = device in _AUTOCASTS and torch.is_autocast_enabled(device)
    if not on or x.dtype == torch.float64:
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None else t.to(dtype) for t in (x, *tensors))


def _check_lora_linear(x: Tensor, projection: Projection) -> None:
    weight, bias, lora_a, lora_b, scaling, dropout_p = projection
    _check_number("scaling", scaling)
    _check_tensors(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)
    k, n = weight.shape if weight.dim() == 2 else (-1, -1)
    rank = lora_a.shape[0]
    _check_shapes(
        ("x", x, (*x.shape[:-1], k)),
        ("bias", bias, (n,)),
        ("lora_a", lora_a, (rank, k)),
        ("lora_b", lora_b, (n, rank)),
        against=f"weight of shape {tuple(weight.shape)} (in_features, out_features)",
    )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")


def _check_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
) -> None:
    _check_number("scale", scale)
    _check_tensors(x=x, down_weight=down_weight, down_bias=down_bias, up_weight=up_weight, up_bias=up_bias)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}: choose one of {', '.join(reference.ACTIVATIONS)}"
        )
    rank, k = down_weight.shape if down_weight.dim() == 2 else (-1, -1)
    _check_shapes(
        ("x", x, (*x.shape[:-1], k)),
        ("down_bias", down_bias, (rank,)),
        ("up_weight", up_weight, (k, rank)),
        ("up_bias", up_bias, (k,)),
        against=f"down_weight of shape {tuple(down_weight.shape)} (bottleneck, width)",
    )


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a number, got {type(value).__name__}, which would get no gradient here"
        )


def _check_tensors(x: Tensor, **others: Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}: use float32, bfloat16, float16 or float64")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")


def _check_shapes(*named: tuple[str, Tensor | None, tuple[int, ...]], against: str) -> None:
    for name, tensor, shape in named:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} beside {against}")
