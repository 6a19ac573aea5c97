"""The SDK makes pictures: what is asked reaches the gateway, what it answers reaches the caller."""

import asyncio
import threading
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from imagemesh.v1 import diffusion_service_pb2, image_pb2, priority_pb2, vit_service_pb2
from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh_client import (
    AsyncClient,
    Classify,
    Client,
    Control,
    ControlSavings,
    Embed,
    Hires,
    InvalidArgument,
    Keep,
    Progress,
    Queued,
    Reference,
    Result,
    Timing,
)
from imagemesh_runtime.errors import Unavailable
from tests.support.recording_gateway import RecordingGateway, png

WAIT = 20


def test_every_option_reaches_the_request(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        client.generate(
            "a fox", negative_prompt="blurry", model="sd-tiny", seed=2**63, steps=7, guidance=0.0, width=64, height=72,
            scheduler="Euler a", n=2, clip_skip=1,
            controls=[Control(b"file", "canny", 0.5, control_type="depth"), Control(b"other")],
            image=b"picture", strength=0.5, mask=b"mask", invert_mask=True, mask_blur=3, keep_unmasked=True,
            priority="batch", scheduler_options={"solver_order": 3, "timestep_spacing": "trailing"},
            guider="PAG", guider_options={"stop": 0.8, "perturbed_guidance_layers": ["mid_block", "up_blocks.0"]},
            references=[Reference(b"like", "adapter", 0.5), Reference(b"this")],
            control_savings=ControlSavings(3, True, "fp8"),
            classify=Classify(3, "vit"), embed=Embed("mean", True, "deit"), keep=Keep("fox", 2, 0.5, 4),
            preview_every=5, mask_padding=0, literal_prompt=True, hires=Hires(2, (3, 4), "Lanczos", 5, 0.5, "DDIM"),
        )  # fmt: skip
    controls = [
        pb.GenerateControl(model="canny", image=image_pb2.Image(encoded=b"file"), scale=0.5, control_type="depth"),
        pb.GenerateControl(image=image_pb2.Image(encoded=b"other"), scale=1.0),
    ]
    expected = pb.GenerateRequest(
        prompt="a fox", negative_prompt="blurry", model="sd-tiny", seed=2**63, steps=7, guidance_scale=0.0, width=64,
        height=72, scheduler="Euler a", num_images=2, clip_skip=1, controls=controls,
        image=image_pb2.Image(encoded=b"picture"), strength=0.5, mask=image_pb2.Image(encoded=b"mask"),
        invert_mask=True, mask_blur=3, keep_unmasked=True, priority=priority_pb2.PRIORITY_BATCH,
        scheduler_options={"solver_order": "3", "timestep_spacing": '"trailing"'}, preview_every=5, mask_padding=0,
        literal_prompt=True,
        control_savings=diffusion_service_pb2.ControlSavings(reuse_steps=3, conditional_only=True, residuals="fp8"),
        references=[
            pb.GenerateReference(image=image_pb2.Image(encoded=b"like"), adapter="adapter", scale=0.5),
            pb.GenerateReference(image=image_pb2.Image(encoded=b"this"), scale=1.0),
        ],
        guider="PAG", guider_options={"stop": "0.8", "perturbed_guidance_layers": '["mid_block", "up_blocks.0"]'},
        classify=pb.GenerateClassify(top_k=3, model="vit"),
        embed=pb.GenerateEmbed(model="deit", pooling=vit_service_pb2.POOLING_MEAN, normalize=True),
        keep=pb.GenerateKeep(label="fox", top_k=2, min_probability=0.5, retries=4),
        hires=pb.GenerateHires(scale=2, width=3, height=4, upscaler="Lanczos", steps=5, strength=0.5, scheduler="DDIM"),
    )  # fmt: skip
    assert gateway.requests == [expected]


def test_what_is_left_out_is_left_to_the_mesh(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        client.generate("a fox")
    assert gateway.requests == [pb.GenerateRequest(prompt="a fox", num_images=1)]


def test_zero_is_sent_and_not_taken_for_absent(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        client.generate("a fox", seed=0, steps=0)
    (request,) = gateway.requests
    assert [request.HasField("seed"), request.HasField("steps")] == [True, True]


def test_result_holds_pictures_parameters_and_timings(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        generation = client.generate("a fox", seed=7, n=2)
    assert [(image.png, image.seed) for image in generation.images] == [(png(7), 7), (png(8), 8)]
    assert (generation.id, generation.parameters.scheduler, generation.parameters.guidance) == ("g1", "DDIM", 7.5)
    assert generation.parameters.backends == {"vae": "fake"}
    assert generation.timings == (Timing("vae", 0.5, 0.25, 0.125, 10, 20),)


def test_stream_tells_events_in_order_and_passes_over_unknown_ones(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        *before, last = client.stream("a fox", seed=7)
    assert before == [Queued("g1", 2), Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    assert isinstance(last, Result)
    assert last.generation.parameters.seed == 7


def test_progress_is_called_after_each_step_on_the_callers_thread(gateway: RecordingGateway) -> None:
    calls: list[tuple[Progress, threading.Thread]] = []
    with Client(gateway.address) as client:
        client.generate("a fox", on_progress=lambda progress: calls.append((progress, threading.current_thread())))
    assert calls == [(Progress(step, 3), threading.current_thread()) for step in (1, 2, 3)]


async def test_sync_and_async_clients_give_the_same(gateway: RecordingGateway) -> None:
    steps: list[Progress] = []
    async with AsyncClient(gateway.address) as client:
        generation = await client.generate("a fox", seed=3, n=2, on_progress=steps.append)
        events = [event async for event in client.stream("a fox", seed=3, n=2)]
    with Client(gateway.address) as sync_client:
        assert sync_client.generate("a fox", seed=3, n=2) == generation
        assert list(sync_client.stream("a fox", seed=3, n=2)) == events
    assert len({request.SerializeToString(deterministic=True) for request in gateway.requests}) == 1
    assert steps == [event for event in events if isinstance(event, Progress)]


def test_leaving_the_stream_cancels_the_call(gateway: RecordingGateway) -> None:
    gateway.hold = True
    with Client(gateway.address) as client:
        with closing(client.stream("a fox")) as events:
            assert [next(events), next(events)] == [Queued("g1", 2), Progress(1, 3)]
        assert gateway.cancelled.wait(WAIT)


async def test_leaving_the_async_stream_cancels_the_call(gateway: RecordingGateway) -> None:
    gateway.hold = True
    async with AsyncClient(gateway.address) as client:
        async with aclosing(client.stream("a fox")) as events:
            async for event in events:
                if isinstance(event, Progress):
                    break
        assert await asyncio.to_thread(gateway.cancelled.wait, WAIT)


def test_a_progress_callback_that_raises_cancels_the_call(gateway: RecordingGateway) -> None:
    gateway.hold = True

    def refuse(progress: Progress) -> None:
        raise RuntimeError("enough")

    with Client(gateway.address) as client:
        with pytest.raises(RuntimeError, match="enough"):
            client.generate("a fox", on_progress=refuse)
        assert gateway.cancelled.wait(WAIT)


def test_closing_the_client_ends_a_call_in_another_thread(gateway: RecordingGateway) -> None:
    gateway.hold = True
    client = Client(gateway.address)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            client.generate("a fox")
        except BaseException as error:
            failures.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert gateway.holding.wait(WAIT)
    client.close()
    caller.join(WAIT)
    assert len(failures) == 1
    assert gateway.cancelled.wait(WAIT)


def test_a_generation_without_result_is_an_error(gateway: RecordingGateway) -> None:
    gateway.forget_result = True
    with Client(gateway.address) as client, pytest.raises(Unavailable, match="without a result"):
        client.generate("a fox")


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", -1), ("seed", 2**64), ("steps", 2**32), ("n", -1), ("width", 1.5), ("clip_skip", "two"),
     ("guidance", "much"), ("scheduler", None), ("negative_prompt", "\udcff")],
)  # fmt: skip
def test_a_value_that_cannot_be_sent_names_its_field(gateway: RecordingGateway, option: str, value: Any) -> None:
    with Client(gateway.address) as client, pytest.raises(InvalidArgument) as caught:
        client.generate("a fox", **{option: value})  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.code) == (option, grpc.StatusCode.INVALID_ARGUMENT)
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("options", "field"),
    [({"width": 0}, "width"), ({"height": 0}, "height"), ({"hires": Hires(scale=0)}, "hires.scale"),
     ({"hires": Hires(size=(0, 64))}, "hires.size[0]")],
)  # fmt: skip
def test_a_zero_that_would_be_taken_for_absent_is_refused(
    gateway: RecordingGateway, options: dict[str, Any], field: str
) -> None:
    with Client(gateway.address) as client, pytest.raises(InvalidArgument) as caught:
        client.generate("a fox", **options)
    assert (caught.value.field, gateway.requests) == (field, [])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_list_of_no_jobs_is_refused(gateway: RecordingGateway, limit: int) -> None:
    with Client(gateway.address) as client, pytest.raises(InvalidArgument, match="limit must be a whole number from 1"):
        client.jobs.list(limit=limit)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout must be a number of seconds above 0"):
        Client("127.0.0.1:1", timeout=timeout)


def test_an_unknown_option_is_a_type_error(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client, pytest.raises(TypeError, match="cfg"):
        client.generate("a fox", cfg=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "file_format"), [("a.png", "PNG"), ("a", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")]
)
def test_save_writes_what_the_suffix_says(
    gateway: RecordingGateway, tmp_path: Path, name: str, file_format: str
) -> None:
    with Client(gateway.address) as client:
        image = client.generate("a fox", seed=100).images[0]
    path = image.save(tmp_path / name)
    with Image.open(path) as saved:
        assert saved.format == file_format
        assert np.abs(np.asarray(saved, dtype=int) - 100).max() <= 2


def test_png_is_saved_byte_for_byte(gateway: RecordingGateway, tmp_path: Path) -> None:
    with Client(gateway.address) as client:
        image = client.generate("a fox", seed=100).images[0]
    assert image.save(str(tmp_path / "a.png")).read_bytes() == image.png


def test_save_refuses_other_suffixes(gateway: RecordingGateway, tmp_path: Path) -> None:
    with Client(gateway.address) as client:
        image = client.generate("a fox").images[0]
    with pytest.raises(InvalidArgument, match=r"\.png, \.jpg"):
        image.save(tmp_path / "a.txt")


def test_to_pil_decodes(gateway: RecordingGateway) -> None:
    with Client(gateway.address) as client:
        picture = client.generate("a fox", seed=100).images[0].to_pil()
    assert (picture.size, picture.getpixel((0, 0))) == ((8, 8), (100, 100, 100))
