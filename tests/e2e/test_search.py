"""Search over real channels: the service's bounds, the gateway, the SDK, HTTP and the command."""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pyarrow.parquet
import pytest

from imagemesh.v1 import image_pb2, vit_service_pb2
from imagemesh.v1 import search_service_pb2 as pb
from imagemesh.v1 import search_service_pb2_grpc as rpc
from imagemesh_cli.host import MeshHost
from imagemesh_cli.main import main
from imagemesh_client import AsyncClient, Client, Duplicate, Index, MeshError
from imagemesh_runtime.tensors import to_proto
from imagemesh_services.vit.config import VitConfig
from imagemesh_services.vit.search.store import STORES
from imagemesh_services.vit.service import create
from tests.support.mesh import running_mesh
from tests.support.pictures import encoded
from tests.support.services import serving


def colour(*rgb: int) -> np.ndarray:
    """To the fake a vector of this direction."""
    return np.full((4, 4, 3), rgb, np.uint8)


RED, GREEN, BLUE, ORANGE = colour(255, 0, 0), colour(0, 255, 0), colour(0, 0, 255), colour(255, 128, 0)


def image(pixels: np.ndarray) -> image_pb2.Image:
    return image_pb2.Image(pixels=to_proto(pixels))


@pytest.fixture
async def search(tmp_path: Path) -> AsyncIterator[rpc.SearchServiceStub]:
    config = VitConfig(listen="127.0.0.1:0", backend="fake", index_root=str(tmp_path / "indexes"))
    async with serving(create, config) as served:
        stub = rpc.SearchServiceStub(served.channel)
        await stub.IndexImages(pb.IndexImagesRequest(index="there", images=[image(RED)], ids=["red"]))
        yield stub


async def test_an_index_knows_its_model_and_says_what_it_is(search):
    answer = await search.IndexImages(pb.IndexImagesRequest(index="there", images=[image(GREEN)], ids=["green"]))
    assert answer.index == pb.IndexInfo(name="there", model="fake", width=3, count=2, store="faiss")
    again = await search.IndexImages(pb.IndexImagesRequest(index="there", images=[image(BLUE)], ids=["green"]))
    assert (again.replaced, again.index.count) == (1, 2)
    assert list((await search.ListIndexes(pb.ListIndexesRequest())).indexes) == [again.index]


IndexRequest, SearchRequest = pb.IndexImagesRequest, pb.SearchImagesRequest
BAD = {
    "path": ("IndexImages", IndexRequest(index="../x", images=[image(RED)], ids=["a"]), "index must be"),
    "no images": ("IndexImages", IndexRequest(index="there"), "images must be 1 to 64"),
    "many images": (
        "IndexImages", IndexRequest(index="there", images=[image(RED)] * 65, ids=map(str, range(65))), "images must be"
    ),
    "few ids": ("IndexImages", IndexRequest(index="there", images=[image(RED)] * 2, ids=["a"]), "ids must be"),
    "id twice": ("IndexImages", IndexRequest(index="there", images=[image(RED)] * 2, ids=["a", "a"]), "all different"),
    "long id": ("IndexImages", IndexRequest(index="there", images=[image(RED)], ids=["a" * 513]), "ids[0]"),
    "empty id": ("IndexImages", IndexRequest(index="there", images=[image(RED)], ids=[""]), "ids[0]"),
    "control": ("IndexImages", IndexRequest(index="there", images=[image(RED)], ids=["a\nb"]), "ids[0]"),
    "torn": (
        "IndexImages", IndexRequest(index="there", images=[image_pb2.Image(encoded=b"x")], ids=["a"]), "images[0]"
    ),
    "other model": (
        "IndexImages", IndexRequest(index="there", images=[image(RED)], ids=["a"], model="b"), "model must be"
    ),
    "other pooling": (
        "IndexImages",
        IndexRequest(index="there", images=[image(RED)], ids=["a"], pooling=vit_service_pb2.POOLING_MEAN),
        "pooling must be unspecified",
    ),
    "unknown pooling": ("IndexImages", IndexRequest(index="new", images=[image(RED)], ids=["a"], pooling=9), "pooling"),
    "search path": ("SearchImages", SearchRequest(index="/etc", images=[image(RED)]), "index must be"),
    "search none": ("SearchImages", SearchRequest(index="there"), "images must be 1 to 64"),
    "top_k": ("SearchImages", SearchRequest(index="there", images=[image(RED)], top_k=1001), "top_k must be"),
    "nan": (
        "SearchImages",
        SearchRequest(index="there", images=[image(RED)], min_similarity=float("nan")),
        "min_similarity must be",
    ),
    "pairs": ("FindDuplicates", pb.FindDuplicatesRequest(index="there", limit=10_001), "limit must be"),
    "pairs likeness": ("FindDuplicates", pb.FindDuplicatesRequest(index="there", min_similarity=2), "min_similarity"),
    "remove none": ("RemoveImages", pb.RemoveImagesRequest(index="there"), "ids must be 1 to 1000"),
    "delete path": ("DeleteIndex", pb.DeleteIndexRequest(index="."), "index must be"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "request_", "said"), BAD.values(), ids=BAD)
