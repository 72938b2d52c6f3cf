"""The language model's loss without its logits: head, softmax and gradient, a tile of logits at a time.

Rows whose label is ignored are never projected. Where the head is frozen, each tile adds what it has of the gradient of
the losses to the hidden states while its logits are there, whatever is still to come, as FlashAttention adds up its
values (Dao et al., 2022); where it trains, or 16 bits are smoothed, backward makes logits again, a chunk of rows at
a time.

torch's own chunks (`F.linear_cross_entropy` with options, from 2.13 on) were measured beside these on the CPU, by
`pytest bench/bench_lm_head.py`: half as long again at best, many times as long at the size that torch chooses, and
ignored labels cost them what others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import reference, routes
from fastpeft.autocast import as_autocast
from fastpeft.autograd import asked, watched
from fastpeft.checks import check_dtypes, check_shapes, check_tensors
from fastpeft.gemm import mm
from fastpeft.routes import Options, Route

REDUCTIONS = ("mean", "sum", "none")
#: Logits in a chunk: rows enough for a product with the weight not to wait for the weight.
_CHUNK = 2**24
#: Logits in a tile on the CPU, whose caches hold them from one pass to the next; elsewhere they are a chunk's.
_TILE = 2**21
_COLUMNS = 512  # of a tile at least, which is what the product with the weight sums up


def lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """`cross_entropy(hidden weightᵀ + bias, labels)`, without ever holding the logits of all rows.

    As `F.cross_entropy` of the logits in float32: softmax is exact, and the same at each run.

    Args:
        hidden: (..., K), float32, bfloat16, float16 or float64, any strides.
        weight: (V, K) in hidden's dtype, any strides, as `lm_head.weight` is.
        labels: (...), int64: the token that each position is to predict (already shifted), or `ignore_index`.
        bias: (V,) in hidden's dtype, or None.
        ignore_index: the label of positions that count nowhere.
        reduction: `mean` over the labels that count, `sum`, or `none`: a loss for each label.
        num_items: what the sum is divided by instead of the number of labels that count, in the place of `mean`:
            transformers' `num_items_in_batch`.
        label_smoothing: the share of the target that is spread over all V tokens (Szegedy et al., 2016), 0 to 1.
        backend: `auto` (Triton for CUDA tensors where it serves the case, else PyTorch), `triton` or `torch`.

    Returns:
        The loss, float32 (float64 of float64): a scalar, or (...) for `none`. NaN for the mean of no label that
        counts, as torch has it. Differentiable by hidden, weight and bias, any number of times; a second
        derivative holds all logits.

    Raises:
        ValueError: shapes, devices or options that don't fit; `backend="triton"` where it can't serve, with the reason.
        TypeError: a dtype or layout that isn't served, or weight or bias in another dtype than hidden's.
        IndexError: a label outside 0 to V - 1 that isn't `ignore_index`, naming it.
    """
    loss, _ = routed_lm_head_loss(
        hidden, weight, labels, bias, ignore_index, reduction, num_items, label_smoothing, backend
    )
    return loss


def routed_lm_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_items: Tensor | float | None,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Route]:
    """`lm_head_loss`, with the route it took, which a head records."""
    _check(hidden, weight, labels, bias, reduction, num_items, label_smoothing)
    hidden, weight, bias = as_autocast(hidden, weight, bias)
    check_dtypes(hidden=hidden, weight=weight, bias=bias)
    route = routes.route_for(Options(backend), hidden.device)
    targets = labels.reshape(-1)
    counts = targets != ignore_index
    if torch.compiler.is_compiling() or routes.transformed():
        # What traces or transforms knows the plain formula.
        losses = reference.lm_head_losses(
            hidden.flatten(0, -2), weight, bias, targets, ignore_index, label_smoothing
        )
    else:
        rows = counts.nonzero()[:, 0]
        states = hidden.reshape(-1, hidden.shape[-1])
        some = len(rows) < len(targets)
        states, kept = (t.index_select(0, rows) if some else t for t in (states, targets))
        _check_range(kept, len(weight))
        trains = any(t is not None and t.requires_grad for t in (weight, bias))
        ahead = torch.is_grad_enabled() and hidden.requires_grad and not trains
        given = states, weight, bias, kept, label_smoothing, ahead
        if route.path == "triton":
            route = _confirmed(backend, *given)
        losses = LmHeadLoss.apply(*given, route.path == "triton")
        if some and reduction == "none":
            losses = losses.new_zeros(len(targets)).index_copy(0, rows, losses)
    if reduction == "none":
        return losses.view(labels.shape), route
    return _reduced(losses.sum(), counts, reduction, num_items), route


def _confirmed(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float,
    ahead: bool,
) -> Route:
    """The route of these operands: whether the kernels serve them, are built and not measured slower."""
    from fastpeft.kernels import lm_head as kernels
    from fastpeft.kernels import tuning

    def through(by_kernels: bool) -> Callable[..., Tensor]:
        return lambda *tensors: LmHeadLoss.apply(*tensors, labels, smoothing, ahead, by_kernels)

    operands = hidden, weight, bias
    return routes.confirm(
        Options(backend),
        routes.why_not_products(backend, hidden, 1, weight, bias),
        lambda: kernels.ready(*operands),
        lambda: tuning.slower_than("lm_head", operands, (smoothing, ahead), through(True), through(False)),
    )


def _reduced(total: Tensor, counts: Tensor, reduction: str, num_items: Tensor | float | None) -> Tensor:
    if reduction == "sum":
        return total
    if num_items is None:
        return total / counts.sum()
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


class LmHeadLoss(torch.autograd.Function):
    """The loss of each row, all of whose labels count: with logits l = h Wᵀ + b, and ε of the target spread evenly,

        loss = logsumexp(l) - (1 - ε) l[label] - ε mean(l)        dl = softmax(l) - (1 - ε) onehot(label) - ε / V
        dh = dl W        dW = dlᵀ h        db = Σ dl

    `ahead` has dh computed beside the losses, unscaled: in 16 bits its last factor may be a loss scaler's. With
    `by_kernels` Triton's compute both.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        smoothing: float,
        ahead: bool,
        by_kernels: bool,
    ) -> Tensor:
        if by_kernels:
            from fastpeft.kernels import lm_head as kernels

            losses, d_hidden = kernels.losses(
                hidden, weight, labels, bias, smoothing=smoothing, gradient=ahead
            )
        else:
            # A target spread over all tokens has to be taken from their shares before 16 bits round these.
            ahead = ahead and (smoothing == 0.0 or hidden.dtype.itemsize > 2)
            losses, d_hidden = _by_tiles(hidden, weight, bias, labels, smoothing, ahead)
        ctx.save_for_backward(hidden, weight, bias, labels, d_hidden)
        ctx.smoothing = smoothing
        ctx.set_materialize_grads(False)
        return losses

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 7
        if watched():
            return LmHeadLoss._plain_backward(ctx, dy)
        hidden, weight, bias, labels, d_hidden = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        if d_hidden is not None:
            return (d_hidden * dy[:, None]).to(hidden.dtype), *(None,) * 6
        d_hidden = hidden.new_empty(hidden.shape) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=dy.dtype) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=dy.dtype) if need_bias else None

        def take(rows: slice, d_logits: Tensor) -> None:
            d_logits *= dy[rows, None]
            d_narrow = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_narrow, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight.add_(d_narrow.T @ hidden[rows])
            if d_bias is not None:
                d_bias.add_(d_logits.sum(0))

        _each_chunk(hidden, weight, bias, labels, ctx.smoothing, take)
        d_weight, d_bias = (g if g is None else g.to(hidden.dtype) for g in (d_weight, d_bias))
        return d_hidden, d_weight, d_bias, *(None,) * 4

    @staticmethod
    def _plain_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """The same gradients by operations that torch differentiates, of saved tensors that are inputs all."""
        hidden, weight, bias, labels, _ = ctx.saved_tensors
        logits = F.linear(hidden, weight, bias).to(dy.dtype)
        target = F.one_hot(labels, len(weight)) * (1.0 - ctx.smoothing) + ctx.smoothing / len(weight)
        d_logits = dy[:, None] * (logits.softmax(1) - target)
        d_narrow = d_logits.to(hidden.dtype)
        gradients = d_narrow @ weight, d_narrow.T @ hidden, d_logits.sum(0).to(hidden.dtype)
        needed = ctx.needs_input_grad
        return *asked(gradients, needed[:3]), *(None,) * 4


