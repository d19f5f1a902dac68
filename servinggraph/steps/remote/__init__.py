"""Steps that other servers run: `v2`, a model behind the V2 inference protocol.

`endpoints` reads addresses, `balancing` decides between them, `fleet` calls them and looks after those that fail;
`http` and `grpc` are the two ways there.
"""

from servinggraph.steps.remote.v2 import V2, V2Options

__all__ = ["V2", "V2Options"]