async def test_what_cannot_be_is_refused_by_its_field(search, method, request_, said):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(search, method)(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()
    indexes = (await search.ListIndexes(pb.ListIndexesRequest())).indexes
    assert [(one.name, one.count) for one in indexes] == [("there", 1)]


@pytest.mark.parametrize("method", ["SearchImages", "FindDuplicates", "RemoveImages", "DeleteIndex"])
async def test_an_index_that_is_not_there_is_not_found(search, method):
    fields = {"SearchImages": {"images": [image(RED)]}, "RemoveImages": {"ids": ["a"]}}.get(method, {})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(search, method)(getattr(pb, f"{method}Request")(index="their", **fields))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "perhaps 'there'" in caught.value.details()


async def test_a_folder_that_cannot_be_is_said_and_harms_no_other_call(tmp_path: Path):
    (tmp_path / "file").touch()
    config = VitConfig(listen="127.0.0.1:0", backend="fake", index_root=str(tmp_path / "file" / "x"))
    async with serving(create, config) as served:
        with pytest.raises(grpc.aio.AioRpcError, match="index_root") as caught:
            await rpc.SearchServiceStub(served.channel).ListIndexes(pb.ListIndexesRequest())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        asked = vit_service_pb2.EmbedImagesRequest(model="fake", images=[image(RED)])
        await served.channel.unary_unary(
            "/imagemesh.v1.VitService/EmbedImages",
            request_serializer=vit_service_pb2.EmbedImagesRequest.SerializeToString,
            response_deserializer=vit_service_pb2.EmbedImagesResponse.FromString,
        )(asked)


async def collected(call) -> list:
    return [message async for message in call]


async def test_groups_come_first_and_then_every_picture_once(search):
    images = [image(colour(255, 10 * i, 0)) for i in range(5)] + [image(colour(0, 10 * i, 255)) for i in range(4)]
    ids = [f"{'red' if i < 5 else 'blue'} {i}" for i in range(9)]
    await search.IndexImages(pb.IndexImagesRequest(index="two", images=images, ids=ids))
    request = pb.ClusterImagesRequest(index="two", clusters=2, seed=1)
    first, *rest = await collected(search.ClusterImages(request))
    assert [group.count for group in first.clusters] == [5, 4]
    told = {one.id: one.cluster for message in rest for one in message.images}
    assert told == {one: int(one.startswith("blue")) for one in ids}
    assert all(told[group.example_id] == i for i, group in enumerate(first.clusters))
    assert await collected(search.ClusterImages(request)) == [first, *rest]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (pb.ClusterImagesRequest(index="there", clusters=2), "clusters must be at most 1, the pictures of index there"),
        (pb.ClusterImagesRequest(index="there", clusters=1001), "clusters must be 0 to 1000"),
        (pb.ClusterImagesRequest(index="there", clusters=1, seed=2**31), "seed must be 0 to 2147483647"),
        (pb.ClusterImagesRequest(index="/"), "index must be"),
        (pb.ClusterImagesRequest(index="their"), "index 'their' not found"),
        (pb.ExportVectorsRequest(index="/"), "index must be"),
        (pb.ExportVectorsRequest(index="their"), "index 'their' not found"),
    ],
)
async def test_streams_are_refused_by_their_fields_too(search, request_, said):
    method = search.ClusterImages if isinstance(request_, pb.ClusterImagesRequest) else search.ExportVectors
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collected(method(request_))
    assert said in caught.value.details()


