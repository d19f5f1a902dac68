"""The .proto files are Triton's contract, and the code that is checked in is made from them."""

import importlib.util
from pathlib import Path

import tritonclient.grpc.model_config_pb2
import tritonclient.grpc.service_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from servinggraph.protocols.protobuf.generated import grpc_service_pb2, model_config_pb2

ROOT = Path(__file__).parents[3]


def generator():
    spec = importlib.util.spec_from_file_location("proto_script", ROOT / "scripts" / "proto.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_code_is_fresh():
    script = generator()
    folder = script.FOLDER / "generated"

    for name, text in script.generate().items():
        assert text == (folder / name).read_text(), f"{name} is not what the .proto file says: run `make proto`"


def contract(module):
    """Return everything of a file that is seen on the wire or by a stub."""
    file = FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
    wire = {}

    def walk(message, path):
        oneofs = [oneof.name for oneof in message.oneof_decl]
        wire[path] = {
            field.name: (
                field.number,
                field.type,
                field.label,
                field.type_name,
                oneofs[field.oneof_index] if field.HasField("oneof_index") else "",
            )
            for field in message.field
        }
        for nested in message.nested_type:
            walk(nested, f"{path}.{nested.name}")
        for enum in message.enum_type:
            wire[f"{path}.{enum.name}"] = {value.name: value.number for value in enum.value}

    for message in file.message_type:
        walk(message, message.name)
    for enum in file.enum_type:
        wire[enum.name] = {value.name: value.number for value in enum.value}
    for service in file.service:
        for method in service.method:
            wire[f"{service.name}/{method.name}"] = (
                method.input_type,
                method.output_type,
                method.client_streaming,
                method.server_streaming,
            )
    return file.package, wire


def test_every_message_field_and_rpc_is_that_of_tritons_own_client():
    pairs = [
        (tritonclient.grpc.service_pb2, grpc_service_pb2),
        (tritonclient.grpc.model_config_pb2, model_config_pb2),
    ]
    for theirs, ours in pairs:
        expected, got = contract(theirs), contract(ours)
        assert expected[0] == got[0]
        assert expected[1] == got[1]
    assert 20 == sum("/" in name for name in contract(grpc_service_pb2)[1])


def test_tritons_own_messages_and_ours_live_in_one_process():
    theirs = tritonclient.grpc.service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"\0\1"])
    ours = grpc_service_pb2.ModelInferRequest.FromString(theirs.SerializeToString())

    assert ("m", [b"\0\1"]) == (ours.model_name, list(ours.raw_input_contents))
    assert type(theirs) is not type(ours)
