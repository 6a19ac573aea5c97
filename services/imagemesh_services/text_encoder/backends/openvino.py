"""Text encoders run by OpenVINO."""

from imagemesh_services.graphs.openvino_engine import OpenVinoEngine
from imagemesh_services.text_encoder.backends.torch.graphs import GraphTextEncoder


class OpenVinoTextEncoder(GraphTextEncoder):
    """See ``GraphTextEncoder``."""

    name, engine = "openvino", OpenVinoEngine