def _by_tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses, and where `gradient`, that of their sum to hidden, in hidden's dtype."""
    losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if gradient else None
    most = _TILE if routes.on_cpu(hidden) else _CHUNK
    for rows in _chunks(len(hidden), most // _COLUMNS):
        columns = most // (rows.stop - rows.start)
        given = hidden[rows], weight, bias, labels[rows, None], smoothing, columns
        losses[rows], found = _of_rows(*given, gradient)
        if d_hidden is not None and found is not None:
            d_hidden[rows] = found
    return losses, d_hidden


def _of_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    smoothing: float,
    columns: int,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """`_by_tiles` of rows with these labels (M, 1), so many columns at a time.

    With m the largest logit so far, tiles sum up `rest = Σ exp(l - m)` and `d = Σ exp(l - m) W` over all but the label,
    whose share is known last: what is left of it and its target may be far smaller than either.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    top = hidden.new_full(label.shape, torch.finfo(wide).min, dtype=wide)
    rest, of_label, summed = (torch.zeros_like(top) for _ in range(3))
    d_hidden = hidden.new_zeros(hidden.shape, dtype=wide) if gradient else None
    target = weight.index_select(0, label[:, 0]) if gradient else weight[:0]
    for start in range(0, len(weight), columns):
        some = weight[start : start + columns]
        logits = mm(hidden, some.T, None if bias is None else bias[start : start + columns]).to(wide)
        column = (label - start).clamp(0, len(some) - 1)
        here = column == label - start
        of_label = torch.where(here, logits.gather(1, column), of_label)
        if smoothing > 0.0:
            summed += logits.sum(1, keepdim=True)
        before, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
        powers = logits.sub_(top).exp_()
        powers.scatter_(1, column, powers.gather(1, column).masked_fill_(here, 0.0))
        shrunk, sums = before.sub_(top).exp_(), powers.sum(1, keepdim=True)
        rest.mul_(shrunk).add_(sums)
        if d_hidden is not None:
            d_hidden.mul_(shrunk).add_(_weighed(powers, sums, some, target))
        del logits, powers  # before the next are made
    total = rest + (of_label - top).exp()
    aim = of_label
    if smoothing > 0.0:
        aim = (1.0 - smoothing) * of_label + smoothing * (summed / len(weight))
    losses = (top - aim + total.log())[:, 0]
    if d_hidden is not None:
        d_hidden.div_(total).addcmul_(smoothing - rest / total, target)
        if smoothing > 0.0:
            d_hidden.sub_(smoothing * weight.mean(0, dtype=wide))
    return losses, d_hidden


def _weighed(powers: Tensor, sums: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """`powers weight`, powers (M, N) with these sums (M, 1), which it overwrites; target (M, K) is the label's weight.

    16 bits hold the shares of any sum, and the product rounds, as stock's does, what is left of the target.
    """
    if powers.dtype == weight.dtype:
        return mm(powers, weight)
    shares = powers.div_(sums.clamp_min(torch.finfo(sums.dtype).tiny)).to(weight.dtype)
    return sums * (torch.addmm(-target, shares, weight).to(sums.dtype) + target)


def _chunks(count: int, most: int) -> Iterator[slice]:
    """So many rows in parts of nearly one size, none larger than `most`."""
    parts = -(-count // most)
    for i in range(parts):
        yield slice(count * i // parts, count * (i + 1) // parts)


def _each_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float,
    take: Callable[[slice, Tensor], None],
) -> None:
    """Hands `take` each chunk's rows, and the gradient of their losses' sum to their logits.

    A chunk is gone before the next is made, unless `take` keeps it.
    """
    for rows in _chunks(len(hidden), max(_CHUNK // len(weight), 1)):
        take(rows, _d_logits(hidden[rows], weight, bias, labels[rows, None], smoothing))


def _d_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, label: Tensor, smoothing: float) -> Tensor:
    """The gradient of the sum of some rows' losses to their logits."""
    logits = mm(hidden, weight.T, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    # A pass in place on the CPU, whose kernel reads a row's elements before it writes them.
    shares = torch.softmax(logits, 1, out=logits if routes.on_cpu(logits) else None)
    if smoothing > 0.0:
        shares -= smoothing / len(weight)
    return shares.scatter_(1, label, shares.gather(1, label) - (1.0 - smoothing))


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    reduction: str,
    num_items: Tensor | float | None,
    label_smoothing: float,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items takes the place of the mean's count, and reduction is {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    check_tensors(hidden=hidden, weight=weight, bias=bias)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels have dtype {labels.dtype}: use int64, as labels.long() gives")
    if labels.device != hidden.device:
        raise ValueError(
            f"labels are on {labels.device} and hidden on {hidden.device}: move them to one device"
        )
    v, k = weight.shape if weight.dim() == 2 else (-1, -1)
    check_shapes(
        ("hidden", hidden, (*labels.shape, k)),
        ("bias", bias, (v,)),
        against=f"labels of shape {tuple(labels.shape)} and weight of shape {tuple(weight.shape)} (vocabulary, width)",
    )


def _check_range(labels: Tensor, vocabulary: int) -> None:
    if labels.numel():
        for found in torch.stack(labels.aminmax()).tolist():
            if not 0 <= found < vocabulary:
                raise IndexError(
                    f"label {found} is out of range: the vocabulary has {vocabulary} tokens, 0 to {vocabulary - 1}"
                )
