"""What each head of transformers reads of GPT-2's last hidden state, from the arguments of its call.

A head whose class is known exactly tells its GPT-2, which then knows whether the padding may leave. Heads of one's own,
and whoever calls GPT2Model directly, tell nothing. A language model's head that has labels defers its logits: the loss
is computed without them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from fastpeft.autocast import dtype_here
from fastpeft.deferred import Product, defer, reading
from fastpeft.modules import is_plain, why_not_here, why_not_tensors
from fastpeft.packing import PackedModel, Reads
from fastpeft.routes import Route
from fastpeft.stock import Defined
from fastpeft.swap import stands_for, stock_class
from fastpeft.trunk import why_not_module

IGNORED = -100  # the label that counts nowhere


def _classifier(head: Any, given: dict[str, Any]) -> Reads | str:
    """The last token that isn't padding by its id, as stock pools."""
    ids: Tensor = given["input_ids"]
    columns = torch.arange(ids.shape[1], device=ids.device)
    if head.config.pad_token_id is None:
        return Reads(pooled=columns[-1:].expand(ids.shape[0]))
    return Reads(pooled=(columns * (ids != head.config.pad_token_id)).argmax(1))


def _language_model(head: Any, given: dict[str, Any]) -> Reads | str | None:
    """The positions before those whose label counts, in stock's own loss."""
    kept = given.get("logits_to_keep")
    if given.get("labels") is not None and head.loss_function is not ForCausalLMLoss:
        return None  # it would be handed what GPT-2 is told
    if isinstance(kept, Tensor) or kept or given.get("ignore_index", IGNORED) != IGNORED:
        return "logits_to_keep, or another ignore_index"
    if given.get("shift_labels") is not None:
        return "shift_labels"
    return _before_labels(given)


def _double_heads(head: Any, given: dict[str, Any]) -> Reads | str:
    """As a language model's, and where the multiple-choice head looks."""
    reads = _before_labels(given)
    if isinstance(reads, str):
        return reads
    assert reads.positions is not None
    summary, places = head.multiple_choice_head.summary_type, given.get("mc_token_ids")
    if summary == "cls_index" and places is not None:
        if not isinstance(places, Tensor) or places.shape != reads.positions.shape[:1]:
            return "mc_token_ids that aren't one a row"
        columns = torch.arange(reads.positions.shape[1], device=places.device)
        return Reads(positions=reads.positions | (columns == places[:, None]))
    if summary not in ("last", "first", "cls_index"):
        return f"a summary of kind {summary}"
    reads.positions[:, 0 if summary == "first" else -1] = True
    return reads


def _token_classifier(head: Any, given: dict[str, Any]) -> Reads | str:
    """The positions whose label counts."""
    reason = _why_not_labels(given)
    return reason or Reads(positions=given["labels"].to(given["input_ids"].device) != IGNORED)


def _before_labels(given: dict[str, Any]) -> Reads | str:
    reason = _why_not_labels(given)
    if reason:
        return reason
    counts = given["labels"].to(given["input_ids"].device) != IGNORED
    return Reads(positions=torch.nn.functional.pad(counts[:, 1:], (0, 1), value=False))


def _why_not_labels(given: dict[str, Any]) -> str | None:
    labels = given.get("labels")
    if labels is None:
        return "no labels: who reads the logits may read those of the padding"
    if not isinstance(labels, Tensor) or labels.shape != given["input_ids"].shape:
        return "labels that haven't the shape of input_ids"
    return None


#: What a head reads, and the parts of it that read, each token by itself.
_HEADS: dict[type[nn.Module], tuple[Callable[[Any, dict[str, Any]], Reads | str | None], tuple[str, ...]]] = {
    GPT2ForSequenceClassification: (_classifier, ("score",)),
    GPT2LMHeadModel: (_language_model, ("lm_head",)),
    GPT2DoubleHeadsModel: (_double_heads, ("lm_head", "multiple_choice_head")),
    GPT2ForTokenClassification: (_token_classifier, ("dropout", "classifier")),
}
HEADS = tuple(_HEADS)
#: The heads whose loss, the language model's, is computed without logits.
LANGUAGE_MODELS = (GPT2LMHeadModel, GPT2DoubleHeadsModel)


