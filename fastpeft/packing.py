"""GPT-2 on packed tokens: padding leaves before the embeddings and returns, as zeros, after the last block.

Between, everything runs on (1, tokens, width): stock's own forward, blocks and adapters. Only attention has to know
which token belongs to which sequence; it alone sees a padded view, its rows flush left. A full batch keeps its grid,
also one whose rows hold several sequences each (positions that begin again): there attention alone changes, and the
block takes its projection's residual. Under a sequence classifier, the last block goes on from its keys and values only
at the tokens that the head pools, which pays for full batches too. A batch whose padding may be read, or that a cache
goes with, keeps its grid, its masks and stock's attention, between blocks that are fused all the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Model, eager_attention_forward

from fastpeft import attention, groups, routes
from fastpeft.block import Grid, Packed, called, projected, spread
from fastpeft.graphs import Graphs
from fastpeft.kernels.rows import rounded
from fastpeft.modules import why_not_here
from fastpeft.routes import Route
from fastpeft.swap import Site, stands_for
from fastpeft.trunk import Trunk

#: Above this share of real tokens, and below 1, packing gains less than its gathers and scatters cost, unless a head
#: pools. A full batch has nothing to gather.
FULL = 0.9
#: Where rows hold several sequences, attention's view may be so many times as large as the grid.
_SPARSE = 4
#: Up to this length the CPU's 16-bit attention takes longer than float32's, up to five times in backward.
_SHORT = 256


class Reads(NamedTuple):
    """Which positions of the last hidden state a head reads in a call; either field, the other None."""

    pooled: Tensor | None = None  # (batch,) the one column that it reads of each row
    positions: Tensor | None = None  # (batch, length), true where it reads


@stands_for(GPT2Attention)
class PackedAttention(GPT2Attention):
    """GPT-2's self-attention over packed tokens; without `packed`, stock's own forward."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Any,
        *args: Any,
        packed: Packed | Grid | None = None,
        kept: Any = None,
        pooled: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """hidden_states (1, T, width), or the whole grid → the output there, or at the pooled tokens, and None."""
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)
        rows = self.attended(called(self.c_attn, hidden_states, packed), packed, kept, pooled)
        return projected(self.c_proj, self.resid_dropout, rows, None, packed.at(pooled)), None

    def attended(self, qkv: Tensor, packed: Packed | Grid, kept: Any, pooled: Tensor | None) -> Tensor:
        """What `c_proj` takes, (1, T, width), or the whole grid, or at the pooled tokens alone, of what `c_attn` gives.

        Keys and values go into the cache `kept`, if there is one, in the caller's grid.
        """
        kept = getattr(kept, "self_attention_cache", kept)
        if isinstance(packed, Grid):
            query, key, value = self._heads(qkv, qkv.shape[:2])
            if kept is not None:
                key, value = kept.update(key, value, self.layer_idx)
            dropout = self.attn_dropout.p if self.training else 0.0
            output, _ = packed.attend(
                self, query, key, value, packed.mask, dropout=dropout, scaling=self.scaling
            )
            return output.reshape(*qkv.shape[:2], self.embed_dim)
        batch, longest = packed.view
        lead, rows = len(qkv), qkv.flatten(0, 1)
        qkv = rows
        size = batch * longest
        scattered = packed.spare or len(qkv) < size  # else the packed rows are the view
        if scattered:
            qkv = spread(qkv, packed.slots, size + packed.spare)[:size]
        # Split before the heads are: the gradient is then joined without another copy.
        query, key, value = self._heads(qkv, packed.view)
        if kept is not None:
            if packed.whole:
                kept.update(key, value, self.layer_idx)
            else:
                grid = packed.in_grid(rows).view(-1, rows.shape[1])
                kept.update(*self._heads(grid, packed.grid)[1:], self.layer_idx)
        if routes.on_cpu(qkv) and longest <= _SHORT:
            query, key, value = (
                part.to(torch.promote_types(part.dtype, torch.float32)) for part in (query, key, value)
            )
        # Rows are flush left, so the causal mask alone keeps every token from the padding.
        mask = packed.mask
        if pooled is not None:  # one query a sequence
            sequences = torch.arange(batch, device=qkv.device)
            place = packed.slots[pooled] % longest
            query = query[sequences, :, place][:, :, None]
            later = torch.arange(longest, device=qkv.device) > place[:, None]
            mask = torch.zeros_like(later, dtype=query.dtype).masked_fill(later, torch.finfo(query.dtype).min)
            mask = mask[:, None, None]
        dropout = self.attn_dropout.p if self.training else 0.0
        if routes.on_cpu(qkv) and dropout > 0.0 and not torch.compiler.is_compiling():
            output = attention.dropping(query, key, value, mask, dropout, self.scaling)
        elif packed.mask is not None:
            output, _ = eager_attention_forward(
                self, query, key, value, mask, dropout=dropout, scaling=self.scaling
            )
        else:  # as transformers calls it, less what GPT-2 hasn't
            causal = mask is None and longest > 1
            output = F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p=dropout, is_causal=causal, scale=self.scaling
            ).transpose(1, 2)
        output = output.to(qkv.dtype).reshape(-1, self.embed_dim)
        if scattered and pooled is None:
            slots = packed.slots.clamp(max=size - 1) if packed.spare else packed.slots
            output = output.index_select(0, slots)
        return output.view(lead, -1, self.embed_dim)

    def _heads(self, qkv: Tensor, shape: Sequence[int]) -> list[Tensor]:
        """Query, key and value, (batch, heads, length, head_dim) each, of qkv (..., 3 · width), batch · length rows."""
        parts = qkv.view(*shape, 3, self.num_heads, self.head_dim).unbind(2)
        return [part.transpose(1, 2) for part in parts]


