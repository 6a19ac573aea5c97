"""``python -m imagemesh_gateway``: the gateway in a process of its own."""

import asyncio
import os

from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.service import create
from imagemesh_runtime.config import load
from imagemesh_runtime.service import serve, set_process_defaults

if __name__ == "__main__":
    set_process_defaults(os.environ.get("IMAGEMESH_LOG_LEVEL", "INFO"))
    asyncio.run(serve(lambda: create(load(GatewayConfig))))
