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


@functools.cache
def shipped() -> dict[tuple, list[str]]:
    """The key of every shipped configuration, with the faults that its row in the committed report shows."""
    path = BENCH / "results" / "compile_report.json"
    rows = json.loads(path.read_text())["rows"]
    faults = compiled(
        f"rows = json.load(open({str(path)!r}))['rows']; print(json.dumps([report.faults(row) for row in rows]))"
    )
    return {(r["kernel"], r["arch"], r["dtype"], r["config"]): f for r, f in zip(rows, faults, strict=True)}


ARCHITECTURES = [80, 86, 89, 90, 100, 120]


@functools.cache
def keys_of() -> dict[str, list[list]]:
    """The key of every configuration that the tables name, by architecture."""
    return compiled(
        "print(json.dumps({arch: [[c.kernel, c.arch, c.dtype, c.config] for c in report.cases(arch)] "
        f"for arch in {ARCHITECTURES}}}))"
    )


@pytest.mark.xdist_group("committed report")  # which is read once
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_committed_report_holds_every_shipped_configuration_and_no_fault(arch):
    keys = keys_of()[str(arch)]
    assert keys
    missing = [key for key in map(tuple, keys) if key not in shipped()]
    assert not missing, f"run bench/compile_report.py --json bench/results/compile_report.json: {missing[:5]}"
    assert {tuple(key): shipped()[tuple(key)] for key in keys if shipped()[tuple(key)]} == {}


# sm_90 has wgmma and descriptors; sm_80's older instructions take as long again to compile.
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.full), 90])
def test_a_sample_of_the_configurations_compiles_clean(arch):
    """The first configuration of each kernel, form and variant, at 16 bits."""
    rows = compiled(
        f"cases = [c for c in report.cases({arch}) if c.dtype not in ('tf32', 'fp32')]; "
        "first = {(c.kernel, c.variant): c for c in reversed(cases)}; "
        "rows = [report.row(c) for c in first.values()]; "
        "print(json.dumps([[report.text(row), report.faults(row)] for row in rows]))"
    )
    assert len(rows) > 10
    assert [line for line, faults in rows if faults] == []  # such as a loop without matrix instructions
