"""How many random graphs: few in the normal run, many with SERVINGGRAPH_PROPERTIES=deep."""

from __future__ import annotations

import os

# At once: pytest parses it, and CPython 3.11 may not when a collection comes in between, deep in a test's stack.
import hypothesis.internal.conjecture.optimiser  # noqa: F401
from hypothesis import HealthCheck, settings

_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

settings.register_profile(
    "ci", max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=_CHECKS, print_blob=True
)
settings.register_profile(
    "deep",
    max_examples=int(os.environ.get("SERVINGGRAPH_EXAMPLES", "20000")),
    deadline=None,
    database=None,
    suppress_health_check=_CHECKS,
    print_blob=True,
)
settings.load_profile(os.environ.get("SERVINGGRAPH_PROPERTIES", "ci"))
