"""LoRA layers in a row with what stands between them, by the kernels; a layer by itself is a chain of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft import reference, routes
from fastpeft.autocast import as_autocast, autocasts, layer_as_autocast
from fastpeft.kernels.rows import as_rows, as_taken, unrowed
from fastpeft.norms import norm_kind, norm_served
from fastpeft.projections import Projection, by_torch
from fastpeft.residuals import Residual, added
from fastpeft.routes import Decided, Options, Route


class Link(NamedTuple):
    """A LoRA layer of a chain, with what stands before and behind it."""

    projection: Projection
    norm: torch.nn.LayerNorm | None = None  # of what comes in, which goes on as the residual
    activates: bool = False  # the tanh GELU follows
    #: With which the result is dropped and added to the residual; None: it isn't.
    residual_p: float | None = None


class Chain(NamedTuple):
    """What is asked of the kernels."""

    rows: Tensor  # (M, K), or (..., K) and contiguous
    residual: Tensor | None  # contiguous, of the shape of what it is added to
    links: list[Link]
    stores: list[str]  # of each link, as `kernels.lora_layer.Call` has it


class How(NamedTuple):
    """How a chain is served: the route, and by kernels what each layer has prepared, whether its norm leaves its xa,
    and the route that its module records.
    """

    route: Route
    prepared: Sequence[Any] = ()
    shrinks: Sequence[bool] = ()
    routes: Sequence[Route] = ()


class Chained(NamedTuple):
    """What comes of a chain, the residual to go on with unless it was added, and the route of each link."""

    y: Tensor
    residual: Tensor | None
    routes: Sequence[Route]


def lora_chain(
    x: Tensor,
    residual: Tensor | None,
    links: list[Link],
    options: Options,
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
    chain = Chain(rows, residual, links, stores)
    how = served(chain, options, decided)
    if how.route.path != "triton":
        return None
    y, carried = by_kernels(chain, how)
    if rows is not x:
        y, carried = unrowed(y, x), None if carried is None else carried.view(x.shape)
    return Chained(added(y, outside), carried, how.routes)


def served(chain: Chain, options: Options, decided: Decided | None) -> How:
    """How a chain is served, for which Triton was chosen; found out once for its kind where that is kept."""
    if decided is None:
        return _found(chain, options)
    some = [
        (each.projection.dropout_p > 0.0, each.residual_p and True, each.norm and norm_kind(each.norm))
        for each in chain.links
    ]
    key = routes.kind_of(chain.rows, chain.residual), *some, *chain.stores
    return decided.answers.once(key, lambda: _found(chain, options))


def _found(chain: Chain, options: Options) -> How:
    """How a chain is served: by kernels where these serve all of it, are built and not slower."""
    from fastpeft.kernels import lora_chain, tuning

    rows, residual, links, stores = chain
    tensors = [t for link in links for t in link.projection[:4]]
    rank = max(link.projection.lora_b.shape[-1] for link in links)
    unsupported = routes.why_not_products(options.backend, rows, rank, *tensors, residual)
    alone = len(links) == 1 and links[0].norm is None
    if not alone and (unsupported or not _fits(chain)):
        return How(Route("torch", "layer by layer"))  # where each says why
    shrinks = []
    for i, link in enumerate(links):
        normed, by = residual if i else rows, "alone"
        if link.norm is not None and normed is not None:
            by = norm_served(normed, link.norm, link.projection, options.strict)
        if by == "stock":
            return How(Route("torch", "a LayerNorm that torch serves"))
        shrinks.append(by == "shrunk")
    how = How(routes.FUSED, [lora_chain.Layer() for _ in links], shrinks, _routes(links, shrinks))

    def through_kernels(x: Any, residual: Any, *tensors: Any) -> Tensor:
        return by_kernels(Chain(x, residual, _with(links, tensors), stores), how)[0]

    def through_pytorch(x: Any, residual: Any, *tensors: Any) -> Any:
        for projection, norm, activates, residual_p in _with(links, tensors):
            if norm is not None:
                residual, x = x, norm(x)
            x = by_torch(as_rows(x), projection, False)
            x = reference.gelu_new(x) if activates else x
            x = x if residual_p is None else added(x, Residual(as_rows(residual), residual_p))
        return x

    def ready() -> str | None:
        # Laid out as all rows of their kind: a single one's strides may be any.
        added_rows = None if residual is None else as_rows(residual)
        seed = torch.empty(2, dtype=torch.int64, device=rows.device)
        seeds = [seed if p > 0.0 else None for p in _drops(links)]
        return lora_chain.ready(as_rows(rows), added_rows, _for_kernels(chain, how, seeds))

    drops = tuple((link.projection.dropout_p, link.residual_p) for link in links)
    given = (rows, residual, *tensors)

    def slower() -> str | None:
        if any(link.projection.groups for link in links):  # by torch there is a product for every group
            return None
        return tuning.slower_than("lora_chain", given, drops, through_kernels, through_pytorch)

    route = routes.confirm(options, unsupported, ready, slower)
    return how if route.path == "triton" else How(route)


def _with(links: list[Link], tensors: Sequence[Any]) -> list[Link]:
    """Links of these weights, biases, lora_a and lora_b, four for each."""
    fours = zip(*[iter(tensors)] * 4, strict=True)
    names = Projection._fields[:4]
    return [
        link._replace(projection=link.projection._replace(**dict(zip(names, four, strict=True))))
        for link, four in zip(links, fours, strict=True)
    ]


def _fits(chain: Chain) -> bool:
    """Whether everything in a chain has one dtype and the widths that it takes, to be computed at once."""
    rows, residual, links, _ = chain
    width = rows.shape[-1]
    held = [*(t for link in links for t in link.projection[:2]), residual]
    held += [p for link in links if link.norm is not None for p in (link.norm.weight, link.norm.bias)]
    if any(t is not None and t.dtype != rows.dtype for t in held):
        return False
    for (weight, _, lora_a, lora_b, *_), norm, _, residual_p in links:
        ranks, ends = (lora_a.shape[-2], lora_b.shape[-1]), (lora_a.shape[-1], lora_b.shape[-2])
        if ends != tuple(weight.shape) or ranks[0] != ranks[1] or ends[0] != width:
            return False
        if norm is not None and (norm.weight is None or norm.weight.shape != (width,)):
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
        found.append(
            Route("triton", f"fused kernels, {' and '.join(names)} included") if names else routes.FUSED
        )
    return found


def by_kernels(chain: Chain, how: How) -> tuple[Tensor, Tensor | None]:
    """A chain by the kernels: its result, and the residual to go on with."""
    import fastpeft.kernels.lora_chain as kernels

    rows, residual, links, _ = chain
    return kernels.lora_chain(rows, residual, _for_kernels(chain, how, new_seeds(rows, *_drops(links))))


def _drops(links: list[Link]) -> list[float]:
    """Two dropouts for each link: before lora_a, and of the result."""
    return [p for link in links for p in (link.projection.dropout_p, link.residual_p or 0.0)]


def _for_kernels(chain: Chain, how: How, seeds: Sequence[Tensor | None]) -> list[Any]:
    """Links as the kernels take them, with a seed for each of their `_drops`."""
    import fastpeft.kernels.lora_chain as kernels

    found = []
    for i, (projection, norm, _, residual_p) in enumerate(chain.links):
        weight, bias, lora_a, lora_b, scaling, dropout_p, groups = projection
        inner, outer = seeds[2 * i], seeds[2 * i + 1]
        call = kernels.Call(
            scaling,
            None if inner is None else kernels.Dropout(dropout_p, inner),
            chain.stores[i],
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


def new_seeds(x: Tensor, *dropouts: float) -> list[Tensor | None]:
    """A seed for each of these dropouts that drops, drawn at once."""
    count = sum(p > 0.0 for p in dropouts)
    seeds = iter(_drawn(x, count) if count else ())
    return [next(seeds) if p > 0.0 else None for p in dropouts]


def _drawn(x: Tensor, count: int) -> Sequence[Tensor]:
    """Seeds from torch's generator on x's device, int64, of which a kernel reads the first element."""
    # 16 bytes apart: kernels are built for pointers so aligned.
    return torch.randint(2**63 - 1, (count, 2), device=x.device).unbind()
