"""Triton's own client, unmodified, against a service and against the gateway."""

import asyncio
import json
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, shared_memory

from imagemesh_cli.host import MeshHost
from imagemesh_client import Client
from tests.support.mesh import running_mesh

RED = np.zeros((2, 4, 4, 3), np.uint8)
RED[0, ..., 0] = 255
RED[1, ..., 2] = 51


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshHost]:
    with running_mesh(backend="fake") as host:
        yield host


@pytest.fixture(params=["gateway", "service"])
def client(mesh: MeshHost, request: pytest.FixtureRequest) -> Iterator[triton.InferenceServerClient]:
    """At either of the two, which have the ViT alike."""
    address = mesh.grpc_address if request.param == "gateway" else mesh.services["vit"].address
    with triton.InferenceServerClient(address) as client:
        yield client


@pytest.fixture
def gateway(mesh: MeshHost) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(mesh.grpc_address) as client:
        yield client


def tensor(name: str, array: np.ndarray, datatype: str) -> Any:
    made = triton.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def text(name: str, value: str) -> Any:
    return tensor(name, np.array([value.encode()], np.object_), "BYTES")


def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return str(caught.value.status()).removeprefix("StatusCode."), caught.value.message()


def test_the_server_tells_of_itself(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert "classification" in client.get_server_metadata().extensions
    assert client.is_model_ready("vit")
    assert client.is_model_ready("vit", "1")
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("vit", "7")
    assert refused(lambda: client.is_model_ready("vit", "one"))[0] == "INVALID_ARGUMENT"
    metadata, config = client.get_model_metadata("vit"), client.get_model_config("vit").config
    assert [(one.name, one.datatype, list(one.shape)) for one in metadata.inputs] == [
        ("image", "UINT8", [-1, -1, -1, 3])
    ]
    assert (list(config.input[0].dims), config.max_batch_size) == ([-1, -1, 3], 64)
    assert refused(lambda: client.get_model_metadata("nobody"))[0] == "NOT_FOUND"


def test_inference_answers_by_name_and_id(client: triton.InferenceServerClient) -> None:
    answer = client.infer("vit", [tensor("image", RED, "UINT8")], request_id="mine")
    np.testing.assert_allclose(answer.as_numpy("logits"), [[1, 0, 0], [0, 0, 0.2]], atol=1e-6)
    np.testing.assert_allclose(answer.as_numpy("probabilities").sum(axis=1), 1, atol=1e-6)
    told = answer.get_response()
    assert (told.id, told.model_name, told.model_version, len(told.raw_output_contents)) == ("mine", "vit", "1", 2)
    embedded = client.infer("vit_embedding", [tensor("image", RED, "UINT8")]).as_numpy("embedding")
    np.testing.assert_allclose(embedded, [[1, 0, 0], [0, 0, 0.2]], atol=1e-6)


def test_outputs_can_be_classified(client: triton.InferenceServerClient) -> None:
    wanted = [triton.InferRequestedOutput("logits", class_count=2), triton.InferRequestedOutput("logits")]
    classes = client.infer("vit", [tensor("image", RED, "UINT8")], outputs=wanted).as_numpy("logits")
    assert classes.shape == (2, 2)
    assert classes[0, 0] == b"1.000000:0:red"
    assert classes[1, 0].endswith(b":2:blue")
    many = triton.InferRequestedOutput("logits", class_count=99)
    assert client.infer("vit", [tensor("image", RED, "UINT8")], outputs=[many]).as_numpy("logits").shape == (2, 3)


BAD = {
    "unknown input": lambda: [tensor("picture", RED, "UINT8")],
    "twice": lambda: [tensor("image", RED, "UINT8")] * 2,
    "none": list,
    "dtype": lambda: [tensor("image", RED.astype(np.float32), "FP32")],
    "rank": lambda: [tensor("image", RED[0], "UINT8")],
    "colours": lambda: [tensor("image", RED[..., :2], "UINT8")],
    "batch": lambda: [tensor("image", np.zeros((65, 1, 1, 3), np.uint8), "UINT8")],
}


@pytest.mark.parametrize("inputs", BAD.values(), ids=BAD)
def test_bad_inputs_are_named(client: triton.InferenceServerClient, inputs: Any) -> None:
    code, message = refused(lambda: client.infer("vit", inputs()))
    assert code == "INVALID_ARGUMENT"
    assert message.startswith("inputs")


def test_other_bad_requests_are_told_as_triton_does(client: triton.InferenceServerClient) -> None:
    inputs = [tensor("image", RED, "UINT8")]
    assert refused(lambda: client.infer("nobody", inputs))[0] == "NOT_FOUND"
    wanted = [triton.InferRequestedOutput("nothing")]
    assert refused(lambda: client.infer("vit", inputs, outputs=wanted))[0] == "INVALID_ARGUMENT"
    inputs[0]._raw_content = inputs[0]._raw_content[:-1]
    assert refused(lambda: client.infer("vit", inputs))[0] == "INVALID_ARGUMENT"


def test_typed_contents_are_read_but_not_beside_raw_ones(client: triton.InferenceServerClient) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(client._channel)
    request = service_pb2.ModelInferRequest(model_name="vit")
    one = request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 1, 3])
    one.contents.uint_contents.extend([0, 255, 0])
    answer = stub.ModelInfer(request)
    place = [output.name for output in answer.outputs].index("logits")
    np.testing.assert_allclose(np.frombuffer(answer.raw_output_contents[place], np.float32), [0, 1, 0])
    request.raw_input_contents.append(b"\0\0\0")
    with pytest.raises(Exception, match="absent where raw_input_contents is given"):
        stub.ModelInfer(request)


