"""The commands for preprocessors."""

from argparse import Namespace
from dataclasses import asdict

from imagemesh_cli.console import connected, print_json, print_table
from imagemesh_client import Preprocessor


def preprocess(args: Namespace) -> int:
    """Make of a picture what a ControlNet is to follow, and write it to a file."""
    with connected(args) as client:
        made = client.preprocess(
            args.file, args.name, parameters=dict(args.parameter), resolution=args.resolution, model=args.model
        )
    path = made.save(args.output)
    height, width = made.pixels.shape[:2]
    if args.json:
        told = {"preprocessor": made.preprocessor, "model": made.model, "backend": made.backend}
        print_json({"file": str(path), "width": width, "height": height, **told})
    else:
        print(f"{path}: {made.preprocessor}, {width}x{height}, {made.model or made.backend}")
    return 0


def preprocessors(args: Namespace) -> int:
    """List the preprocessors that there are."""
    with connected(args) as client:
        found = client.preprocessors()
    if args.json:
        print_json([{**asdict(one), "available": one.available} for one in found])
        return 0
    print_table(("NAME", "PARAMETERS", "NEEDS", "WHAT IT MAKES"), [_row(one) for one in found])
    return 0


def _row(one: Preprocessor) -> tuple[str, ...]:
    parameters = ", ".join(f"{parameter.name}={parameter.default}" for parameter in one.parameters)
    needs = "" if not one.needs_model else one.models[0] if one.models else "a model, none here"
    return one.name, parameters, needs, one.about
