"""What a comparison ran on: package versions, processor, devices."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import fastpeft
from fastpeft.compare.errors import BadInput

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate")


def processes() -> PartialState:
    """The processes that work together (one, unless torchrun started more) and this one's device."""
    return PartialState(cpu=not torch.accelerator.is_available())


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the results; None for one that isn't installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fastpeft": fastpeft.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, GPU and how the work is spread over them; nothing that names the machine."""
    state = processes()
    gpu = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": state.device.type,
        "processor": _processor(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "processes": state.num_processes,
        "mixed_precision": mixed_precision(),
    }


def mixed_precision() -> str:
    """What autocast computes in: what accelerate was launched with, else bf16 where the device is made for it, or `no`.

    Where bfloat16 is only emulated, by a CPU without AMX or AVX512-BF16 or a GPU before Ampere, it is the slower one.

    Raises:
        BadInput: it was launched with another, or with fp16 on a CPU, which accelerate has no autocast for.
    """
    if asked := os.environ.get("ACCELERATE_MIXED_PRECISION"):
        known = ("no", "bf16") if processes().device.type == "cpu" else ("no", "bf16", "fp16")
        if asked not in known:
            raise BadInput(f"ACCELERATE_MIXED_PRECISION={asked}: here it can be {', '.join(known)}")
        return asked
    native = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": lambda: torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
    }.get(processes().device.type, lambda: False)
    return "bf16" if native() else "no"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
