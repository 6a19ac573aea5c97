"""Image classifiers as graphs, run by OpenVINO."""

from imagemesh_services.vit.backends.openvino.backend import OpenVinoVit

__all__ = ["OpenVinoVit"]