@pytest.mark.parametrize("store", STORES)
async def test_whatever_keeps_them_answers_the_same(tmp_path: Path, store: str):
    url = ":memory:" if store == "qdrant" else ""
    config = VitConfig(listen="127.0.0.1:0", backend="fake", index_root=str(tmp_path), index_store=store, index_url=url)
    async with serving(create, config) as served:
        stub = rpc.SearchServiceStub(served.channel)
        images = [image(RED), image(ORANGE), image(BLUE), image(RED)]
        asked = pb.IndexImagesRequest(index="all-of_it", images=images, ids=["red", "orange", "blue", "twin"])
        assert (await stub.IndexImages(asked)).index.store == store
        found = (await stub.SearchImages(pb.SearchImagesRequest(index="all-of_it", images=[image(ORANGE)]))).results
        assert found[0].matches[0].id == "orange"
        np.testing.assert_allclose(
            [one.similarity for one in found[0].matches], [1, 255 / 285, 255 / 285, 0], atol=1e-2
        )
        twins = await stub.FindDuplicates(pb.FindDuplicatesRequest(index="all-of_it", min_similarity=0.99))
        assert [(one.first_id, one.second_id) for one in twins.pairs] == [("red", "twin")]
        groups, *_ = await collected(stub.ClusterImages(pb.ClusterImagesRequest(index="all-of_it", clusters=2)))
        assert [one.count for one in groups.clusters] == [3, 1]
        assert (await stub.RemoveImages(pb.RemoveImagesRequest(index="all-of_it", ids=["twin", "x"]))).removed == 1
        assert [one.count for one in (await stub.ListIndexes(pb.ListIndexesRequest())).indexes] == [3]
        with pytest.raises(grpc.aio.AioRpcError, match="perhaps 'all-of_it'"):
            await stub.DeleteIndex(pb.DeleteIndexRequest(index="all-of-it"))


async def test_indexes_outlive_the_service(tmp_path: Path):
    config = VitConfig(listen="127.0.0.1:0", backend="fake", index_root=str(tmp_path))
    async with serving(create, config) as served:
        asked = pb.IndexImagesRequest(index="kept", images=[image(RED), image(BLUE)], ids=["red", "blue"])
        await rpc.SearchServiceStub(served.channel).IndexImages(asked)
    async with serving(create, config) as served:
        asked = pb.SearchImagesRequest(index="kept", images=[image(ORANGE)], top_k=1)
        answer = await rpc.SearchServiceStub(served.channel).SearchImages(asked)
    assert answer.results[0].matches[0].id == "red"


@pytest.fixture(scope="module")
def mesh(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshHost]:
    """The tiny ViT in torch, its gateway over all of it."""
    root = tmp_path_factory.mktemp("indexes")
    without = ("controlnet", "text-encoder", "vae", "diffusion")
    with running_mesh(backend="torch", models=str(models), index_root=str(root), without=without) as host:
        yield host


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, one of them twice, below a folder with a file that is none and one that is torn."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        (root / ("more" if i % 2 else ".") / f"{i:02}.png").write_bytes(encoded(pixels // (i % 4 + 1)))
    (root / "copy.png").write_bytes((root / "00.png").read_bytes())
    (root / "notes.txt").write_text("no picture")
    (root / "torn.png").write_bytes((root / "00.png").read_bytes()[:200])
    (root / "text.jpg").write_text("no picture either")
    return root


def test_similarities_are_those_of_the_embeddings(mesh, photos):
    files = sorted(photos.glob("*/*.png"))
    with Client(mesh.grpc_address) as client:
        index = client.indexes.add("cosines", files, map(str, files), pooling="mean")
        assert index == Index("cosines", "tiny-vit", "mean", index.width, len(files), "faiss")
        found = client.indexes.search("cosines", files, len(files))
        vectors = client.embed(files, "mean", normalize=True).vectors
    cosines = vectors @ vectors.T
    for row, matches in zip(cosines, found, strict=True):
        told = {match.id: match.similarity for match in matches}
        np.testing.assert_allclose([told[str(file)] for file in files], row, atol=1e-5)
        assert [match.similarity for match in matches] == sorted(told.values(), reverse=True)


async def test_the_async_sdk_does_all_of_it(mesh):
    async with AsyncClient(mesh.grpc_address) as client:
        await client.indexes.add("colours", [RED, GREEN, BLUE], ["red", "green", "blue"])
        await client.indexes.add("colours", RED, "red again")
        twins = await client.indexes.duplicates("colours", 0.99999)
        assert twins == [Duplicate("red", "red again", twins[0].similarity)]
        assert len(await client.indexes.duplicates("colours", 1e-6, limit=1)) == 1
        assert await client.indexes.remove("colours", ["red again", "nobody"]) == 1
        found = await client.indexes.search("colours", [GREEN], 3, min_similarity=0.99999)
        assert [match.id for match in found[0]] == ["green"]
        assert "colours" in [index.name for index in await client.indexes.list()]
        groups = await client.indexes.clusters("colours", 3, seed=2)
        assert [(group.count, groups.members[group.example][0]) for group in groups.groups] == [(1, 0), (1, 1), (1, 2)]
        pieces = [piece async for piece in client.indexes.vectors("colours")]
        vectors = (await client.embed([RED, GREEN, BLUE], normalize=True)).vectors
        told = {one: vector for ids, piece in pieces for one, vector in zip(ids, piece, strict=True)}
        np.testing.assert_allclose([told[one] for one in ("red", "green", "blue")], vectors, atol=1e-5)
        await client.indexes.delete("colours")
        with pytest.raises(MeshError, match="index 'colours' not found"):
            await client.indexes.search("colours", RED)
        with pytest.raises(MeshError, match="1 to 64 pictures"):
            await client.indexes.add("colours", [RED] * 65, map(str, range(65)))


