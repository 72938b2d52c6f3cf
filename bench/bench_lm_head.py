"""A language model's frozen head and its loss, by torch's operations, by torch's chunks and by fastpeft's."""

from __future__ import annotations

import functools
from typing import Any

import layers
import pytest
import timing
import torch
from cases import DTYPES, HeadCase, head_cases

pytestmark = pytest.mark.benchmark(timer=timing.CLOCK)
#: All variants share stock's.
built = functools.lru_cache(maxsize=2)(layers.head_variant)
#: A training step's alone, for chunks have their gradients in forward; not as a graph, for how many labels count is
#: read back from the device; and the logits leave nothing in L2.
PHASE, STATE = "forward+backward", ("eager", "warm")


@pytest.mark.parametrize("variant", layers.HEAD_VARIANTS)
@pytest.mark.parametrize("case", head_cases(timing.DEVICE), ids=str)
def test_lm_head(benchmark: Any, case: HeadCase, variant: str) -> None:
    if variant.startswith("torch") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy in chunks: 2.13 has")
    about = {**case._asdict(), **timing.about(PHASE, STATE)}
    benchmark.extra_info.update(operation="lm_head", variant=variant, **about)
    baseline, layer = (built(case, name, timing.DEVICE) for name in ("stock", variant))
    x = torch.randn(1, case.tokens, case.width, dtype=DTYPES[case.dtype], device=timing.DEVICE)
    benchmark.group = str(case)
    timing.measure(benchmark, layer, baseline, x, PHASE, STATE)