def test_statistics_count_items_and_batches(client: triton.InferenceServerClient) -> None:
    def told() -> Any:
        return client.get_inference_statistics("vit").model_stats[0]

    before = told()
    client.infer("vit", [tensor("image", RED, "UINT8")])
    refused(lambda: client.infer("vit", []))
    after = told()
    assert after.inference_count - before.inference_count == 2
    assert after.execution_count - before.execution_count == 1
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    assert after.inference_stats.success.ns > before.inference_stats.success.ns
    assert 2 in [one.batch_size for one in after.batch_stats]
    assert len(client.get_inference_statistics().model_stats) >= 2
    assert refused(lambda: client.get_inference_statistics("nobody"))[0] == "INVALID_ARGUMENT"


def test_models_are_unloaded_and_loaded(client: triton.InferenceServerClient) -> None:
    client.unload_model("vit_embedding")
    try:
        assert not client.is_model_ready("vit_embedding")
        assert refused(lambda: client.infer("vit_embedding", [tensor("image", RED, "UINT8")]))[0] == "NOT_FOUND"
        states = {one.name: one.state for one in client.get_model_repository_index().models}
        assert (states["vit"], states["vit_embedding"]) == ("READY", "UNAVAILABLE")
    finally:
        client.load_model("vit_embedding")
    assert client.is_model_ready("vit_embedding")
    assert client.unload_model("nobody") is None
    assert refused(lambda: client.load_model("nobody"))[0] == "INTERNAL"


def test_kserves_client_has_the_name_in_another_field(client: triton.InferenceServerClient) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(client._channel)
    stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(repository_name="vit"))
    assert not client.is_model_ready("vit")
    stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(repository_name="vit"))
    assert client.is_model_ready("vit")


def test_tensors_go_through_shared_memory(client: triton.InferenceServerClient) -> None:
    size = RED.nbytes
    handle = shared_memory.create_shared_memory_region("both", "/imagemesh_test_oip", size + 24)
    try:
        shared_memory.set_shared_memory_region(handle, [RED])
        client.register_system_shared_memory("both", "/imagemesh_test_oip", size + 24)
        assert client.get_system_shared_memory_status("both").regions["both"].byte_size == size + 24
        image = triton.InferInput("image", RED.shape, "UINT8")
        image.set_shared_memory("both", size)
        logits = triton.InferRequestedOutput("logits")
        logits.set_shared_memory("both", 24, offset=size)
        answer = client.infer("vit", [image], outputs=[logits])
        assert answer.get_response().raw_output_contents == [b""]
        found = shared_memory.get_contents_as_numpy(handle, np.float32, [2, 3], offset=size)
        np.testing.assert_allclose(found, [[1, 0, 0], [0, 0, 0.2]], atol=1e-6)
        logits.set_shared_memory("both", 8, offset=size)
        assert refused(lambda: client.infer("vit", [image], outputs=[logits]))[0] == "INTERNAL"
        image.set_shared_memory("both", size, offset=25)
        assert refused(lambda: client.infer("vit", [image]))[0] == "INVALID_ARGUMENT"
        again = refused(lambda: client.register_system_shared_memory("both", "/imagemesh_test_oip", 8))
        assert again[0] == "ALREADY_EXISTS"
        client.unregister_system_shared_memory()
        assert len(client.get_system_shared_memory_status().regions) == 0
    finally:
        client.unregister_system_shared_memory()
        shared_memory.destroy_shared_memory_region(handle)


def test_bad_regions_are_told_as_triton_does(client: triton.InferenceServerClient) -> None:
    register = client.register_system_shared_memory
    assert refused(lambda: register("x", "/imagemesh_is_not_there", 8))[0] == "INTERNAL"
    assert refused(lambda: register("x", "/../etc/passwd", 8))[0] == "INVALID_ARGUMENT"
    assert refused(lambda: client.get_system_shared_memory_status("x"))[0] == "NOT_FOUND"
    assert client.unregister_system_shared_memory("x") is None
    image = triton.InferInput("image", [1, 1, 1, 3], "UINT8")
    image.set_shared_memory("x", 3)
    assert refused(lambda: client.infer("vit", [image]))[0] == "NOT_FOUND"


