"""Every shipped kernel configuration compiles to clean machine code: a sample here, all in the committed report."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def compiled(code: str) -> list:
    """What `code` prints as JSON, in a process where kernels are compiled rather than interpreted."""
    script = f"import json, sys; sys.path.insert(0, {str(BENCH)!r}); import compile_report as report; {code}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


ARCHITECTURES = [80, 86, 89, 90, 100, 120]


@functools.cache
def shipped_and_named() -> tuple[dict[tuple, list[str]], dict[str, list[list]]]:
    """What the committed report holds and what the tables name, from one process.

    The key of every shipped configuration, with the faults that its row in the report shows; the key of every
    configuration of the tables, by architecture.
    """
    path = BENCH / "results" / "compile_report.json"
    rows = json.loads(path.read_text())["rows"]
    faults, keys = compiled(
        f"rows = json.load(open({str(path)!r}))['rows']; faults = [report.faults(row) for row in rows]; "
        "keys = {arch: [[c.kernel, c.arch, c.dtype, c.config] for c in report.cases(arch)] "
        f"for arch in {ARCHITECTURES}}}; print(json.dumps([faults, keys]))"
    )
    held = {(r["kernel"], r["arch"], r["dtype"], r["config"]): f for r, f in zip(rows, faults, strict=True)}
    return held, keys


@pytest.mark.xdist_group("committed report")  # which is read once
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_committed_report_holds_every_shipped_configuration_and_no_fault(arch):
    held, keys = shipped_and_named()
    keys = [tuple(key) for key in keys[str(arch)]]
    assert keys
    missing = [key for key in keys if key not in held]
    assert not missing, f"run bench/compile_report.py --json bench/results/compile_report.json: {missing[:5]}"
    assert {key: held[key] for key in keys if held[key]} == {}


#: Of each kernel as few variants as have every branch of its code; the GEMM's longest loops besides, without any.
SAMPLE = {
    "adapter_forward": ["gelu residual"],
    "adapter_backward": ["relu", "gelu", "silu"],  # each activation, and its derivative; linear has gelu_tanh
    "adapter_gradient": [""],
    "shrink": ["dropout", "dropout grouped"],
    "gradient": ["dropout gelu", "dropout gelu grouped"],
    "dropout": [""],
    "layer_norm_shrink": ["dropout"],
    "layer_norm_backward": [""],
    "head_logits": ["descriptor stored", "pointer stored smoothed"],
    "head_gradient": ["descriptor", "pointer smoothed"],
    "linear": [
        "pointer split",
        "pointer split residual",
        "pointer split gelu alone",
        "pointer dropout transposed gelu",
        "descriptor split",
        "descriptor split gelu alone",
        "descriptor dropout transposed gelu",
        "descriptor dropout residual",
        "descriptor dropout transposed gelu grouped",
    ],
}


# sm_90 has wgmma and descriptors; sm_80's older instructions take as long again to compile.
@pytest.mark.parametrize(
    ("arch", "whole"),
    [
        (90, False),
        pytest.param(90, True, marks=pytest.mark.full),
        pytest.param(80, True, marks=pytest.mark.full),
    ],
)
def test_a_sample_of_the_configurations_compiles_clean(arch, whole):
    """The first configuration of each kernel, form and variant, at 16 bits."""
    sample = {kernel: None for kernel in SAMPLE} if whole else SAMPLE
    rows = compiled(
        f"cases = [c for c in report.cases({arch}) if c.dtype not in ('tf32', 'fp32')]; sample = {sample}; "
        "first = {(c.kernel, c.variant): c for c in reversed(cases)}; "
        "cases = [c for c in first.values() if sample[c.kernel] is None or c.variant in sample[c.kernel]]; "
        "rows = [report.row(c) for c in cases]; "
        "print(json.dumps([[report.text(row), report.faults(row)] for row in rows]))"
    )
    assert whole or len(rows) == sum(map(len, SAMPLE.values())), "a variant is no more"
    assert [line for line, faults in rows if faults] == []  # such as a loop without matrix instructions
