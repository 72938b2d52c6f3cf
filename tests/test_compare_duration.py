"""How long a comparison is said to take."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_comparison import arguments

from fastpeft.compare import checkpoint, data, duration, train
from fastpeft.compare.encoding import encode
from fastpeft.compare.tasks import CLASSIFY


def test_the_estimate_is_runs_times_what_a_run_does_times_a_step(tmp_path, monkeypatch):
    """Of a step of 3 s: 4 steps of two batches, twice 6 held-out texts in batches of 8, and 12 steps timed."""
    asked = arguments(tmp_path, accumulate=2)
    base = checkpoint.load(asked.model, CLASSIFY, ("bad", "good"), torch.device("cpu"))
    encoded = encode(data.load(asked.data, CLASSIFY), base, asked)
    ticks = itertools.count(step=3)
    monkeypatch.setattr(duration.time, "perf_counter", lambda: float(next(ticks)))
    seconds = 3 * (4 * 2 + 2 * 6 / 8 / 3 + 12)
    setting = train.Setting(base, encoded, asked)
    assert duration.estimate(2, setting, torch.device("cpu")) == f"about {2 * seconds / 60:.0f} minutes"


def test_what_is_left_follows_from_what_finished_runs_took(monkeypatch):
    now = iter([100.0, 150.0, 240.0, 300.0])
    monkeypatch.setattr(duration.time, "monotonic", lambda: next(now))
    clock = duration.Clock(3)
    assert clock.left() == "; about 2 minutes left"  # 50 s each
    assert clock.left() == "; about 70 seconds left"  # 70 s each
    assert clock.left() == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(1, "about 5 seconds"), (89, "about 90 seconds"), (600, "about 10 minutes"),
                           (7200, "about 2.0 hours")],
)  # fmt: skip
def test_durations_are_told_as_roughly_as_they_are_known(seconds, words):
    assert duration._about(seconds) == words
