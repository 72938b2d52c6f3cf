"""Whether a GPT-2's trunk is plain: modules of known classes that treat each token by itself, and nobody looking on.

Only then may its rows be other than the caller's grid. A class is known by exact comparison; whatever isn't known, a
hook, a forward of an instance's own, a module used twice, keeps the trunk stock. Nothing is recognised by its name.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Sequence
from itertools import chain, repeat
from operator import is_, itemgetter
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.peft_model import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import ModulesToSaveWrapper, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2MLP,
    GPT2Attention,
    GPT2Block,
    GPT2Model,
    GPT2SequenceSummary,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import output_capturing

from fastpeft.adapters import Adapter, ParallelAdapter, adapt_output, adapters_of
from fastpeft.copies import Copied
from fastpeft.groups import is_names, names_given
from fastpeft.modules import held_by, touched
from fastpeft.stock import Defined
from fastpeft.swap import is_fused, stock_class

_ACTIVATIONS = ("gelu_new", "gelu", "gelu_fast", "quick_gelu", "relu", "silu", "tanh")
#: Stock classes whose forward treats tokens one by one, or is one that packing replaces.
_CALLED: set[Any] = {
    GPT2Model, GPT2Block, GPT2Attention, GPT2MLP, GPT2SequenceSummary,
    Conv1D, nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Identity,
    LoraLinear, LoraEmbedding, DoraLinearLayer, ModulesToSaveWrapper, Copied, Adapter, ParallelAdapter,
    nn.GELU, nn.ReLU, nn.SiLU, *(type(ACT2FN[name]) for name in _ACTIVATIONS),
}  # fmt: skip
_HELD = {nn.ModuleList, nn.ModuleDict, nn.ParameterDict}  # never called
#: These aren't only treated one by one: packing has a forward of its own for them.
_REPLACED = {GPT2Model, GPT2Block, GPT2Attention, GPT2MLP}
#: What a packed call has a way of its own for, or relies on.
_DEFINED = Defined(
    *((kind, name) for name in ("forward", "__call__") for kind in _CALLED),
    (modeling_gpt2, "create_causal_mask"), (modeling_gpt2, "eager_attention_forward"),
    (F, "scaled_dot_product_attention"), (F, "softmax"), (torch, "matmul"), (F, "layer_norm"), (F, "embedding"),
)  # fmt: skip


def _code_of(function: Any, name: str) -> CodeType | None:
    """The code of a function that `function` defines within itself."""
    constants = getattr(getattr(function, "__code__", None), "co_consts", ())
    return next((c for c in constants if isinstance(c, CodeType) and c.co_name == name), None)


#: Hooks of libraries that change no value: they ask the embeddings for a gradient, or collect what the caller of
#: GPT2Model asked to be collected, and such a call isn't packed.
_INERT = {
    _code_of(PreTrainedModel.enable_input_require_grads, "make_inputs_require_grads"),
    _code_of(PeftModel._prepare_model_for_gradient_checkpointing, "make_inputs_require_grad"),
    _code_of(prepare_model_for_kbit_training, "make_inputs_require_grad"),
    _code_of(getattr(output_capturing, "install_output_capuring_hook", None), "output_capturing_hook"),
} - {None}


def why_not_module(module: Any, coming: Container[int] = ()) -> str | None:
    """What about this module keeps that which it is part of from packing, to go on after its name; None for nothing.

    Modules whose ids are in `coming` are taken for swapped.
    """
    kind: type = stock_class(type(module))
    if kind in _HELD:
        return None
    swapped = is_fused(module) or id(module) in coming
    if kind not in _CALLED and not swapped:
        return f"is a {kind.__name__}, which isn't known to treat each token by itself"
    if "forward" in vars(module):
        return "has a forward of its own"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        kinds = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        hooks = chain.from_iterable(hooks.values() for hooks in kinds)
        if any(
            hook is not adapt_output and getattr(hook, "__code__", None) not in _INERT and not is_names(hook)
            for hook in hooks
        ):
            return "has a hook that looks on"
    if kind in _REPLACED and not swapped:
        return "isn't patched: call fastpeft.patch again"
    if kind in (LoraLinear, LoraEmbedding):
        variants = {type(v) for v in getattr(module, "lora_variant", {}).values()} - {DoraLinearVariant}
        if variants:
            return f"has a {variants.pop().__name__}"
    return None


class _Hooks(NamedTuple):
    """The hooks of the modules that are called, as they were when they were looked at."""

    handles: int  # how many handles of hooks torch had given out
    bare: list[dict[str, Any]]  # the `__dict__`s of modules that weren't `touched`
    others: list[dict[str, Any]]  # those of all others
    looked_at: list[Any]  # the modules with hooks of any kind, or a forward of their own
    named: list[Any]  # those that a call gave `adapter_names`
    hosts: int  # how many have bottleneck adapters behind them


class _Seen(NamedTuple):
    """A trunk as it was walked; lists run in parallel with what a call compares them with.

    All but the first two are of what is below the transformer, which holds this: else only the collector could free it.
    """

    transformer: Any  # a weak reference
    own: dict[str, Any]  # what it held
    holders: list[dict[str, Any]]  # the `__dict__`s of all modules that have some below them
    children: list[dict[str, Any]]  # what they held
    called: list[Any]  # every module that is called
    kinds: list[type]  # their classes
    attributes: list[dict[str, Any]]  # their `__dict__`s
    trains: tuple[list[dict[str, Any]], list[str]]  # `__dict__`s of modules, and names of what trains in them
    attentions: list[dict[str, Any]]  # the `__dict__`s of the attentions, one a block
    expected: list[tuple[Any, ...]]  # what they have to say of themselves
    tables: list[dict[str, Any]]  # the `__dict__`s of the embeddings
    loras: int  # how many LoRA layers there are
    offender: Any  # a weak reference to the module that keeps the trunk stock, if one does
    hooks: _Hooks
    mark: Any  # stands for all of this where it goes on


class Trunk:
    """What a GPT-2 was made of when it was last walked, for a call to ask cheaply whether it still is.

    A call compares every module below with what was there, its class, its hooks, whether it has a forward of its own,
    and the classes of what trains.
    """

    def __init__(self) -> None:
        #: What was found at the last walk: the same as long as no module was replaced, swapped or hooked, whatever
        #: became of what they hold. To be taken for so only while a call runs that has just asked.
        self.seen: Any = None

    def __deepcopy__(self, memo: Any) -> Trunk:
        return Trunk()

    def __reduce__(self) -> Any:
        return Trunk, ()

    def why_not(self, transformer: Any) -> str | None:
        """Why this GPT-2 isn't plain now; None where it is."""
        reason = _DEFINED.replaced()
        if reason:
            return reason
        seen = self.seen
        if (
            seen is not None
            and seen.transformer() is transformer
            and transformer._modules == seen.own
            and not touched([vars(transformer)])
            and list(map(_MODULES, seen.holders)) == seen.children
            and list(map(type, seen.called)) == seen.kinds
        ):
            hooks = seen.hooks
            as_looked = hooks.handles == RemovableHandle.next_id and not touched(hooks.bare)
            if seen.offender is not None:
                offender = seen.offender()
                reason = why_not_module(offender) if as_looked and offender is not None else None
                if reason:
                    return f"{_name_of(offender, transformer)} {reason}"
            elif as_looked and not any(map(dict.__contains__, hooks.others, repeat("forward"))):
                return _why_not_state(seen)
            else:  # hooks came or went, as those of `adapter_rows` do: the rest is as it was
                hooks = _hooks_of(seen.called, seen.attributes)
                if not any(map(why_not_module, hooks.looked_at)):
                    self.seen = seen._replace(trains=_trains(seen.called), hooks=hooks, mark=object())
                    return _why_not_state(self.seen)
        return self.walk(transformer)

    def trained(self) -> Iterable[Any]:
        """What trained when it was last walked, as it is now."""
        places, names = self.seen.trains
        return map(dict.get, map(_PARAMETERS, places), names)

    def adapter_names(self) -> Sequence[str] | None:
        """The adapters of a batch's rows, as hooks give them now wherever there are any; None where they don't."""
        named = self.seen.hooks.named
        return names_given(named[0]) if named else None

    def walk(self, transformer: Any, coming: Container[int] = ()) -> str | None:
        """`why_not`, asked of every module below; those whose ids are in `coming` are taken for swapped."""
        modules = held_by(transformer)
        if len(set(map(id, modules))) < len(modules):
            self.seen = None
            return "a module is used twice"
        if not all(isinstance(b, GPT2Block) and isinstance(b.attn, GPT2Attention) for b in transformer.h):
            self.seen = None
            return "its layers aren't all GPT-2's blocks"
        called = [module for module in modules if type(module) not in _HELD]
        below = called[1:]
        attributes: list[Any] = list(map(vars, below))
        hooks = _hooks_of(
            below, attributes
        )  # first: what another thread adds from here on has another handle
        offender = next((m for m in called if why_not_module(m, coming)), None)
        config = transformer.config
        width, heads = config.hidden_size, config.num_attention_heads
        self.seen = _Seen(
            weakref.ref(transformer),
            dict(transformer._modules),
            [vars(m) for m in modules[1:] if m._modules],
            [dict(m._modules) for m in modules[1:] if m._modules],
            below,
            list(map(type, below)),
            attributes,
            _trains(below),
            [vars(block.attn) for block in transformer.h],
            [(True, i, heads, width // heads, width, width, False) for i in range(len(transformer.h))],
            [vars(m) for m in below if isinstance(m, nn.Embedding)],
            sum(isinstance(m, LoraLayer) for m in below),
            None if offender is None else weakref.ref(offender),
            hooks,
            object(),
        )
        if offender is None:
            return _why_not_state(self.seen)
        return f"{_name_of(offender, transformer)} {why_not_module(offender, coming)}"


def _trains(called: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    found = [(vars(m), m._parameters) for m in called if m._parameters]
    pairs = [(d, name) for d, own in found for name, p in own.items() if p is not None and p.requires_grad]
    return [held for held, _ in pairs], [name for _, name in pairs]


def _hooks_of(called: list[Any], attributes: list[dict[str, Any]]) -> _Hooks:
    handles = RemovableHandle.next_id
    looked_at = [
        m for m, held in zip(called, attributes, strict=True) if "forward" in held or any(_HOOKS(held))
    ]
    bare: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for held in attributes:
        (others if touched([held]) else bare).append(held)
    return _Hooks(
        handles,
        bare,
        others,
        looked_at,
        [m for m in looked_at if names_given(m) is not None],
        sum(not isinstance(m, LoraLayer) and bool(adapters_of(m)) for m in looked_at),
    )


def _why_not_state(seen: _Seen) -> str | None:
    """What a trunk of known modules is nevertheless kept stock by; None where nothing does."""
    if list(map(_SHAPE, seen.attentions)) != seen.expected:
        return "an attention isn't causal, or its layer_idx, heads, widths or upcasting aren't what the config says"
    if not all(map(is_, map(_CONFIG, seen.attentions), repeat(seen.transformer().config))):
        return "an attention has a config of its own"
    places, names = seen.trains
    if not _PLAIN.issuperset(map(type, map(dict.get, map(_PARAMETERS, places), names))):
        return "parameters of a class of their own"
    named = seen.hooks.named
    given = list(map(names_given, named))
    if any(given):
        if not all(is_fused(module) or type(module) in _HOSTS for module in named):
            return "adapter_names for what isn't a LoRA layer that fastpeft fuses"
        if len(given) < seen.loras + seen.hooks.hosts or any(each != given[0] for each in given):
            return "adapter_names that aren't the same for all LoRA layers and bottleneck adapters"
    if any(table["max_norm"] is not None or table["scale_grad_by_freq"] for table in seen.tables):
        return "embeddings with max_norm or scale_grad_by_freq"
    return None


#: Behind these there may be bottleneck adapters, which names are for, and not for their own forward.
_HOSTS = (nn.Dropout, nn.LayerNorm)
_SHAPE = itemgetter(
    "is_causal", "layer_idx", "num_heads", "head_dim", "embed_dim", "split_size", "reorder_and_upcast_attn"
)
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONFIG, _PARAMETERS, _MODULES = map(itemgetter, ("config", "_parameters", "_modules"))
_PLAIN = {Tensor, nn.Parameter, type(None)}


def _name_of(module: Any, transformer: Any) -> str:
    return next(name for name, m in transformer.named_modules() if m is module) or "the model"
