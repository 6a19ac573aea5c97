"""``python -m imagemesh_services.vae``: the service in a process of its own."""

from imagemesh_runtime.service import main
from imagemesh_services.vae.config import VaeConfig
from imagemesh_services.vae.service import create

if __name__ == "__main__":
    main(VaeConfig, create)
