"""Seconds that `import fastpeft` adds to a program with torch, peft and GPT-2, and that `patch` takes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import variants
from checkout import ROOT

import fastpeft

IMPORT = """
import time, torch, peft, transformers.models.gpt2.modeling_gpt2
began = time.perf_counter()
import fastpeft
print(time.perf_counter() - began)
"""


def import_seconds(rounds: int = 3) -> float:
    """Median, each in a fresh interpreter."""
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def patch_seconds(rounds: int = 10) -> float:
    """Median time of `fastpeft.patch` on GPT-2 small with LoRA on all projections."""
    setting = variants.Setting("small", "lora", "fp32", dropout=0.1, rank=8, head="lm", device="cpu")
    model = variants.build(setting, ["peft"])["peft"]
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        fastpeft.patch(model)
        taken.append(time.perf_counter() - began)
        fastpeft.unpatch(model)
    return statistics.median(taken)


def measure() -> dict[str, float]:
    return {"import_seconds": import_seconds(), "patch_seconds": patch_seconds()}
