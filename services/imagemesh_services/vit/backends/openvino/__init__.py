"""Image classifiers as graphs, run by OpenVINO."""

import sys

# OpenVINO reports each import of it over the network unless this package of its own is missing. Nothing that imagemesh
# runs may call out by itself.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

from imagemesh_services.vit.backends.openvino.backend import OpenVinoVit  # noqa: E402

__all__ = ["OpenVinoVit"]
