"""Modules as they were found when a call was planned, for the next call to ask cheaply whether they still are so."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpeft.checks import is_dense
from fastpeft.modules import is_plain, touched, why_not_here
from fastpeft.routes import Decided


class Plan(ABC):
    """What a module's call was found to be.

    Costs the host some 5 µs a call where asking everything costs 50. Modules below are compared by identity and class,
    and for hooks or a forward of their own; parameters by class, dtype, device, layout and whether inference mode made
    them. No hook has come to a backward pass while torch has given out no handle since.
    """

    def __init__(self, module: Any, holders: Sequence[Any], parts: Sequence[nn.Module]) -> None:
        """Of `module`, whose call runs `parts`, which it and the `holders` below it hold."""
        self._module = weakref.ref(module)  # which holds its plan: else only the collector could free it
        self._walked: Any = None
        self._handles = RemovableHandle.next_id
        self._own, self._holders = dict(module._modules), list(holders)
        self._children = list(map(dict, map(_MODULES, holders)))
        self._parts = list(parts)
        self._kinds = list(map(type, parts))
        self._attributes = list(map(vars, parts))
        tensors = self.read()  # and not kept: what is replaced later is to be freed then
        self._like = list(map(like, tensors))
        # What inference mode made can't be saved for backward: it is asked about at each call.
        self._whole = not any(
            t is False or (t is not None and (t.is_inference() or not is_dense(t))) for t in tensors
        )
        #: What was found out about its operation.
        self.decided = Decided()

    @abstractmethod
    def read(self) -> list[Tensor | None]:
        """The parameters that the call takes, as they are now; the first has the dtype and device of what comes in.

        False stands for one that its module doesn't hold as a parameter, but perhaps as an attribute.
        """

    def holds(self, module: Any, x: Tensor, walked: Any = None) -> bool:
        """Whether a call of `module` on what is like x but for its shape is still of the kind that was planned.

        `walked` stands for the modules of a trunk, hooks and all, as they were just seen to be (`Trunk.seen.mark`):
        where it is what it was when these were last compared, they are as they were.
        """
        planned: Any = self._module()
        if walked is None or walked is not self._walked or planned is not module:
            if not (
                planned is module
                and module._modules == self._own
                and list(map(_MODULES, self._holders)) == self._children
                and list(map(type, self._parts)) == self._kinds
                and not touched(self._attributes)
                and (self._handles == RemovableHandle.next_id or self._is_plain())
                and why_not_here() is None
            ):
                return False
            self._walked = walked
        tensors = self.read()
        first = tensors[0]
        return (
            self._whole
            and list(map(like, tensors)) == self._like
            and first is not None
            and type(x) is Tensor
            and is_dense(x)
            and x.device == first.device
            and self.takes(x, first)
        )

    def _is_plain(self) -> bool:
        """Whether no module below has a hook, which then holds for all handles given out up to now."""
        handles = RemovableHandle.next_id
        if not all(map(is_plain, self._parts)):
            return False
        self._handles = handles
        return True

    def takes(self, x: Tensor, first: Tensor) -> bool:
        """Whether x has a dtype that the call was planned for, of which `first` is the first parameter."""
        return x.dtype == first.dtype or torch.is_autocast_enabled(x.device.type)


_MODULES = attrgetter("_modules")


def like(tensor: Any) -> Any:
    """What a call's plan is for, of a tensor."""
    if tensor is None or tensor is False:
        return tensor
    strides = tensor.layout is torch.strided and tensor.stride()
    kind = type(tensor), tensor.dtype, tensor.device
    return *kind, tensor.shape, strides, tensor.is_neg(), tensor.is_inference()
