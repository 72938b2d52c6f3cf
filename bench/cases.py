"""What the benchmarks measure: shapes are data.

M tokens, K in_features, N out_features, R rank or bottleneck. The defaults are GPT-2 small's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WIDTH = 768
BOTTLENECK = 64
VOCABULARY = 50257
#: What `GPT2Config` takes for the published sizes, and for one that only tries things out.
MODELS = {
    "tiny": {"n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 61, "n_positions": 64},
    "half": {"n_layer": 6, "n_embd": 768, "n_head": 12},
    "small": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
}
LORA_TARGETS = ("c_attn", "c_proj", "c_fc")
ADAPTER_SLOTS = ("post_attn", "post_mlp")


class Projection(NamedTuple):
    """A linear layer of a GPT-2 block."""

    name: str
    k: int
    n: int


def projections(width: int = WIDTH) -> tuple[Projection, ...]:
    """The four linear layers of a GPT-2 block, in the order in which they run."""
    return (
        Projection("c_attn", width, 3 * width),
        Projection("attn.c_proj", width, width),
        Projection("c_fc", width, 4 * width),
        Projection("mlp.c_proj", 4 * width, width),
    )


class LoraCase(NamedTuple):
    """One projection under LoRA."""

    projection: Projection
    tokens: int
    rank: int
    dropout: float
    dtype: str

    def __str__(self) -> str:
        return f"{self.projection.name}-M{self.tokens}-r{self.rank}-p{self.dropout:g}-{self.dtype}"


class AdapterCase(NamedTuple):
    """One bottleneck adapter."""

    width: int
    bottleneck: int
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"adapter-{self.width}-{self.bottleneck}-M{self.tokens}-{self.dtype}"


class HeadCase(NamedTuple):
    """A language model's frozen head with its loss, to which a share of the labels counts."""

    vocabulary: int
    width: int
    tokens: int
    counting: float
    dtype: str

    def __str__(self) -> str:
        return f"head-{self.vocabulary}-{self.width}-M{self.tokens}-c{self.counting:g}-{self.dtype}"


def lora_cases(device: str) -> list[LoraCase]:
    """The microbenchmarks of a LoRA layer."""
    tokens, rank, dtypes = (8192, 16, ("bf16", "fp32")) if device == "cuda" else (1024, 8, ("fp32", "bf16"))
    return [
        LoraCase(projection, tokens, rank, dropout, dtype)
        for dtype in dtypes
        for dropout in (0.0, 0.1)
        for projection in projections()
    ]


def adapter_cases(device: str) -> list[AdapterCase]:
    """The microbenchmarks of an adapter."""
    tokens = 8192 if device == "cuda" else 1024
    return [AdapterCase(WIDTH, BOTTLENECK, tokens, dtype) for dtype in ("fp32", "bf16")]


def head_cases(device: str) -> list[HeadCase]:
    """The microbenchmarks of a head: all labels count, or as few as where prompts and padding don't."""
    tokens, dtype = (8192, "bf16") if device == "cuda" else (512, "fp32")
    return [HeadCase(VOCABULARY, WIDTH, tokens, counting, dtype) for counting in (1.0, 0.29)]
