"""gRPC's floor in Python: a grpc.aio servicer with ONNX Runtime and the small batcher of floor.py, and no checks at all.

What gRPC and the model cost; a server's own cost is its distance from here. Metadata and configuration
are there because the load generator asks for them.
"""

import os

os.environ["MODE"] = "batch"

import floor
import grpc
import numpy as np
import uvloop
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

TYPES = {"FP32": model_config_pb2.TYPE_FP32, "INT64": model_config_pb2.TYPE_INT64}
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def dims(tensor):
    return [size if isinstance(size, int) else -1 for size in tensor.shape]


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    async def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request, context):
        return service_pb2.ServerMetadataResponse(name="bare", version="1")

    async def ModelMetadata(self, request, context):
        metadata = service_pb2.ModelMetadataResponse(name=floor.NAME, versions=["1"], platform="bare")
        (given,) = floor.session.get_inputs()
        metadata.inputs.add(name=given.name, datatype=floor.DATATYPES[given.type], shape=dims(given))
        for output in floor.session.get_outputs():
            metadata.outputs.add(name=output.name, datatype=floor.DATATYPES[output.type], shape=dims(output))
        return metadata

    async def ModelConfig(self, request, context):
        config = model_config_pb2.ModelConfig(name=floor.NAME, platform="bare")
        (given,) = floor.session.get_inputs()
        config.input.add(name=given.name, data_type=TYPES[floor.DATATYPES[given.type]], dims=dims(given))
        for output in floor.session.get_outputs():
            config.output.add(name=output.name, data_type=TYPES[floor.DATATYPES[output.type]], dims=dims(output))
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelInfer(self, request, context):
        rows = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tuple(request.inputs[0].shape))
        results = await floor.infer(rows)
        answer = service_pb2.ModelInferResponse(model_name=floor.NAME, model_version="1", id=request.id)
        for (name, datatype), result in zip(floor.outputs, results, strict=True):
            answer.outputs.add(name=name, datatype=datatype, shape=result.shape)
            answer.raw_output_contents.append(result.tobytes())
        return answer


async def main():
    server = grpc.aio.server(options=OPTIONS)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"127.0.0.1:{os.environ['PORT']}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main())
