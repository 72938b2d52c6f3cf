"""GPT-2's MLP through kernels that compute its GELU beside its two LoRA projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from fastpeft import ops
from fastpeft.modules import (
    FusedGelu,
    FusedLoraLinear,
    is_plain,
    projection_of,
    why_not_lora,
    why_not_tensors,
)


class FusedMLP(GPT2MLP):
    """GPT-2's MLP in one operation where Triton serves both projections; else stock's forward over its fused layers."""

    def forward(self, hidden_states: Any) -> Tensor:
        y = _through_kernels(self, hidden_states)
        return super().forward(hidden_states) if y is None else self.dropout(y)


def install(transformer: Any) -> None:
    """Swap the MLPs of `transformer` in place."""
    for block in transformer.h:
        if type(block.mlp) is GPT2MLP and "forward" not in block.mlp.__dict__:
            block.mlp.__class__ = FusedMLP


def uninstall(transformer: Any) -> None:
    """Undo `install`."""
    for block in transformer.h:
        if type(block.mlp) is FusedMLP:
            block.mlp.__class__ = GPT2MLP  # type: ignore[assignment]


def _through_kernels(mlp: Any, x: Tensor) -> Tensor | None:
    """`c_proj(act(c_fc(x)))` by the kernels; None where its layers had better be called one by one."""
    fc, act, proj = mlp.c_fc, mlp.act, mlp.c_proj
    if [type(each) for each in (fc, act, proj)] != [FusedLoraLinear, FusedGelu, FusedLoraLinear]:
        return None
    if not all(is_plain(each) and not each._fastpeft.exact for each in (fc, act, proj)):
        return None
    if (
        why_not_lora(fc)
        or why_not_lora(proj)
        or why_not_tensors(x, *(each.base_layer.weight for each in (fc, proj)))
    ):
        return None
    (first, added_to_first), (second, added_to_second) = projection_of(fc), projection_of(proj)
    if added_to_first or added_to_second:
        return None
    try:
        served = ops.lora_mlp(x, first, second, fc._fastpeft.backend, fc._fastpeft.strict)
    except ValueError as error:
        raise ValueError(f"{fc._fastpeft.name} and {proj._fastpeft.name}: {error}") from None
    if served is None:
        return None
    y, route = served
    for each in (fc, act, proj):
        each._fastpeft.record(route)
    return y
