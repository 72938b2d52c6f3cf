"""Modules as they were found when a call was planned, for the next call to ask cheaply whether they still are so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpeft.modules import is_plain, why_not_here
from fastpeft.routes import Decided


class Plan(ABC):
    """What a module's call was found to be.

    Costs the host some 5 µs a call where asking everything costs 50. Modules below are compared by identity and class,
    and for a forward of their own; parameters by class, dtype, device, shape, strides and whether inference mode made
    them. Hooks come only with handles, which torch numbers: while no number was given out since, none has come.
    """

    def __init__(self, module: Any, holders: Sequence[Any], parts: Sequence[nn.Module]) -> None:
        """Of `module`, whose call runs `parts`, which `holders` hold."""
        self._module = module
        self._walked: Any = None
        self._handles = RemovableHandle.next_id
        self._holders = list(holders)
        self._children = list(map(dict, map(_MODULES, holders)))
        self._parts = list(parts)
        self._kinds = list(map(type, parts))
        self._attributes = list(map(vars, parts))
        self.tensors = self.read()
        self._like = list(map(like, self.tensors))
        # What inference mode made can't be saved for backward: it is asked about at each call.
        self._whole = not any(t is False or (t is not None and t.is_inference()) for t in self.tensors)
        #: What was found out about its operation.
        self.decided = Decided()

    @abstractmethod
    def read(self) -> list[Tensor | None]:
        """The parameters that the call takes, as they are now; the first has the dtype and device of what comes in.

        False stands for one that its module doesn't hold as a parameter, but perhaps as an attribute.
        """

    def holds(self, module: Any, x: Tensor, walked: Any = None) -> bool:
        """Whether a call of `module` on what is like x but for its shape is still of the kind that was planned.

        `walked` stands for the modules of a trunk, hooks and all, as they were just seen to be (`Trunk.seen`): where it
        is what it was when these were last compared, they are as they were.
        """
        if walked is None or walked is not self._walked or self._module is not module:
            if not (
                self._module is module
                and list(map(_MODULES, self._holders)) == self._children
                and list(map(type, self._parts)) == self._kinds
                and (self._handles == RemovableHandle.next_id or self._is_plain())
                and not any(map(contains, self._attributes, repeat("forward")))
                and why_not_here() is None
            ):
                return False
            self._walked = walked
        self.tensors = self.read()
        first, now = self.tensors[0], list(map(like, self.tensors))
        return (
            self._whole
            and now == self._like
            and first is not None
            and type(x) is Tensor
            and x.device == first.device
            and self.takes(x)
        )

    def _is_plain(self) -> bool:
        """Whether no module below has a hook, which then holds for all handles given out up to now."""
        handles = RemovableHandle.next_id
        if not all(map(is_plain, self._parts)):
            return False
        self._handles = handles
        return True

    def takes(self, x: Tensor) -> bool:
        """Whether x has a dtype that the call was planned for."""
        first = self.tensors[0]
        assert first is not None
        return x.dtype == first.dtype or torch.is_autocast_enabled(x.device.type)


_MODULES = attrgetter("_modules")


def like(tensor: Any) -> Any:
    """What a call's plan is for, of a tensor."""
    if tensor is None or tensor is False:
        return tensor
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_inference()
