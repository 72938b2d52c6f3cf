"""GPT-2 on packed tokens: padding leaves before the embeddings and returns, as zeros, after the last block.

Between, everything runs on (1, tokens, width): stock's own forward, blocks, adapters and user code. Only
attention has to know which token belongs to which sequence; it alone sees a padded view, its rows flush left.
A full batch keeps its grid: there attention alone changes, and the block takes its projection's residual.
Under a sequence classifier, the last block goes on from its keys and values only at the tokens that the head pools,
which pays for full batches too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2Attention,
    GPT2Block,
    eager_attention_forward,
)

from fastpeft import attention, ops
from fastpeft.block import FusedBlock, projected
from fastpeft.modules import Site

#: Above this share of real tokens, and below 1, packing gains less than its gathers and scatters cost, unless a head
#: pools. A full batch has nothing to gather.
FULL = 0.9
#: Up to this length the CPU's 16-bit attention takes longer than float32's, up to five times in backward.
_SHORT = 256
_ARGUMENTS = (
    "input_ids",
    "past_key_values",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
)


class Packed(NamedTuple):
    """Where the packed tokens are: in the caller's (batch, length) grid, and in attention's padded view."""

    tokens: Tensor  # (T,) flat indices into the grid
    slots: Tensor  # (T,) flat indices into the view
    grid: tuple[int, int]
    view: tuple[int, int]  # (batch, longest)
    mask: Tensor | None  # (1, 1, longest, longest), additive: eager attention needs it written out
    pooled: Tensor | None  # (batch,) indices among the packed of the tokens that the head reads, if no other

    @property
    def whole(self) -> bool:
        """Whether nothing leaves, so that the caller's grid can stay as it is."""
        return self.pooled is None and len(self.tokens) == self.grid[0] * self.grid[1]


class PackedAttention(GPT2Attention):
    """GPT-2's self-attention over packed tokens; without `packed`, stock's own forward."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Any,
        *args: Any,
        packed: Packed | None = None,
        pool: bool = False,
        residual: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """hidden_states (1, T, width), or the whole grid → the output at every token, or at the pooled ones, and None.

        The output is added to a residual of its shape if there is one.
        """
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)
        batch, longest = packed.view
        qkv = self.c_attn(hidden_states).flatten(0, 1)
        if len(qkv) < batch * longest:  # else the packed rows are the view
            qkv = qkv.new_zeros(batch * longest, qkv.shape[1]).index_copy_(0, packed.slots, qkv)
        # Split before the heads are: the gradient is then joined without another copy.
        query, key, value = (
            part.view(batch, longest, self.num_heads, self.head_dim).transpose(1, 2)
            for part in qkv.view(batch, longest, -1).split(self.split_size, dim=2)
        )
        if qkv.device.type == "cpu" and longest <= _SHORT:
            query, key, value = (
                part.to(torch.promote_types(part.dtype, torch.float32)) for part in (query, key, value)
            )
        # Rows are flush left, so the causal mask alone keeps every token from the padding.
        mask = packed.mask
        if pool and packed.pooled is not None:  # one query a sequence
            sequences = torch.arange(batch, device=qkv.device)
            place = packed.slots[packed.pooled] % longest
            query = query[sequences, :, place][:, :, None]
            later = torch.arange(longest, device=qkv.device) > place[:, None]
            mask = torch.zeros_like(later, dtype=query.dtype).masked_fill(later, torch.finfo(query.dtype).min)
            mask = mask[:, None, None]
        dropout = self.attn_dropout.p if self.training else 0.0
        if qkv.device.type == "cpu" and dropout > 0.0 and not torch.compiler.is_compiling():
            output = attention.dropping(query, key, value, mask, dropout, self.scaling)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        output = output.to(qkv.dtype).reshape(-1, self.embed_dim)
        if len(output) > len(packed.slots):
            output = output.index_select(0, packed.slots)
        output = output.unflatten(0, (len(hidden_states), -1))
        return projected(self.c_proj, self.resid_dropout, output, residual), None


class PackedLastBlock(FusedBlock):
    """GPT-2's last block: where the head pools, keys and values of all tokens, and the rest of the pooled alone."""

    def forward(  # type: ignore[override]
        self, hidden_states: Any, *args: Any, packed: Packed | None = None, **kwargs: Any
    ) -> Tensor:
        """hidden_states (1, T, width) → the same shape, zeros where the head doesn't read."""
        if packed is None or packed.pooled is None:
            return super().forward(
                hidden_states, *args, **(kwargs if packed is None else {**kwargs, "packed": packed})
            )
        attended, _ = self.attn(self.ln_1(hidden_states), packed=packed, pool=True)
        pooled = hidden_states.index_select(1, packed.pooled) + attended
        pooled = pooled + self.mlp(self.ln_2(pooled))
        return torch.zeros_like(hidden_states).index_copy(1, packed.pooled, pooled)


