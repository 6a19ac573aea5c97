"""Generate protos/gen from protos/imagemesh: messages, gRPC stubs and their types."""

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=GEN, help="folder to write instead; what is in there goes")
    out = parser.parse_args().out
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "imagemesh").rglob("*.proto"))
    # protoc looks for its plugins in PATH; they lie beside the interpreter.
    env = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    with tempfile.TemporaryDirectory() as made:
        outputs = [f"--{kind}_out={made}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *sources], cwd=PROTOS, env=env, check=True
        )
        for package in ("imagemesh", "imagemesh/v1"):
            Path(made, package, "__init__.py").touch()
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)


if __name__ == "__main__":
    main()
