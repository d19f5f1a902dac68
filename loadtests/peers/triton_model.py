"""The model in Triton's Python backend; Triton's own batcher says which requests run together."""

import numpy as np
import triton_python_backend_utils as triton
from session import open_session


class TritonPythonModel:
    def initialize(self, args):
        self.session = open_session(args["model_name"])
        self.input = self.session.get_inputs()[0].name
        self.outputs = [output.name for output in self.session.get_outputs()]

    def execute(self, requests):
        batch = [triton.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        results = self.session.run(None, {self.input: np.concatenate(batch) if len(batch) > 1 else batch[0]})
        # Triton knows no batched output of one axis: labels go out as [rows, 1].
        results = [result if result.ndim > 1 else result[:, None] for result in results]
        answers, start = [], 0
        for rows in batch:
            end = start + len(rows)
            tensors = [triton.Tensor(name, result[start:end]) for name, result in zip(self.outputs, results, strict=True)]
            answers.append(triton.InferenceResponse(tensors))
            start = end
        return answers
