"""UNets run by OpenVINO."""

from imagemesh_services.diffusion.backends.torch.graphs import GraphDiffusion
from imagemesh_services.graphs.openvino_engine import OpenVinoEngine


class OpenVinoDiffusion(GraphDiffusion):
    """See ``GraphDiffusion``."""

    name, engine = "openvino", OpenVinoEngine
