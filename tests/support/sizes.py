"""The rule of the house: files of at most 400 lines, functions of at most 40. Exits 1 and names what is longer."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOTS = ("services", "gateway", "tests", "deploy")
MAX_FILE, MAX_FUNCTION = 400, 40


def too_long(path: Path) -> Iterator[str]:
    source = path.read_text()
    name = path.relative_to(ROOT)
    if (lines := source.count("\n")) > MAX_FILE:
        yield f"{name}: {lines} lines, at most {MAX_FILE}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION:
                yield f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION}"


def main() -> int:
    found = [line for root in ROOTS for path in sorted((ROOT / root).rglob("*.py")) for line in too_long(path)]
    print("\n".join(found) or "sizes: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
