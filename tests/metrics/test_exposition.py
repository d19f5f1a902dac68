"""Readings as text: what Prometheus reads of it is what was read."""

from hypothesis import given, strategies as st
from prometheus_client.parser import text_string_to_metric_families

from servinggraph.measures import BOUNDS_NS, Durations
from servinggraph.metrics import Family, Readings
from servinggraph.metrics.exposition import write

COUNTER = Family("things_total", "counter", "things", ("of",), "Things: 'quoted', \\ and\nover two lines.")
SECONDS = Family("thing_seconds", "histogram", "seconds", ("of",), "How long.")
GAUGE = Family("thing_now", "gauge", "things", (), "Now.")


def samples(readings, family):
    text = write(readings, "")[0].decode()
    name = family.name.removesuffix("_total")
    (found,) = [metric for metric in text_string_to_metric_families(text) if metric.name == name]
    assert found.type == family.kind
    return found.samples


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_label_values_come_back_as_they_were(value):
    readings = Readings()
    readings.count(COUNTER, (value,), 3)
    assert [({"of": value}, 3)] == [(sample.labels, sample.value) for sample in samples(readings, COUNTER)]


@given(st.lists(st.integers(0, 10**11), max_size=30))
def test_a_histogram_has_every_duration_in_the_first_bucket_that_holds_it(times):
    durations = Durations()
    for ns in times:
        durations.add(ns)
    readings = Readings()
    readings.durations(SECONDS, ("x",), durations)
    found = samples(readings, SECONDS)
    buckets = {float(sample.labels["le"]): sample.value for sample in found if sample.name.endswith("_bucket")}
    assert len(buckets) == len(BOUNDS_NS) + 1
    for bound, count in buckets.items():
        assert count == sum(ns / 1e9 <= bound for ns in times)
    (total,) = [sample.value for sample in found if sample.name.endswith("_sum")]
    assert total == sum(times) / 1e9


def test_what_is_counted_twice_adds_up_and_what_is_set_is_the_last():
    one, other = Readings(), Readings()
    for readings in (one, other):
        readings.count(COUNTER, ("x",), 2)
        readings.sizes(SECONDS, ("x",), [1, 2], {1: 3, 4: 1})
    one.add(other)
    one.set(GAUGE, (), 1)
    one.set(GAUGE, (), 5)
    assert [4] == [sample.value for sample in samples(one, COUNTER)]
    assert [5] == [sample.value for sample in samples(one, GAUGE)]
    assert [6, 6, 8, 8, 14] == [sample.value for sample in samples(one, SECONDS)]


def test_the_process_is_shown_under_the_usual_names():
    text = write(Readings(), "")[0].decode()
    names = {metric.name for metric in text_string_to_metric_families(text)}
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "python_gc_collections"} <= names
