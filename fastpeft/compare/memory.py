"""Peak memory of one stretch of work."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The most memory held since it was made, beyond what was held then, in bytes.

    On CUDA by tensors (`max_memory_allocated`); on Linux without a GPU in the process's resident set. Elsewhere it
    isn't measured: `getrusage` keeps the peak of the whole process's life.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            _give_back()
            self.restarted = _restart_peak()
        self._before = 0
        self._before = self.bytes() or 0

    def bytes(self) -> int | None:
        """The peak so far; None where it can't be measured."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        if self.device.type == "cpu" and self.restarted:
            for line in _STATUS.read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 - self._before
        return None


def _restart_peak() -> bool:
    """Make the kernel count the peak anew (proc(5): writing 5 to clear_refs resets VmHWM)."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Return freed memory to the system, so that a run doesn't carry the peak of the one before."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if hasattr(ctypes, "CDLL") else None
    if trim is not None:  # glibc has it
        trim(0)
