"""Request parameters that the protocol itself gives a meaning to.

Source: Triton, extension_schedule_policy.
"""

from __future__ import annotations

from collections.abc import Mapping

from servinggraph.context import ParameterValue
from servinggraph.errors import InvalidRequest
from servinggraph.protocols.v2.json_data import shown

__all__ = ["priority_of", "timeout_of"]


def timeout_of(parameters: Mapping[str, ParameterValue]) -> float | None:
    """Return the V2 parameter `timeout` in seconds (on the wire microseconds); None without one, or for 0, as in Triton.

    Raises:
        InvalidRequest: not a whole number from 0 on.
    """
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or timeout < 0:
        raise InvalidRequest(f"parameter 'timeout' is a whole number of microseconds, got {shown(timeout)}")
    return timeout / 1e6 if timeout else None


def priority_of(parameters: Mapping[str, ParameterValue]) -> int:
    """Return the V2 parameter `priority`; 0 stands for the default level.

    Raises:
        InvalidRequest: not a whole number from 0 on.
    """
    priority = parameters.get("priority", 0)
    if type(priority) is not int or priority < 0:
        raise InvalidRequest(f"parameter 'priority' is a whole number from 0 on, got {shown(priority)}")
    return priority
