"""The commands that have classifiers loaded and unloaded while the mesh runs."""

from argparse import Namespace
from dataclasses import asdict

from imagemesh_cli.console import connected, print_json


def load(args: Namespace) -> int:
    """Have a classifier in memory."""
    with connected(args) as client:
        model = client.load_model(args.model)
    if args.json:
        print_json(asdict(model))
        return 0
    labels = model.properties.get("labels", "?")
    print(f"{model.name}: loaded by {model.backend} in {model.dtype} on {model.device}, {labels} labels")
    return 0


def unload(args: Namespace) -> int:
    """Drop one from memory."""
    with connected(args) as client:
        was_loaded = client.unload_model(args.model)
    if args.json:
        print_json({"name": args.model, "was_loaded": was_loaded})
        return 0
    print(f"{args.model}: {'unloaded' if was_loaded else 'was not loaded'}")
    return 0
