"""One walk over the modules: decide for each, then swap classes; and the way back."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GenerationMixin
from transformers.activations import NewGELUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2ForSequenceClassification, GPT2Model
from transformers.pytorch_utils import Conv1D

from fastpeft import block, ops, probe
from fastpeft.adapters import Adapter
from fastpeft.modules import (
    FROZEN,
    FusedAdapter,
    FusedConv1D,
    FusedGelu,
    FusedLinear,
    FusedLoraLinear,
    Site,
    fused_adapter,
    stock_class,
    why_not_adapter,
    why_not_frozen,
    why_not_lora,
)
from fastpeft.packing import PackingSite, install, uninstall, why_not_model

SCOPES = ("layers", "model")


class Candidate(NamedTuple):
    """A module that fastpeft knows: the class it may become, or the reason why it stays stock."""

    name: str
    module: Any
    kind: str
    fused: type[nn.Module] | None
    reason: str | None


def patch(
    model: nn.Module,
    backend: str = "auto",
    strict: bool = False,
    exact: bool = False,
    scope: str = "model",
) -> nn.Module:
    """Swap the LoRA layers, bottleneck adapters and `gelu_new` of `model` for fused ones, in place.

    So are its other frozen linear layers, where oneDNN by itself is faster than what torch does (`gemm.by_onednn`).
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
        scope: `model` also runs GPT-2 on packed tokens, without the padding that the attention mask hides and,
            under a sequence classifier, with the last block only at the token it reads: the last hidden state
            is zero elsewhere, and with `use_cache` unset no cache is built in training, nor under heads that
            don't generate. Triton's kernels then take in the GELU, dropouts, residuals and LayerNorms beside
            the LoRA projections; on the CPU the dropouts of attention and residuals draw fewer numbers.
            `layers` swaps layers one by one and nothing else, as `exact` does.

    Returns:
        The model.

    Raises:
        ValueError: an unknown `backend` or `scope`, a backend that can't serve the model here, or, with
            `strict`, a site that can't be fused or none at all; nothing is changed then.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    found = candidates(model)
    # Nobody asked for frozen layers, so they decide nothing.
    plan = [candidate for candidate in found if candidate.kind != "frozen"]
    for candidate in plan:
        device = next((p.device for p in candidate.module.parameters()), None)
        if device is not None and candidate.fused is not None:
            ops.choose(backend, exact, device)
    transformers = [(name, m) for name, m in model.named_modules() if type(m) is GPT2Model]
    packing = transformers if scope == "model" and not exact else []
    if strict:
        stock = [f"{c.name}: {c.reason}" for c in plan if c.reason]
        stock += [f"{name}: {reason}" for name, m in packing if (reason := why_not_model(m))]
        if stock or not plan:
            raise ValueError("can't fuse " + ("; ".join(stock) or f"anything in {type(model).__name__}"))
    if not plan:
        warnings.warn(
            f"fastpeft.patch found nothing to fuse in {type(model).__name__}: no LoRA layer, bottleneck "
            "adapter or gelu_new activation",
            stacklevel=2,
        )
    swaps = [c for c in (plan if exact else found) if c.fused is not None]
    for module in {m for m in model.modules() if type(m) in FROZEN} - {c.module for c in swaps}:
        _restore(module)  # it isn't served any more, or LoRA has been put around it
    for candidate in swaps:
        before = candidate.module.__dict__.get("_fastpeft")
        candidate.module.__class__ = candidate.fused
        calls = before.calls if before else 0
        candidate.module._fastpeft = Site(candidate.name, backend, exact, strict, calls=calls)
    for _, transformer in transformers:
        uninstall(transformer)
        block.uninstall(transformer)
    for name, transformer in packing:
        block.install(transformer, backend)
        heads = [m for m in model.modules() if m._modules.get("transformer") is transformer]
        generates = not heads or any(isinstance(head, GenerationMixin) for head in heads)
        pools = [type(head) for head in heads] == [GPT2ForSequenceClassification]
        install(
            transformer,
            PackingSite(name or "model", backend, exact, strict, builds_cache=generates, pools=pools),
        )
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give every swapped module of `model` its stock class back, in place; returns the model.

    Raises:
        ValueError: another library (FSDP) has swapped a fused class since; nothing is changed then.
    """
    swapped = [m for m in model.modules() if "_fastpeft" in m.__dict__ and type(m) is not GPT2Model]
    for module in swapped:  # an error comes before any change
        stock_class(type(module))
    for module in swapped:
        _restore(module)
    for module in model.modules():
        if type(module) is GPT2Model:
            uninstall(module)
            block.uninstall(module)
    return model


def _restore(module: Any) -> None:
    module.__class__ = stock_class(type(module))
    del module._fastpeft


def candidates(model: nn.Module) -> list[Candidate]:
    """Every module of `model` that fastpeft could fuse, fused already or not, in the model's order."""
    found: list[Candidate] = []
    parts: set[int] = set()  # of LoRA layers and adapters
    for name, module in model.named_modules():
        decision = _decide(module)
        if decision is None and id(module) not in parts:
            decision = _decide_frozen(module)
        elif decision is not None and decision[0] in ("lora", "adapter"):
            parts.update(id(part) for part in module.modules())
        if decision is not None:
            found.append(Candidate(name or type(model).__name__, module, *decision))
    return found


def _decide(module: Any) -> tuple[str, type[nn.Module] | None, str | None] | None:
    """Kind, fused class and reason for one module; None for a module that is none of our business.

    Stock classes are compared exactly: a subclass (a quantised layer, one that FSDP swapped) may do more.
    A fused class stays what it is, also below the class that FSDP has put on top.
    """
    kind: Any = type(module)
    if isinstance(module, LoraLayer):
        if isinstance(module, FusedLoraLinear):
            return "lora", kind, why_not_lora(module)
        if kind is LoraLinear:
            return "lora", FusedLoraLinear, why_not_lora(module)
        return "lora", None, f"{kind.__module__}.{kind.__name__} isn't peft's lora.Linear"
    if isinstance(module, FusedAdapter):
        return "adapter", kind, why_not_adapter(module)
    if kind is Adapter:
        return "adapter", fused_adapter(kind), why_not_adapter(module)
    if isinstance(module, Adapter):
        return "adapter", None, f"{kind.__module__}.{kind.__name__} isn't fastpeft's Adapter"
    if probe.looks_like_adapter(module):
        reason = probe.why_not_fusible(module)
        return "adapter", None if reason else fused_adapter(kind), reason
    if isinstance(module, FusedGelu):
        return "activation", kind, None
    if kind is NewGELUActivation:
        return "activation", FusedGelu, None
    if kind is GPT2Model and "_fastpeft" in module.__dict__:
        return "packing", None, why_not_model(module)
    return None


def _decide_frozen(module: Any) -> tuple[str, type[nn.Module] | None, str | None] | None:
    """`_decide` for a linear layer that is no part of a LoRA layer or adapter; None where its products stay stock's."""
    kind: Any = type(module)
    if kind not in FROZEN and kind not in (Conv1D, nn.Linear):
        return None
    reason = why_not_frozen(module)
    if reason:
        return ("frozen", None, reason) if kind in FROZEN else None
    return "frozen", FusedConv1D if isinstance(module, Conv1D) else FusedLinear, None
