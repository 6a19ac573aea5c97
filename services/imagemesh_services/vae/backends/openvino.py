"""VAEs run by OpenVINO."""

from imagemesh_services.graphs.openvino_engine import OpenVinoEngine
from imagemesh_services.vae.backends.torch.graphs import GraphVae


class OpenVinoVae(GraphVae):
    """See ``GraphVae``."""

    name, engine = "openvino", OpenVinoEngine
