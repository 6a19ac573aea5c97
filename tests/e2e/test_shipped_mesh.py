"""The mesh draws with the shipped folders what diffusers draws with them, and that is what the prompt asked for."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

import imagemesh_models
from imagemesh_cli.parser import build_parser
from imagemesh_client import Client, Control
from imagemesh_training import data, edges, poses
from imagemesh_training.captions import plain_caption
from imagemesh_training.measures import colour_of, psnr_of
from tests.support.mesh import running_mesh
from tests.support.reference import draw, worst

ROOT = imagemesh_models.root()
PROMPT = "a red apple on a blue background"
APPLE, FOX = (data.Scene([thing.name for thing in data.things()].index(name), "blue") for name in ("apple", "fox"))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running_mesh(models=str(ROOT), backend="torch") as mesh, Client(mesh.grpc_address) as client:
        yield client


def named(client: Client, picture: Image.Image) -> str:
    """What the classifier says it shows."""
    return client.classify(picture)[0].predictions[0].label


@pytest.mark.parametrize("scheduler", ["", "DDIM", "Euler a"])
def test_the_picture_equals_the_pipeline_s(client: Client, scheduler: str) -> None:
    generation = client.generate(PROMPT, negative_prompt="a fox", scheduler=scheduler, steps=8, guidance=3, seed=7)
    theirs = draw(
        ROOT / "emoji-sd", PROMPT, negative_prompt="a fox", scheduler_name=scheduler, seeds=[7], num_inference_steps=8,
        guidance_scale=3,
    )  # fmt: skip
    assert worst([np.asarray(image.to_pil()) for image in generation.images], theirs) <= 1


def test_the_demo_s_picture_is_of_what_its_prompt_asks(client: Client) -> None:
    demo = build_parser().parse_args(["demo"])
    picture = client.generate(demo.prompt, seed=demo.seed).images[0].to_pil()
    assert named(client, picture) in demo.prompt


def test_every_colour_of_a_fox_that_is_asked_for_is_drawn(client: Client) -> None:
    for colour in data.COLOURS:
        picture = client.generate(f"a fox on a {colour} background", seed=1).images[0].to_pil()
        assert colour_of(np.asarray(picture)) == colour


def test_a_low_strength_keeps_the_picture_and_a_high_one_follows_the_prompt(client: Client) -> None:
    before = Image.fromarray(data.draw(APPLE, data.load_sprites()))
    kept, followed = (
        client.generate("a ghost on a blue background", image=before, strength=strength, seed=2).images[0].to_pil()
        for strength in (0.1, 1.0)
    )
    assert (named(client, before), named(client, followed)) == ("apple", "ghost")
    assert psnr_of(np.asarray(kept), np.asarray(before)) > psnr_of(np.asarray(followed), np.asarray(before)) + 5


@pytest.mark.parametrize("thing", ["apple", "fox", "moon"])
def test_a_low_strength_leaves_a_thing_where_the_prompt_alone_would_not_draw_it(client: Client, thing: str) -> None:
    index = [one.name for one in data.things()].index(thing)
    before = data.draw(data.Scene(index, "blue", place="left"), data.load_sprites())
    prompt = f"a {thing} on a blue background"
    kept = client.generate(prompt, image=Image.fromarray(before), strength=0.1, guidance=1, seed=2).images[0].to_pil()
    anew = client.generate(prompt, guidance=1, seed=2).images[0].to_pil()
    assert named(client, kept) == thing
    assert psnr_of(np.asarray(kept), before) > 20 > 15 > psnr_of(np.asarray(anew), before)


def test_a_control_puts_things_where_its_edges_are(client: Client) -> None:
    """Edges of small things in poses that their prompts don't tell: met at least twice as well as without them."""
    rng, sprites = np.random.default_rng(12), data.load_sprites()
    met: dict[bool, list[float]] = {True: [], False: []}
    posed = [poses.random_pose(rng) for _ in range(30)]
    for pose in [pose for pose in posed if pose.side <= 36][:10]:
        wanted = edges.canny(poses.draw(pose, sprites))
        hint = Control(Image.fromarray(edges.as_hint(wanted)))
        for controlled, controls in ((True, [hint]), (False, [])):
            picture = client.generate(plain_caption(pose.scene), controls=controls, seed=4).images[0].to_pil()
            met[controlled].append(edges.overlap(edges.canny(np.asarray(picture)), wanted))
    assert np.mean(met[True]) > 2 * np.mean(met[False])


def test_inpainting_redraws_inside_the_mask_and_nothing_else(client: Client) -> None:
    before = Image.fromarray(data.draw(FOX, data.load_sprites()))
    inside = np.zeros((64, 64), bool)
    inside[8:56, 8:56] = True
    made = client.generate(
        "a pizza on a blue background", image=before, mask=Image.fromarray(inside), keep_unmasked=True, seed=3
    )
    after = np.asarray(made.images[0].to_pil())
    assert named(client, made.images[0].to_pil()) == "pizza"
    assert np.array_equal(after[~inside], np.asarray(before)[~inside])


def test_held_out_prompts_come_out_as_the_thing_and_on_the_colour_they_ask_for(client: Client) -> None:
    scenes, names = data.pairs(held=True)[::6], [thing.name for thing in data.things()]
    pictures = [client.generate(plain_caption(scene), seed=5).images[0].to_pil() for scene in scenes]
    things = [named(client, picture) == names[scene.thing] for picture, scene in zip(pictures, scenes, strict=True)]
    colours = [colour_of(np.asarray(picture)) == scene.colour for picture, scene in zip(pictures, scenes, strict=True)]
    assert sum(things) / len(things) >= 0.85
    assert sum(colours) / len(colours) >= 0.95
