"""What the page and the terminal conclude from runs: verdicts and speed-ups, and when none follows."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from rich.console import Console

from fastpeft.compare.summary import Spread, speed_shown, summarise
from fastpeft.compare.table import table
from fastpeft.compare.tasks import CLASSIFY, LM, TASKS, perplexity
from fastpeft.compare.verdict import good_for, standings, verdict

TEXTS = 400
SIZES = {"head": 384, "lora": 30_720, "full": 10_500_000}


def _results(task: str = CLASSIFY, seeds: int = 3, texts: int = TEXTS, **means: float) -> dict:
    """Results of methods of these qualities: the same texts are hard for all, and seeds vary a little."""
    generator = np.random.default_rng(0)
    hard = generator.random(texts)
    weights = np.ones(texts, int) if task == CLASSIFY else generator.integers(5, 50, size=texts)
    runs = []
    for method, mean in means.items():
        for seed in range(seeds):
            jitter = 0.06 * generator.normal(size=texts)
            scores = (hard + jitter < mean) * 1.0 if task == CLASSIFY else weights * (mean + hard + jitter)
            runs.append(_run(method, seed, scores.tolist(), float(scores.sum() / weights.sum())))
    before = None if task == CLASSIFY else (weights * 9.0).tolist()
    return {"task": task, "runs": runs, "before": before, "data": {"weights": weights.tolist()}}


def _run(method: str, seed: int, scores: list[float], quality: float) -> dict:
    return {
        "method": method.replace("_", "-"),
        "seed": seed,
        "trains": "something",
        "base": "model = ...",
        "load": "model = ...",
        "diverged": False,
        "quality": quality,
        "scores": scores,
        "trainable_parameters": SIZES.get(method, 1000),
        "trainable_share": 0.01,
        "formula": "classes·width",
        "learning_rate": 1e-3,
        "steps": 10,
        "step_seconds_stock": 0.2,
        "step_seconds_layers": 0.1,
        "step_seconds_auto": 0.05,
        "unpacked_because": None,
        "peak_memory_bytes": 10**9,
        "train_seconds": 3.0,
        "sites": [],
    }


def test_a_summary_has_mean_lowest_and_highest_over_the_seeds():
    results = _results(lora=0.7)
    qualities = [run["quality"] for run in results["runs"]]
    [summary] = summarise(results)
    assert summary.quality == Spread(pytest.approx(sum(qualities) / 3), min(qualities), max(qualities))
    assert summary.interval[0] < summary.quality.mean < summary.interval[1]
    assert summary.speed_up["layers"].mean == pytest.approx(2.0)
    assert summary.speed_up["auto"].mean == pytest.approx(4.0)


def test_the_mean_of_like_values_lies_within_them():
    """(0.05 + 0.05 + 0.05) / 3 is above 0.05 as floats have it, and a bar can't end below its start."""
    [summary] = summarise(_results(lora=0.7))
    assert sum([0.05] * 3) / 3 > 0.05
    assert summary.step_seconds["auto"] == Spread(0.05, 0.05, 0.05)


def test_the_verdict_names_the_smallest_method_as_good_as_the_best_and_what_it_costs():
    said = verdict(_results(head=0.60, lora=0.80, full=0.815))
    assert re.match(
        r"lora is the smallest method as good as the best: \d\d\.\d% with 30,720 trainable parameters "
        r"\(1% of the model\), 50 ms a step, 1\.00 GB at its peak; the best mean, full's, is \d\d\.\d%, with "
        r"10,500,000: lora is at most \d\.\d points behind\.$",
        said[0],
    )
    assert re.match(
        r"Worse than full by a paired test over 400 held-out texts and 3 seeds: head by ", said[1]
    )
    assert said[2].startswith("No test tells from it: lora (")
    assert re.search(r"about [\d,]+ held-out texts and \d+ seeds would show it\.$", said[2])


def test_the_best_may_be_the_smallest():
    said = verdict(_results(head=0.80, full=0.60))
    assert said[0].startswith("head is the smallest method as good as the best: ")
    assert said[0].endswith("; it is the best.")
    assert len(said) == 2


def test_fewer_bits_are_better():
    results = _results(LM, head=6.0, full=5.0)
    assert [s.worse for s in standings(results)] == [True, False]
    assert verdict(results)[0].startswith("full is the smallest method as good as the best: 5.")
    assert "(perplexity " in verdict(results)[0]
    assert "head by 1.0" in verdict(results)[1]
    assert " bits (" in verdict(results)[1]


def test_where_no_test_tells_any_apart_it_says_what_would():
    [said] = verdict(_results(texts=40, head=0.70, lora=0.72))
    assert said.startswith("No difference follows from 40 held-out texts and 3 seeds: ")
    assert re.search(r"If the gap to head is what it seems, about [\d,]+ held-out texts and \d+ seeds", said)


def test_pairs_tell_apart_what_their_own_intervals_do_not():
    results = _results(head=0.70, lora=0.75)
    head, lora = standings(results)
    assert head.summary.interval[1] > lora.summary.interval[0]
    assert head.worse


