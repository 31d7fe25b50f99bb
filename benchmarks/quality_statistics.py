"""Intervals of what was measured, and the rules that make verdicts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000
GROUPS = 50  # of images, each left out once
HARMLESS_DROP = 0.02  # of accuracy, at most
BREAKING_DROP = 0.10
SMALLEST_EFFECT = 0.01  # of the value that is changed: below that, a claim is taken to be wrong


@dataclass(frozen=True)
class Estimate:
    """A value and its interval at 95 %."""

    value: float
    low: float
    high: float

    def __rmul__(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.low, factor * self.high)

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def change(before: Floats, after: Floats, seed: int = 0) -> Estimate:
    """The mean of after - before, of values (N,) of the same prompts and noise; its interval by paired bootstrap."""
    difference = np.asarray(after, np.float64) - before
    count = len(difference)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return Estimate(float(difference.mean()), *map(float, np.percentile(drawn @ difference / count, (2.5, 97.5))))


class Reference:
    """Features (N, F) to which others have a Frechet distance."""

    def __init__(self, features: Floats) -> None:
        self._mean, covariance = _moments(features)
        values, vectors = np.linalg.eigh(covariance)
        self._root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
        self._trace = float(np.trace(covariance))

    def distance(self, features: Floats) -> float:
        """|mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), of features (N, F). Source: Heusel et al.
        2017."""
        mean, covariance = _moments(features)
        mixed = np.sqrt(np.clip(np.linalg.eigvalsh(self._root @ covariance @ self._root), 0, None)).sum()
        return max(0.0, float(((mean - self._mean) ** 2).sum() + self._trace + np.trace(covariance) - 2 * mixed))

    def without(self, features: Floats) -> Floats:
        """(G,): the distances without every G-th image, from the first, the second, ... on. G is at most GROUPS."""
        index = np.arange(len(features))
        groups = min(GROUPS, len(features))
        return np.array([self.distance(features[index % groups != group]) for group in range(groups)])


def jackknife(value: float, without: Floats) -> Estimate:
    """The interval of a distance, or of the difference of two, of which ``without`` are the values without each group:
    1.96 times sqrt((G - 1) / G * sum((value_g - mean)^2)).

    A bootstrap does not serve here. It repeats images, and with about as many features as images that nearly doubles
    the distance, and makes its intervals two to three times as wide as they should be.
    """
    spread = 1.96 * float(np.sqrt((len(without) - 1) * np.var(without)))
    return Estimate(value, value - spread, value + spread)


def _moments(features: Floats) -> tuple[Floats, Floats]:
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


# Rules


def harmless_until(changes: Sequence[Estimate]) -> int:
    """How many strengths, from the weakest on, are harmless: each, and all before it, loses at most 2 points of
    accuracy, and has an interval that reaches 0."""
    for index, each in enumerate(changes):
        if each.value < -HARMLESS_DROP or each.high < 0:
            return index
    return len(changes)


def breaks_at(changes: Sequence[Estimate]) -> int | None:
    """The first strength at which more than 10 points of accuracy are lost."""
    return next((index for index, each in enumerate(changes) if each.value < -BREAKING_DROP), None)


def verdict(moved: Estimate, direction: int, before: float) -> str:
    """Whether a value moves in a direction (+1 or -1), by the interval of how far it moved from ``before``.

    "yes": the whole interval is on that side of 0. "no, the opposite": all of it is on the other side. "no": an effect
    of 1 % of ``before`` or more in that direction is outside of it. Else "not measurable here".
    """
    low, high = sorted((direction * moved.low, direction * moved.high))
    if low > 0:
        return "yes"
    if high < 0:
        return "no, the opposite"
    return "no" if high < SMALLEST_EFFECT * abs(before) else "not measurable here"
