"""What is made is looked at in the same call, and what doesn't show what it must is drawn again or dropped: over gRPC,
HTTP, as a job and by the command."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from imagemesh_cli.host import MeshHost
from imagemesh_cli.main import main
from imagemesh_client import Classify, Client, Embed, Generation, Keep, MeshError
from tests.support.mesh import running_mesh

SMALL: dict[str, Any] = {"steps": 1, "width": 32, "height": 32}
SEED = 20
RETRIES = 5


@pytest.fixture(scope="module")
def mesh(models: Path) -> Iterator[MeshHost]:
    with running_mesh(backend="torch", models=str(models), without=("controlnet",)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def client(mesh: MeshHost) -> Iterator[Client]:
    with Client(mesh.grpc_address) as client:
        yield client


def draw(client: Client, **options: Any) -> Generation:
    return client.generate("a fox", **SMALL, **options)


@pytest.fixture(scope="module")
def alone(client: Client) -> Generation:
    """Pictures of SEED and of the seeds of its retries, each with all of its labels."""
    return draw(client, seed=SEED, n=1 + RETRIES, classify=Classify(1000), embed=Embed("mean", True))


@pytest.fixture(scope="module")
def rule(alone: Generation) -> tuple[str, float, int]:
    """A label, a probability that some retry's picture has first, and not the first picture; and which retry it is."""
    label = alone.images[0].classification.predictions[0].label
    found = [
        next(one.probability for one in image.classification.predictions if one.label == label)
        for image in alone.images
    ]
    if found[0] == max(found):  # then any other label's greatest is another picture's, or each is as sure as the next
        label = alone.images[0].classification.predictions[-1].label
        found = [
            next(one.probability for one in image.classification.predictions if one.label == label)
            for image in alone.images
        ]
    best = int(np.argmax(found))
    assert best > 0
    return label, (max(found) + sorted(found)[-2]) / 2, best


def test_what_is_told_is_what_classify_and_embed_tell_of_the_picture(client, alone):
    files = [image.to_pil() for image in alone.images]
    for image, told in zip(alone.images, client.classify(files, 1000), strict=True):
        assert image.classification.model == "tiny-vit"
        assert [one.label for one in image.classification.predictions] == [one.label for one in told.predictions]
        for one, other in zip(image.classification.predictions, told.predictions, strict=True):
            assert one.logit == pytest.approx(other.logit, abs=1e-4)
    vectors = client.embed(files, "mean", normalize=True).vectors
    np.testing.assert_allclose([image.embedding for image in alone.images], vectors, atol=1e-5)
    assert (alone.parameters.classifier, alone.parameters.embedder) == ("tiny-vit", "tiny-vit")
    assert {"classify", "embed"} <= {timing.stage for timing in alone.timings}
    plain = draw(client, seed=SEED)
    assert (plain.images[0].classification, plain.images[0].embedding, plain.rejected) == (None, None, ())
    assert plain.images[0].png == draw(client, seed=SEED, classify=Classify(1)).images[0].png


def test_another_seed_is_drawn_until_one_shows_what_it_must(client, alone, rule):
    label, least, best = rule
    keep = Keep(label, 1000, least, RETRIES)
    steps: list[int] = []
    made = draw(client, seed=SEED, keep=keep, classify=Classify(2), on_progress=lambda told: steps.append(told.step))
    (image,) = made.images
    assert (image.index, image.seed, made.parameters.seed) == (0, SEED + best, SEED)
    assert np.abs(np.asarray(image.to_pil(), int) - np.asarray(alone.images[best].to_pil(), int)).max() <= 1
    assert f"Seed: {SEED + best}" in image.to_pil().info["parameters"]
    assert [(one.index, one.seed) for one in made.rejected] == [(0, SEED + i) for i in range(best)]
    for one in made.rejected:
        assert f"{label!r} has a probability of" in one.reason
        assert f"below {least:g}" in one.reason
        assert len(one.classification.predictions) == 2
    assert steps == list(range(1, best + 2))
    assert f"diffusion-retry-{best}" in {timing.stage for timing in made.timings}
    assert draw(client, seed=SEED, keep=keep).images[0].png == image.png


def test_several_pictures_are_each_kept_or_not(client, alone, rule):
    label, least, best = rule
    seeds = [SEED + best, SEED]
    made = draw(client, seeds=seeds, keep=Keep(label, 1000, least, 1))
    assert (made.images[0].index, made.images[0].seed) == (0, SEED + best)
    retried = max(seeds) + 2  # of picture 1, the first time
    tried = {(one.index, one.seed) for one in made.rejected} | {(one.index, one.seed) for one in made.images[1:]}
    assert tried == {(1, SEED), (1, retried)}
    dropped = draw(client, seeds=seeds, keep=Keep(label, 1000, least))
    assert [image.index for image in dropped.images] == [0]
    assert [(one.index, one.seed) for one in dropped.rejected] == [(1, SEED)]


