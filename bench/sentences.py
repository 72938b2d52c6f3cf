"""Batches of real sentences: Rotten Tomatoes in random order, padded to the longest of a batch, as by Trainer."""

from __future__ import annotations

import random

import checkout  # noqa: F401
import torch
from torch import Tensor

from fastpeft.compare import base_model
from fastpeft.compare.arguments import ROTTEN_TOMATOES
from fastpeft.compare.data import load_rotten_tomatoes
from fastpeft.compare.errors import BadInput

ANSWERS = f"{ROTTEN_TOMATOES}-answers"
#: What a language model is trained on: whole sentences, or each one's second half alone, after its prompt.
NAMES = (ROTTEN_TOMATOES, ANSWERS)


def batches(
    count: int,
    size: int,
    vocabulary: int,
    longest: int,
    device: str,
    head: str = "classifier",
    name: str = "",
) -> list[dict[str, Tensor]]:
    """`count` batches of `size` sentences, no sentence twice before all were taken; the same at each call.

    Labels are a classifier's, or a language model's: the tokens themselves, for `ANSWERS` of each second half.

    Sentences are cut at `longest` tokens. Token 0 is the padding and nothing else; a vocabulary smaller than
    GPT-2's makes other words of them, as long as they were.

    Raises:
        BadInput: the packages with the sentences and the tokenizer aren't installed.
    """
    tokenizer = base_model.tokenizer(base_model.GPT2_TOKENS)
    part = load_rotten_tomatoes().train
    order = random.Random(1).sample(range(len(part.texts)), len(part.texts))
    found = []
    for start in range(0, count * size, size):
        rows = [order[place % len(order)] for place in range(start, start + size)]
        texts = [part.texts[row] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        mask = batch["attention_mask"]
        ids = (1 + batch["input_ids"] % (vocabulary - 1)) * mask
        labels = torch.tensor([part.labels[row] for row in rows])
        if head == "lm":
            ahead = mask.sum(1, keepdim=True) // 2 if name == ANSWERS else 0
            labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) <= ahead), -100)
        each = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        found.append({name: tensor.to(device) for name, tensor in each.items()})
    return found


def why_not() -> str | None:
    """What is missing for them; None where nothing is."""
    try:
        batches(1, 1, vocabulary=2, longest=1, device="cpu")
    except BadInput as error:
        return str(error)
    return None
