"""What bench/together.py measures: both ways of training runs do the same work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import gpt2

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import tables
import together


def test_a_step_side_by_side_is_the_steps_one_after_another():
    base, runs = gpt2().requires_grad_(False), together.runs_of(2, 4, 0.0)
    ids = torch.randint(2, 61, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    trained = {}
    for variant in together.BASELINES["training"]:
        each = together.trainers(base, runs, variant)
        step = together.training(each, batch)
        step()
        step()
        models = [trainer.model for trainer in each]
        names = [run.name for run in runs] if variant == "together" else ["default"] * 2
        trained[variant] = [
            torch.cat([p.detach().flatten() for n, p in model.named_parameters() if f".{name}." in n])
            for model, name in zip(models * (2 if variant == "together" else 1), names, strict=True)
        ]
    for mine, apart, stock in zip(*(trained[name] for name in together.BASELINES["training"]), strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(apart, stock, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("minutes", [None, 0.0])
def test_points_are_recorded_and_gone_on_with(minutes, tmp_path, capsys):
    path = tmp_path / "together.json"
    words = [
        "--model",
        "tiny",
        "--runs",
        "0",
        "--seq",
        "8",
        "--rows",
        "1",
        "2",
        "--adapters",
        "1",
        "2",
        "--rounds",
        "1",
    ]
    args = together.parsed([*words, "--json", str(path)])
    args.minutes = minutes
    if minutes is not None:
        with pytest.raises(SystemExit):
            together.measure(args)
        assert not path.exists()
        return
    record = together.measure(args)
    assert [(each["batch"], each["adapters"]) for each in record["points"]] == [(1, 1), (2, 1), (2, 2)]
    assert all(set(each["variants"]) == {*together.BASELINES["inference"]} for each in record["points"])
    assert record["points"][0]["variants"]["fastpeft_rows"]["speedup"]["over"] == "peft_rows"
    (table,) = tables.together(record)
    assert len(table.rows) == 9
    capsys.readouterr()
    args.resume = True
    assert together.measure(args)["points"] == record["points"]
    assert "Rows of a batch" not in capsys.readouterr().out
