"""Figures, tables and the report are made of recorded JSON alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import tables  # noqa: E402

HEADER = {
    "command": "bench/some.py",
    "commit": "0123456789ab",
    "machine": {"system": "Linux", "processor": "Some CPU", "cores": 2, "torch_threads": 2, "gpu": None},
    "versions": {"python": "3.11", "torch": "2.13.0", "peft": "0.21.2"},
}
SPREAD = {"median": 0.5, "q20": 0.4, "q80": 0.8}
COUNT = {"launches": 3, "bytes": 3_000_000, "saved_bytes": 500_000}
BOUND = {"launches": 2, "bytes": 2_000_000, "saved_bytes": 400_000}
TRAFFIC = {
    "kind": "traffic",
    "shapes": {"tokens": 8192, "width": 768, "rank": 16, "dropout": 0.1, "bottleneck": 64},
    "dtype": "bf16",
    "architecture": "sm_90",
    "block": {"bound": BOUND, "frozen": COUNT, "peft_bf16": COUNT, "fastpeft": COUNT},
    "adapter": {"bound": BOUND, "eager": COUNT, "fastpeft": COUNT},
    "many": {"one_by_one": BOUND, "together": COUNT},
    "neighbours": {"bound": BOUND, "bound_fused": BOUND, "peft_bf16": COUNT, "fastpeft_model": COUNT},
    "layers": {"c_attn": {"bound": BOUND, "frozen": COUNT, "peft_bf16": COUNT, "fastpeft": COUNT}},
    "head": {"768": {"bound": {**BOUND, "teraflops": 1.26}, "recomputed": {**COUNT, "teraflops": 3.16}}},
    **HEADER,
}
ROW = {
    "seconds": SPREAD,
    "tokens_per_second": {"median": 2048.0, "q20": 1280.0, "q80": 2560.0},
    "speedup": {"over": "peft", "median": 0.91, "q20": 0.88, "q80": 0.94},
    "over_frozen": {"median": 1.07, "q20": 1.05, "q80": 1.09},
    "step_peak_bytes": 2_000_000,
    "saved_bytes": 1_000_000,
}
#: Like numbers, whose quantiles may round apart.
EVEN = {**ROW, "tokens_per_second": {"median": 2048.0, "q20": math.nextafter(2048, 2049), "q80": 2048.0}}
POINT = {
    "mode": "training", "model": "small", "method": "lora", "dtype": "fp32", "dropout": 0.05, "rank": 8,
    "model_dropout": 0.0, "head": "lm", "device": "cpu", "data": "random", "batch": 8, "seq": 128, "fill": 1.0,
    "rounds": 5,
    "variants": {"frozen": EVEN, "peft": ROW, "fastpeft": ROW, "exact": {"failed": "RuntimeError: no | memory"}},
}  # fmt: skip
SENTENCES = {
    **POINT, "head": "classifier", "model_dropout": 0.1, "data": "rotten-tomatoes", "batch": 32, "seq": None,
    "fill": 0.508,
    "variants": {**POINT["variants"], "fastpeft_model": {**ROW, "over_layers": {**SPREAD, "median": 0.44}}},
}  # fmt: skip
ISSUED = {
    "host_ms": 20.0, "spread": SPREAD, "operators": 300, "launches": 91,
    "parts": {"planning": 1000.0, "dispatch and autograd": 9000.0, "launching": 2000.0, "the rest": 8000.0},
}  # fmt: skip
HOST = {
    "kind": "host",
    "shapes": {"layers": 12, "width": 16, "rows": 4, "length": 12, "dropout": 0.05, "vary": True, "runs": 8},
    "architecture": "sm_90",
    "variants": {"peft": ISSUED, "auto, triton": ISSUED},
    "decoding": {"peft": ISSUED, "auto, triton": ISSUED},
    "runs": {"one by one": ISSUED, "together": ISSUED},
    **HEADER,
}
TIMED = {
    "seconds": SPREAD,
    "tokens_per_second": ROW["tokens_per_second"],
    "speedup": {**SPREAD, "over": "peft_apart"},
}
RUNS = {
    "mode": "training", "model": "small", "dtype": "fp32", "rank": 8, "seq": 32, "device": "cpu", "rounds": 3,
    "head": "lm", "dropout": 0.05, "adapters": 8, "batch": 4,
    "variants": {"peft_apart": TIMED, "together": TIMED, "fastpeft_apart": {"failed": "Wrong: it is"}},
}  # fmt: skip
SERVED = {
    **{key: value for key, value in RUNS.items() if key != "head"}, "mode": "inference", "batch": 64,
    "variants": {"fastpeft_rows": {**TIMED, "over_one": {**SPREAD, "median": 1.31}}},
}  # fmt: skip
TOGETHER = {"kind": "together", "points": [RUNS, SERVED], **HEADER}
THROUGHPUT = {"kind": "throughput", "points": [POINT], **HEADER}
LAYER = {
    "operation": "lora", "projection": "c_attn", "tokens": 1024, "rank": 8, "dropout": 0.1, "dtype": "fp32",
    "phase": "forward", "device": "cpu", "run": "eager", "l2": "warm", "seconds": SPREAD,
    "speedup": {"median": 0.91, "q20": 0.88, "q80": 0.94},
}  # fmt: skip
FAILED = {key: value for key, value in LAYER.items() if key not in ("seconds", "speedup")}
FAILED |= {"variant": "compile", "failed": "Wrong: it is"}
HEAD = {
    "operation": "lm_head", "vocabulary": 50257, "width": 768, "tokens": 512, "counting": 0.29, "dtype": "fp32",
    "phase": "forward+backward", "device": "cpu", "run": "eager", "l2": "warm", "seconds": SPREAD,
    "speedup": {"median": 2.87, "q20": 2.73, "q80": 3.15}, "variant": "torch_two_chunks",
}  # fmt: skip
MICRO = {
    "kind": "micro",
    "rows": [*({**LAYER, "variant": v} for v in ("frozen", "peft", "fastpeft")), FAILED, HEAD],
    **HEADER,
}
COMPILED = {
    "arch": 90, "registers": 168, "spill_loads": 0, "spill_stores": 0,
    "shared_bytes": 98304, "shared_limit": 232448,
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    records = {
        "traffic": TRAFFIC,
        "host": HOST,
        "throughput": THROUGHPUT,
        "micro": MICRO,
        "together": TOGETHER,
    }
    records["sentences"] = {**THROUGHPUT, "points": [SENTENCES]}
    for name, content in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "compile_report.json").write_text(json.dumps({"triton": "3.7.1", "rows": [COMPILED]}))
    steps = {"tests/test_some.py": "3 passed in 1.0s", "micro": "done"}
    (tmp_path / "steps.json").write_text(json.dumps({"kind": "steps", "steps": steps, **HEADER}))
    return tmp_path


def test_one_command_draws_rewrites_the_readme_and_reports(results):
    readme = results / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    command = [
        BENCH / "plot.py",
        "--results",
        results,
        "--table",
        readme,
        "--report",
        results / "report.html",
    ]
    subprocess.run([sys.executable, *command], check=True)
    for name in ("traffic", "host", "throughput", "sentences", "micro"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{tables.END}\nafter\n")
    assert "old" not in text
    assert "fastpeft : peft | 2048 : 2048 | 0.91 (0.88-0.94) | 1.07" in text
    assert (
        "dropout 0.05, GPT-2's own 0.1, fp32, batch 32 of rotten-tomatoes, 49% padding, CPU | fastpeft : peft |"
        in text
    )
    assert (
        "\n|  | fastpeft, auto scope : peft | 2048 : 2048 | 0.91 (0.88-0.94) | 1.07 | 0.44 | 2.0 : 2.0 |"
        in text
    )
    assert "| logits never stored | 3.0 (1.50), 3.2 |" in text
    assert "|  | launches | MB moved | x the first | MB saved for backward |" in text
    assert "| fastpeft, side by side | 3 | 3.0 | 1.50 |" in text
    assert "| auto, triton | 20.0 | 0.50 (0.40-0.80) | 300 | 91 | 1.0 | 9.0 | 2.0 | 8.0 |" in text
    assert "| together | 20.0 | 0.50 (0.40-0.80) | 300 | 91 |" in text
    assert (
        "|  | fastpeft, side by side | 500.0 | 2048 | 0.50 (0.40-0.80) over peft, one after another |" in text
    )
    assert (
        "| GPT-2 small (classifier), 64 rows, 8 adapters, fp32 | fastpeft, adapter_names | 500.0 | 2048 |"
        in text
    )
    assert "over peft, one after another | 1.31 |" in text
    assert "| fastpeft, exact | failed: RuntimeError: no / memory |  |  |  |  |" in text
    page = (results / "report.html").read_text()
    assert page.count("<td>failed: RuntimeError: no / memory</td>") == 2
    assert "<td>failed: Wrong: it is</td>" in page
    assert page.count("data:image/png;base64,") == 5
    layer = "c_attn, 1024 tokens, r=8, dropout 0.1, fp32, forward"
    head = "768 x 50257, 512 tokens, 29% of the labels count, fp32, forward+backward"
    for part in ("3 passed", "sm_90", "0123456789ab", layer, head, "<td>500.000 (2.87)</td>"):
        assert part in page


def test_rewriting_twice_changes_nothing(results):
    readme = results / "README.md"
    readme.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    tables.rewrite(readme, list(tables.short(tables.load(results))))
    once = readme.read_text()
    tables.rewrite(readme, list(tables.short(tables.load(results))))
    assert readme.read_text() == once
    assert "| fastpeft | 3 | 3.0 | 1.50 | 0.5 |" in once


def test_a_file_without_both_markers_is_left_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{tables.END}\n{tables.BEGIN}\n")
    with pytest.raises(ValueError, match=r"README\.md needs one"):
        tables.rewrite(path, [])
    assert path.read_text() == f"{tables.END}\n{tables.BEGIN}\n"


def test_a_folder_without_records_is_an_error(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCH / "plot.py", "--results", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no record in" in done.stderr


def test_every_variant_has_a_label():
    import layers
    import variants

    names = {*layers.LORA_VARIANTS, *layers.ADAPTER_VARIANTS, *layers.HEAD_VARIANTS}
    names |= {name for method in variants.BASELINES.values() for name in method}
    assert names <= tables.LABELS.keys()
