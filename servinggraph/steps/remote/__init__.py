"""Steps that other servers run: `v2`, a model behind the V2 inference protocol, and `rest`, any HTTP service with JSON.

`endpoints` reads addresses, `balancing` decides between them, `fleet` calls them and looks after those that fail;
`v2_http` and `v2_grpc` are the two ways there, `http` the pool of connections. `templates` and `documents` make the
requests of `rest` and read its answers.
"""

from servinggraph.steps.remote.rest import Rest, RestOptions
from servinggraph.steps.remote.v2 import V2, V2Options

__all__ = ["V2", "Rest", "RestOptions", "V2Options"]
