"""One way for every kind: a module's class is swapped for a fused one that bears its name, and swapped back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fastpeft.kernels.memo import Memo
from fastpeft.routes import Options, Route

_Fused = TypeVar("_Fused", bound=type[nn.Module])
#: The fused class of every stock class that has one.
_FUSED: dict[type[nn.Module], type[nn.Module]] = {}


@dataclass
class Site:
    """What `patch` decided for one module and what its calls did since; kept on the module as `_fastpeft`."""

    name: str
    options: Options
    last: Route | None = None
    calls: int = 0
    plan: Any = None  # what its last call found out, for the next to compare
    #: What was found out about calls, by what their plans are of.
    decided: Memo = field(default_factory=lambda: Memo(64))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which begin without a plan: it is of this module."""
        return {**vars(self), "plan": None, "decided": Memo(64)}

    def record(self, route: Route) -> None:
        """Note a call; not while compiling, where a changing counter would recompile each call."""
        if not torch.compiler.is_compiling():
            self.last = route
            self.calls += route.path != "stock"


def stands_for(stock: type[nn.Module]) -> Callable[[_Fused], _Fused]:
    """Makes a subclass of `stock` the class that is swapped in for it.

    It bears stock's name everywhere: in `repr`, errors, saved configs, and where libraries look modules up by the name
    of their class (FSDP's wrap policies, transformers' recorders). Copies and pickles rebuild it from the stock class.
    """

    def enter(fused: _Fused) -> _Fused:
        for name, member in vars(fused).items():
            if isinstance(member, FunctionType):
                member.__qualname__ = f"{stock.__qualname__}.{name}"
        fused.__name__, fused.__qualname__, fused.__module__ = (
            stock.__name__,
            stock.__qualname__,
            stock.__module__,
        )
        fused._fastpeft_stock = stock  # type: ignore[attr-defined]
        fused._fastpeft_forward = stock.forward  # type: ignore[attr-defined]  # what it was found to compute
        fused.__reduce_ex__ = _reduce_ex  # type: ignore[method-assign, assignment]
        fused.__new__ = staticmethod(_made)  # type: ignore[method-assign, assignment]
        _FUSED[stock] = fused
        return fused

    return enter


def _made(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A module of the stock class for whoever calls a fused one, for a new module has no site to run by.

    Without arguments an empty one of the class itself, as DataParallel asks for its replicas.
    """
    stock = vars(cls).get("_fastpeft_stock")
    return stock(*args, **kwargs) if stock and (args or kwargs) else object.__new__(cls)


def _reduce_ex(module: Any, protocol: Any) -> Any:
    reduced = object.__reduce_ex__(module, protocol)
    stock = vars(type(module)).get("_fastpeft_stock")
    if stock is None:  # another library's class on top of ours: its own affair
        return reduced
    _, _, *state = cast(tuple, reduced)
    mixin = type(module).__mro__[1]
    return _new, (stock, None if mixin is stock else mixin), *state


def _new(stock: type[nn.Module], mixin: type[nn.Module] | None) -> nn.Module:
    return object.__new__(fused_class(stock, mixin))


def fused_class(stock: type[nn.Module], mixin: type[nn.Module] | None = None) -> type[nn.Module]:
    """The class that is swapped in for `stock`; made of `mixin` for a class that only the user's model has."""
    if stock not in _FUSED:
        assert mixin is not None, f"nothing stands for {stock.__name__}"
        stands_for(stock)(type(stock.__name__, (mixin, stock), {}))
    return _FUSED[stock]


def stock_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The stock class that `kind` stands for, which is `kind` itself where it stands for none."""
    return vars(kind).get("_fastpeft_stock", kind)


def is_fused(module: nn.Module) -> bool:
    """Whether the class of `module` is one that is swapped in, exactly."""
    return "_fastpeft_stock" in vars(type(module))


def swap(module: Any, site: Site, mixin: type[nn.Module] | None = None) -> None:
    """Give `module` its fused class, unless it has it already, and this site, which goes on counting."""
    before = vars(module).get("_fastpeft")
    if not is_below(module):
        module.__class__ = fused_class(type(module), mixin)
    site.calls = before.calls if before else 0
    module._fastpeft = site


def restore(modules: Iterable[Any]) -> None:
    """Give every swapped one of `modules` its stock class back.

    Raises:
        ValueError: another library has put a class of its own on top of a fused one; nothing is changed then.
    """
    modules = list(modules)
    for module in modules:
        if is_below(module) and not is_fused(module):
            parametrized = hasattr(module, "parametrizations")
            remedy = (
                "remove them first, with torch.nn.utils.parametrize.remove_parametrizations"
                if parametrized
                else "unpatch before you shard or wrap the model"
            )
            what = "parametrizations were" if parametrized else f"{type(module).__name__} was"
            raise ValueError(f"{module._fastpeft.name}: {what} put on top of its fused class: {remedy}")
    for module in modules:
        if is_fused(module):
            module.__class__ = stock_class(type(module))
            del module._fastpeft


def is_below(module: nn.Module) -> bool:
    """Whether the class of `module` is a fused one, or another library's on top of one."""
    return any("_fastpeft_stock" in vars(kind) for kind in type(module).__mro__)
