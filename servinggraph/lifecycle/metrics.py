"""Reads what is counted into metrics, at one moment on the event loop, and keeps it over reloads.

The hot path pays for counters only; all names, labels and sums are made here, when somebody asks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from servinggraph.accelerators.nvml import gpu_states
from servinggraph.lifecycle.access import AccessLog, Entry
from servinggraph.measures import Told, Traffic, TrafficByProtocol
from servinggraph.metrics import Readings, families as of, triton as nv
from servinggraph.metrics.steps import StepMeter, StepNames
from servinggraph.statistics import GraphStatistics, NodeStatistics

if TYPE_CHECKING:
    from servinggraph.lifecycle.catalog import ServedGraph
    from servinggraph.lifecycle.serving import Serving

__all__ = ["Ledger", "read_devices", "read_metrics"]

logger = logging.getLogger("servinggraph.metrics")

MOST_VERSIONS: Final = 1024
"""Versions of graphs whose counters are kept for when they come back; those not served for longest are forgotten."""

STILL_COUNTING: Final = 2
"""How many replaced graphs of a version may still be answering what they have begun; of older ones only sums are kept."""

FILL_BOUNDS: Final = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


class _Account:
    """What one version has counted so far, over all graphs that it has been."""

    def __init__(self, told: Callable[[str], Told] | None) -> None:
        self.traffic = TrafficByProtocol(told)
        self.meters: dict[str, StepMeter] = {}
        self.replaced: deque[GraphStatistics] = deque()
        self.sums = Readings()
        # Decisions that graphs before the present one have counted, by router and branch, beyond what its own router says.
        self.decided: dict[tuple[str, str], float] = {}


class Ledger:
    """Counters by graph and version, which a reload does not set back.

    Args:
        triton: whether there are Triton's names as well.
        access: takes each request for the access log; None without one.
    """

    def __init__(self, *, triton: bool = False, access: AccessLog | None = None) -> None:
        self.triton = triton
        self._access = access
        self._names = StepNames()
        self._accounts: OrderedDict[tuple[str, str], _Account] = OrderedDict()
        self._complained: set[str] = set()
        self.unknown = TrafficByProtocol(self._told("", ""))

    def _told(self, graph: str, version: str) -> Callable[[str], Told] | None:
        access = self._access
        if access is None:
            return None

        def of_protocol(protocol: str) -> Told:
            def told(moment: int, code: str, ns: int, id: str) -> None:
                access.add(Entry(moment, protocol, graph, version, code, ns, id))

            return told

        return of_protocol

    def traffic(self, name: str, version: str) -> TrafficByProtocol:
        """Return where the requests to a version are counted."""
        return self._account((name, version)).traffic

    def meters(self, name: str, version: str) -> Callable[[str], StepMeter]:
        """Return what gives the meter of each node of a version."""
        meters = self._account((name, version)).meters
        return lambda node: meters.setdefault(node, StepMeter(self._names))

    def replaced(self, graph: ServedGraph) -> None:
        """Take over what a graph has counted that is served no longer."""
        key = graph.plan.name, graph.plan.version
        account = self._account(key)
        account.replaced.append(graph.executor.statistics)
        while len(account.replaced) > STILL_COUNTING:
            self._read_statistics(account.sums, key, account.replaced.popleft())
        for (router, branch), number in self._decisions(graph).items():
            account.decided[router, branch] = account.decided.get((router, branch), 0) + number

    def taken_up(self, graph: ServedGraph) -> None:
        """Go on with a graph that is served now: its routers may remember what those before them had counted."""
        account = self._account((graph.plan.name, graph.plan.version))
        for place, number in self._decisions(graph).items():
            account.decided[place] = max(0.0, account.decided.get(place, 0) - number)

    def read(self, readings: Readings, graph: ServedGraph) -> None:
        """Read what one version has counted."""
        key = graph.plan.name, graph.plan.version
        account = self._account(key)
        readings.add(account.sums)
        for statistics in (*account.replaced, graph.executor.statistics):
            self._read_statistics(readings, key, statistics)
        for protocol, traffic in account.traffic.items():
            _read_traffic(readings, (*key, protocol), traffic)
            if self.triton:
                _read_outcomes(readings, key, traffic.answered, traffic.failures)
        for node, meter in account.meters.items():
            meter.read(readings, (*key, node))
        for (router, branch), number in self._decisions(graph).items():
            before = account.decided.get((router, branch), 0)
            readings.count(of.ROUTER_DECISIONS, (*key, router, branch), before + number)

    def _read_statistics(self, readings: Readings, key: tuple[str, str], statistics: GraphStatistics) -> None:
        _read_nodes(readings, key, statistics)
        if not self.triton:
            return
        nv.read_model(readings, key, statistics.report())
        for node, counters in statistics.nodes.items():
            place = f"{key[0]}.{node}", key[1]
            nv.read_model(readings, place, counters.report())
            _read_outcomes(readings, place, counters.answered, counters.failures)

    def report(self, router: str, read: Any) -> dict[str, Any]:
        """Return a router's settings or report; nothing, and a line in the log, where that fails."""
        try:
            found: dict[str, Any] = dict(read())
        except Exception as error:
            self.complain(router, error)
            return {}
        return found

    def complain(self, router: str, error: Exception) -> None:
        """Say once that a router's report cannot be read, and why."""
        if router not in self._complained:
            self._complained.add(router)
            logger.error("router '%s' cannot be read for metrics (told once)", router, exc_info=error)

    def _decisions(self, graph: ServedGraph) -> dict[tuple[str, str], float]:
        return {
            (name, branch): number
            for name, seat in graph.seats.items()
            for branch, number in _numbers(self.report(name, seat.router.report).get("decisions")).items()
        }

    def _account(self, key: tuple[str, str]) -> _Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account(self._told(*key))
            if len(self._accounts) > MOST_VERSIONS:
                self._accounts.popitem(last=False)
        else:
            self._accounts.move_to_end(key)
        return account


