"""UNets run by ONNX Runtime."""

from imagemesh_services.diffusion.backends.torch.graphs import GraphDiffusion
from imagemesh_services.graphs.onnx_engine import OnnxEngine


class OnnxDiffusion(GraphDiffusion):
    """See ``GraphDiffusion``."""

    name, engine = "onnxruntime", OnnxEngine
