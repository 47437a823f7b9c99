"""Advantages against exact arithmetic: Python's fractions and its module of statistics."""

import statistics
from fractions import Fraction

import numpy as np
import pytest

from trainers.advantages import ESTIMATORS, SCALES, advantages, combine, has_spread

NAN = float("nan")
REWARDS = {
    "binary": [[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "fractions": [[0.25, -1.5, 3.0, 0.125], [10.0, 20.5, -7.25, 1.0]],
    "missing": [[1, NAN, 0, 0.5], [NAN, NAN, NAN, NAN], [NAN, 2, NAN, NAN], [NAN, 0, 1, NAN]],
    "pairs": [[0, 1], [1, 0], [2, 2]],
    "alone": [[3.0], [5.0]],
    "large": [[2.0**30, 2.0**30 + 1, 2.0**30, 2.0**30]],
}


def exact(rewards, estimator, scale):
    """By the papers' formulas, completion by completion."""
    everything = [Fraction(r) for group in rewards for r in group if r == r]
    result = []
    for group in rewards:
        known = [Fraction(r) for r in group if r == r]
        row = []
        for place, reward in enumerate(group):
            others = [Fraction(r) for other, r in enumerate(group) if r == r and other != place]
            if reward != reward or not others:
                row.append(0.0)
                continue
            baseline = {"group": known, "rloo": others}[estimator]
            difference = Fraction(reward) - sum(baseline) / len(baseline)
            spread = {"group": known, "batch": everything, "none": None}[scale]
            row.append(float(difference) / (1 if spread is None else statistics.stdev(spread) + 1e-4))
        result.append(row)
    return result


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", REWARDS)
def test_against_exact_arithmetic(name, estimator, scale):
    got = advantages(np.array(REWARDS[name], np.float64), estimator=estimator, scale=scale)
    assert got.dtype == np.float32 and got.shape == np.shape(REWARDS[name])
    np.testing.assert_allclose(got, exact(REWARDS[name], estimator, scale), rtol=1e-6, atol=1e-10)


def test_every_kind_is_another():
    rewards_BC = np.array(REWARDS["fractions"])
    found = {(e, s): advantages(rewards_BC, estimator=e, scale=s).tolist() for e in ESTIMATORS for s in SCALES}
    assert len({str(value) for value in found.values()}) == len(ESTIMATORS) * len(SCALES)
    assert advantages(rewards_BC).tolist() == found["group", "group"]


def test_a_constant_for_a_prompt_changes_nothing():
    rewards_BC = np.array(REWARDS["fractions"])
    moved_BC = rewards_BC + np.array([[8.0], [-2.0]])
    for estimator in ESTIMATORS:
        one, two = (advantages(r, estimator=estimator, scale="group") for r in (rewards_BC, moved_BC))
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_groups_without_spread():
    rewards_BC = np.array([[0.1, 0.1, 0.1], [0.1, 0.3 - 0.2, 0.1], [NAN, 1, 1], [NAN, NAN, 3], [NAN, 1, 2], [NAN] * 3])
    assert has_spread(rewards_BC).tolist() == [False, False, False, False, True, False]
    assert np.abs(advantages(rewards_BC)[~has_spread(rewards_BC)]).max() < 1e-10


def test_names_that_are_none():
    for options in (dict(estimator="mean"), dict(scale="std")):
        with pytest.raises(ValueError, match=repr(*options.values())):
            advantages(np.zeros((2, 3)), **options)


def test_rewards_are_weighted_where_they_apply():
    rewards_NF = np.array([[1, 2, 3], [NAN, 2, 3], [NAN, NAN, 0], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(combine(rewards_NF, np.array([0.5, -1, 2])), [4.5, 4, 0, NAN])


def test_rewards_that_cannot_be_combined():
    with pytest.raises(ValueError, match="2 weights do not fit rewards of 3 functions"):
        combine(np.zeros((4, 3)), np.ones(2))
    with pytest.raises(ValueError, match="completion 2 has an infinite reward"):
        combine(np.array([[0.0], [NAN], [np.inf]]), np.ones(1))
