"""``python -m imagemesh_services.diffusion``: the service in a process of its own."""

from imagemesh_runtime.service import main
from imagemesh_services.diffusion.config import DiffusionConfig
from imagemesh_services.diffusion.service import create

if __name__ == "__main__":
    main(DiffusionConfig, create)
