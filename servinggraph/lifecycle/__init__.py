"""What is served, in which state, and how much of it at once; and the one way in which a request is answered.

`catalog` holds the graphs, `control` their routers, `admission` the slots, `inference` answers a
decoded request, `shared_memory` has the regions of clients, `serving` is what every front end is
given. Front ends own none of it. `repository` loads and unloads: `layout` looks at its folder,
`reading` compiles, `overrides` understands load requests, `residence` brings versions into memory
and out of it within a `budget`.
"""

from servinggraph.lifecycle.admission import Admission
from servinggraph.lifecycle.catalog import Catalog, ServedGraph
from servinggraph.lifecycle.control import Control, RouterSeat
from servinggraph.lifecycle.inference import infer, stream
from servinggraph.lifecycle.reading import read_graphs
from servinggraph.lifecycle.repository import Repository, RepositorySettings
from servinggraph.lifecycle.serving import Serving
from servinggraph.lifecycle.shared_memory import SharedMemory

__all__ = [
    "Admission", "Catalog", "Control", "Repository", "RepositorySettings", "RouterSeat", "ServedGraph", "Serving",
    "SharedMemory", "infer", "read_graphs", "stream",
]  # fmt: skip
