"""``python -m imagemesh_services.text_encoder``: the service in a process of its own."""

from imagemesh_runtime.service import main
from imagemesh_services.text_encoder.config import TextEncoderConfig
from imagemesh_services.text_encoder.service import create

if __name__ == "__main__":
    main(TextEncoderConfig, create)
