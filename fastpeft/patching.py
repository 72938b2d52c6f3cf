"""One walk over the modules: decide for each, then swap classes; and the way back."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2Model
from transformers.pytorch_utils import Conv1D

from fastpeft import probe, routes
from fastpeft.adapters import Adapter, ParallelAdapter
from fastpeft.fused_adapter import FusedAdapter, why_not_adapter
from fastpeft.graphs import Graphs
from fastpeft.heads import HEADS, LANGUAGE_MODELS, why_not_head
from fastpeft.lora import why_not_lora
from fastpeft.modules import FROZEN, why_not_frozen
from fastpeft.packing import PackedModel, PackingSite, why_not_model
from fastpeft.swap import Site, is_below, is_fused, restore, stock_class, swap
from fastpeft.trunk import Trunk

SCOPES = ("auto", "model", "layers")
#: Stock classes of the modules that only the runtime on packed tokens swaps, beside GPT2Model itself.
_RUNTIME = (GPT2Block, GPT2Attention, GPT2MLP, *HEADS)
#: Why a module that looks like an adapter was refused when it was probed, which nothing but `patch` does.
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class Candidate(NamedTuple):
    """A module that fastpeft knows: whether it is swapped for a fused one, and the reason why it stays stock."""

    name: str
    module: Any
    kind: str
    swaps: bool
    reason: str | None


def patch(
    model: nn.Module,
    backend: str = "auto",
    strict: bool = False,
    exact: bool = False,
    scope: str = "auto",
    graphs: bool = False,
) -> nn.Module:
    """Swap the LoRA layers, bottleneck adapters and `gelu_new` of `model` for fused ones, in place.

    So are its other frozen linear layers, where oneDNN by itself is faster than what torch does (`gemm.by_onednn`);
    not in a model that has nothing else to fuse and is no GPT-2.
    Parameters, state-dict keys, hooks and gradients stay what they were; `unpatch` undoes it. What can't be
    fused stays stock, with the reason in `report`. A second call takes up what was added since, and its
    arguments replace the first call's.

    Args:
        model: a GPT-2 with any head, plain, with adapters, or wrapped by peft; LoRA over `nn.Linear` is fused
            in other architectures too.
        backend: `auto` (Triton where tensors are on CUDA and the case is served, else PyTorch), `triton`
            or `torch`.
        strict: raise where a site can't be fused, instead of leaving it stock.
        exact: on the CPU, peft's own random numbers and stock's arithmetic, to compare number by number.
        scope: `auto` also runs GPT-2 on packed tokens, without the padding that the attention mask hides, wherever
            what is read of its last hidden state is known from the head and the arguments, and holds no padding:
            sequence classification, whose last block goes on only at the token it reads; language modelling and token
            classification with labels that count at no hidden position, whose logits are zero there. Hooks, modules of
            one's own, or a caller that isn't known keep a padded batch stock. `model` packs for any caller, who
            thereby says that nothing is read at hidden positions: the last hidden state is zero there. Triton's
            kernels then take in the GELU, dropouts, residuals and LayerNorms beside the LoRA projections; on the CPU
            the dropouts of attention and residuals draw fewer numbers. `layers` swaps layers one by one and nothing
            else, as `exact` does.
        graphs: on CUDA, run the blocks of packed calls as CUDA graphs, one for each size, captured at its second call:
            for a model as small as GPT-2 the host otherwise takes longer to launch a step's kernels than the GPU to run
            them. Token counts and lengths are rounded up, by an eighth and a quarter at most. What can't be captured
            runs as without, with the reason in `report`: a cache (train with `use_cache=False`), gradient
            checkpointing, eager attention, a second forward pass before the first one's backward.

    Returns:
        The model.

    Raises:
        ValueError: an unknown `backend` or `scope`, `graphs` where nothing is packed, a backend that can't serve the
            model here, or, with `strict`, a site that can't be fused or none at all; nothing is changed then.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    if graphs and (scope == "layers" or exact):
        raise ValueError("graphs=True runs packed calls: choose scope='auto' or 'model', and not exact=True")
    found = candidates(model, probing=True)
    # Nobody asked for these, so they decide nothing.
    options = routes.Options(backend, exact, strict)
    plan = [candidate for candidate in found if candidate.kind not in ("frozen", "packing", "loss")]
    for candidate in plan:
        device = next((p.device for p in candidate.module.parameters()), None)
        if device is not None and candidate.swaps:
            routes.choose(options, device)
    swaps = [c for c in (plan if exact else found) if c.swaps]
    runtime = [] if scope == "layers" or exact else _runtime(model)
    if strict:
        coming = {id(c.module) for c in swaps} | {id(m) for _, m in runtime}
        stock = [f"{c.name}: {c.reason}" for c in plan if c.reason]
        for name, module in runtime:
            if stock_class(type(module)) is GPT2Model:
                reason = why_not_model(module) or Trunk().walk(module, coming)
                stock += [f"{name}: {reason}"] if reason else []
        if stock or not plan:
            raise ValueError("can't fuse " + ("; ".join(stock) or f"anything in {type(model).__name__}"))
    if not plan:
        warnings.warn(
            f"fastpeft.patch found nothing to fuse in {type(model).__name__}: no LoRA layer, bottleneck "
            "adapter or gelu_new activation",
            stacklevel=2,
        )
    kept = {id(c.module) for c in swaps if c.kind == "frozen"} | {id(m) for _, m in runtime}
    # Frozen layers that aren't served any more, or have LoRA around them now; a runtime that isn't asked for any more.
    restore(m for m in model.modules() if is_fused(m) and _is_optional(m) and id(m) not in kept)
    for name, module, kind, *_ in swaps:
        swap(module, Site(name, options), FusedAdapter if kind == "adapter" else None)
    for name, module in runtime:
        whole = stock_class(type(module)) is GPT2Model
        asked = {"only_unmasked": scope == "model", "graphs": Graphs() if graphs else None}
        swap(module, PackingSite(name, options, **cast(Any, asked)) if whole else Site(name, options))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give every swapped module of `model` its stock class back, in place; returns the model.

    Raises:
        ValueError: another library (FSDP, a parametrization) has put its class on top of a fused one since; nothing
            is changed then.
    """
    restore(model.modules())
    return model


def _is_optional(module: nn.Module) -> bool:
    return type(module) in FROZEN or stock_class(type(module)) in (GPT2Model, *_RUNTIME)


def _runtime(model: nn.Module) -> list[tuple[str, Any]]:
    """Every module that the runtime on packed tokens swaps, with its name: GPT-2, parts of it, and its known heads."""
    found = [(name or "model", m) for name, m in model.named_modules() if stock_class(type(m)) is GPT2Model]
    transformers = {id(transformer) for _, transformer in found}
    for prefix, transformer in list(found):
        for name, module in transformer.named_modules(prefix=prefix):
            if stock_class(type(module)) in (GPT2Block, GPT2Attention, GPT2MLP) and "forward" not in vars(
                module
            ):
                found.append((name, module))
    for name, module in model.named_modules():
        if stock_class(type(module)) in HEADS and id(module._modules.get("transformer")) in transformers:
            found.append((name or "model", module))
    return found


def candidates(model: nn.Module, *, probing: bool = False) -> list[Candidate]:
    """Every module of `model` that fastpeft could fuse, fused already or not, in the model's order.

    `probing` runs the forward of a copy of what looks like a user's own adapter; else the last probe's reason is told.
    """
    found: list[Candidate] = []
    parts: set[int] = set()  # of LoRA layers and adapters
    for name, module in model.named_modules():
        decision = _decide(module, probing)
        if decision is None and id(module) not in parts:
            decision = _decide_frozen(module)
        elif decision is not None and decision[0] in ("lora", "adapter"):
            parts.update(id(part) for part in module.modules())
        if decision is not None:
            found.append(Candidate(name or type(model).__name__, module, *decision))
    if any(c.kind != "frozen" or is_fused(c.module) for c in found) or _runtime(model):
        return found
    return []  # frozen layers alone, of what is no GPT-2, are nobody's business here


def _decide(module: Any, probing: bool) -> tuple[str, bool, str | None] | None:
    """Kind, whether to swap, and reason for one module; None for a module that is none of our business.

    Stock classes are compared exactly: a subclass (a quantised layer, one that FSDP swapped) may do more.
    A fused class stays what it is, also below the class that FSDP has put on top.
    """
    kind: Any = type(module)
    stock = stock_class(kind)
    below = is_below(module)
    if isinstance(module, LoraLayer):
        if stock is LoraLinear or below:
            return "lora", True, why_not_lora(module)
        return "lora", False, f"{kind.__module__}.{kind.__name__} isn't peft's lora.Linear"
    if isinstance(module, FusedAdapter) or kind is Adapter:
        return "adapter", True, why_not_adapter(module)
    if kind is ParallelAdapter:
        return "adapter", False, "it reads another tensor than the one it is added to"
    if isinstance(module, Adapter):
        return "adapter", False, f"{kind.__module__}.{kind.__name__} isn't fastpeft's Adapter"
    if probe.looks_like_adapter(module):
        if probing:
            _refused[module] = probe.why_not_fusible(module) or ""
        reason = _refused.get(module) or None
        return "adapter", probing and reason is None, reason
    if stock is NewGELUActivation or (isinstance(module, NewGELUActivation) and below):
        return "activation", True, None
    if stock in LANGUAGE_MODELS and below:
        return "loss", False, why_not_head(module)
    if isinstance(module, PackedModel):
        return "packing", False, why_not_model(module) or module._fastpeft.trunk.why_not(module)
    return None


def _decide_frozen(module: Any) -> tuple[str, bool, str | None] | None:
    """`_decide` for a linear layer that is no part of a LoRA layer or adapter; None where its products stay stock's."""
    if stock_class(type(module)) not in (Conv1D, nn.Linear):
        return None
    reason = why_not_frozen(module)
    if reason:
        return ("frozen", False, reason) if is_fused(module) else None
    return "frozen", True, None
