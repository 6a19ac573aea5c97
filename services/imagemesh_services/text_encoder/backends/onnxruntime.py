"""Text encoders run by ONNX Runtime."""

from imagemesh_services.graphs.onnx_engine import OnnxEngine
from imagemesh_services.text_encoder.backends.torch.graphs import GraphTextEncoder


class OnnxTextEncoder(GraphTextEncoder):
    """See ``GraphTextEncoder``."""

    name, engine = "onnxruntime", OnnxEngine
