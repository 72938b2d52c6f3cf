"""Rows of one batch through different adapters, in training as in inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fastpeft import groups


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it, each row of a batch uses the adapter of its name: `model(**batch)` for a batch of `len(names)` rows.

    What peft's argument `adapter_names` does in inference, in training too: an adapter's gradient comes from its own
    rows alone, as from a batch of only those; an adapter without rows gets none. Adapters may differ in rank, targets,
    scaling and dropout, and heads that peft saves with them (`modules_to_save`) go with their rows. For an adapter to
    train its parameters must (`model.set_requires_grad(names)`): peft leaves only the active one's so.

    Args:
        model: a model with peft's LoRA, patched or not.
        names: for each row of the batches that come, an adapter's name, or `"__base__"` for none.

    Raises:
        TypeError: names that aren't a sequence of strings.
        ValueError: a name that no adapter has, gradient checkpointing (whose second forward comes later), or
            another such context, or `adapter_names`, around it. A batch of another number of rows raises at its call.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of adapters' names, one for each row; got {names!r}")
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    known = sorted({name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)})
    unknown = sorted(set(names) - {*known, groups.BASE})
    if unknown:
        raise ValueError(
            f"no adapter is named {', '.join(unknown)}: the model has {', '.join(known) or 'none'}"
        )
    if any(groups.names_given(layer) for layer in layers):
        raise ValueError("the rows of this model's batches have adapters already: leave that context first")
    if any(vars(module).get("gradient_checkpointing") for module in modules):
        raise ValueError(
            "under gradient checkpointing the forward runs again after the context has ended: call "
            "model.gradient_checkpointing_disable() first"
        )
    given = partial(groups.hook, adapter_names=list(names))
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
                stack.callback(module.register_forward_pre_hook(given, with_kwargs=True).remove)
        yield
