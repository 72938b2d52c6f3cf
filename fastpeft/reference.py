"""Each formula once, in plain PyTorch: everything else in fastpeft must agree with these.

M tokens, K in_features, N out_features, R rank or bottleneck; leading dimensions of `x` count as M.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Activations a bottleneck adapter may have, by the name used in configs and kernels.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def dropout(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """Inverted dropout of `x` by a given boolean mask `keep` (shape of x); `None` keeps everything."""
    if keep is None:
        return x
    return x * keep * keep_scale(dropout_p)


def keep_scale(dropout_p: float) -> float:
    """What dropout multiplies the elements by that it keeps: 1 / (1 - p), or 0 where it keeps none."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """`x W + b + s · (dropout(x) Aᵀ) Bᵀ` (Hu et al., 2021, "LoRA", eq. 3), as peft computes it.

    Shapes: x (..., K), weight (K, N), bias (N,), lora_a (R, K), lora_b (N, R), keep like x; returns (..., N).
    """
    y = x @ weight
    if bias is not None:
        y = y + bias
    return y + scaling * (dropout(x, keep, dropout_p) @ lora_a.T @ lora_b.T)


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
) -> Tensor:
    """`x + scale · up(act(down(x)))` (Houlsby et al., 2019, "Parameter-Efficient Transfer Learning", fig. 2).

    Shapes: x (..., K), down_weight (R, K), down_bias (R,), up_weight (K, R), up_bias (K,); returns (..., K).
    """
    hidden = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
    return x + scale * F.linear(hidden, up_weight, up_bias)


def lm_head_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """A language model's loss of each row, cross-entropy of its logits in float32 at least; 0 where it is ignored.

    Shapes: hidden (M, K), weight (V, K), bias (V,), labels (M,); returns (M,).
    """
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )


def gelu_new(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks & Gimpel, 2016), GPT-2's activation, in one pass."""
    return F.gelu(x, approximate="tanh")