@dataclass
class PackingSite(Site):
    """The site of a GPT-2 on packed tokens."""

    builds_cache: bool = True  # in eval mode, with `use_cache` unset: what its head may read later
    pools: bool = False  # its head is a sequence classifier, which reads one token a row


def install(transformer: Any, site: PackingSite) -> None:
    """Make `transformer` pack its batches, its class unchanged: two hooks, and its attentions swapped."""
    uninstall(transformer)
    transformer._fastpeft = site
    # The last before and the first after forward, so that a user's hooks see the caller's shapes.
    transformer.register_forward_pre_hook(_pack, with_kwargs=True)
    transformer.register_forward_hook(_unpack, with_kwargs=True, prepend=True)
    for block in transformer.h:
        if type(block.attn) is GPT2Attention:
            block.attn.__class__ = PackedAttention
    if type(block) is FusedBlock:
        block.__class__ = PackedLastBlock


def uninstall(transformer: Any) -> None:
    """Undo `install`."""
    for hooks, hook in ((transformer._forward_pre_hooks, _pack), (transformer._forward_hooks, _unpack)):
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            transformer._forward_pre_hooks_with_kwargs.pop(key, None)
            transformer._forward_hooks_with_kwargs.pop(key, None)
    for block in transformer.h:
        if type(block.attn) is PackedAttention:
            block.attn.__class__ = GPT2Attention  # type: ignore[assignment]
        if type(block) is PackedLastBlock:
            block.__class__ = FusedBlock  # type: ignore[assignment]
    transformer.__dict__.pop("_fastpeft", None)


def why_not_model(transformer: Any) -> str | None:
    """Why this GPT-2, as it is built, can't run on packed tokens; None where it can."""
    implementation = transformer.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        return f"attention is {implementation}, not eager or sdpa"
    if transformer.config.reorder_and_upcast_attn:
        return "reorder_and_upcast_attn"
    for block in transformer.h:
        if type(block) not in (GPT2Block, FusedBlock, PackedLastBlock) or "forward" in block.__dict__:
            return f"a block is {type(block).__name__}, or its forward was replaced"
        if type(block.attn) not in (GPT2Attention, PackedAttention) or "forward" in block.attn.__dict__:
            return f"an attention is {type(block.attn).__name__}, or its forward was replaced"
    return None


def _why_not_call(module: Any, arguments: dict[str, Any]) -> str | None:
    """Why this call runs stock; None where packing computes what stock does."""
    config = module.config
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if torch.compiler.is_compiling():
        return "compiled: the number of tokens depends on the data"
    if ids is None or ids.dim() != 2:
        return "input_ids (batch, length) are needed to see the padding"
    if arguments.get("past_key_values") is not None:
        return "past keys and values, of a cache or a prefix"
    if arguments.get("use_cache"):
        return "a cache"
    if mask is None and arguments.get("position_ids") is not None:
        return "position_ids without an attention_mask"  # where they begin again, stock sees another sequence
    if mask is not None and mask.shape != ids.shape:
        return "an attention_mask that hasn't the shape of input_ids"
    if (
        arguments.get("use_cache") is None
        and config.use_cache
        and not module.training
        and module._fastpeft.builds_cache
    ):
        return "a cache, which this head builds by default"
    if arguments.get("encoder_hidden_states") is not None:
        return "cross-attention"
    for wanted in ("output_attentions", "output_hidden_states"):
        asked = arguments.get(wanted)
        if asked or (asked is None and getattr(config, wanted, False)):
            return wanted
    return why_not_model(module)


