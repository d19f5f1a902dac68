"""Steps that write to Kafka topics: `publish`, a copy beside the answer; `queue`, work for a later stage."""

from servinggraph.steps.topics.publish import Publish, PublishOptions
from servinggraph.steps.topics.queue import Queue, QueueOptions

__all__ = ["Publish", "PublishOptions", "Queue", "QueueOptions"]
