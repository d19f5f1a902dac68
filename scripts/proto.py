"""Turns the .proto files of the gRPC front end into Python: `make proto`.

protoc's own Python modules register their messages in protobuf's common pool, where those of
tritonclient and other Triton stubs already are when a process uses both, and the second one to
come is refused. So the modules written here hold protoc's descriptors in a pool of their own,
and work with every version of protobuf that the extra `grpc` allows.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

FOLDER = Path(__file__).parents[1] / "servinggraph" / "protocols" / "protobuf"
NAMES = ("model_config", "grpc_service")  # a file comes after those that it imports

MODULE = '''"""Made from proto/{name}.proto by `make proto`: do not edit."""

from google.protobuf.internal import builder as _builder

from servinggraph.protocols.protobuf.generated._pool import POOL
{imports}
DESCRIPTOR = POOL.AddSerializedFile(
{data}
)
_builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
_builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, __name__, globals())
'''


def generate() -> dict[str, str]:
    """Return file name to text of everything that belongs into `generated/`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        arguments = ["protoc", f"-I{FOLDER / 'proto'}", f"--pyi_out={out}", f"--descriptor_set_out={out / 'set'}"]
        if protoc.main(arguments + [f"{name}.proto" for name in NAMES]):
            raise SystemExit("protoc failed")
        files = FileDescriptorSet.FromString((out / "set").read_bytes()).file
        texts = {f"{name}_pb2.pyi": _stub((out / f"{name}_pb2.pyi").read_text()) for name in NAMES}
    for file in files:
        name = file.name.removesuffix(".proto")
        texts[f"{name}_pb2.py"] = _module(name, file)
    return texts


def _stub(text: str) -> str:
    return text.replace(
        "import model_config_pb2 as", "from servinggraph.protocols.protobuf.generated import model_config_pb2 as"
    )


def _module(name: str, file: FileDescriptorProto) -> str:
    # A path of our own, so that two files of one name never meet.
    prefix = "servinggraph/"
    imports = "".join(
        f"import servinggraph.protocols.protobuf.generated.{path[:-6]}_pb2  # noqa: F401\n" for path in file.dependency
    )
    file.name = prefix + file.name
    file.dependency[:] = [prefix + path for path in file.dependency]
    data = file.SerializeToString(deterministic=True)
    lines = "\n".join(f"    {data[at : at + 40]!r}" for at in range(0, len(data), 40))
    return MODULE.format(name=name, imports=imports, data=lines)


def main() -> None:
    """Write the files."""
    for name, text in generate().items():
        (FOLDER / "generated" / name).write_text(text)


if __name__ == "__main__":
    main()
