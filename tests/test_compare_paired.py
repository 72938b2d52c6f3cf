"""What texts and seeds allow to say of a difference, held against simulation and published tables."""

from __future__ import annotations

import numpy as np
import pytest

from fastpeft.compare import paired

#: Student's t, two-sided 95 %, as tables print it, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 5: 2.571, 30: 2.042, 1000: 1.962}


@pytest.mark.parametrize("freedom", STUDENT)
def test_quantiles_are_students(freedom):
    assert paired._squared(0.95, freedom + 1) ** 0.5 == pytest.approx(STUDENT[freedom], abs=6e-4)


def test_a_chance_is_that_of_its_interval_reaching_zero():
    generator = np.random.default_rng(4)
    for shift in 0.02, 0.05, 0.1:
        found = paired.difference(shift + generator.normal(size=(3, 200)), np.zeros((3, 200)), np.ones(200))
        assert (found.p < 0.05) == (not found.low < 0 < found.high)


def _scores(generator, seeds, texts, by_seed, by_text, rest):
    """Differences of mean zero that vary by seed, by text and by both."""
    return (
        by_seed * generator.normal(size=(seeds, 1))
        + by_text * generator.normal(size=(1, texts))
        + rest * generator.normal(size=(seeds, texts))
    )


@pytest.mark.parametrize(("by_seed", "by_text", "rest"), [(0, 1, 1), (0.2, 0.1, 0.5), (0.07, 1, 1)])
@pytest.mark.parametrize("seeds", [2, 3])
def test_equal_methods_are_told_apart_no_more_often_than_promised(seeds, by_seed, by_text, rest):
    """Of 600 comparisons of equals, 5 % are 30, with a standard deviation of 5.3."""
    generator = np.random.default_rng(0)
    weights = np.ones(200)
    found = 0
    for _ in range(600):
        apart = _scores(generator, seeds, 200, by_seed, by_text, rest)
        found += paired.difference(apart, np.zeros_like(apart), weights).p < 0.05
    assert found <= 30 + 3 * 5.3


def test_a_difference_that_is_there_is_found_and_in_its_interval():
    generator = np.random.default_rng(1)
    covered = shown = 0
    for _ in range(300):
        first = 0.3 + _scores(generator, 3, 200, 0.02, 1, 0.3)
        found = paired.difference(first, np.zeros((3, 200)), np.ones(200))
        covered += found.low < 0.3 < found.high
        shown += found.p < 0.05
    assert covered >= 0.92 * 300
    assert shown >= 0.9 * 300


def test_what_texts_share_doesnt_hide_a_difference():
    """Texts hard for one are hard for the other: the pairs are apart though each varies thirty times as much."""
    generator = np.random.default_rng(2)
    hard = 3 * generator.normal(size=(1, 400))
    first = hard + 0.1 + 0.1 * generator.normal(size=(3, 400))
    second = hard + 0.1 * generator.normal(size=(3, 400))
    found = paired.difference(first, second, np.ones(400))
    assert found.p < 0.01
    assert 0.05 < found.low < found.high < 0.15


def test_texts_count_by_their_weight():
    weights = np.array([1.0, 3.0, 6.0])
    first, second = np.array([[1.0, 9.0, 12.0]] * 2), np.array([[0.0, 3.0, 6.0]] * 2)
    assert paired.difference(first, second, weights).mean == pytest.approx(13 / 10)


def test_what_never_varies_is_certain():
    same = np.ones((2, 5))
    assert paired.difference(same, same, np.ones(5))[:4] == (0, 0, 0, 1)
    assert paired.difference(same, 0 * same, np.ones(5))[:4] == (1, 1, 1, 0)


def test_the_bootstraps_interval_is_as_wide_as_texts_vary():
    """As the linearised standard error of a ratio has it, which is right for many texts."""
    generator = np.random.default_rng(3)
    weights = generator.integers(1, 20, size=2000).astype(float)
    scores = weights * generator.gamma(2, 2.5, size=(1, 2000))
    low, high = paired.interval(scores, weights)
    quality = scores.sum() / weights.sum()
    error = 2000**0.5 * (scores[0] - quality * weights).std() / weights.sum()
    assert (low, high) == pytest.approx((quality - 1.96 * error, quality + 1.96 * error), abs=0.3 * error)


def test_tests_share_a_chance_as_holm_has_it():
    assert paired.shares([0.01, 0.04, 0.03]) == [
        3,
        2,
        2,
    ]  # 0.03 · 2 shows nothing, so 0.04 isn't asked by itself
    assert paired.shares([0.01, 0.04, 0.02]) == [3, 1, 2]
    assert paired.shares([0.9, 0.8]) == [2, 2]
    assert paired.shares([]) == []


@pytest.mark.parametrize("tests", [1, 15])
def test_an_interval_leaves_out_zero_where_a_difference_is_shown(tests):
    generator = np.random.default_rng(6)
    for shift in np.linspace(0, 0.3, 40):
        found = paired.difference(
            shift + generator.normal(size=(3, 200)), np.zeros((3, 200)), np.ones(200), tests
        )
        assert found.shown == (not found.low < 0 < found.high)


@pytest.mark.parametrize("tests", [1, 10])
@pytest.mark.parametrize(("text", "seed"), [(4e-4, 0.0), (1e-6, 4e-4), (4e-4, 4e-4)])
def test_as_many_as_it_names_would_tell_four_times_in_five(text, seed, tests):
    """In simulated comparisons of that many, with the difference and the spreads it was told of."""
    generator = np.random.default_rng(5)
    texts, seeds = paired.would_tell(paired.Difference(0.02, 0, 0, 0.3, text, seed, 100, 3, tests))
    assert texts > 100 or seeds > 3
    shown = 0
    for _ in range(300):
        apart = 0.02 + _scores(generator, seeds, texts, (3 * seed) ** 0.5, (100 * text) ** 0.5, 0)
        shown += paired.difference(apart, np.zeros_like(apart), np.ones(texts), tests).shown
    assert 0.7 * 300 <= shown <= 0.93 * 300


def test_a_difference_that_seeds_hide_is_not_promised():
    assert paired.would_tell(paired.Difference(1e-6, 0, 0, 0.9, 1e-4, 1e-2, 100, 3)) is None
