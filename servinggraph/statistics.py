"""Counters of graphs and of their nodes, by the rules of Triton's statistics extension.

Plain integers, nanoseconds, written on the event loop only. Each request to a graph or a
node ends in exactly one of `success` and `fail`; what follows from that (`queue.count` is
`success.count`, compute counts are those without cache hits) is not counted but derived in
`report`. Source: Triton, extension_statistics.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from time import perf_counter_ns, time_ns
from typing import Any, Final

from servinggraph.errors import ErrorCode, ServingGraphError
from servinggraph.measures import NodeDurations
from servinggraph.tensors import Array

__all__ = ["BatchStatistics", "GraphStatistics", "NodeStatistics", "ResponseStatistics", "StreamProgress", "code_of", "is_late"]

MOST_RESPONSES: Final = 256
"""Answers of one request that are told apart; later ones join the last."""

_EARLY_S: Final = 0.002
"""Timers of some event loops are up to a millisecond early, their clock is as much behind."""


class BatchStatistics:
    """Executions of one size."""

    __slots__ = ("count", "infer_ns", "input_ns", "output_ns")

    def __init__(self, count: int = 0, infer_ns: int = 0) -> None:
        self.count, self.infer_ns = count, infer_ns
        self.input_ns = self.output_ns = 0

    def report(self, size: int) -> dict[str, Any]:
        """Return the counters as Triton names them."""
        return {
            "batch_size": size,
            "compute_input": _duration(self.count, self.input_ns),
            "compute_infer": _duration(self.count, self.infer_ns),
            "compute_output": _duration(self.count, self.output_ns),
        }


class ResponseStatistics:
    """The n-th answers of requests to a decoupled graph. Each is one of success, fail, empty and cancel."""

    __slots__ = (
        "cancel", "cancel_ns", "empty", "empty_ns", "fail", "fail_ns",
        "infer_ns", "output_ns", "success", "success_ns",
    )  # fmt: skip

    def __init__(self) -> None:
        self.success = self.success_ns = self.infer_ns = self.output_ns = 0
        self.fail = self.fail_ns = self.empty = self.empty_ns = self.cancel = self.cancel_ns = 0

    def answered(self, ns: int) -> None:
        """Count an answer that took `ns` to make."""
        self.success += 1
        self.success_ns += ns
        self.infer_ns += ns

    def ended(self, ns: int) -> None:
        """Count an end without an answer, found out in `ns`."""
        self.empty += 1
        self.empty_ns += ns
        self.infer_ns += ns

    def failed(self, ns: int) -> None:
        """Count a failure in place of an answer."""
        self.fail += 1
        self.fail_ns += ns
        self.infer_ns += ns

    def cancelled(self, ns: int) -> None:
        """Count an answer that nobody waited for any more."""
        self.cancel += 1
        self.cancel_ns += ns

    def report(self) -> dict[str, Any]:
        """Return the counters as Triton names them."""
        answers = self.success + self.fail + self.empty
        return {
            "compute_infer": _duration(answers, self.infer_ns),
            "compute_output": _duration(self.success + self.fail, self.output_ns),
            "success": _duration(self.success, self.success_ns),
            "fail": _duration(self.fail, self.fail_ns),
            "empty_response": _duration(self.empty, self.empty_ns),
            "cancel": _duration(self.cancel, self.cancel_ns),
        }


class NodeStatistics:
    """Counters of one node; its executor hands them to whoever answers for the node.

    A batcher counts for itself (`batched`); any other node is counted by the stretch it is in,
    as one execution a request. A cache in front of a node adds `cache_hit` and `cache_miss`.

    Attributes:
        batched: True when a batcher counts: a request answered from a cache then never reaches what counts.
        success: requests that were answered.
        rows: their rows, of a batched node.
        queue_ns: how long they waited.
        busy_ns: what else they took, from joining to splitting.
        input_ns: of that, for joining.
        output_ns: of that, for splitting.
        piece_ns: what requests in pieces took less than their pieces together.
        fail: requests that got an error, or whose caller left.
        failures: those by code of the error, `cancelled` where the caller left.
        durations: durations by size; None where metrics are off.
        max_rows: most rows of an execution, of a batched node.
        load_ns: how long the node took to load.
        batches: executions by number of rows; there are at most as many sizes as the policy's `max_rows`.
        items: of a generator, counters of its items, which are no requests.
        responses: what the n-th answers came to, of a graph that gives several.
    """

    __slots__ = (
        "batched", "batches", "busy_ns", "durations", "fail", "fail_ns", "failures", "hit_ns", "hits", "input_ns", "items",
        "last_ns", "load_ns", "max_rows", "miss_ns", "misses", "output_ns", "piece_ns", "queue_ns", "responses", "rows",
        "success",
    )  # fmt: skip

    def __init__(self) -> None:
        self.batched = False
        self.success = self.rows = self.fail = self.fail_ns = self.last_ns = 0
        self.queue_ns = self.busy_ns = self.input_ns = self.output_ns = self.piece_ns = 0
        self.hits = self.hit_ns = self.misses = self.miss_ns = 0
        self.batches: dict[int, BatchStatistics] = {}
        self.items: NodeStatistics | None = None
        self.responses: list[ResponseStatistics] = []
        self.failures: dict[str, int] = {}
        self.durations: NodeDurations | None = None
        self.max_rows = self.load_ns = 0

    def failed(self, ns: int, code: str) -> None:
        """Count a request that got an error, or that was cancelled, after `ns`."""
        self.fail += 1
        self.fail_ns += ns
        self.failures[code] = self.failures.get(code, 0) + 1

    def answer_failed(self) -> None:
        """Count a request as failed that was counted as answered: what stands behind the node refused the answer.

        Its times stay where they are; which of them were this request's is not kept.
        """
        self.success -= 1
        self.failed(0, ErrorCode.INTERNAL.value)

    def answered_in_pieces(self, ns: int) -> None:
        """Count a request whose pieces have been answered."""
        self.success += 1
        self.piece_ns += ns

    def cache_hit(self, ns: int) -> None:
        """Count a request that a cache answered, in `ns`."""
        self.hits += 1
        self.hit_ns += ns
        self.last_ns = perf_counter_ns()

    def cache_miss(self, ns: int) -> None:
        """Count a look into a cache that found nothing; `ns` is for looking and for putting the answer in."""
        self.misses += 1
        self.miss_ns += ns

    def batch(self, size: int) -> BatchStatistics:
        """Return the counters of executions of `size` rows, those that padding added included."""
        batch = self.batches.get(size)
        if batch is None:
            batch = self.batches[size] = BatchStatistics()
        return batch

    def response(self, index: int) -> ResponseStatistics:
        """Return the counters of the answers number `index`, counted from 0."""
        responses = self.responses
        at = min(index, MOST_RESPONSES - 1)
        while len(responses) <= at:
            responses.append(ResponseStatistics())
        return responses[at]

    @property
    def answered(self) -> int:
        """Requests that were answered, by a cache or otherwise."""
        # A generator begins without a failure, and may then have one.
        items_failed = 0 if self.items is None else self.items.fail
        return self.success - items_failed + (self.hits if self.batched else 0)

    @property
    def infer_ns(self) -> int:
        """How long requests were computed, each in a batch for as long as the batch."""
        items_ns = 0 if self.items is None else self.items.busy_ns
        return self.busy_ns + items_ns - self.input_ns - self.output_ns - (0 if self.batched else self.hit_ns)

    def report(self) -> dict[str, Any]:
        """Return the counters as Triton names them, without name and version."""
        success, success_ns = self.answered, self.queue_ns + self.busy_ns + self.piece_ns
        fail, fail_ns = self.fail, self.fail_ns
        if self.items is not None:
            success_ns += self.items.busy_ns
            fail, fail_ns = fail + self.items.fail, fail_ns + self.items.fail_ns
        computed = success - self.hits
        if self.batched:
            success_ns += self.hit_ns
            rows, executions = self.rows, sum(batch.count for batch in self.batches.values())
            batches = [self.batches[size].report(size) for size in sorted(self.batches)]
        else:
            rows = executions = computed
            batches = [BatchStatistics(executions, self.infer_ns).report(1)] if executions else []
        return {
            "last_inference": _milliseconds(self.last_ns),
            "inference_count": rows,
            "execution_count": executions,
            "inference_stats": {
                "success": _duration(success, success_ns),
                "fail": _duration(fail, fail_ns),
                "queue": _duration(success, self.queue_ns),
                "compute_input": _duration(computed, self.input_ns),
                "compute_infer": _duration(computed, self.infer_ns),
                "compute_output": _duration(computed, self.output_ns),
                "cache_hit": _duration(self.hits, self.hit_ns),
                "cache_miss": _duration(self.misses, self.miss_ns),
            },
            "response_stats": {str(index): response.report() for index, response in enumerate(self.responses)},
            "batch_stats": batches,
            "memory_usage": [],
        }


class GraphStatistics:
    """Counters of a graph, and of its nodes.

    As for Triton's ensembles a graph's queue and compute times are the sums over its nodes; of
    a graph that batches whole requests they are the batcher's.

    Attributes:
        nodes: counters by node name, in the plan's order, a router before its branches.
        whole: counters of the batcher of whole requests; None without one.
        counts_rows: True when a request counts as its rows; else it counts as one.
        requests: what every request to the graph came to.
        measured: True when durations are counted by size, too.
    """

    __slots__ = ("_leaves", "_only", "counts_rows", "last_answer_ns", "measured", "nodes", "requests", "whole")

    def __init__(self, nodes: Mapping[str, NodeStatistics]) -> None:
        self.nodes = nodes
        self.whole: NodeStatistics | None = None
        self.counts_rows = False
        self.requests = NodeStatistics()
        self.last_answer_ns = 0
        self.measured = False
        routers = {name.rpartition(".")[0] for name in nodes}
        self._leaves = [node for name, node in nodes.items() if name not in routers]
        self._only = self._leaves[0] if len(nodes) == 1 else None

    def measure(self) -> None:
        """Count durations by size, too; before the graph is built."""
        self.measured = True
        for node in self.nodes.values():
            node.durations = NodeDurations()

    def of_whole_requests(self) -> NodeStatistics:
        """Return the counters of a batcher of whole requests."""
        self.whole = NodeStatistics()
        if self.measured:
            self.whole.durations = NodeDurations()
        return self.whole

    def succeeded(self, now: int, ns: int, inputs: Mapping[str, Array]) -> None:
        """Count a request that got its answer now, by `perf_counter_ns`, after `ns`."""
        requests = self.requests
        requests.success += 1
        self.last_answer_ns = ns
        requests.busy_ns += ns
        requests.last_ns = now
        if self.counts_rows:
            for array in inputs.values():
                requests.rows += array.shape[0]
                break
        else:
            requests.rows += 1

    def answer_failed(self) -> None:
        """Count the answer that was counted last as failed: it could not be sent. No await may lie between the two."""
        requests = self.requests
        requests.success -= 1
        requests.busy_ns -= self.last_answer_ns
        requests.failed(self.last_answer_ns, ErrorCode.INTERNAL.value)

    def report(self) -> dict[str, Any]:
        """Return the graph's counters as Triton names them, without name and version."""
        own = self.requests.report()
        inner = self.whole or self._only
        times = [self.whole] if self.whole is not None else self._leaves
        queued = [self.whole] if self.whole is not None else list(self.nodes.values())
        stats = own["inference_stats"]
        stats["queue"] = _duration(stats["queue"]["count"], sum(node.queue_ns for node in queued))
        stats["compute_input"] = _duration(stats["compute_input"]["count"], sum(node.input_ns for node in times))
        stats["compute_infer"] = _duration(stats["compute_infer"]["count"], sum(node.infer_ns for node in times))
        stats["compute_output"] = _duration(stats["compute_output"]["count"], sum(node.output_ns for node in times))
        own["inference_count"] = self.requests.rows
        own["batch_stats"] = []
        if inner is not None:
            executed = inner.report()
            own["execution_count"], own["batch_stats"] = executed["execution_count"], executed["batch_stats"]
        return own


