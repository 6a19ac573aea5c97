"""``imagemesh demo``: a mesh for the time of one picture."""

import asyncio
import os
from argparse import Namespace
from pathlib import Path

from imagemesh_cli.console import counted, print_timings, progress_bar
from imagemesh_cli.host import MeshHost
from imagemesh_client import AsyncClient, GeneratedImage
from imagemesh_runtime.service import set_process_defaults


def demo(args: Namespace) -> int:
    """Start a mesh on free ports, make a picture, classify it, tell what each hop cost, stop."""
    set_process_defaults(os.environ.get("IMAGEMESH_LOG_LEVEL", "WARNING"))
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name in ("models", "backend") if (value := getattr(args, name)) is not None}
    free = {"listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0", "keys_file": ""}
    asyncio.run(_demo(MeshHost.configured(settings, free, args.config), args.prompt, args.seed, args.out))
    return 0


async def _demo(host: MeshHost, prompt: str, seed: int, folder: Path) -> None:
    async with host, AsyncClient(host.grpc_address) as client:
        print(f"The mesh is up: {len(host.services)} services behind a gateway at {host.grpc_address}")
        with progress_bar("generating") as show:
            generation = await client.generate(prompt, seed=seed, on_progress=show)
        picture = generation.images[0]
        path = picture.save(folder / "demo.png")
        made = generation.parameters
        steps = counted(made.steps, "step")
        print(f'"{prompt}" by {made.model}, {steps} of {made.scheduler}, seed {picture.seed}: {path}')
        await _classify(client, picture)
        print_timings(generation.timings)


async def _classify(client: AsyncClient, picture: GeneratedImage) -> None:
    (answer,) = await client.classify(picture.png, top_k=3)
    seen = ", ".join(f"{prediction.label} {prediction.probability:.0%}" for prediction in answer.predictions)
    print(f"{answer.model} sees: {seen}")
