"""Texts as the token ids that a model trains on and is judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from fastpeft.compare.arguments import Arguments
from fastpeft.compare.checkpoint import Base
from fastpeft.compare.data import Data, Part
from fastpeft.compare.tasks import CLASSIFY

Examples = list[dict[str, Any]]


class Encoded(NamedTuple):
    """The two parts as token ids; of the eval part, which text each example is of, and what each text weighs."""

    train: Examples
    eval: Examples
    texts: list[int]  # of each eval example, the index of its text
    weights: list[int]  # of each eval text: 1, or the tokens of it that are predicted
    longest: int  # tokens of an example at most
    cut: int  # texts that were longer: a text to classify was cut, a document goes on in another example


def encode(data: Data, base: Base, arguments: Arguments) -> Encoded:
    """Tokens of every text, at most as many in one example as all methods can take.

    A text to classify is cut there; a document to predict goes on in another example, so that each of its tokens is
    predicted once, the first of them from an end-of-text before it.
    """
    longest = base.model.config.n_positions - arguments.reserved
    if arguments.max_length is not None:
        longest = min(longest, arguments.max_length)
    parts = _classified if arguments.task == CLASSIFY else _predicted
    train, _, _, cut_train = parts(data.train, base, longest)
    evaluation, texts, weights, cut_eval = parts(data.eval, base, longest)
    # By length, so that a batch pads little; the order in which rows are judged changes nothing.
    order = sorted(range(len(evaluation)), key=lambda i: len(evaluation[i]["input_ids"]))
    return Encoded(
        train,
        [evaluation[i] for i in order],
        [texts[i] for i in order],
        weights,
        longest,
        cut_train + cut_eval,
    )


def collator(task: str, base: Base) -> Callable[[Examples], dict[str, Any]]:
    """What pads examples to a batch: ids, attention mask and labels, those of padding -100."""
    if task == CLASSIFY:
        return DataCollatorWithPadding(base.tokenizer)
    return DataCollatorForLanguageModeling(base.tokenizer, mlm=False)


def _classified(part: Part, base: Base, longest: int) -> tuple[Examples, list[int], list[int], int]:
    ids = base.tokenizer(part.texts, verbose=False)["input_ids"]
    rows = zip(ids, part.labels, strict=True)
    examples = [{"input_ids": text[:longest], "labels": label} for text, label in rows]
    return examples, list(range(len(ids))), [1] * len(ids), sum(len(text) > longest for text in ids)


def _predicted(part: Part, base: Base, longest: int) -> tuple[Examples, list[int], list[int], int]:
    examples: Examples = []
    texts: list[int] = []
    ids = base.tokenizer(part.texts, verbose=False, add_special_tokens=False)["input_ids"]
    padding = base.tokenizer.pad_token_id  # as a label it counts nowhere, and a text may spell it
    for index, document in enumerate(ids):
        tokens = [base.tokenizer.eos_token_id, *document]
        for start in range(0, len(document), longest - 1):
            examples.append({"input_ids": tokens[start : start + longest]})
            texts.append(index)
    weights = [sum(token != padding for token in document) for document in ids]
    return examples, texts, weights, sum(len(document) >= longest for document in ids)