def read_metrics(serving: Serving, ledger: Ledger) -> Readings:
    """Return all metrics as they are now; on the event loop, so that they fit each other."""
    readings = Readings()
    readings.set(of.BUILD_INFO, (serving.options.server_version,), 1)
    readings.set(of.READY, (), serving.catalog.ready)
    readings.set(of.IN_FLIGHT, (), serving.admission.in_flight)
    readings.set(of.IN_FLIGHT_LIMIT, (), serving.admission.limit)
    for protocol, traffic in ledger.unknown.items():
        _read_traffic(readings, ("", "", protocol), traffic)
    for graph in serving.catalog.graphs():
        ledger.read(readings, graph)
        _read_state(readings, graph)
        if ledger.triton:
            _read_pending(readings, graph)
        for seat in graph.seats.values():
            name = seat.router.name
            labels = graph.plan.name, graph.plan.version, name
            settings, report = ledger.report(name, seat.router.settings), ledger.report(name, seat.router.report)
            readings.set(of.ROUTER_REVISION, labels, seat.router.revision)
            for branch, number in _numbers(settings.get("weights")).items():
                readings.set(of.ROUTER_WEIGHT, (*labels, branch), number)
            for branch, number in _numbers(report.get("shares")).items():
                readings.set(of.ROUTER_SHARE, (*labels, branch), number)
            stage = report.get("stage", settings.get("stage"))
            if stage is not None:
                readings.set(of.ROUTER_STAGE, (*labels, str(stage)), 1)
            for challenger, seen in _entries(report.get("challengers")).items():
                try:
                    _read_shadow(readings, (*labels, challenger), seen)
                except (AttributeError, KeyError, TypeError) as error:  # another's router may mean something else by that
                    ledger.complain(name, error)
    for topics in serving.kafka() if serving.kafka is not None else ():
        _read_kafka(readings, topics)
    return readings


def read_devices(readings: Readings, *, triton: bool = False) -> None:
    """Read the state of GPUs; asks the driver, so not on the event loop."""
    for gpu in gpu_states():
        readings.set(of.DEVICE_MEMORY, (gpu.device, "used"), gpu.used_bytes)
        readings.set(of.DEVICE_MEMORY, (gpu.device, "total"), gpu.total_bytes)
        readings.set(of.DEVICE_BUSY, (gpu.device,), gpu.utilization)
        if triton:
            readings.set(nv.GPU_TOTAL, (gpu.uuid,), gpu.total_bytes)
            readings.set(nv.GPU_USED, (gpu.uuid,), gpu.used_bytes)
            readings.set(nv.GPU_BUSY, (gpu.uuid,), gpu.utilization)


def _read_shadow(readings: Readings, labels: tuple[str, ...], seen: Mapping[str, Any]) -> None:
    ended = {"answered": seen["answered"], "failed": seen["errors"]["failed"], "dropped": sum(seen["dropped"].values())}
    for outcome, number in ended.items():
        readings.set(of.SHADOW_COPIES, (*labels, outcome), number)
    if seen["agreement"]["rate"] is not None:
        readings.set(of.SHADOW_AGREEMENT, labels, seen["agreement"]["rate"])


def _read_kafka(readings: Readings, report: Mapping[str, Any]) -> None:
    graph = (str(report["graph"]),)
    for key, family in of.KAFKA.items():
        value = report.get(key)
        if value is not None:  # what belongs to a connection is not there without one
            readings.set(family, graph, float(value))
    for code, number in report["errors"].items():
        readings.set(of.KAFKA_ERRORS, (*graph, code), number)


