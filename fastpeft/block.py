"""GPT-2's block with its neighbours in its kernels: GELU, dropouts, residuals, gradients that meet at a norm.

Where no kernel serves them, or something listens in between, each part runs by itself, as in stock.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from fastpeft import ops
from fastpeft.adapters import adapt_output
from fastpeft.modules import (
    FusedAdapter,
    FusedGelu,
    FusedLoraLinear,
    dropout_p,
    is_plain,
    projection_of,
    why_not_lora,
    why_not_tensors,
)


class FusedMLP(GPT2MLP):
    """GPT-2's MLP in one operation where Triton serves both projections; else stock's forward over its fused layers."""

    def forward(self, hidden_states: Any, residual: Tensor | None = None) -> Tensor:
        """The MLP of hidden_states (..., width), added to `residual`, of the same shape, if there is one."""
        added = _residual(residual, self.dropout)
        y = _through_kernels(self, hidden_states, added)
        if y is None:
            return projected(self.c_proj, self.dropout, self.act(self.c_fc(hidden_states)), residual)
        if added is not None:
            return y
        y = self.dropout(y)
        return y if residual is None else residual + y


class FusedBlock(GPT2Block):
    """GPT-2's block, which hands its residuals to the projections that they are added to."""

    _fastpeft_backend: Any

    def forward(  # type: ignore[override]
        self,
        hidden_states: Any,
        past_key_values: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        use_cache: Any = False,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (batch, length, width) → the same shape."""
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
        given |= kwargs
        if encoder_hidden_states is not None:
            given |= {"encoder_hidden_states": encoder_hidden_states}
            return super().forward(hidden_states, encoder_attention_mask=encoder_attention_mask, **given)
        h, x = self._normed(self.ln_1, hidden_states, self.attn, "c_attn")
        x = _added(self.attn, x, h, kwargs.get("packed") is not None, **given)
        h, x = self._normed(self.ln_2, x, self.mlp, "c_fc")
        return _added(self.mlp, x, h, type(self.mlp) is FusedMLP)

    def _normed(self, norm: nn.Module, x: Tensor, branch: Any, first: str) -> tuple[Tensor, Tensor]:
        """The LayerNorm of x for `branch`, whose first layer is named, and x to go on with as the residual."""
        if type(norm) is not nn.LayerNorm or not is_plain(norm):
            return norm(x), x
        layer: Any = getattr(branch, first, None)
        given = _takes_shrunk(branch, layer, x)
        strict = given is not None and layer._fastpeft.strict
        return ops.layer_norm(x, norm, self._fastpeft_backend, given, strict)


def install(transformer: Any, backend: str) -> None:
    """Swap the blocks of `transformer` and their MLPs in place."""
    for block in transformer.h:
        if type(block) is GPT2Block and "forward" not in block.__dict__:
            block.__class__ = FusedBlock
            vars(block)["_fastpeft_backend"] = backend
        if type(block.mlp) is GPT2MLP and "forward" not in block.mlp.__dict__:
            block.mlp.__class__ = FusedMLP


def uninstall(transformer: Any) -> None:
    """Undo `install`."""
    for block in transformer.h:
        if type(block) is FusedBlock:
            block.__class__ = GPT2Block  # type: ignore[assignment]
            del block._fastpeft_backend
        if type(block.mlp) is FusedMLP:
            block.mlp.__class__ = GPT2MLP  # type: ignore[assignment]


def projected(c_proj: Any, dropout: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """`dropout(c_proj(x))`, added to a residual if there is one, in one operation where that can be."""
    added = _residual(residual, dropout)
    if added is not None and type(c_proj) is FusedLoraLinear and is_plain(c_proj):
        return c_proj(x, residual=added)
    y = _dropped(c_proj(x), dropout)
    return y if residual is None else residual + y


def _added(branch: Any, x: Tensor, h: Tensor, takes_residual: bool, **given: Any) -> Tensor:
    """`x + branch(h)` for a block's attention or MLP, in one operation with what the branch ends with."""
    if takes_residual and is_plain(branch):
        return _first(branch(h, residual=x, **given))
    adapter = getattr(branch, "adapter", None)
    adapted = list(branch._forward_hooks.values()) == [adapt_output] and is_plain(
        branch, but_for=adapt_output
    )
    if adapted and isinstance(adapter, FusedAdapter) and is_plain(adapter):
        return adapter(_first(branch.forward(h, **given)), residual=x)
    return x + _first(branch(h, **given))


def _takes_shrunk(branch: Any, layer: Any, x: Tensor) -> ops.Projection | None:
    """The first layer of a branch, where the LayerNorm before can do a part of its work; else None."""
    return _for_kernels(layer, x) if is_plain(branch, but_for=adapt_output) else None


def _for_kernels(layer: Any, x: Tensor) -> ops.Projection | None:
    """What a call of this LoRA layer computes, where kernels may do it beside other work; else None."""
    if type(layer) is not FusedLoraLinear or not is_plain(layer):
        return None
    site = layer._fastpeft
    if ops.choose(site.backend, site.exact, x.device).path != "triton":
        return None
    if why_not_lora(layer) or why_not_tensors(x, layer.base_layer.weight):
        return None
    projection, rest = projection_of(layer)
    return None if rest else projection


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _drops(dropout: nn.Module) -> float | None:
    """The probability with which `dropout` drops now; None where a call of it is more than that."""
    return dropout_p(dropout) if type(dropout) is nn.Dropout and is_plain(dropout) else None


def _residual(residual: Tensor | None, dropout: nn.Module) -> ops.Residual | None:
    """A residual for an operation to add; None where there is none, or dropout isn't all that happens on the way."""
    p = _drops(dropout)
    return None if residual is None or p is None else ops.Residual(residual, p)


def _dropped(x: Tensor, dropout: nn.Module) -> Tensor:
    p = _drops(dropout)
    return dropout(x) if p is None else ops.dropped(x, p)


def _through_kernels(mlp: Any, x: Tensor, residual: ops.Residual | None) -> Tensor | None:
    """`c_proj(act(c_fc(x)))`, added to a residual if there is one; None where its layers had better go one by one."""
    fc, act, proj = mlp.c_fc, mlp.act, mlp.c_proj
    if type(act) is not FusedGelu or not is_plain(act) or act._fastpeft.exact:
        return None
    first, second = _for_kernels(fc, x), _for_kernels(proj, x)
    if first is None or second is None:
        return None
    site = fc._fastpeft
    try:
        served = ops.lora_mlp(x, first, second, site.backend, site.strict, residual)
    except ValueError as error:
        raise ValueError(f"{site.name} and {proj._fastpeft.name}: {error}") from None
    if served is None:
        return None
    y, route = served
    for each in (fc, act, proj):
        each._fastpeft.record(route)
    return y
