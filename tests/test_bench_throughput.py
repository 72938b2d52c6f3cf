"""bench/throughput.py times only what is right, each variant against the others in every round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import record  # noqa: E402
import throughput  # noqa: E402
import variants  # noqa: E402
from check import Wrong  # noqa: E402

LORA = variants.Setting("tiny", "lora", "bf16", dropout=0.1, rank=4, head="lm", device="cpu")
ADAPTER = LORA._replace(method="adapter", dtype="fp32", dropout=0.0, head="classifier")
UNCOMPILED = ["frozen", "peft", "peft_fp32", "fastpeft", "fastpeft_fp32", "exact"]


def test_every_variant_passes_the_check_and_shares_the_frozen_weights():
    models = variants.build(LORA, UNCOMPILED)
    variants.check(models, LORA)
    places = {
        name: {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        for name, model in models.items()
    }
    assert all(place == places["frozen"] for place in places.values())
    trained = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in models.values()]
    assert sum(map(len, trained)) == len(set().union(*trained))


def test_adapters_pass_the_check_under_a_classifier():
    variants.check(variants.build(ADAPTER, ["frozen", "eager", "fastpeft"]), ADAPTER)


def test_a_variant_that_computes_something_else_is_refused():
    models = variants.build(LORA, ["peft", "fastpeft"])
    with torch.no_grad():
        next(p for n, p in models["fastpeft"].named_parameters() if "lora_B" in n).mul_(1.5)
    with pytest.raises(Wrong, match=r"fastpeft: .*error"):
        variants.check(models, LORA)


def test_a_stock_model_under_a_fused_name_is_refused_and_the_reverse():
    models = variants.build(LORA, ["peft", "fastpeft"])
    with pytest.raises(Wrong, match="fastpeft doesn't run"):
        variants.check({"peft": models["peft"], "fastpeft": variants.twin(models["peft"])}, LORA)
    with pytest.raises(Wrong, match="peft doesn't run"):
        variants.check({"peft": models["fastpeft"]}, LORA)


def test_each_variant_takes_each_place_in_turn():
    turns = [throughput.rotated(["a", "b", "c"], turn) for turn in range(3)]
    assert [sorted(place) for place in zip(*turns, strict=True)] == [["a", "b", "c"]] * 3


def test_a_ratio_is_taken_within_its_round(monkeypatch):
    rounds = {"frozen": [1.0, 10.0, 1.0], "peft": [2.0, 20.0, 2.0], "fastpeft": [1.0, 10.0, 1.0]}
    monkeypatch.setattr(throughput, "seconds", lambda *_: rounds)
    models = variants.build(LORA, list(rounds))
    rows = throughput.point(models, LORA, "training", batch=2, seq=8, rounds=3)
    assert rows["fastpeft"]["speedup"] == {"over": "peft", "median": 2.0, "q20": 2.0, "q80": 2.0}
    assert rows["peft"]["over_frozen"]["q80"] == 2.0
    assert rows["peft"]["tokens_per_second"] == 2 * 8 / 2.0
    assert 0 < rows["fastpeft"]["saved_bytes"] < rows["peft"]["saved_bytes"]


def test_saved_bytes_counts_each_activation_once_and_no_parameter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))

        def forward(self, x):
            exponential = x.exp()  # saved by itself, and again by the product
            return SimpleNamespace(loss=(exponential * self.weight).sum())

    x = torch.zeros(5, 32, requires_grad=True)
    assert throughput.saved_bytes(Twice(), {"x": x}) == 5 * 32 * 4


def test_the_record_holds_what_was_measured_on_what(tmp_path):
    path = tmp_path / "throughput.json"
    flags = "--model tiny --method lora adapter --batch 2 --seq 8 --rounds 2 --inference"
    names = ["--variants", "frozen", "peft", "eager", "fastpeft"]
    throughput.measure(throughput.parsed([*flags.split(), *names, "--json", str(path)]))
    result = json.loads(path.read_text())
    modes = [(point["method"], point["mode"]) for point in result["points"]]
    assert modes == [(m, mode) for m in ("lora", "adapter") for mode in ("training", "inference")]
    for point in result["points"]:
        assert point["dtype"] == "fp32"
        assert {"batch", "seq", "rank", "dropout", "rounds", "device"} <= point.keys()
        assert all(row["seconds"]["median"] > 0 for row in point["variants"].values())
    assert {"commit", "machine", "versions", "command"} <= result.keys()
    assert result["machine"].keys() == {"system", "processor", "cores", "torch_threads", "gpu"}


def test_quantiles_are_those_of_the_values():
    assert record.spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}
    assert record.spread([2.0]) == {"median": 2.0, "q20": 2.0, "q80": 2.0}
