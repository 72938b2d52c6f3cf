"""What held-out texts and seeds allow to say of two methods that were judged by the same ones.

A score varies with the text and with the seed, each crossed with the other. The variance of a mean difference is taken
for the sum of what the means by text and the means by seed vary, which counts what is left of both twice and so errs
on the side of no difference (Owen, 2007, "The pigeonhole bootstrap"). Few seeds count as few: each of the two variances
has Student's quantile for as many as it was seen in, where one quantile for their sum would promise too much.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
_RESAMPLED = 20_000_000  # texts drawn in all, at most
_GRID = 20_001
_CHANCES = np.logspace(0, -9, 400)
_POWER = 0.841621  # the normal's quantile: a difference as large as thought is found four times in five
_MOST = 10**9


class Difference(NamedTuple):
    """A mean difference of two methods, its interval, and where its uncertainty comes from."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, of this test alone
    text_variance: float  # of the mean, that texts give it
    seed_variance: float  # and that seeds give it
    texts: int
    seeds: int
    tests: int = 1  # that share the chance of a false difference, and the interval's of missing the truth

    @property
    def shown(self) -> bool:
        """Whether it would come about by chance in fewer than 1 of 20 such families of tests."""
        return self.p * self.tests < 1 - CONFIDENCE


def difference(first: Floats, second: Floats, weights: Floats, tests: int = 1) -> Difference:
    """The quality of `first` less that of `second`.

    Args:
        first, second: scores (seeds, texts), of at least two seeds and texts.
        weights: what each text weighs (texts,).
        tests: as many share the chance of one false difference (`shares`).
    """
    apart = np.asarray(first, float) - second
    seeds, texts = apart.shape
    whole = weights.sum()
    mean = float(apart.mean(0).sum() / whole)
    # Of a ratio of sums, linearised (Cochran, 1977, "Sampling Techniques", 6.3).
    residuals = apart.mean(0) - mean * weights
    by_text = float(texts / (texts - 1) * (residuals**2).sum() / whole**2)
    by_seed = float((apart.sum(1) / whole).var(ddof=1) / seeds)
    if by_text + by_seed == 0:
        return Difference(mean, mean, mean, float(mean == 0), 0.0, 0.0, texts, seeds, tests)
    confidence = _confidence(tests)
    half = math.sqrt(_squared(confidence, seeds) * by_seed + _squared(confidence, texts) * by_text)
    widths = _squared(1 - _CHANCES, seeds) * by_seed + _squared(1 - _CHANCES, texts) * by_text
    p = float(np.interp(mean**2, widths, _CHANCES))
    return Difference(mean, mean - half, mean + half, p, by_text, by_seed, texts, seeds, tests)


def interval(scores: Floats, weights: Floats) -> tuple[float, float]:
    """The bootstrap's 95 % interval of a quality over texts (Efron, 1979): of scores (seeds, texts)."""
    mean = np.asarray(scores, float).mean(0)
    drawn = _drawn(len(mean))
    low, high = np.quantile((drawn @ mean) / (drawn @ weights), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=1)
def _drawn(texts: int) -> NDArray[np.float32]:
    """How often each text is drawn, with replacement: (resamples, texts), fewer of them where texts are very many."""
    generator = np.random.default_rng(0)
    resamples = max(200, min(RESAMPLES, _RESAMPLED // texts))
    drawn = generator.integers(texts, size=(resamples, texts))
    return np.stack([np.bincount(row, minlength=texts) for row in drawn]).astype(np.float32)


def shares(ps: list[float]) -> list[int]:
    """How many tests each of these chances shares a false difference with, for that of one among all to stay 1 in 20.

    Holm's (1979): the least chance with all, the next with those that are left, until one shows nothing.
    """
    found, left = [0] * len(ps), len(ps)
    for index in sorted(range(len(ps)), key=ps.__getitem__):
        found[index] = left
        left -= ps[index] * left < 1 - CONFIDENCE
    return found


def would_tell(found: Difference) -> tuple[int, int] | None:
    """Texts and seeds with which a difference as large as this one would be shown four times in five.

    By a test among as many as this was one of. Of all pairs the one with the fewest scores; None where a billion texts
    wouldn't do.
    """
    texts, seeds, confidence = found.texts, found.seeds, _confidence(found.tests)
    by_text = (math.sqrt(_squared(confidence, texts)) + _POWER) ** 2 * found.text_variance * texts
    pairs = []
    for number in range(seeds, 20 * seeds):
        by_seed = (
            (math.sqrt(_squared(confidence, number)) + _POWER) ** 2 * found.seed_variance * seeds / number
        )
        room = found.mean**2 - by_seed
        if room * _MOST > by_text:
            pairs.append((max(texts, math.ceil(by_text / room)), number))
    return min(pairs, key=math.prod, default=None)


def _confidence(tests: int) -> float:
    return 1 - (1 - CONFIDENCE) / tests


@functools.cache
def _student(freedom: int) -> tuple[Floats, Floats]:
    """With t = √freedom · tan(angle), Student's density is cos(angle)^(freedom - 1): angles, and sums up to them."""
    angles = np.linspace(0, math.pi / 2, _GRID)
    density = np.cos(angles) ** (freedom - 1)
    sums = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, sums / sums[-1]


def _squared(confidence: float | Floats, seen: int) -> Any:
    """The square of what Student's t stays within with this confidence, for a variance seen in so many."""
    angles, sums = _student(seen - 1)
    return (seen - 1) * np.tan(np.interp(confidence, sums, angles)) ** 2