def test_what_is_not_here_is_told_truthfully(client: triton.InferenceServerClient) -> None:
    assert len(client.get_cuda_shared_memory_status().regions) == 0
    assert client.unregister_cuda_shared_memory() is None
    assert refused(lambda: client.register_cuda_shared_memory("x", b"eA==", 0, 8))[0] == "INVALID_ARGUMENT"
    assert client.get_trace_settings().settings["trace_level"].value == ["OFF"]
    assert client.update_trace_settings(settings={"trace_level": None}).settings["trace_level"].value == ["OFF"]
    assert client.get_log_settings().settings["log_error"].bool_param
    assert refused(lambda: client.update_log_settings({"log_file": "/tmp/x"}))[0] == "UNIMPLEMENTED"


def test_a_stream_goes_on_after_a_failed_item(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("vit", [tensor("image", RED, "UINT8")], request_id="1")
    client.async_stream_infer("nobody", [tensor("image", RED, "UINT8")], request_id="2")
    client.async_stream_infer("vit", [tensor("image", RED[:1], "UINT8")], request_id="3")
    got = [answers.get(timeout=30) for _ in range(3)]
    client.stop_stream()
    assert [result.get_response().id if result else None for result, _ in got] == ["1", None, "3"]
    assert "model 'nobody' not found" in got[1][1].message()
    assert got[0][0].get_response().parameters["triton_final_response"].bool_param


def test_generate_streams_its_steps_and_its_pictures(mesh: MeshHost, gateway: triton.InferenceServerClient) -> None:
    inputs = [text("prompt", "a cat"), tensor("seed", np.array([5], np.int64), "INT64")]
    inputs += [tensor(name, np.array([n], np.int32), "INT32") for name, n in (("steps", 4), ("num_images", 2))]
    code, message = refused(lambda: gateway.infer("generate", inputs))
    assert (code, "decoupled" in message) == ("UNIMPLEMENTED", True)
    assert gateway.get_model_config("generate").config.model_transaction_policy.decoupled
    answers: queue.Queue[Any] = queue.Queue()
    gateway.start_stream(lambda result, error: answers.put((result, error)))
    gateway.async_stream_infer("generate", inputs, request_id="g", enable_empty_final_response=True)
    got = []
    while not got or not got[-1].parameters["triton_final_response"].bool_param:
        result, error = answers.get(timeout=60)
        assert error is None
        got.append(result.get_response())
    gateway.stop_stream()
    assert len(got[-1].outputs) == 0
    made = triton.InferResult(got[-2])
    with Client(mesh.grpc_address) as client:
        called = client.generate("a cat", seed=5, steps=4, n=2)
    for i, image in enumerate(called.images):
        np.testing.assert_array_equal(made.as_numpy("image")[i], np.asarray(image.to_pil()))
    assert made.as_numpy("seed").tolist() == [5, 6]
    assert json.loads(made.as_numpy("parameters")[0])["steps"] == 4
    steps = [int(triton.InferResult(one).as_numpy("step")[0]) for one in got[:-1]]
    assert steps == sorted(steps)
    assert steps[-1] == 4


async def test_the_async_client_works_too(mesh: MeshHost) -> None:
    async with triton_aio.InferenceServerClient(mesh.grpc_address) as client:
        calls = [client.infer("vit", [tensor("image", RED, "UINT8")]) for _ in range(4)]
        for answer in await asyncio.gather(*calls):
            np.testing.assert_allclose(answer.as_numpy("logits")[0], [1, 0, 0], atol=1e-6)

        async def requests() -> Any:
            for i in range(2):
                wanted = [triton.InferRequestedOutput("image")]
                yield {
                    "model_name": "generate", "inputs": [text("prompt", f"cat {i}")], "outputs": wanted,
                    "request_id": str(i),
                }  # fmt: skip

        got = [(result, error) async for result, error in client.stream_infer(requests())]
        assert [result.get_response().id for result, _ in got] == ["0", "1"]
        assert all(result.as_numpy("image").shape[-1] == 3 for result, _ in got)


def test_other_stages_are_models_too(mesh: MeshHost, gateway: triton.InferenceServerClient) -> None:
    picture = np.full((1, 16, 16, 3), 255, np.uint8)
    for address in (mesh.grpc_address, mesh.services["vae"].address):
        with triton.InferenceServerClient(address) as client:
            mean = client.infer("vae_encoder", [tensor("image", picture, "UINT8")]).as_numpy("mean")
            assert mean.shape == (1, 4, 2, 2)
            latents = tensor("latents", mean * np.float32(0.5), "FP32")
            np.testing.assert_array_equal(client.infer("vae_decoder", [latents]).as_numpy("image"), picture)
            assert refused(lambda: client.infer("vae_encoder", [tensor("image", picture[:, :7], "UINT8")]))[0] == (
                "INVALID_ARGUMENT"
            )
    for address in (mesh.grpc_address, mesh.services["text-encoder"].address):
        with triton.InferenceServerClient(address) as client:
            embeds = client.infer("text_encoder", [text("prompt", "hi")]).as_numpy("prompt_embeds")
            np.testing.assert_allclose(embeds[0, :3, 0] * 256, [1, 104, 105])
    index = {one.name for one in gateway.get_model_repository_index().models}
    assert index == {"generate", "text_encoder", "vae_decoder", "vae_encoder", "vit", "vit_embedding"}
