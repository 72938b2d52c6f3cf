"""One LoRA layer in each of the ways it can be run."""

from __future__ import annotations

import functools
from typing import Any

import layers
import pytest
import timing
import torch
from cases import DTYPES, LoraCase, lora_cases

pytestmark = pytest.mark.benchmark(timer=timing.CLOCK)
#: Both phases, one after the other, share what was built and compiled; all variants share peft's.
built = functools.lru_cache(maxsize=2)(layers.lora_variant)


@pytest.mark.parametrize("phase", timing.PHASES)
@pytest.mark.parametrize("state", timing.STATES, ids="-".join)
@pytest.mark.parametrize("variant", layers.LORA_VARIANTS)
@pytest.mark.parametrize("case", lora_cases(timing.DEVICE), ids=str)
def test_lora(benchmark: Any, case: LoraCase, variant: str, phase: str, state: tuple[str, str]) -> None:
    if variant == "peft_fp32" and case.dtype == "fp32":
        pytest.skip("factors are float32 already: this is the variant peft")
    name, k, n = case.projection
    shape = {**case._asdict(), "projection": name, "k": k, "n": n}
    benchmark.extra_info.update(operation="lora", variant=variant, **shape, **timing.about(phase, state))
    baseline, layer = (built(case, name, timing.DEVICE) for name in ("peft", variant))
    x = torch.randn(1, case.tokens, k, dtype=DTYPES[case.dtype], device=timing.DEVICE)
    benchmark.group = f"{case} {phase} {'-'.join(state)}"
    timing.measure(benchmark, layer, baseline, x, phase, state)
