"""ControlNets run by ONNX Runtime."""

from imagemesh_services.controlnet.backends.torch.graphs import GraphControlNet
from imagemesh_services.graphs.onnx_engine import OnnxEngine


class OnnxControlNet(GraphControlNet):
    """See ``GraphControlNet``."""

    name, engine = "onnxruntime", OnnxEngine