class StreamProgress:
    """Counts one request to a decoupled graph, answer by answer, without the time that its reader takes.

    Args:
        statistics: the graph's.
    """

    __slots__ = ("_asked", "_done", "_index", "_ns", "_open", "_statistics")

    def __init__(self, statistics: GraphStatistics) -> None:
        self._statistics = statistics
        self._asked = perf_counter_ns()
        self._ns = 0
        self._index = 0
        self._done = self._open = False

    def answered(self) -> None:
        """Note that the next answer is made."""
        self._statistics.requests.response(self._index).answered(self._spent())
        self._open = True

    def asked(self) -> None:
        """Note that the reader took it and waits for the next."""
        self._asked = perf_counter_ns()
        self._index += 1
        self._open = False

    def ended(self, inputs: Mapping[str, Array]) -> None:
        """Note that there are no more: the request is answered."""
        self._statistics.requests.response(self._index).ended(self._spent())
        self._statistics.succeeded(perf_counter_ns(), self._ns, inputs)
        self._done = True

    def leave(self) -> None:
        """Note that the request is over, and has failed unless it ended."""
        if self._done:
            return
        error = sys.exception()
        gone = isinstance(error, GeneratorExit | asyncio.CancelledError)
        if not self._open:
            response = self._statistics.requests.response(self._index)
            (response.cancelled if gone else response.failed)(self._spent())
        elif gone:
            self._statistics.requests.response(self._index + 1).cancelled(0)
        self._statistics.requests.failed(self._ns, code_of(error))

    def _spent(self) -> int:
        ns = perf_counter_ns() - self._asked
        self._ns += ns
        return ns


def code_of(error: BaseException | None, *, late: bool = False) -> str:
    """Return the code by which a failure is counted.

    Args:
        error: what a request failed with; None when its caller left.
        late: True when its deadline has passed: then that is why it was cancelled.
    """
    if isinstance(error, ServingGraphError):
        return str(error.code.value)
    if error is None or isinstance(error, asyncio.CancelledError | GeneratorExit):
        return str((ErrorCode.DEADLINE_EXCEEDED if late else ErrorCode.CANCELLED).value)
    return str(ErrorCode.INTERNAL.value)


def is_late(deadline: float | None, now: float) -> bool:
    """Tell whether who is cancelled now, on the clock of deadlines, is so because a deadline has passed."""
    return deadline is not None and now >= deadline - _EARLY_S


def _duration(count: int, ns: int) -> dict[str, int]:
    # Where all failed, what nodes had done for them before is nobody's time.
    return {"count": count, "ns": ns if count else 0}


def _milliseconds(moment_ns: int) -> int:
    """Return a moment of `perf_counter_ns` in milliseconds since 1970; 0 stays 0."""
    return (time_ns() - (perf_counter_ns() - moment_ns)) // 1_000_000 if moment_ns else 0
