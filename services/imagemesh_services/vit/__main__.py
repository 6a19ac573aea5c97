"""``python -m imagemesh_services.vit``: the service in a process of its own."""

from imagemesh_runtime.service import main
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.service import create

if __name__ == "__main__":
    main(VitConfig, create)