def test_the_likeliest_label_alone_counts_unless_more_are_asked_for(client, alone):
    first, second = alone.images[0].classification.predictions[:2]
    made = draw(client, seed=SEED, keep=Keep(second.label))
    assert made.images == ()
    assert made.rejected[0].reason.startswith(f"{second.label!r} is not the likeliest label; {first.label!r} is, with ")
    assert len(draw(client, seed=SEED, keep=Keep(second.label, 2)).images) == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "label": ({"keep": {"label": "nothing like it"}}, "keep.label"),
    "no label": ({"keep": {"top_k": 2}}, "keep.label"),
    "many labels": ({"keep": {"label": "LABEL", "top_k": 1001}}, "keep.top_k"),
    "probability": ({"keep": {"label": "LABEL", "min_probability": 1.5}}, "keep.min_probability"),
    "retries": ({"keep": {"label": "LABEL", "retries": 9}}, "keep.retries"),
    "seeds of retries": ({"keep": {"label": "LABEL", "retries": 1}, "seeds": [2**63 - 1]}, "keep.retries"),
    "labels": ({"classify": {"top_k": 0}}, "classify.top_k"),
    "pooling": ({"embed": {"pooling": "max"}}, "embed.pooling"),
    "another field": ({"classify": {"threshold": 0.5}}, "classify.threshold"),
    "another shape": ({"keep": "LABEL"}, "keep"),
}


@pytest.mark.parametrize(("body", "field"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused_by_its_field(mesh, alone, body, field):
    label = alone.images[0].classification.predictions[0].label
    body = json.loads(json.dumps(body).replace("LABEL", label))
    answer = httpx.post(f"http://{mesh.http_address}/v1/generate", json={"prompt": "a fox"} | body, timeout=60)
    assert (answer.status_code, answer.json()["error"].get("field")) == (400, field), answer.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": Keep("x", 1001)}, "keep.label must be one of the"),
        ({"classify": Classify(1001)}, "classify.top_k must be 0 to 1000"),
        ({"classify": Classify(model="their")}, "model 'their' not found"),
        ({"embed": Embed(model="their")}, "model 'their' not found"),
    ],
)
def test_grpc_refuses_it_too_before_anything_is_drawn(client, options, said):
    with pytest.raises(MeshError, match=said.replace("(", r"\(")):
        draw(client, on_progress=lambda told: pytest.fail("a step was done"), **options)


def test_http_tells_what_was_kept_and_what_was_not(mesh, alone, rule):
    label, least, best = rule
    keep = {"label": label, "top_k": 1000, "min_probability": least, "retries": RETRIES}
    asked = {"prompt": "a fox", **SMALL, "seed": SEED, "keep": keep, "classify": {"top_k": 1}, "embed": {}}
    with httpx.Client(base_url=f"http://{mesh.http_address}", timeout=60) as http:
        told = http.post("/v1/generate", json=asked).json()
        (image,) = told["images"]
        assert (image["seed"], image["index"], len(image["classification"])) == (SEED + best, 0, 1)
        assert len(image["embedding"]) == len(alone.images[0].embedding)
        assert [one["seed"] for one in told["rejected"]] == [SEED + i for i in range(best)]
        none = asked | {"keep": keep | {"retries": 0}}
        assert http.post("/v1/generate", json=none).json()["images"] == []
        refused = http.post("/v1/generate", json=none, headers={"Accept": "image/png"})
        assert (refused.status_code, refused.json()["error"]["field"]) == (406, "Accept")
        job = http.post("/v1/jobs", json=asked).json()
        assert job["request"]["keep"] | {"min_probability": least} == keep
        assert job["request"]["classify"] == {"model": "tiny-vit", "top_k": 1}
        with Client(mesh.grpc_address) as client:
            client.jobs.wait(job["id"])
        ended = http.get(f"/v1/jobs/{job['id']}").json()
        assert {**image, "url": ""} | {"png": ""} == {**ended["images"][0], "url": "", "png": ""}
        assert ended["rejected"] == told["rejected"]
        assert http.get(f"/v1/jobs/{job['id']}/result").json()["images"] == told["images"]


def test_a_retry_is_cancelled_as_any_pass_is(client, alone):
    label = alone.images[0].classification.predictions[0].label
    steps = 40
    options = {**SMALL, "steps": steps, "seed": SEED, "keep": Keep(label, 1, 1.0, 8)}
    job = client.jobs.create("a fox", **options)
    for now in client.jobs.watch(job.id):
        if now.progress is not None and now.progress.step > steps:
            assert now.progress.steps > steps
            client.jobs.cancel(job.id)
        last = now
    assert last.state == "cancelled"


def test_the_command_keeps_what_it_is_told_to(mesh, alone, rule, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("IMAGEMESH_SERVER", mesh.grpc_address)
    label, least, best = rule
    file = tmp_path / "fox.png"
    asked = ["generate", "a fox", "-o", str(file), "--seed", str(SEED), "--steps", "1", "--size", "32x32"]
    keep = ["--keep", label, "--keep-among", "1000", "--keep-probability", str(least)]
    assert main([*asked, *keep, "--retries", str(best), "--classify", "1", "--embed"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"{file}: seed {SEED + best}, ")
    assert out.splitlines()[1].startswith(f"{file}: {alone.images[best].classification.predictions[0].label} ")
    assert err.count("is not kept") == best
    assert np.load(tmp_path / "fox.npy").shape == alone.images[0].embedding.shape
    file.unlink()
    assert main([*asked, *keep]) == 1
    out, err = capfd.readouterr()
    assert (out, file.exists()) == ("", False)
    assert f"picture 0 with seed {SEED} is not kept: {label!r} has a probability of" in err
    assert main([*asked, "--retries", "2"]) == 2
    assert "--retries must be given beside --keep" in capfd.readouterr().err
