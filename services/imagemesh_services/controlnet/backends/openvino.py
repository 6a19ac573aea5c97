"""ControlNets run by OpenVINO."""

from imagemesh_services.controlnet.backends.torch.graphs import GraphControlNet
from imagemesh_services.graphs.openvino_engine import OpenVinoEngine


class OpenVinoControlNet(GraphControlNet):
    """See ``GraphControlNet``."""

    name, engine = "openvino", OpenVinoEngine