def test_http_indexes_and_searches(mesh):
    def file(pixels: np.ndarray) -> str:
        return base64.b64encode(encoded(pixels)).decode()

    with httpx.Client(base_url=f"http://{mesh.http_address}") as http:
        images = [{"id": "red", "image": file(RED)}, {"id": "blue", "image": file(BLUE)}]
        made = http.post("/v1/index", json={"index": "web", "images": images}).json()
        assert made["replaced"] == 0
        assert made["index"]["count"] == 2
        assert made["index"] in http.get("/v1/index").json()["indexes"]
        found = http.post("/v1/search", json={"index": "web", "image": file(BLUE), "top_k": 1}).json()
        assert found["matches"] == [{"id": "blue", "similarity": pytest.approx(1, abs=1e-5)}]
        for path, body, field in (
            ("/v1/index", {"index": "web", "images": []}, "images"),
            ("/v1/index", {"index": "../web", "images": images}, "index"),
            ("/v1/search", {"index": "web", "image": file(RED), "top_k": 1001}, "top_k"),
            ("/v1/search", {"index": "web", "image": file(RED), "path": "/etc"}, "path"),
        ):
            refused = http.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["field"]) == (400, field)
        assert http.delete("/v1/index/web").status_code == 204
        assert http.delete("/v1/index/web").status_code == 404


def test_the_command_indexes_a_folder_and_searches_it(mesh, photos, capfd, monkeypatch):
    monkeypatch.setenv("IMAGEMESH_SERVER", mesh.grpc_address)
    assert main(["index", str(photos)]) == 0
    out, err = capfd.readouterr()
    assert out == "pictures: 13 pictures added, 13 in all, by tiny-vit\n"
    assert sorted(line.split()[1] for line in err.splitlines()) == [str(photos / "text.jpg"), str(photos / "torn.png")]
    assert main(["search", str(photos / "more" / "03.png"), "--top-k", "2"]) == 0
    assert capfd.readouterr().out.splitlines()[0] == f"1.0000 {photos / 'more' / '03.png'}"
    assert main(["duplicates", "--min-similarity", "0.999999", "--json"]) == 0
    pairs = json.loads(capfd.readouterr().out)
    assert [(one["first"], one["second"]) for one in pairs] == [(str(photos / "00.png"), str(photos / "copy.png"))]
    assert main(["clusters", "--clusters", "3", "--json"]) == 0
    parts = json.loads(capfd.readouterr().out)
    assert sum(one["count"] for one in parts["clusters"]) == len(parts["pictures"]) == 13
    assert main(["clusters", "--clusters", "1"]) == 0
    assert capfd.readouterr().out.splitlines()[1].split()[:2] == ["0", "13"]
    parquet = photos / "mine.parquet"
    assert main(["vectors", "-o", str(parquet)]) == 0
    assert capfd.readouterr().out == f"{parquet}: 13 pictures\n"
    table = pyarrow.parquet.read_table(parquet)
    with Client(mesh.grpc_address) as client:
        own = client.embed(table.column("id").to_pylist(), normalize=True)
    np.testing.assert_allclose(np.stack(table.column("vector").to_numpy()), own.vectors, atol=1e-5)
    about = json.loads(table.schema.metadata[b"imagemesh"])
    assert (about["model"], about["width"], about["count"]) == (own.model, own.vectors.shape[1], 13)
    assert main(["vectors", "--index", "their", "-o", str(photos / "none.parquet")]) == 2
    assert "index 'their' not found" in capfd.readouterr().err
    assert sorted(path.suffix for path in photos.glob("*.par*")) == [".parquet"]
    assert main(["indexes", "--delete", "pictures"]) == 0
    assert "pictures " not in capfd.readouterr().out
    assert main(["search", str(photos / "00.png")]) == 2
    assert "index 'pictures' not found" in capfd.readouterr().err
