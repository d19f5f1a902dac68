"""What is kept of comparisons: shares with intervals, distributions, examples; all of it bounded."""

from __future__ import annotations

import json
from math import inf, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest

from servinggraph.routers.shadow import Record, Verdict
from servinggraph.routers.shadow.examples import Reservoir, summary
from servinggraph.routers.shadow.holding import held_bytes
from servinggraph.routers.shadow.record import wilson
from servinggraph.routers.shadow.sketch import Sketch


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**6), st.data())
def test_the_interval_is_wilsons(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert (pytest.approx(expected.low, abs=1e-9), pytest.approx(expected.high, abs=1e-9)) == (low, high)
    assert 0 <= low <= successes / trials <= high <= 1


def test_without_a_trial_nothing_is_known():
    assert (0.0, 1.0) == wilson(0, 0)
    assert {"of": 0, "agreed": 0, "rate": None, "low": None, "high": None} == Record(0).report()["agreement"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e9)), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_quantiles_are_at_most_2_percent_off(values, share):
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    exact = float(np.quantile(values, share, method="lower"))
    assert pytest.approx(exact, rel=0.0201, abs=1e-12) == sketch.quantile(share)
    assert max(values) == sketch.report()["max"]
    again = Sketch()
    again.take(sketch.sums())
    assert pytest.approx(exact, rel=0.0201, abs=1e-12) == again.quantile(share)
    assert pytest.approx(max(values), rel=0.0201, abs=1e-12) == again.highest
    assert np.array_equal(sketch.sums(), again.sums())


def test_a_distribution_takes_any_value_in_bounded_memory():
    sketch = Sketch()
    for value in (0.0, 1e-300, 1e300, inf, nan, 5.0):
        sketch.add(value)
    assert {"count": 6, "infinite": 2, "p50": pytest.approx(5.0, rel=0.02), "p90": None, "p99": None, "max": 1e300} == (
        sketch.report()
    )
    for exponent in np.linspace(-300, 300, 20_000):
        sketch.add(10.0**exponent)
    assert len(sketch.sums()) < 1600


def test_counts_of_several_workers_add_up():
    records = [Record(0) for _ in range(3)]
    for number, record in enumerate(records[:2]):
        for step in range(10):
            record.sampled += 1
            record.answers(1.0 + step, 5.0)
            differing = Verdict(step % 2 == 0, "values", 4, 2, {"y": float(step), "z": inf})
            record.compares(differing, "r", {}, {}, {})
        record.failed("internal", "text")
        record.drop("late")
        record.drop(f"reason {number}")
    one, other = (record.sums() for record in records[:2])
    records[2].take({name: one.get(name, 0) + other.get(name, 0) for name in {*one, *other}})

    report = records[2].report()
    assert (20, {"late": 2, "reason 0": 1, "reason 1": 1}) == (report["sampled"], report["dropped"])
    assert {"of": 20, "agreed": 10} == {name: report["agreement"][name] for name in ("of", "agreed")}
    assert (80, 40) == (report["rows"]["of"], report["rows"]["agreed"])
    assert {"internal": 2} == report["errors_by_code"]
    assert (20, 20) == (report["differences"]["y"]["count"], report["differences"]["z"]["infinite"])
    assert records[0].report()["latency_ms"]["champion"]["p50"] == report["latency_ms"]["champion"]["p50"]


def test_examples_are_a_fair_sample_of_all_disagreements():
    seen = np.zeros(100)
    for _ in range(400):
        reservoir = Reservoir(5)
        for number in range(100):
            place = reservoir.place()
            if place is not None:
                reservoir.put(place, {"number": number})
        assert 5 == len(reservoir.all())
        for example in reservoir.all():
            seen[example["number"]] += 1
    # 400 samples of 5 of 100: each is in 20 of them, give or take.
    assert abs(seen[:50].sum() - 1000) < 5 * sqrt(2000 * 0.25)
    assert seen.min() > 0


def test_without_room_for_examples_none_is_kept():
    record = Record(0)
    record.compares(Verdict(agrees=False, reason="values"), "r", {}, {}, {})
    assert [] == record.report()["examples"]


def test_an_example_is_small_however_large_the_request():
    record = Record(1)
    value = {f"tensor-{number}": np.zeros((1000, 1000), np.float32) for number in range(40)}
    value["text"] = np.array([b"\xff" * 10_000], object)
    record.compares(Verdict(agrees=False, reason="values"), "i" * 10_000, value, ["x" * 10_000] * 1000, {"deep": [[1] * 1000]})
    assert len(json.dumps(record.report()["examples"])) < 20_000


def test_a_summary_shows_the_first_elements():
    value = {"x": np.arange(20.0).reshape(4, 5), "t": np.array([b"ab"], object), "n": 3, "odd": np.array([inf, nan])}
    assert {
        "x": {"datatype": "FP64", "shape": [4, 5], "first": list(range(16))},
        "t": {"datatype": "BYTES", "shape": [1], "first": ["ab"]},
        "n": 3,
        "odd": {"datatype": "FP64", "shape": [2], "first": ["inf", "nan"]},
    } == summary(value)


def test_names_that_a_comparison_invents_are_bounded():
    record = Record(5)
    for number in range(1000):
        record.compares(Verdict(False, f"reason {number}", differences={f"name {number}": 1.0}), "", {}, {}, {})
        record.failed(f"code {number}", "x" * 10_000)
    report = record.report()
    assert 1000 == sum(report["disagreements"].values()) == sum(report["errors_by_code"].values())
    assert len(report["disagreements"]) <= 65
    assert len(report["differences"]) <= 64
    assert len(report["last_error"]) <= 500


def test_bytes_are_those_that_a_value_keeps_in_memory():
    body = bytes(1_000_000)
    views = {name: np.frombuffer(body, np.uint8, 10, offset) for name, offset in (("a", 0), ("b", 500_000))}
    assert 1_000_000 <= held_bytes(views) < 1_010_000
    assert held_bytes(views, views) == held_bytes(views)
    array = np.zeros(1000, np.float64)
    assert 8000 <= held_bytes({"x": array[:1], "y": array.reshape(10, 100)}) < 9000
    texts = np.array([b"%1000d" % number for number in range(5000)], object)
    assert 5_000_000 < held_bytes({"t": texts}) < 6_000_000
    document = {"items": [{"text": f"{number:1000}"} for number in range(5000)]}
    assert 3_000_000 < held_bytes(document) < 10_000_000


def test_an_object_that_cannot_say_its_size_takes_a_little():
    class Odd:
        def __sizeof__(self):
            raise RuntimeError("no size")

    assert 64 == held_bytes(Odd())
