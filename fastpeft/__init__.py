"""Fused-kernel runtime for parameter-efficient fine-tuning of GPT-2."""

from fastpeft.adapters import AdapterConfig, add_adapters, load_adapters, save_adapters
from fastpeft.lm_head import lm_head_loss
from fastpeft.ops import adapter, lora_linear
from fastpeft.patch import patch, unpatch
from fastpeft.report import report

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "adapter",
    "add_adapters",
    "lm_head_loss",
    "load_adapters",
    "lora_linear",
    "patch",
    "report",
    "save_adapters",
    "unpatch",
]
