"""How sure one may be: intervals over clusters, paired across arms."""

from __future__ import annotations

import numpy as np
import pytest

from steerserve.lab.bootstrap import Interval, Resamples, bootstrap, one_sided, per_cluster, quotient


def test_the_interval_covers_the_truth_where_prompts_differ_more_than_seeds() -> None:
    """On clustered data the interval holds the true mean about 95 % of the time; ignoring clusters it would not."""
    rng = np.random.default_rng(7)
    cluster = np.repeat(np.arange(40), 5)
    clustered, single = Resamples(40, draws=400), Resamples(200, draws=400)
    covered = ignored = 0
    for _ in range(100):
        data = rng.normal(size=40)[cluster] + 0.2 * rng.normal(size=200)
        interval = Interval.of(clustered.ratio(per_cluster(cluster, data, 40), np.full(40, 5.0)))
        covered += interval.low <= 0 <= interval.high
        narrow = Interval.of(single.ratio(data, np.ones(200)))
        ignored += narrow.low <= 0 <= narrow.high
        assert interval.value == pytest.approx(data.mean())
        assert interval.low < interval.value < interval.high
    assert covered >= 88
    assert ignored < 75


def test_arms_share_their_draws() -> None:
    hits = np.random.default_rng(0).random(30)
    resamples = Resamples(30)
    a, b = resamples.ratio(hits, np.ones(30)), resamples.ratio(2 * hits, np.ones(30))
    interval = Interval.of(quotient(b, a))
    assert (interval.low, interval.value, interval.high) == pytest.approx((2, 2, 2))
    assert np.std(a) > 0.02


def test_a_ratio_is_weighted_by_its_denominator() -> None:
    draws = Resamples(2).ratio(np.array([9.0, 1.0]), np.array([90.0, 1.0]))
    assert draws[0] == pytest.approx(10 / 91)
    assert {round(value, 6) for value in draws[1:]} == {round(value, 6) for value in (0.1, 10 / 91, 1.0)}


def test_what_has_no_value_has_no_interval() -> None:
    draws = Resamples(4).ratio(np.zeros(4), np.zeros(4))
    assert all(np.isnan(value) for value in vars(Interval.of(draws)).values())
    some = Resamples(2).ratio(np.array([1.0, 1.0]), np.array([0.0, 2.0]))  # some draws hold the first alone
    assert np.isnan(some).any()
    assert Interval.of(some).value == 1.0
    assert np.isfinite(Interval.of(some).high)


def test_the_one_sided_bound_leaves_a_twentieth_below() -> None:
    draws = np.concatenate([[50.0], np.arange(101.0)])
    assert one_sided(draws, 0.05) == pytest.approx(5)
    assert Interval.of(draws) == Interval(50.0, pytest.approx(2.5), pytest.approx(97.5))


def test_any_statistic_is_resampled_by_whole_clusters() -> None:
    clusters = np.array([2, 0, 1, 0, 2, 1, 1])
    members = {0: [1, 3], 1: [2, 5, 6], 2: [0, 4]}
    values = np.random.default_rng(0).random(7)

    def ratio(pick: np.ndarray) -> float:
        for cluster, indices in members.items():
            counts = {int((pick == index).sum()) for index in indices}
            assert len(counts) == 1, (cluster, pick)
        return float((2 * values)[pick].mean() / values[pick].mean())

    interval = bootstrap(clusters, ratio, draws=300)
    assert (interval.low, interval.value, interval.high) == pytest.approx((2, 2, 2))
    mean = bootstrap(np.arange(200), lambda pick: float((pick % 2)[pick >= 0].mean()))
    assert mean.value == 0.5
    assert mean.low == pytest.approx(0.43, abs=0.01)
