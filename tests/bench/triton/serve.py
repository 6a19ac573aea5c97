"""A Triton server for the models of a folder: ``serve.py FOLDER GRPC_PORT HTTP_PORT``; it runs until its input ends.

It prints the gRPC address when it is ready; what the server itself says goes to standard error.
"""

import os
import sys

from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig


def main() -> None:
    """Serve."""
    folder, grpc_port, http_port = sys.argv[1:]
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = TritonConfig(
        model_repository=folder, allow_metrics=False, exit_timeout_secs=5,
        grpc_address="127.0.0.1", grpc_port=int(grpc_port), http_address="127.0.0.1", http_port=int(http_port),
    )  # fmt: skip
    server = Triton(config=config, security_config=TritonSecurityConfig(restricted_endpoints=[]))
    server.run()
    print(f"127.0.0.1:{grpc_port}", file=said, flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
