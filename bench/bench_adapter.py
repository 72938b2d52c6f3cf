"""One bottleneck adapter against the eager module."""

from __future__ import annotations

import functools
from typing import Any

import layers
import pytest
import timing
import torch
from cases import DTYPES, AdapterCase, adapter_cases

pytestmark = pytest.mark.benchmark(timer=timing.CLOCK)
#: Both phases, one after the other, share what was built and compiled; all variants share the eager one.
built = functools.lru_cache(maxsize=2)(layers.adapter_variant)


@pytest.mark.parametrize("phase", timing.PHASES)
@pytest.mark.parametrize("state", timing.STATES, ids="-".join)
@pytest.mark.parametrize("variant", layers.ADAPTER_VARIANTS)
@pytest.mark.parametrize("case", adapter_cases(timing.DEVICE), ids=str)
def test_adapter(benchmark: Any, case: AdapterCase, variant: str, phase: str, state: tuple[str, str]) -> None:
    about = {**case._asdict(), **timing.about(phase, state)}
    benchmark.extra_info.update(operation="adapter", variant=variant, **about)
    baseline, layer = (built(case, name, timing.DEVICE) for name in ("eager", variant))
    x = torch.randn(1, case.tokens, case.width, dtype=DTYPES[case.dtype], device=timing.DEVICE)
    benchmark.group = f"{case} {phase} {'-'.join(state)}"
    timing.measure(benchmark, layer, baseline, x, phase, state)
