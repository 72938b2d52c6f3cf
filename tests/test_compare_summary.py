"""What the page and the terminal conclude from runs: rankings and speed-ups, and when none follows."""

from __future__ import annotations

import itertools
import random

import pytest
from rich.console import Console

from fastpeft.compare.summary import Spread, ranking, speed_shown, standard_error, summarise
from fastpeft.compare.table import table

EVAL_ROWS = 1280


def _runs(
    stock: float = 0.2, layers: float = 0.1, model: float = 0.05, **accuracies: list[float]
) -> list[dict]:
    return [
        {
            "method": method.replace("_", "-"),
            "seed": seed,
            "accuracy": accuracy,
            "trainable_parameters": 384,
            "trainable_share": 0.01,
            "formula": "classes·width",
            "learning_rate": 1e-3,
            "steps": 10,
            "step_seconds_stock": stock,
            "step_seconds_layers": layers,
            "step_seconds_auto": model,
            "unpacked_because": None,
            "peak_memory_bytes": 10**9,
            "train_seconds": 3.0,
            "sites": [],
        }
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def _said(**accuracies: list[float]) -> str:
    return " ".join(ranking(summarise(_runs(**accuracies)), EVAL_ROWS))


def test_a_summary_has_mean_lowest_and_highest_over_the_seeds():
    [summary] = summarise(_runs(lora=[0.7, 0.6, 0.8]))
    assert summary.accuracy == Spread(pytest.approx(0.7), 0.6, 0.8)
    assert summary.speed_up["layers"].mean == pytest.approx(2.0)
    assert summary.speed_up["auto"].mean == pytest.approx(4.0)


def test_overlapping_spreads_give_no_ranking():
    said = _said(head=[0.60, 0.75], lora=[0.74, 0.90])
    assert said.startswith("No ranking follows")
    assert "above" not in said


def test_spreads_apart_are_ranked_best_first():
    said = _said(head=[0.60, 0.61, 0.62], full=[0.88, 0.89, 0.90], lora=[0.70, 0.74, 0.75])
    assert "full above lora and head; lora above head." in said
    assert "no ranking" not in said.lower()
    assert "by chance in 1 of 10 cases" in said


def test_where_some_pairs_overlap_the_rest_is_still_ranked():
    said = _said(head=[0.60, 0.61], lora=[0.70, 0.74], full=[0.73, 0.76])
    assert "full above head; lora above head." in said
    assert "no ranking follows between them" in said


def test_a_gap_that_so_few_eval_texts_cannot_tell_apart_is_not_ranked():
    close = {"head": [0.720, 0.721], "lora": [0.723, 0.724]}
    assert "closer than the 3.5 points that 1,280 eval texts can tell apart" in _said(**close)
    assert "lora above head" in " ".join(ranking(summarise(_runs(**close)), 10**7))


def test_one_seed_gives_no_ranking_however_far_apart():
    assert _said(head=[0.1], lora=[0.9]) == "One seed shows no spread: no ranking follows."


def test_one_method_gives_nothing_to_rank():
    assert "nothing to rank" in _said(head=[0.1, 0.2])


def test_the_standard_error_is_that_of_drawing_eval_texts_again():
    generator = random.Random(0)
    drawn = [sum(generator.random() < 0.7 for _ in range(200)) / 200 for _ in range(2000)]
    mean = sum(drawn) / len(drawn)
    expected = (sum((value - mean) ** 2 for value in drawn) / len(drawn)) ** 0.5
    assert standard_error(summarise(_runs(lora=[0.7])), 200) == pytest.approx(expected, rel=0.05)


def test_the_chance_named_is_that_of_two_equal_methods_coming_apart():
    seeds = 3
    ranks = set(range(2 * seeds))
    apart = [
        max(first) < min(ranks - set(first)) or min(first) > max(ranks - set(first))
        for first in itertools.combinations(ranks, seeds)
    ]
    assert 1 / (sum(apart) / len(apart)) == 10


def test_a_speed_up_is_shown_only_where_all_runs_agree_who_is_faster():
    runs = _runs(lora=[0.7, 0.7])
    assert speed_shown(summarise(runs)[0], "layers")
    runs[0]["step_seconds_layers"] = 0.21
    assert not speed_shown(summarise(runs)[0], "layers")
    assert speed_shown(summarise(runs)[0], "auto")
    assert not speed_shown(summarise(runs[1:])[0], "auto")  # one run alone


def test_the_terminal_table_fits_80_columns_and_marks_speed_ups_that_do_not_hold():
    runs = _runs(adapter_block=[0.7123, 0.7234], stock=1.6438, layers=1.5) + _runs(full=[0.71, 0.72])
    runs[0]["step_seconds_layers"] = 1.9
    for run in runs:
        run["trainable_parameters"] = 124_440_576
    console = Console(width=80, record=True, quiet=False, file=None)
    with console.capture() as captured:
        console.print(table({"runs": runs, "data": {"eval_rows": EVAL_ROWS}}))
    shown = captured.get()
    assert "…" not in shown
    assert "adapter-block" in shown
    assert "71.8% (71.2–72.3)" in shown
    assert "(0.98×)" in shown
    assert "2.00×" in shown
    assert "1643.8" in shown
    assert "4.00×" in shown
    assert "124,440,576" in shown
    assert "No ranking follows" in shown
