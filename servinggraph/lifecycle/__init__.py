"""What is served, in which state, and how much of it at once; and the one way in which a request is answered.

`catalog` holds the graphs, `control` their routers, `admission` the slots, `inference` answers a decoded request, and
`shared_memory` has the regions of clients, `serving` is what every front end is given. Front ends own none of it.
"""

from servinggraph.lifecycle.admission import Admission
from servinggraph.lifecycle.catalog import Catalog, ServedGraph
from servinggraph.lifecycle.control import Control, RouterSeat
from servinggraph.lifecycle.inference import infer, stream
from servinggraph.lifecycle.serving import Serving
from servinggraph.lifecycle.shared_memory import SharedMemory

__all__ = ["Admission", "Catalog", "Control", "RouterSeat", "ServedGraph", "Serving", "SharedMemory", "infer", "stream"]