def _pack(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]] | None:
    arguments = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    reason = (
        "called with unnamed arguments" if len(args) > len(_ARGUMENTS) else _why_not_call(module, arguments)
    )
    packed = _layout(module, arguments) if reason is None else reason
    if isinstance(packed, str):
        module._fastpeft.record(ops.Route("stock", packed))
        return None
    if arguments.get("attention_mask") is None:  # stock will see one
        module.warn_if_padding_and_no_attention_mask(arguments["input_ids"], None)
    chosen = {
        # Anything with four dimensions is taken for a finished mask, so none is built.
        "attention_mask": torch.empty(1, 1, 1, 1, device=arguments["input_ids"].device),
        "use_cache": False,
        "packed": packed,
    }
    if not packed.whole:
        chosen |= _packed_rows(packed, arguments)
    module._fastpeft.record(ops.Route("torch", "packed: no padding between the embeddings and the head"))
    return (), {**arguments, **chosen}


def _packed_rows(packed: Packed, arguments: dict[str, Any]) -> dict[str, Tensor | None]:
    """What the embeddings look up, (1, T) each."""
    ids: Tensor = arguments["input_ids"]
    positions, types = arguments.get("position_ids"), arguments.get("token_type_ids")
    if positions is None:  # stock counts columns, padding or not
        positions = torch.arange(ids.shape[1], device=ids.device)
    return {
        "input_ids": ids.flatten()[packed.tokens][None],
        "position_ids": positions.expand_as(ids).flatten()[packed.tokens][None],
        "token_type_ids": None if types is None else types.flatten()[packed.tokens][None],
    }


def _layout(module: Any, arguments: dict[str, Any]) -> Packed | str:
    """The layout of a batch, or why its padding can't leave, or needn't."""
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    batch, length = ids.shape
    rows = torch.arange(batch, device=ids.device)
    read = _pooled_columns(ids, module.config.pad_token_id) if module._fastpeft.pools else None
    wanted = None if _watched(module) else read
    if mask is not None:
        mask = mask.bool()
        visible = mask[rows, read].all() if read is not None else mask.any()
        # The one wait for the device.
        count, all_visible = torch.stack((mask.sum(), visible)).tolist()
        if FULL * ids.numel() < count < ids.numel() and wanted is None:
            return "the batch is nearly full"
        if not all_visible:
            return "the mask hides a token that the head pools, or all of them"
        mask = None if count == ids.numel() else mask
    if mask is None:
        tokens = order = torch.arange(ids.numel(), device=ids.device)
        places, longest = tokens % length, length
    else:
        tokens = mask.flatten().nonzero()[:, 0]
        order = mask.flatten().cumsum(0) - 1  # a token's index among the packed
        places = (mask.cumsum(1) - 1).flatten()[tokens]
        longest = int(places.max()) + 1
    causal = None
    if module.config._attn_implementation == "eager":
        dtype = module.wpe.weight.dtype
        causal = torch.full((longest, longest), torch.finfo(dtype).min, dtype=dtype, device=ids.device)
        causal = causal.triu(1)[None, None]
    pooled = None if wanted is None else order[rows * length + wanted]
    return Packed(
        tokens, tokens // length * longest + places, (batch, length), (batch, longest), causal, pooled
    )


def _pooled_columns(ids: Tensor, pad_token_id: int | None) -> Tensor:
    """(batch,) the column that GPT2ForSequenceClassification reads: the last that isn't padding, by its id."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    if pad_token_id is None:
        return columns[-1:].expand(ids.shape[0])
    return (columns * (ids != pad_token_id)).argmax(1)


def _watched(module: Any) -> bool:
    """Whether a user's hook looks at what the last block leaves, and so at tokens that no head reads."""
    ours = {"fastpeft.packing", "fastpeft.adapters", "transformers.utils.output_capturing"}
    watched = (module, module.h[-1], module.ln_f)
    hooks = [hook for m in watched for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return any(getattr(hook, "__module__", None) not in ours for hook in hooks)


def _unpack(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    packed = kwargs.get("packed")
    if packed is None or packed.whole:
        return None
    hidden = output[0][0]
    batch, length = packed.grid
    if len(hidden) < batch * length:
        hidden = hidden.new_zeros(batch * length, hidden.shape[1]).index_copy(0, packed.tokens, hidden)
    full = hidden.view(batch, length, -1)
    if isinstance(output, tuple):
        return (full, *output[1:])
    output.last_hidden_state = full
    return output
