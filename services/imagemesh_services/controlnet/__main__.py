"""``python -m imagemesh_services.controlnet``: the service in a process of its own."""

from imagemesh_runtime.service import main
from imagemesh_services.controlnet.config import ControlNetConfig
from imagemesh_services.controlnet.service import create

if __name__ == "__main__":
    main(ControlNetConfig, create)
