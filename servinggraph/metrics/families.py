"""Every metric that a server may show: name, kind, unit, labels and what it says. docs/metrics.md is held against this.

Names follow Prometheus' rules: base units, `_total` for counters. No label's values come from a
caller: graphs, nodes and branches are named by who serves, and the rest are closed sets.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

__all__ = ["ALL", "Family"]


class Family(NamedTuple):
    """One metric."""

    name: str
    """As it is scraped; of a histogram without `_bucket`, `_sum` and `_count`."""
    kind: Literal["counter", "gauge", "histogram"]
    """What it is to Prometheus."""
    unit: str
    """What a value counts."""
    labels: tuple[str, ...]
    """Names of its labels."""
    help: str
    """What it says, in a sentence."""


_GRAPH: Final = ("graph", "version")
_NODE: Final = (*_GRAPH, "node")
_DOOR: Final = (*_GRAPH, "protocol")
_ROUTER: Final = (*_GRAPH, "router")

REQUESTS: Final = Family(
    "servinggraph_requests_total", "counter", "requests", (*_DOOR, "code"),
    "Requests by what became of them: ok, cancelled (the caller left), or the code of the error; graph is empty for "
    "requests that were refused before their graph was known.",
)  # fmt: skip
REQUEST_SECONDS: Final = Family(
    "servinggraph_request_seconds", "histogram", "seconds", _DOOR,
    "Answered requests: from when the request was there to when its answer could be sent; of a stream, to its end.",
)  # fmt: skip
REQUEST_STAGE_SECONDS: Final = Family(
    "servinggraph_request_stage_seconds", "histogram", "seconds", (*_DOOR, "stage"),
    "Of that, for decode (bytes to tensors) and encode (tensors to bytes); what is left was spent in the nodes.",
)  # fmt: skip
GRAPH_IN_FLIGHT: Final = Family(
    "servinggraph_graph_in_flight_requests", "gauge", "requests", _GRAPH, "Requests that the graph answers now."
)
NODE_REQUESTS: Final = Family(
    "servinggraph_node_requests_total", "counter", "requests", (*_NODE, "code"),
    "Requests to a node or a router's branch, by what became of them, as above.",
)  # fmt: skip
NODE_STAGE_SECONDS: Final = Family(
    "servinggraph_node_stage_seconds", "histogram", "seconds", (*_NODE, "stage"),
    "Answered requests to a node: compute, and for batched ones queue (until the node had room) and batch_wait (with room, "
    "until the batch was full enough to begin); a request in a batch has the batch's compute time.",
)  # fmt: skip
CACHE_LOOKUPS: Final = Family(
    "servinggraph_cache_lookups_total", "counter", "requests", (*_NODE, "result"),
    "Requests to what has a cache, by result: hit or miss; node is empty for the cache of the whole graph.",
)  # fmt: skip
BATCH_ROWS: Final = Family(
    "servinggraph_batch_rows", "histogram", "rows", _NODE,
    "Batches that ran, by rows, padding included; node is empty for batches of whole requests.",
)  # fmt: skip
BATCH_FILL: Final = Family(
    "servinggraph_batch_fill_ratio", "histogram", "ratio", _NODE, "Batches that ran, by rows over the most that one may have."
)
BATCH_MAX_ROWS: Final = Family(
    "servinggraph_batch_max_rows", "gauge", "rows", _NODE, "Most rows that a batch may have (batch.max_rows)."
)
QUEUE_DEPTH: Final = Family("servinggraph_queue_depth", "gauge", "requests", _NODE, "Requests that wait for a batch now.")
QUEUE_LIMIT: Final = Family(
    "servinggraph_queue_limit", "gauge", "requests", _NODE, "Most requests that may wait (batch.max_queue)."
)
BATCHES_RUNNING: Final = Family("servinggraph_batches_running", "gauge", "batches", _NODE, "Batches that run now.")
GRAPH_READY: Final = Family("servinggraph_graph_ready", "gauge", "boolean", _GRAPH, "1 while the graph takes requests.")
GRAPH_LOAD_SECONDS: Final = Family(
    "servinggraph_graph_load_seconds", "gauge", "seconds", _GRAPH, "How long the last load of the graph took."
)
GRAPH_MEMORY: Final = Family(
    "servinggraph_graph_memory_bytes", "gauge", "bytes", _GRAPH,
    "Growth of the process while the graph was loaded, or the size of its files if that is more: an estimate. Not there for "
    "graphs that were loaded side by side.",
)  # fmt: skip
NODE_LOAD_SECONDS: Final = Family(
    "servinggraph_node_load_seconds", "gauge", "seconds", _NODE, "How long the node took of that."
)
ROUTER_DECISIONS: Final = Family(
    "servinggraph_router_decisions_total", "counter", "requests", (*_ROUTER, "branch"),
    "Requests that a router sent to a branch, of routers that choose.",
)  # fmt: skip
ROUTER_WEIGHT: Final = Family(
    "servinggraph_router_weight", "gauge", "weight", (*_ROUTER, "branch"), "Weight of a branch, as it is set."
)
ROUTER_SHARE: Final = Family(
    "servinggraph_router_share", "gauge", "ratio", (*_ROUTER, "branch"), "Share of the requests that a branch is to get."
)
ROUTER_STAGE: Final = Family(
    "servinggraph_router_stage", "gauge", "boolean", (*_ROUTER, "stage"), "1 for the stage that a router is in."
)
ROUTER_REVISION: Final = Family(
    "servinggraph_router_revision", "gauge", "changes", _ROUTER, "How often the router's settings were changed."
)
SHADOW_COPIES: Final = Family(
    "servinggraph_shadow_copies", "gauge", "requests", (*_ROUTER, "challenger", "outcome"),
    "Copies of requests that a challenger got beside the present champion, by what became of them: answered, failed or "
    "dropped; of all workers together where they share a state.",
)  # fmt: skip
SHADOW_AGREEMENT: Final = Family(
    "servinggraph_shadow_agreement_ratio", "gauge", "ratio", (*_ROUTER, "challenger"),
    "Share of a challenger's compared answers that agree with the champion's; not there before the first one.",
)  # fmt: skip


def _kafka(name: str, unit: str, text: str, kind: Literal["counter", "gauge"] = "counter") -> Family:
    return Family(f"servinggraph_kafka_{name}", kind, unit, ("graph",), text)


KAFKA: Final = {
    "lag": _kafka("lag_records", "records", "Records in the broker behind the last one that was read.", "gauge"),
    "ready": _kafka("ready", "boolean", "1 while the graph's topics are read, within max_lag where that is set.", "gauge"),
    "in_flight": _kafka("in_flight_records", "records", "Records that run now.", "gauge"),
    "waiting": _kafka("waiting_records", "records", "Records in memory, those that run included.", "gauge"),
    "waiting_bytes": _kafka("waiting_bytes", "bytes", "Size of the records in memory.", "gauge"),
    "unwritten": _kafka("unwritten_records", "records", "Answers that the broker does not have yet.", "gauge"),
    "paused": _kafka("paused", "boolean", "1 while reading pauses because too much is in memory.", "gauge"),
    "commit_age_s": _kafka("commit_age_seconds", "seconds", "Time since the last commit.", "gauge"),
    "consumed": _kafka("consumed_records_total", "records", "Records that were read."),
    "produced": _kafka("produced_records_total", "records", "Answers that the broker has."),
    "dead_letters": _kafka("dead_letters_total", "records", "Records that were given up, and are in the dead letters."),
    "duplicates": _kafka("duplicate_records_total", "records", "Records that were there before, by their request ids."),
    "retries": _kafka("retries_total", "attempts", "Further attempts at a record."),
    "abandoned": _kafka("abandoned_records_total", "records", "Records whose partition went to another member meanwhile."),
    "commits": _kafka("commits_total", "commits", "Commits; with exactly_once transactions."),
    "rebalances": _kafka("rebalances_total", "rebalances", "How often partitions were given out anew."),
    "reconnects": _kafka("reconnects_total", "connections", "Connections made anew after a failure."),
    "pauses": _kafka("pauses_total", "pauses", "How often reading paused."),
    "paused_s": _kafka("paused_seconds_total", "seconds", "For how long."),
    "seconds": _kafka(
        "end_to_end_seconds_total", "seconds", "From a record's timestamp to its answer in the broker, over all answers."
    ),
}
"""By the key under which the front end reports it."""
KAFKA_ERRORS: Final = Family(
    "servinggraph_kafka_errors_total", "counter", "records", ("graph", "code"), "Records given up, by code of the error."
)
READY: Final = Family("servinggraph_ready", "gauge", "boolean", (), "1 while the server is ready, as /v2/health/ready says.")
IN_FLIGHT: Final = Family(
    "servinggraph_in_flight_requests", "gauge", "requests", (), "Requests in flight, over all graphs and protocols."
)
IN_FLIGHT_LIMIT: Final = Family(
    "servinggraph_in_flight_limit", "gauge", "requests", (), "Most requests in flight (--max-in-flight)."
)
BUILD_INFO: Final = Family("servinggraph_build_info", "gauge", "constant", ("release",), "1, with the release as a label.")

DEVICE_MEMORY: Final = Family(
    "servinggraph_device_memory_bytes", "gauge", "bytes", ("device", "state"),
    "Memory of a GPU that this process may use, by state: used (by anybody) or total.",
)  # fmt: skip
DEVICE_BUSY: Final = Family(
    "servinggraph_device_utilization_ratio", "gauge", "ratio", ("device",), "Share of time in which a GPU ran anything."
)

ALL: Final = (
    REQUESTS, REQUEST_SECONDS, REQUEST_STAGE_SECONDS, GRAPH_IN_FLIGHT,
    NODE_REQUESTS, NODE_STAGE_SECONDS, CACHE_LOOKUPS,
    BATCH_ROWS, BATCH_FILL, BATCH_MAX_ROWS, QUEUE_DEPTH, QUEUE_LIMIT, BATCHES_RUNNING,
    GRAPH_READY, GRAPH_LOAD_SECONDS, GRAPH_MEMORY, NODE_LOAD_SECONDS,
    ROUTER_DECISIONS, ROUTER_WEIGHT, ROUTER_SHARE, ROUTER_STAGE, ROUTER_REVISION,
    SHADOW_COPIES, SHADOW_AGREEMENT,
    *KAFKA.values(), KAFKA_ERRORS,
    DEVICE_MEMORY, DEVICE_BUSY,
    READY, IN_FLIGHT, IN_FLIGHT_LIMIT, BUILD_INFO,
)  # fmt: skip
"""In the order in which they are shown."""
