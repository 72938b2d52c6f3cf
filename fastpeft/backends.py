"""The names of what may run a fused path. Apart from what runs it, so that naming one imports no torch."""

from __future__ import annotations

#: `auto` is Triton where tensors are on CUDA and the case is served, else PyTorch.
BACKENDS = ("auto", "triton", "torch")
