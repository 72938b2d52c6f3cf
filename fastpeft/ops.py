"""The fused operations: validate, choose the backend, run it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import autograd, reference, routes
from fastpeft.autocast import as_autocast, autocasts, layer_as_autocast
from fastpeft.checks import check_adapter, check_lora_linear
from fastpeft.kernels.rows import as_rows, as_taken
from fastpeft.norms import norm_kind, norm_served
from fastpeft.projections import Grouped, Projection
from fastpeft.residuals import Residual, added, rows_of
from fastpeft.routes import Confirmed, Decided, Route


class Link(NamedTuple):
    """A LoRA layer of a chain, with what stands before and behind it."""

    projection: Projection
    norm: torch.nn.LayerNorm | None = None  # of what comes in, which goes on as the residual
    activates: bool = False  # the tanh GELU follows
    residual_p: float | None = (
        None  # with which the result is dropped and added to the residual; None: it isn't
    )


class Chained(NamedTuple):
    """What comes of a chain, the residual to go on with unless it was added, and the route of each link."""

    y: Tensor
    residual: Tensor | None
    routes: Sequence[Route]


def _once(
    decided: Decided | None,
    route: Route,
    backend: str,
    strict: bool,
    rows: Tensor,
    residual: Tensor | None,
    links: list[Link],
    stores: list[str],
) -> Confirmed:
    """What `_confirmed` says; asked once for such a call."""
    if decided is None:
        return _confirmed(route, backend, strict, rows, residual, links, stores)
    some = [
        (each.projection.dropout_p > 0.0, each.residual_p and True, each.norm and norm_kind(each.norm))
        for each in links
    ]
    key = routes.kind_of(rows, residual), *some, *stores
    return decided.answers.once(
        key, lambda: _confirmed(route, backend, strict, rows, residual, links, stores)
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
    layer: Projection | Grouped,
    backend: str,
    exact: bool,
    strict: bool = False,
    residual: Residual | None = None,
    decided: Decided | None = None,
) -> tuple[Tensor, Route]:
    """`lora_linear`, added to a residual if there is one, with the route it took, which modules record.

    Of a `Grouped` layer each group of rows has an update of its own; it isn't traced.
    """
    if decided is None:
        for each in [layer] if isinstance(layer, Projection) else layer.apart():
            check_lora_linear(x, each)
    route = (routes.route_for if decided is None else decided.chosen)(backend, exact, x.device)
    if decided is None or autocasts(x):
        x, layer = layer_as_autocast(x, layer)
    projection: Projection | None = None
    if route.path == "triton":
        projection = layer.stacked(x.device) if isinstance(layer, Grouped) else layer
        route = route if projection is not None else Route("torch", "no row has an update")
    if projection is not None:
        import fastpeft.kernels.launch as launch
        import fastpeft.kernels.lora_linear as kernels

        if not launch.eager(x):
            rows = as_rows(x)
            found = _confirmed(route, backend, strict, rows, None, [Link(projection)], ["y"]).route
            if found.path == "triton":
                (seed,) = _new_seeds(x, projection.dropout_p)
                y = kernels.lora_linear(rows, *projection[:6], seed)
                return added(_unrowed(y, x), residual), found
        else:
            rows = as_taken(x)
            residual_rows, residual_p = rows_of(residual, rows)
            links = [Link(projection, residual_p=residual_p)]
            found, how = _once(decided, route, backend, strict, rows, residual_rows, links, ["y"])
            if found.path == "triton":
                y, _ = _through_kernels(rows, residual_rows, links, ["y"], how)
                y = y if rows is x else _unrowed(y, x)
                return y if residual_rows is not None else added(y, residual), found
        route = found
    rows = as_rows(x)
    if isinstance(layer, Projection) and (torch.compiler.is_compiling() or routes.transformed()):
        # The compiler fuses the plain formula by itself.
        weight, bias, lora_a, lora_b, scaling, dropout_p, _ = layer
        dropped = F.dropout(x, dropout_p).to(lora_a.dtype)
        update = scaling * (dropped @ lora_a.T @ lora_b.T)
        y = (F.linear(x, weight.T, bias) + update).to(x.dtype)
    else:
        y = _by_torch(rows, layer, exact)
    return added(_unrowed(y, x), residual), route


def _by_torch(rows: Tensor, layer: Projection | Grouped, exact: bool) -> Tensor:
    """A LoRA layer of rows (M, K) on the PyTorch path."""
    parts: Sequence[autograd.Part]
    if isinstance(layer, Grouped):
        weight, bias, *_ = layer
        parts, factors = layer.parts()
    else:
        weight, bias, *factors, scaling, dropout_p, _ = layer
        parts = (autograd.Part(None, scaling, dropout_p),)
    return autograd.LoraLinear.apply(rows, weight, bias, parts, exact, *factors)


def _unrowed(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) in the grid of x (..., K)."""
    return y if x.dim() == y.dim() else y.view(*x.shape[:-1], y.shape[-1])


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W + b`, x (..., K) and weight (K, N) as `Conv1D` has it, by `gemm.mm`; differentiable by x alone."""
    return _unrowed(autograd.Linear.apply(as_rows(x), weight, bias), x)


def lora_chain(
    x: Tensor,
    residual: Tensor | None,
    links: list[Link],
    backend: str,
    strict: bool = False,
    decided: Decided | None = None,
) -> Chained | None:
    """LoRA layers in a row with what stands between them, by the kernels; None where these won't serve them at once.

    For devices that `choose` gives to Triton: outside the kernels there is nothing to gain over layer by layer.
    x (..., K); the residual has the shape of what it is added to.
    """
    import fastpeft.kernels.launch as launch  # `from fastpeft.kernels import launch` takes ten times as long
    import fastpeft.kernels.lora_chain as kernels

    if not launch.eager(x):
        return None
    outside = None
    if autocasts(x):
        # A LayerNorm and a sum are float32 there, the layers between them aren't.
        if any(link.norm or (link.residual_p is not None and link is not links[-1]) for link in links):
            return None
        links = [link._replace(projection=layer_as_autocast(x, link.projection)[1]) for link in links]
        x, *_ = as_autocast(x)
        if residual is not None and residual.dtype != x.dtype and links[-1].residual_p is not None:
            outside, residual = Residual(residual, links[-1].residual_p), None
            links[-1] = links[-1]._replace(residual_p=None)
    rows = as_taken(x)
    if residual is not None:
        residual = residual.contiguous() if rows is x else as_rows(residual.contiguous())
    layers, activated = [link.projection for link in links], [link.activates for link in links]
    stores = kernels.stores(rows, residual, layers, activated)
    route, how = _once(decided, _FUSED, backend, strict, rows, residual, links, stores)
    if route.path != "triton":
        return None
    y, carried = _through_kernels(rows, residual, links, stores, how)
    if rows is not x:
        y, carried = _unrowed(y, x), None if carried is None else _unrowed(carried, x)
    return Chained(added(y, outside), carried, how.routes)


_FUSED = Route("triton", "fused kernels")


class How(NamedTuple):
    """How the kernels serve a chain: what each layer has prepared, whether its norm leaves its xa, and the routes."""

    prepared: list[Any]
    shrinks: list[bool]
    routes: list[Route]


def _through_kernels(
    rows: Tensor, residual: Tensor | None, links: list[Link], stores: list[str], how: How
) -> tuple[Tensor, Tensor | None]:
    """A chain by the kernels: its result, and the residual to go on with."""
    import fastpeft.kernels.lora_chain as kernels

    drops = [p for link in links for p in (link.projection.dropout_p, link.residual_p or 0.0)]
    return kernels.lora_chain(rows, residual, _for_kernels(links, stores, how, _new_seeds(rows, *drops)))


def _for_kernels(links: list[Link], stores: list[str], how: How, seeds: Sequence[Tensor | None]) -> list[Any]:
    """Links as the kernels take them, with two seeds for each: of the mask before lora_a, and of the residual's."""
    import fastpeft.kernels.lora_chain as kernels

    found = []
    for i, (projection, norm, _, residual_p) in enumerate(links):
        weight, bias, lora_a, lora_b, scaling, dropout_p, groups = projection
        inner, outer = seeds[2 * i], seeds[2 * i + 1]
        call = kernels.Call(
            scaling,
            None if inner is None else kernels.Dropout(dropout_p, inner),
            stores[i],
            None if outer is None else kernels.Dropout(residual_p or 0.0, outer),
            groups,
        )
        before = None
        if norm is not None:
            held: Any = norm._parameters  # an attribute's look-up takes ten times as long
            before = kernels.Norm(held["weight"], held["bias"], norm.eps, how.shrinks[i])
        layer = weight, bias, lora_a, lora_b
        found.append(kernels.Link(layer, call, how.prepared[i], before, residual_p is not None))
    return found


def _confirmed(
    route: Route,
    backend: str,
    strict: bool,
    rows: Tensor,
    residual: Tensor | None,
    links: list[Link],
    stores: list[str],
) -> Confirmed:
    """How a chain's call is served: by `route`, prepared, where kernels serve all of it, are built and not slower."""
    from fastpeft.kernels import lora_chain, tuning

    tensors = [t for link in links for t in link.projection[:4]]
    rank = max(link.projection.lora_b.shape[-1] for link in links)
    unsupported = routes.why_not_products(backend, rows, rank, *tensors, residual)
    alone = len(links) == 1 and links[0].norm is None
    if not alone and (unsupported or not _fit(rows, residual, links)):
        return Confirmed(Route("torch", "layer by layer"))  # where each says why
    shrinks = []
    for i, link in enumerate(links):
        normed, served = residual if i else rows, "alone"
        if link.norm is not None and normed is not None:
            served = norm_served(normed, link.norm, link.projection, strict)
        if served == "stock":
            return Confirmed(Route("torch", "a LayerNorm that torch serves"))
        shrinks.append(served == "shrunk")
    how = How([lora_chain.Layer() for _ in links], shrinks, _routes(links, shrinks))

    def through_kernels(x: Any, residual: Any, *tensors: Any) -> Tensor:
        return _through_kernels(x, residual, _with(links, tensors), stores, how)[0]

    def through_pytorch(x: Any, residual: Any, *tensors: Any) -> Any:
        for projection, norm, activates, residual_p in _with(links, tensors):
            if norm is not None:
                residual, x = x, norm(x)
            x = _by_torch(as_rows(x), projection, False)
            x = reference.gelu_new(x) if activates else x
            x = x if residual_p is None else added(x, Residual(as_rows(residual), residual_p))
        return x

    def ready() -> str | None:
        # Laid out as all rows of their kind: a single one's strides may be any.
        added_rows = None if residual is None else as_rows(residual)
        seed = torch.empty(2, dtype=torch.int64, device=rows.device)
        drops = [p for link in links for p in (link.projection.dropout_p, link.residual_p or 0.0)]
        seeds = [seed if p > 0.0 else None for p in drops]
        return lora_chain.ready(as_rows(rows), added_rows, _for_kernels(links, stores, how, seeds))

    drops = tuple((link.projection.dropout_p, link.residual_p) for link in links)
    given = (rows, residual, *tensors)

    def slower() -> str | None:
        if any(link.projection.groups for link in links):  # by torch there is a product for every group
            return None
        return tuning.slower_than("lora_chain", given, drops, through_kernels, through_pytorch)

    return Confirmed(routes.confirm(route, backend, strict, unsupported, ready, slower), how)


def _with(links: list[Link], tensors: Sequence[Any]) -> list[Link]:
    """Links of these weights, biases, lora_a and lora_b, four for each."""
    fours = zip(*[iter(tensors)] * 4, strict=True)
    names = Projection._fields[:4]
    return [
        link._replace(projection=link.projection._replace(**dict(zip(names, four, strict=True))))
        for link, four in zip(links, fours, strict=True)
    ]


def _fit(rows: Tensor, residual: Tensor | None, links: list[Link]) -> bool:
    """Whether everything in a chain has one dtype and the widths that it takes, to be computed at once."""
    width = rows.shape[-1]
    held = [*(t for link in links for t in link.projection[:2]), residual]
    held += [p for link in links if link.norm is not None for p in (link.norm.weight, link.norm.bias)]
    if any(t is not None and t.dtype != rows.dtype for t in held):
        return False
    for (weight, _, lora_a, lora_b, *_), norm, _, residual_p in links:
        ranks, ends = (lora_a.shape[-2], lora_b.shape[-1]), (lora_a.shape[-1], lora_b.shape[-2])
        if ends != tuple(weight.shape) or ranks[0] != ranks[1] or ends[0] != width:
            return False
        if norm is not None and norm.weight.shape != (width,):
            return False
        width = ends[1]
        if residual_p is not None and residual is not None and residual.shape != (*rows.shape[:-1], width):
            return False
    return True


def _routes(links: list[Link], shrinks: list[bool]) -> list[Route]:
    """The route of each link, by what is included; layers that a GELU joins have one."""
    found: list[Route] = []
    for i, link in enumerate(links):
        if i and links[i - 1].activates:
            found.append(found[-1])
            continue
        names = [name for name, there in (("LayerNorm", shrinks[i]), ("GELU", link.activates)) if there]
        found.append(Route("triton", f"fused kernels, {' and '.join(names)} included") if names else _FUSED)
    return found


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
        check_adapter(x, down_weight, down_bias, up_weight, up_bias, activation, scale)
        route = routes.route_for(backend, exact, x.device)
    else:
        route = decided.chosen(backend, exact, x.device)
    rows, scale = as_rows(x), float(scale)
    if route.path == "triton":
        from fastpeft.kernels import adapter as kernels
        from fastpeft.kernels import launch, tuning

        residual_rows, _ = rows_of(outer, rows)

        def through_kernels(x: Any, down: Any, down_bias: Any, up: Any, up_bias: Any, more: Any) -> Tensor:
            return kernels.adapter(x, down, down_bias, up, up_bias, activation, scale, more)

        def through_pytorch(*tensors: Any) -> Any:
            y = autograd.Adapter.apply(*tensors[:5], activation, scale)
            return y if residual_rows is None else y + tensors[5]

        given = (rows, down_weight, down_bias, up_weight, up_bias, residual_rows)

        def found() -> Confirmed:
            confirmed = routes.confirm(
                route,
                backend,
                strict,
                launch.unsupported(rows, down_weight.shape[0], *given),
                lambda: kernels.ready(*given[:5], activation, residual_rows),
                lambda: tuning.slower_than("adapter", given, (activation,), through_kernels, through_pytorch),
            )
            return Confirmed(confirmed)

        kind = routes.kind_of(rows, residual_rows)
        route, _ = found() if decided is None else decided.answers.once(kind, found)
        if route.path == "triton":
            y = through_kernels(*given).view(x.shape)
            return y if residual_rows is not None else added(y, outer), route
    wide = torch.promote_types(x.dtype, down_weight.dtype) if exact else x.dtype
    if (
        torch.compiler.is_compiling() or routes.transformed()
    ):  # the compiler fuses the plain formula by itself
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


def _new_seeds(x: Tensor, *dropouts: float) -> list[Tensor | None]:
    """A seed for each of these dropouts that drops, drawn at once."""
    count = sum(p > 0.0 for p in dropouts)
    seeds = iter(_drawn(x, count) if count else ())
    return [next(seeds) if p > 0.0 else None for p in dropouts]


def _drawn(x: Tensor, count: int) -> Sequence[Tensor]:
    """Seeds from torch's generator on x's device, int64, of which a kernel reads the first element."""
    # 16 bytes apart: kernels are built for pointers so aligned.
    return torch.randint(2**63 - 1, (count, 2), device=x.device).unbind()
