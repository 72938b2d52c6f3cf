"""What a trained model is judged by: a score for each held-out text, and their mean."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction

from fastpeft.compare.encoding import Encoded
from fastpeft.compare.tasks import CLASSIFY, LM

_IGNORED = -100  # the label that counts nowhere


class Judge:
    """Trainer's `compute_metrics`: keeps the scores of the last evaluation, by text, and returns the quality."""

    def __init__(self, encoded: Encoded) -> None:
        self._texts = np.array(encoded.texts)
        self._weights = np.array(encoded.weights)
        self.scores: list[float] = []

    def __call__(self, judged: EvalPrediction) -> dict[str, float]:
        """The quality, from the score of each example (examples,) in the order of `Encoded.eval`."""
        scores: Any = judged.predictions
        by_text = np.bincount(self._texts, weights=scores, minlength=len(self._weights))
        self.scores = [round(float(score), 4) for score in by_text]
        return {"quality": float(by_text.sum() / self._weights.sum())}


def _right(logits: Any, labels: Tensor) -> Tensor:
    """logits (texts, classes), the first of what a model returns, and labels (texts,) → 1 where right (texts,)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return (logits.argmax(-1) == labels).float()


def _bits(logits: Any, labels: Tensor) -> Tensor:
    """logits (rows, a prompt's tokens + tokens, vocabulary), labels (rows, tokens) → bits of each row (rows,)."""
    logits = (logits[0] if isinstance(logits, tuple) else logits)[:, -labels.shape[1] :]
    # Row by row: a copy of all logits in float32 would take as much memory again.
    rows = [
        F.cross_entropy(row[:-1].float(), label[1:], ignore_index=_IGNORED, reduction="sum")
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows) / math.log(2)


#: By task: Trainer's `preprocess_logits_for_metrics`, which needn't keep logits then.
SCORE = {CLASSIFY: _right, LM: _bits}