class Settings(NamedTuple):
    """What a configuration holds, and what follows of it for packing."""

    held: dict[str, Any]
    implementation: str
    attend: Callable[..., Any] | None  # its function, None where it isn't known
    reason: str | None  # why the model can't run on packed tokens
    asked: list[str]  # outputs that it asks for where a call doesn't say


@dataclass
class PackingSite(Site):
    """The site of a GPT-2 on packed tokens."""

    only_unmasked: bool = False  # the caller says that only tokens that the mask shows are read
    settings: Settings | None = None  # of the model, as they were when last asked about
    trunk: Trunk = field(default_factory=Trunk)
    graphs: Graphs | None = None  # of its blocks, where they were asked for


#: How each of GPT2Model's arguments may be, for its call to be packed; by any other name, only None.
_TAKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "use_cache", "return_dict"}
#: What passes through to attention functions, of which eager and sdpa don't look at it.
_IGNORED = {"num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_FALSY = {"output_attentions", "output_hidden_states"}
_NAMES = list(inspect.signature(GPT2Model.forward).parameters)[1:]
#: What the tokens come as.
_READ = ("input_ids", "inputs_embeds")
#: Of a cache or a prefix; as later versions of transformers name it, too.
_CACHES = {"past_key_values", "cache"}
#: Of which stock's attention does nothing but update them with keys and values.
_KNOWN_CACHES = {DynamicCache, StaticCache, EncoderDecoderCache, type(None)}
_NAMED = {name: name for name in _FALSY} | dict.fromkeys(
    ("encoder_hidden_states", "encoder_attention_mask"), "cross-attention"
)
#: Attention, by how it is configured, that looks at none of what is passed through to it.
_ATTEND: dict[str, Callable[..., Any]] = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}
_MASKS: dict[str, Callable[..., Any]] = {"eager": eager_mask, "sdpa": sdpa_mask}
_UNREAD = "GPT2Model was called by itself: what of its padding is read isn't known"


