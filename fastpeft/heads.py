"""What each head of transformers reads of GPT-2's last hidden state, from the arguments of its call.

A head whose class is known exactly tells its GPT-2, which then knows whether the padding may leave. Heads of one's own,
and whoever calls GPT2Model directly, tell nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from fastpeft.packing import PackedModel, Reads
from fastpeft.swap import stands_for
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


def _fused(stock: Any) -> type[nn.Module]:
    """The class of a head that tells its GPT-2 what it reads."""
    reads_of, parts = _HEADS[stock]
    names = list(inspect.signature(stock.forward).parameters)[1:]

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or type(self.transformer) is not PackedModel
        ):
            return stock.forward(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or given.get("past_key_values") is not None:
            return stock.forward(self, *args, **kwargs)
        reads = _why_not_parts(self, parts) or reads_of(self, given)
        return stock.forward(self, *args, **kwargs, **({} if reads is None else {"reads": reads}))

    return stands_for(stock)(type(stock.__name__, (stock,), {"forward": forward}))


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
