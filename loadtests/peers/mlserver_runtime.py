"""The model as an MLServer runtime."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from session import open_session


class Onnx(MLModel):
    async def load(self) -> bool:
        self.onnx = open_session(self.name)
        self.input_name = self.onnx.get_inputs()[0].name
        self.output_names = [output.name for output in self.onnx.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        results = self.onnx.run(None, {self.input_name: NumpyCodec.decode_input(payload.inputs[0])})
        outputs = [NumpyCodec.encode_output(name, result) for name, result in zip(self.output_names, results, strict=True)]
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)