def _read_outcomes(readings: Readings, model: tuple[str, str], answered: int, failures: Mapping[str, int]) -> None:
    readings.count(nv.SUCCESS, model, answered)
    for code, number in failures.items():
        readings.count(nv.FAILURE, (*model, nv.reason_of(code)), number)


def _read_pending(readings: Readings, graph: ServedGraph) -> None:
    name, version = graph.plan.name, graph.plan.version
    for node, batcher in graph.executor.batchers.items():
        readings.count(nv.PENDING, (name, version), batcher.queued)
        if node:
            readings.set(nv.PENDING, (f"{name}.{node}", version), batcher.queued)


def _read_state(readings: Readings, graph: ServedGraph) -> None:
    labels = graph.plan.name, graph.plan.version
    readings.set(of.GRAPH_READY, labels, graph.ready)
    readings.set(of.GRAPH_IN_FLIGHT, labels, graph.requests)
    statistics = graph.executor.statistics
    readings.set(of.GRAPH_LOAD_SECONDS, labels, statistics.requests.load_ns / 1e9)
    if graph.size_bytes:
        readings.set(of.GRAPH_MEMORY, labels, graph.size_bytes)
    for node, counters in statistics.nodes.items():
        if counters.load_ns:
            readings.set(of.NODE_LOAD_SECONDS, (*labels, node), counters.load_ns / 1e9)
    for node, batcher in graph.executor.batchers.items():
        place = *labels, node
        readings.set(of.BATCH_MAX_ROWS, place, batcher.policy.max_rows)
        readings.set(of.QUEUE_DEPTH, place, batcher.queued)
        readings.set(of.QUEUE_LIMIT, place, batcher.policy.max_queue)
        readings.set(of.BATCHES_RUNNING, place, batcher.running)


def _read_traffic(readings: Readings, labels: tuple[str, str, str], traffic: Traffic) -> None:
    readings.count(of.REQUESTS, (*labels, "ok"), traffic.answered)
    for code, number in traffic.failures.items():
        readings.count(of.REQUESTS, (*labels, code), number)
    if not traffic.answered:
        return
    readings.durations(of.REQUEST_SECONDS, labels, traffic.whole)
    readings.durations(of.REQUEST_STAGE_SECONDS, (*labels, "decode"), traffic.decode)
    readings.durations(of.REQUEST_STAGE_SECONDS, (*labels, "encode"), traffic.encode)


def _read_nodes(readings: Readings, key: tuple[str, str], statistics: GraphStatistics) -> None:
    nodes = dict(statistics.nodes)
    if statistics.whole is not None:
        nodes[""] = statistics.whole
    for name, node in nodes.items():
        _read_node(readings, (*key, name), node)
    if statistics.requests.hits or statistics.requests.misses:
        _read_cache(readings, (*key, ""), statistics.requests)


def _read_node(readings: Readings, labels: tuple[str, str, str], node: NodeStatistics) -> None:
    readings.count(of.NODE_REQUESTS, (*labels, "ok"), node.answered)
    failures = [node.failures] if node.items is None else [node.failures, node.items.failures]
    for code, number in ((code, number) for kind in failures for code, number in kind.items()):
        readings.count(of.NODE_REQUESTS, (*labels, code), number)
    if node.hits or node.misses:
        _read_cache(readings, labels, node)
    durations = node.durations
    if durations is not None:
        readings.durations(of.NODE_STAGE_SECONDS, (*labels, "compute"), durations.compute)
        if node.batched:
            readings.durations(of.NODE_STAGE_SECONDS, (*labels, "queue"), durations.queue)
            readings.durations(of.NODE_STAGE_SECONDS, (*labels, "batch_wait"), durations.batch_wait)
    if node.batched:
        sizes = {size: batch.count for size, batch in node.batches.items()}
        most = node.max_rows
        readings.sizes(of.BATCH_ROWS, labels, _powers(most), sizes)
        readings.sizes(of.BATCH_FILL, labels, FILL_BOUNDS, {size / most: times for size, times in sizes.items()})


def _read_cache(readings: Readings, labels: tuple[str, str, str], node: NodeStatistics) -> None:
    readings.count(of.CACHE_LOOKUPS, (*labels, "hit"), node.hits)
    readings.count(of.CACHE_LOOKUPS, (*labels, "miss"), node.misses)


def _powers(most: int) -> list[int]:
    """Return the powers of two below a number, and the number."""
    return [*(1 << exponent for exponent in range((most - 1).bit_length())), most]


def _entries(values: Any) -> Mapping[str, Any]:
    return {str(name): value for name, value in values.items()} if isinstance(values, Mapping) else {}


def _numbers(values: Any) -> Mapping[str, float]:
    """Return what of a router's report is numbers by branch; another package's router may say anything."""
    if not isinstance(values, Mapping):
        return {}
    return {str(name): float(value) for name, value in values.items() if isinstance(value, int | float)}
