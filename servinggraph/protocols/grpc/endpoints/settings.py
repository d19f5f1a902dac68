"""Trace and log settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.routing import Method
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb

__all__ = ["methods"]


def methods(serving: Serving) -> Mapping[str, Method]:
    """Return the RPCs by name."""

    def trace(request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
        # A setting without values is one that is to be cleared.
        changes: dict[str, Any] = {key: list(setting.value) or None for key, setting in request.settings.items()}
        response = pb.TraceSettingResponse()
        for key, value in serving.tracing.update(changes, request.model_name).items():
            response.settings[key].value.extend(value if isinstance(value, list) else [value])
        return response

    def logs(request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
        changes: dict[str, Any] = {}
        for key, setting in request.settings.items():
            choice = setting.WhichOneof("parameter_choice")
            changes[key] = None if choice is None else getattr(setting, choice)
        response = pb.LogSettingsResponse()
        for key, value in serving.logs.update(changes).items():
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(response.settings[key], kind, value)
        return response

    return {"TraceSetting": trace, "LogSettings": logs}
