"""A model for Triton's Python backend: has a ControlNet's residuals ready and answers every request with them."""

import json

import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    """Triton's own interface."""

    def initialize(self, args):
        """The arrays that ``tests.bench.transport.residuals`` makes, by the outputs of the model's configuration."""
        numbers = np.random.default_rng(0)
        self._outputs = []
        for output in json.loads(args["model_config"])["output"]:
            shape = [int(size) for size in output["dims"]]
            self._outputs.append((output["name"], numbers.random(shape, np.float32).astype(np.float16)))

    def execute(self, requests):
        """Triton copies the arrays to where the client wants them."""
        return [triton.InferenceResponse([triton.Tensor(*output) for output in self._outputs]) for _ in requests]