class _Deferring:
    """A head as its own forward sees it where its logits are deferred."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden (..., K) → its logits (..., V), deferred."""
        layer, site = self._head.lm_head, self._head._fastpeft
        reason = why_not_tensors(hidden, *(t for t in (layer.weight, layer.bias) if t is not None))
        if hidden.dtype == torch.float64:
            reason = "stock rounds float64 logits to float32 before the loss"
        elif layer.weight.is_inference():
            reason = "nothing tells when a weight of torch.inference_mode changes"
        if reason:
            site.record(Route("stock", reason))
            return layer(hidden)
        dtype = dtype_here(hidden) or hidden.dtype
        if not torch.is_grad_enabled():  # where anybody may edit it before the logits are read
            hidden = hidden.clone()
        return defer(Product(hidden, layer.weight, layer.bias, dtype, site))


def _fused(stock: Any) -> type[nn.Module]:
    """The class of a head that tells its GPT-2 what it reads, and defers its logits where it has labels."""
    reads_of, parts = _HEADS[stock]
    own, defined = stock.forward, Defined((stock, "forward"))
    names = list(inspect.signature(own).parameters)[1:]

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        # Unpatched since, by whoever holds this method; or somebody replaced stock's own.
        if traced or "_fastpeft" not in vars(self) or defined.replaced():
            return stock.forward(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        reads = _reads(self, given)
        told = {} if reads is None else {"reads": reads}
        if stock not in LANGUAGE_MODELS:
            return stock.forward(self, *args, **kwargs, **told)
        reason = _why_not_deferred(self, given)
        if reason:
            self._fastpeft.record(Route("stock", reason))
            return stock.forward(self, *args, **kwargs, **told)
        return reading(stock.forward(_Deferring(self), *args, **kwargs, **told))

    def _reads(self: Any, given: dict[str, Any]) -> Reads | str | None:
        """What this call reads, or why that isn't known; None where nobody asks."""
        ids = given.get("input_ids")
        inner = self.transformer
        # What somebody put on it isn't told: it would be handed an argument that it doesn't know.
        if type(inner) is not PackedModel or not is_plain(inner):
            return None
        if (
            type(ids) is not Tensor
            or ids.is_meta
            or ids.dim() != 2
            or given.get("past_key_values") is not None
        ):
            return None
        return _why_not_parts(self, parts) or reads_of(self, given)

    return stands_for(stock)(type(stock.__name__, (stock,), {"forward": forward}))


def why_not_head(head: Any) -> str | None:
    """Why a language model's head, as it is, computes its loss from logits; None where it needn't."""
    layer = head.lm_head
    if stock_class(type(layer)) is not nn.Linear or not is_plain(layer):
        return "lm_head is more than a linear layer"
    if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        return "lm_head trains"
    return None


def _why_not_deferred(head: Any, given: dict[str, Any]) -> str | None:
    """Why this call of a language model computes its logits; None where they wait until they are read."""
    if given.get("labels") is None:
        return "no labels: the logits are what is asked for"
    return_dict = given.get("return_dict")
    if not (head.config.return_dict if return_dict is None else return_dict):
        return "return_dict=False: a tuple holds its logits"
    if isinstance(head, GPT2LMHeadModel) and head.loss_function is not ForCausalLMLoss:
        return "a loss_function of its own"
    if get_eval_frame_callback():  # it compiles what this call calls, though not the call itself
        return "torch.compile takes plain logits"
    return why_not_here() or why_not_head(head)


def _why_not_parts(head: Any, parts: tuple[str, ...]) -> str | None:
    """Why what reads the last hidden state may look at more than one token at a time, or be looked at; else None."""
    for part in parts:
        for name, module in getattr(head, part).named_modules(prefix=part):
            reason = why_not_module(module)
            if reason:
                return f"{name} {reason}"
    return None


for _stock in HEADS:
    _fused(_stock)
