"""Dynamic batching of any operation on rows. Knows no models, graphs or protocols.

`queue` decides which requests form the next batch (pure, no clock), `rows` joins and
splits tensors, `members` is who waits, `batcher` waits and runs.
"""

from servinggraph.batching.batcher import Batcher

__all__ = ["Batcher"]