def test_one_seed_and_one_method_give_no_verdict_however_far_apart():
    assert verdict(_results(seeds=1, head=0.1, lora=0.9)) == [
        "One seed shows no spread: no verdict follows; --seeds 3 would show one."
    ]
    assert verdict(_results(lora=0.9)) == ["One method alone: there is nothing to compare it with."]


def test_of_many_equal_methods_one_is_called_worse_no_more_often_than_promised():
    """Which is the best is seen in the scores that the tests are of: by tests with the best alone it is 1 in 7."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        by_text = generator.normal(size=(10, 60))
        runs = [
            _run(f"method_{i}", seed, scores.tolist(), float(scores.mean()))
            for i in range(10)
            for seed, scores in enumerate(by_text[i] + 0.02 * generator.normal(size=(3, 60)))
        ]
        results = {"task": LM, "runs": runs, "data": {"weights": [1] * 60}}
        found += any(standing.worse for standing in standings(results))
    assert found <= 10 + 3 * 3.1


def test_an_interval_of_accuracies_ends_where_they_do():
    given = {
        ("head", 0): [1.0] * 6,
        ("head", 1): [0.0] * 6,
        ("lora", 0): [1.0, 0.0] * 3,
        ("lora", 1): [1.0] * 6,
    }
    runs = [_run(*which, scores, sum(scores) / 6) for which, scores in given.items()]
    found = standings({"task": CLASSIFY, "runs": runs, "data": {"weights": [1] * 6}})
    [behind] = [standing.behind for standing in found if standing.behind]
    assert (behind.low, behind.high) == (-1, 1)


def test_a_method_that_diverged_is_named_and_not_compared():
    results = _results(LM, head=6.0, lora=5.0, full=5.5)
    for run in results["runs"]:
        if run["method"] == "full" and run["seed"] != 1:
            run |= {"diverged": True, "quality": None, "scores": None}
    assert [summary.method for summary in summarise(results)] == ["head", "lora"]
    assert verdict(results)[-1] == (
        "full isn't compared: it diverged from seeds 0 and 2 at the learning rate 0.001; a lower --lr may hold it."
    )
    assert set(good_for(results)) == {"head", "lora"}


def test_bits_beyond_all_sense_are_written_all_the_same():
    assert perplexity(2e4) == math.inf
    assert TASKS[LM].show(18237870.676) == "1.82e+07 bits a token (perplexity inf)"


def test_least_memory_is_said_where_all_runs_agree():
    results = _results(head=0.60, lora=0.80)
    for run in results["runs"]:
        run["peak_memory_bytes"] = 1e9 + (run["seed"] if run["method"] == "head" else 1) * 5e8
    assert not any("least memory" in praise for praise in good_for(results).values())
    for run in results["runs"]:
        run["peak_memory_bytes"] = 1e9 if run["method"] == "head" else 2e9
    assert "least memory" in good_for(results)["head"]


def test_equal_methods_are_not_ranked():
    assert [s.worse for s in standings(_results(head=0.75, lora=0.75, full=0.75))] == [False] * 3


def test_what_each_is_good_for_follows_from_the_measurements():
    results = _results(head=0.60, lora=0.80, full=0.815)
    for run in results["runs"]:
        run["step_seconds_auto"] = {"head": 0.02, "lora": 0.05, "full": 0.09}[run["method"]]
        run["peak_memory_bytes"] = {"head": 9e8, "lora": 9.1e8, "full": 2e9}[run["method"]]
    assert good_for(results) == {
        "head": "fewest parameters, quickest step",  # its memory is too close to lora's to count
        "lora": "smallest as good as the best",
        "full": "lora is smaller, no slower and not shown worse",
    }


def test_a_speed_up_is_shown_only_where_all_runs_agree_who_is_faster():
    results = _results(seeds=2, lora=0.7)
    runs = results["runs"]
    assert speed_shown(summarise(results)[0], "layers")
    runs[0]["step_seconds_layers"] = 0.21
    assert not speed_shown(summarise(results)[0], "layers")
    assert speed_shown(summarise(results)[0], "auto")
    del runs[0]
    assert not speed_shown(summarise(results)[0], "auto")  # one run alone


@pytest.mark.parametrize("task", [CLASSIFY, LM])
def test_the_terminal_table_fits_80_columns_and_marks_speed_ups_that_do_not_hold(task):
    results = _results(task, adapter_houlsby=0.71, full=0.72)
    for run in results["runs"]:
        run["trainable_parameters"] = 124_440_576
        run["step_seconds_stock"] = 1.6438
    results["runs"][0]["step_seconds_layers"] = 1.9
    results["runs"][0]["method"] = results["runs"][1]["method"] = results["runs"][2]["method"] = (
        "adapter-houlsby:bottleneck=16,layers=6-11"
    )
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(results))
    shown = captured.get()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    joined = re.sub(r"\s+", "", shown)
    assert "full" in shown
    low, high = summarise(results)[1].interval
    assert (f"{100 * low:.1f}–{100 * high:.1f}" if task == CLASSIFY else f"{low:.3f}–{high:.3f}") in shown
    assert "(11.25×)" in shown
    assert "32.88×" in shown
    assert "1643.8" in shown
    assert "124,440,576" in shown
    assert "Nodifferencefollows" in joined
    assert ("The base model, not fine-tuned: 9.000 bits" in shown) == (task == LM)
