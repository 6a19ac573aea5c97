"""Services of one process take turns on the cores: one lane computes for all of them."""

import os
import threading
from pathlib import Path

import torch
from PIL import Image

from imagemesh_cli.host import MeshHost
from imagemesh_client import Client, Control
from tests.support.mesh import running_mesh


def test_all_services_of_a_process_compute_on_one_thread(models: Path, control_image: Image.Image) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    with running_mesh(backend="torch", models=str(models)) as mesh, Client(mesh.grpc_address) as client:
        client.generate("a cat", steps=2, controls=[Control(control_image)])
        client.classify(control_image)
        lanes = [thread for thread in threading.enumerate() if thread.name.startswith("lane-")]
        assert len([thread for thread in lanes if thread.ident not in before]) == 1
        assert threads_of_a_computation(mesh) == len(os.sched_getaffinity(0))


def threads_of_a_computation(mesh: MeshHost) -> int:
    """What torch uses on the lane; each thread of a process has its own count."""
    return mesh.services["vae"]._models.lane._pool.submit(torch.get_num_threads).result()  # type: ignore[attr-defined]


def test_the_threads_of_a_computation_can_be_bounded(models: Path) -> None:
    with running_mesh(backend="torch", models=str(models), threads="1") as mesh:
        assert threads_of_a_computation(mesh) == 1
    with running_mesh(backend="torch", models=str(models)) as mesh:
        assert threads_of_a_computation(mesh) == len(os.sched_getaffinity(0))