@stands_for(GPT2Model)
class PackedModel(GPT2Model):
    """GPT-2 that packs the batches of which nobody reads the padding, and fuses the blocks of all that it knows."""

    _fastpeft: PackingSite

    @functools.wraps(GPT2Model.forward)
    def forward(  # type: ignore[override]
        self, *args: Any, reads: Reads | str = _UNREAD, **kwargs: Any
    ) -> Any:
        """As GPT2Model's; `reads` tells what its caller reads, or why that isn't known."""
        if torch.compiler.is_compiling():  # the number of tokens depends on the data
            return super().forward(*args, **kwargs)
        site = self._fastpeft
        arguments = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        reason = (
            (len(arguments) < len(args) + len(kwargs) and "an error")  # for stock to raise
            or _why_not_blocks(self, arguments)
            or site.trunk.why_not(self)
        )
        packed = reason or _why_not_packed(self, arguments) or _layout(self, arguments, reads, site)
        if isinstance(packed, str):
            site.record(Route("stock", packed))
            if reason or site.settings is None or site.trunk.adapter_names() is not None:
                return super().forward(*args, **kwargs)
            grid = Grid([site.trunk.seen.mark], site.settings.attend)
            try:
                return super().forward(*args, packed=grid, **kwargs)
            finally:
                grid.walked.clear()  # a checkpoint's second forward comes after who knows what
        graphs = site.graphs
        given = _caches(self, arguments), packed.groups is not None
        if graphs is not None and not graphs.refused(self, site.trunk.trained(), *given):
            packed = _as_graph(self, packed, graphs)
        chosen: dict[str, Any] = {"packed": packed}
        if arguments.get("attention_mask") is None:  # stock will see one
            self.warn_if_padding_and_no_attention_mask(arguments["input_ids"], None)
        # Anything with four dimensions is taken for a finished mask, so none is built.
        chosen["attention_mask"] = torch.empty(1, 1, 1, 1, device=arguments["input_ids"].device)
        if not packed.whole:
            chosen |= _packed_rows(packed, arguments)
        before = groups.packed.set(packed.groups)
        try:
            output = super().forward(**{**arguments, **chosen})
        finally:
            groups.packed.reset(before)
            packed.walked.clear()
        reason = "packed: no padding between the embeddings and the head"
        if graphs is not None:
            reason += f"; no graph: {graphs.why_not}" if graphs.why_not else ", replayed as a graph"
        site.record(Route("packed", reason))
        return output if packed.whole else _unpacked(packed, output)


def why_not_model(transformer: Any) -> str | None:
    """Why this GPT-2, as it is configured, can't run on packed tokens; None where it can."""
    return _why_not_settings(_settings(transformer))


def _settings(transformer: Any) -> Settings:
    config = transformer.config
    implementation, reason = config._attn_implementation, None
    if implementation not in _ATTEND:
        reason = f"attention is {implementation}, not eager or sdpa"
    elif config.reorder_and_upcast_attn:
        reason = "reorder_and_upcast_attn"
    elif not getattr(config, "is_causal", True):
        reason = "attention isn't causal"
    asked = [name for name in _FALSY if getattr(config, name, False)]
    return Settings(dict(vars(config)), implementation, _ATTEND.get(implementation), reason, asked)


def _are_of(settings: Settings, config: Any) -> bool:
    """Whether settings are of this config as it is; its properties take 2 µs each."""
    now = vars(config)
    return now.keys() == settings.held.keys() and all(map(is_, now.values(), settings.held.values()))


def _why_not_settings(settings: Settings) -> str | None:
    if settings.reason:
        return settings.reason
    implementation = settings.implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    if (
        attend is not settings.attend
        or ALL_MASK_ATTENTION_FUNCTIONS[implementation] is not _MASKS[implementation]
    ):
        return f"{implementation} attention, or its mask, isn't transformers' own"
    return None


