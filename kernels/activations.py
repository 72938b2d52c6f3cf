"""The activations and their derivatives, of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import rounded


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z), float32. The tanh GELU is z σ(2u), because (1 + tanh u) / 2 = σ(2u)."""
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        return z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        tl.static_assert(ACTIVATION == "silu")
        return z * tl.sigmoid(z)


@triton.jit
def activation_gradient(z, ACTIVATION: tl.constexpr):
    """act'(z), float32."""
    if ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return gate + z * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate = tl.sigmoid(z)
        return gate + z * gate * (1.0 - gate)


@triton.jit
def gelu(t):
    """GPT-2's gelu(t), in t's dtype."""
    return rounded(activate(t.to(tl.float32), "gelu_tanh"), t.dtype)
