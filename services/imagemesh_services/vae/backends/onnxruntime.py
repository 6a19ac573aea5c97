"""VAEs run by ONNX Runtime."""

from imagemesh_services.graphs.onnx_engine import OnnxEngine
from imagemesh_services.vae.backends.torch.graphs import GraphVae


class OnnxVae(GraphVae):
    """See ``GraphVae``."""

    name, engine = "onnxruntime", OnnxEngine
