"""Generate protos/gen from protos/imagemesh: messages, gRPC stubs and their types."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).parent
GEN = PROTOS / "gen"


def main() -> None:
    """Write everything anew, so that nothing stale stays; what is there is replaced only once all went well."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "imagemesh").rglob("*.proto"))
    # protoc looks for its plugins in PATH; they lie beside the interpreter.
    env = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    with tempfile.TemporaryDirectory(dir=PROTOS) as made:
        outputs = [f"--{kind}_out={made}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *sources], cwd=PROTOS, env=env, check=True
        )
        for package in ("imagemesh", "imagemesh/v1"):
            Path(made, package, "__init__.py").touch()
        shutil.rmtree(GEN, ignore_errors=True)
        shutil.copytree(made, GEN)


if __name__ == "__main__":
    main()
