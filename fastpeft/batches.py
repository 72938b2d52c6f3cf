"""Batches of several runs: their examples in order, one run's rows below another's, and the loss of each target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from transformers import GPT2ForSequenceClassification

from fastpeft.heads import IGNORED
from fastpeft.lm_head import routed_lm_head_loss
from fastpeft.packing import Reads


class Orders(Sampler[int]):
    """A batch of each run in turn, each in the order in which Trainer would have it from the run's seed.

    Grouped by length, Trainer draws it from the generator that all else draws from; here it is of the seed alone.
    """

    def __init__(self, sampler: Any, seeds: list[int], batch_size: int) -> None:
        self._sampler, self._seeds, self._batch_size = sampler, seeds, batch_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._seeds) * len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        orders = []
        for seed in self._seeds:
            self._sampler.generator = torch.Generator().manual_seed(seed + self._epoch)
            orders.append(list(self._sampler))
        for start in range(0, len(self._sampler), self._batch_size):
            for order in orders:
                yield from order[start : start + self._batch_size]


#: What a batch holds, and what its padding is, None for the model's own.
_FILL = {"input_ids": None, "attention_mask": 0, "labels": IGNORED}


def join(batches: list[dict[str, Tensor]], size: int, padding: int) -> dict[str, Tensor]:
    """Batches of one run each, one below the other; the shorter get padding after what they have."""
    unknown = sorted({key for batch in batches for key in batch} - {*_FILL})
    if unknown or any(not {"input_ids", "labels"} <= {*batch} for batch in batches):
        raise ValueError(
            f"collate_fn gave {', '.join(batches[0])}: a sweep takes input_ids, labels and attention_mask"
        )
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    joined = {}
    for key, fill in _FILL.items():
        parts = [batch.get(key, torch.ones_like(batch["input_ids"])) for batch in batches]
        if any(len(part) != size for part in parts):
            raise ValueError(
                f"collate_fn made {len(parts[0])} rows of {size} examples: a row for each is needed"
            )
        value = padding if fill is None else fill
        joined[key] = torch.cat(
            [F.pad(p, (0, longest - p.shape[1]), value=value) if p.dim() > 1 else p for p in parts]
        )
    return joined


def targets_of(labels: Tensor) -> Tensor:
    """What each position is to predict, (rows, length); of a classifier's labels, what each text is, (rows,)."""
    return labels if labels.dim() == 1 else F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def losses_of(head: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The loss of each target, 0 where it is ignored."""
    given, targets = {"input_ids": input_ids, "attention_mask": attention_mask}, targets_of(labels)
    if isinstance(head, GPT2ForSequenceClassification):
        return F.cross_entropy(head(**given, use_cache=False).logits, targets, reduction="none")
    reads = Reads(positions=targets != IGNORED)
    hidden = head.transformer(**given, use_cache=False, reads=reads).last_hidden_state
    weight, bias, site = head.lm_head.weight, head.lm_head.bias, head._fastpeft
    losses, route = routed_lm_head_loss(
        hidden, weight, targets, bias, IGNORED, "none", None, 0.0, site.options.backend
    )
    site.record(route)
    return losses