def _why_not_blocks(module: Any, arguments: dict[str, Any]) -> str | None:
    """Why this call runs stock, whatever the batch; None where fused blocks compute what stock's do."""
    for name, value in arguments.items():
        if name in _TAKEN or name in _IGNORED or value is None or (name in _FALSY and not value):
            continue
        if name in _CACHES:
            kinds = {type(value), type(getattr(value, "self_attention_cache", None))}
            if not kinds <= _KNOWN_CACHES:
                return f"a cache that is a {type(value).__name__}"
        elif name != "inputs_embeds":
            return _NAMED.get(name, f"{name}, which packing doesn't know")
    if torch.jit.is_tracing():
        return "traced: the number of tokens depends on the data"
    if any(isinstance(value, Tensor) and value.numel() == 0 for value in map(arguments.get, _READ)):
        return "no tokens"
    site = module._fastpeft
    if site.settings is None or not _are_of(site.settings, module.config):
        site.settings = _settings(module)
    reason = why_not_here() or _why_not_settings(site.settings)
    return reason or next((name for name in site.settings.asked if arguments.get(name) is None), None)


def _why_not_packed(module: Any, arguments: dict[str, Any]) -> str | None:
    """Why a batch of this call keeps its padding, whatever it reads; None where packing computes what stock does."""
    if any(arguments.get(name) is not None for name in _CACHES):
        return "past keys and values, of a cache or a prefix"
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if type(ids) is not Tensor or ids.dim() != 2 or arguments.get("inputs_embeds") is not None:
        return "input_ids (batch, length) are needed to see the padding"
    if ids.is_meta:
        return "ids without data"
    placed = mask is None and arguments.get("position_ids") is not None
    # Checkpointing turns the cache off, before or after it counts.
    if placed and module.gradient_checkpointing and _caches(module, arguments):
        return "position_ids without an attention_mask, and a cache under checkpointing"
    if mask is not None and (
        type(mask) is not Tensor or mask.shape != ids.shape or mask.device != ids.device
    ):
        return "an attention_mask that hasn't the shape of input_ids"
    length = ids.shape[1]
    for name, shapes in (
        ("position_ids", ((1, length), tuple(ids.shape))),
        ("token_type_ids", (tuple(ids.shape),)),
    ):
        given = arguments.get(name)
        if given is not None and (type(given) is not Tensor or tuple(given.shape) not in shapes):
            return f"{name} that haven't the shape of input_ids"
    return None


