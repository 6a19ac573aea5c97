"""Image classifiers as ONNX graphs, run by ONNX Runtime."""

from imagemesh_services.vit.backends.onnxruntime.backend import OnnxVit

__all__ = ["OnnxVit"]
