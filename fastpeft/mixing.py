"""Rows of one batch through different adapters, in training as in inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from fastpeft import groups
from fastpeft.adapters import adapters_of
from fastpeft.copies import Copied
from fastpeft.modules import held_by


class _Eagerly:
    """What was compiled runs eagerly from the first that enters to the last that leaves, of any thread, in any order.

    torch has one stance for the whole process, and each that restores it restores what it found.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.__exit__(None, None, None)


_eagerly = _Eagerly()


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it, each row of a batch uses the adapter of its name: `model(**batch)` for a batch of `len(names)` rows.

    What peft's argument `adapter_names` does in inference, in training too: an adapter's gradient comes from its own
    rows alone, as from a batch of only those; an adapter without rows gets none. A name is of a LoRA adapter, of a set
    of bottleneck adapters, or of both, which then both apply. Adapters may differ in rank, targets, scaling and
    dropout, sets in bottleneck, activation, slots and layers. For a LoRA adapter to train its parameters must
    (`model.set_requires_grad(names)`): peft leaves only the active one's so. Sets always train.

    Heads of their own that adapters and sets have (`modules_to_save`) go with their rows; rows of other names have the
    head that was there before. Any other head is one for all rows.

    A compiled model runs eagerly within it. Add, delete or copy nothing within it: what comes doesn't know the rows,
    and a copy keeps them. A call from another thread uses the same rows.

    Args:
        model: a model with peft's LoRA, with sets of bottleneck adapters or with both, patched or not.
        names: for each row of the batches that come, an adapter's name, or `"__base__"` for none.

    Raises:
        TypeError: names that aren't a sequence of strings.
        ValueError: a name that no adapter has, gradient checkpointing (whose second forward comes later), or
            another such context, or `adapter_names`, around it. A batch of another number of rows raises at its call.
    """
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of adapters' names, one for each row; got {names!r}")
    modules = list(dict.fromkeys(held_by(model)))
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    hosts = [module for module in modules if adapters_of(module)]
    copies = [module for module in modules if isinstance(module, Copied)]
    of_lora = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    known = sorted(of_lora.union(*map(adapters_of, hosts)))
    unknown = sorted(set(names) - {*known, groups.BASE})
    if unknown:
        raise ValueError(
            f"no adapter is named {', '.join(unknown)}: the model has {', '.join(known) or 'none'}"
        )
    if any(groups.names_given(module) for module in (*layers, *hosts)):
        raise ValueError("the rows of this model's batches have adapters already: leave that context first")
    if any(vars(module).get("gradient_checkpointing") for module in modules):
        raise ValueError(
            "under gradient checkpointing the forward runs again after the context has ended: call "
            "model.gradient_checkpointing_disable() first"
        )
    with ExitStack() as stack:
        # What was compiled without these hooks doesn't look for them.
        stack.enter_context(_eagerly)
        for module in modules:
            if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
                own = names
                if isinstance(module, ModulesToSaveWrapper):  # which has to know them all
                    own = [name if name in module.modules_to_save else groups.BASE for name in names]
                given = partial(groups.hook, adapter_names=list(own))
                stack.callback(module.register_forward_pre_hook(given, with_kwargs=True).remove)
        for host in (*hosts, *copies):
            given = partial(groups.mark, adapter_names=list(names))
            stack.callback(host.register_forward_pre_hook(given).remove)
        yield
