"""Fused-kernel runtime for parameter-efficient fine-tuning of GPT-2."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpeft.adapters import AdapterConfig, add_adapters, set_adapters
    from fastpeft.lm_head import lm_head_loss
    from fastpeft.mixing import adapter_rows
    from fastpeft.ops import adapter, lora_linear
    from fastpeft.patching import patch, unpatch
    from fastpeft.reporting import report
    from fastpeft.runs import Run
    from fastpeft.saving import load_adapters, save_adapters
    from fastpeft.sweep import Result, Sweep

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "Result",
    "Run",
    "Sweep",
    "adapter",
    "adapter_rows",
    "add_adapters",
    "lm_head_loss",
    "load_adapters",
    "lora_linear",
    "patch",
    "report",
    "save_adapters",
    "set_adapters",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """A public name, and others with it: the command line's `--help` needs no torch, few need transformers' Trainer."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = ("adapters", "lm_head", "mixing", "ops", "patching", "reporting", "saving")
    for module in ("sweep",) if name in ("Result", "Run", "Sweep") else modules:
        found = vars(import_module(f"{__name__}.{module}"))
        globals().update({public: found[public] for public in __all__ if public in found})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