def _layout(module: Any, arguments: dict[str, Any], reads: Reads | str, site: PackingSite) -> Packed | str:
    """The layout of a batch, or why its padding can't leave, or needn't."""
    ids, attention_mask = arguments["input_ids"], arguments.get("attention_mask")
    batch, length = ids.shape
    mask, given = attention_mask, arguments.get("position_ids")
    if given is None and length > module.wpe.weight.shape[0]:
        return "more tokens than positions"
    rows = torch.arange(batch, device=ids.device)
    read, only_unmasked = Reads() if isinstance(reads, str) else reads, site.only_unmasked
    names, sizes = site.trunk.adapter_names(), [length] * batch
    if names is not None and len(names) != batch:
        return "an error"  # for stock to raise
    if mask is not None:
        mask = mask.bool()
        visible = mask.any()
        if read.pooled is not None:
            visible = mask[rows, read.pooled].all()
        elif read.positions is not None and not only_unmasked:
            visible = ~(read.positions & ~mask).any()
        # The one wait for the device; of ids beneath the padding, stock makes errors too.
        sums = mask.sum(1)
        found = torch.stack((sums.sum(), sums.max(), visible, _in_range(module, arguments)))
        if names is not None:
            found = torch.cat((found, sums))
        count, longest, all_visible, in_range, *sizes = found.tolist()
        if count == ids.numel():
            mask = None
        elif count == 0 or not all_visible:
            return "the mask hides a token that is read, or all of them"
        elif not in_range:
            return "an error"  # for stock to raise
        elif isinstance(reads, str) and not only_unmasked:
            return reads
        elif arguments.get("use_cache"):
            return "a cache of padded rows"
        elif FULL * ids.numel() < count and read.pooled is None:
            return "the batch is nearly full"
    sequences, pooled = batch, read.pooled
    order = None if names is None else groups.order_of(tuple(names), ids.device)
    by_adapter = None if order is None else order.by_adapter
    if by_adapter is not None:  # all below is of the grid with its rows in that order
        mask = None if mask is None else mask[by_adapter]
        given = None if given is None else given.expand_as(ids)[by_adapter]
        pooled = None if pooled is None else pooled[by_adapter]
    if mask is None:
        tokens = index = torch.arange(ids.numel(), device=ids.device)
        places, longest, sequence = tokens % length, length, tokens // length
        if attention_mask is None and given is not None and not _caches(module, arguments):
            # As stock has it, positions that don't go on are another sequence's; it has no padding then.
            begins = torch.nn.functional.pad(given.expand_as(ids).diff(dim=1) != 1, (1, 0), value=True)
            first = begins.flatten().nonzero()[:, 0]
            sequence = begins.flatten().cumsum(0) - 1
            places = tokens - first[sequence]
            sequences, longest = len(first), int(places.max()) + 1
            if sequences * longest > _SPARSE * ids.numel() or sequences * longest**2 > 2 * batch * length**2:
                return "a long sequence among short ones: attention's view would be mostly padding"
            pooled = pooled if sequences == batch else None
    else:
        index = mask.flatten().cumsum(0) - 1  # a token's index among the packed
        cells = torch.arange(ids.numel(), device=ids.device)
        # Not `nonzero`, which would wait for the device again.
        tokens = cells.new_empty(count + 1).scatter_(0, index.where(mask.flatten(), count), cells)[:count]
        places, sequence = (mask.cumsum(1) - 1).flatten()[tokens], tokens // length
    one_each = sequences == batch
    if site.graphs is not None and not (mask is None and pooled is None and one_each):  # that keeps its grid
        sequences = sequences if one_each else rounded(sequences)
        longest = rounded(longest, steps=4)
    causal = None
    if module.config._attn_implementation == "eager":
        dtype = module.wpe.weight.dtype
        causal = torch.full((longest, longest), torch.finfo(dtype).min, dtype=dtype, device=ids.device)
        causal = causal.triu(1)[None, None]
    last = module.h[-1] if len(module.h) else None
    pooled = None if pooled is None or last is None else index[rows * length + pooled]
    slots, view = sequence * longest + places, (sequences, longest)
    layout = Packed(tokens, slots, (batch, length), view, causal, pooled, last, [site.trunk.seen.mark])
    if order is None:
        return layout
    if by_adapter is not None:
        tokens = by_adapter[tokens // length] * length + tokens % length
    return layout._replace(tokens=tokens, groups=order.groups(sizes), moved=by_adapter is not None)


def _as_graph(module: Any, packed: Packed, graphs: Graphs) -> Packed:
    """A layout whose blocks are replayed: the first does the work of all."""
    packed = packed._replace(spare=not packed.whole)
    blocks, modules = module.h, [module, *module._fastpeft.trunk.seen.called]

    def graph(block: nn.Module, hidden: Tensor) -> Tensor:
        return graphs.through(blocks, modules, hidden, packed) if block is blocks[0] else hidden

    return packed._replace(graph=graph)


def _caches(module: Any, arguments: dict[str, Any]) -> bool:
    """Whether this call makes a cache."""
    asked = arguments.get("use_cache")
    return bool(module.config.use_cache if asked is None else asked)


def _in_range(module: Any, arguments: dict[str, Any]) -> Tensor:
    """Whether every id and position of the grid is one that the embeddings have."""
    found = torch.ones((), dtype=torch.bool, device=arguments["input_ids"].device)
    for name, table in (
        ("input_ids", module.wte),
        ("token_type_ids", module.wte),
        ("position_ids", module.wpe),
    ):
        given = arguments.get(name)
        if given is not None:
            low, high = given.aminmax()
            found = found & (low >= 0) & (high < table.weight.shape[0])
    return found


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


def _unpacked(packed: Packed, output: Any) -> Any:
    """The output of GPT2Model with its hidden states back in the caller's grid."""
    full = packed.in_grid(output[0][0])
    if isinstance(output, tuple):
        return (full, *output[1:])
    output.last_hidden_state = full
    return output
