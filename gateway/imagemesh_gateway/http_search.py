"""Search over HTTP."""

from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from imagemesh.v1 import image_pb2, vit_service_pb2
from imagemesh.v1 import search_service_pb2 as pb
from imagemesh_gateway.http_body import ALLOWED, Picture, Strict, Text
from imagemesh_gateway.http_media import require_json
from imagemesh_gateway.search import SearchForwarder
from imagemesh_runtime.limits import MAX_ID_CHARACTERS, MAX_IMAGES, MAX_MATCHES

INDEX_PATH: Final = "/v1/index"
SEARCH_PATH: Final = "/v1/search"
# What the fields of the bodies may be, for errors to say.
SEARCH_ALLOWED: Final = {
    "index": "1 to 64 lower-case letters, digits, - and _",
    "images": f"a list of 1 to {MAX_IMAGES}",
    "images[].id": f"a string of 1 to {MAX_ID_CHARACTERS} characters",
    "images[].image": ALLOWED["image"],
    "image": ALLOWED["image"],
    "model": ALLOWED["model"],
    "top_k": f"1 to {MAX_MATCHES}",
    "min_similarity": "-1 to 1",
}


class NamedPicture(Strict):
    """A picture and what it is called in the index."""

    id: Text = Field(min_length=1, max_length=MAX_ID_CHARACTERS)
    image: Picture


class IndexBody(Strict):
    """Pictures for an index."""

    index: Text
    images: Annotated[list[NamedPicture], Field(min_length=1, max_length=MAX_IMAGES)]
    model: Text = Field("", description="Which makes the vectors of a new index; empty is the mesh's default.")

    def to_proto(self) -> pb.IndexImagesRequest:
        """The same request for the service."""
        return pb.IndexImagesRequest(
            index=self.index,
            images=[image_pb2.Image(encoded=one.image) for one in self.images],
            ids=[one.id for one in self.images],
            model=self.model,
        )


class SearchBody(Strict):
    """A picture to find the like of."""

    index: Text
    image: Picture
    top_k: int = Field(10, ge=1, le=MAX_MATCHES)
    min_similarity: float = Field(-1, ge=-1, le=1, allow_inf_nan=False)

    def to_proto(self) -> pb.SearchImagesRequest:
        """The same request for the service."""
        return pb.SearchImagesRequest(
            index=self.index,
            images=[image_pb2.Image(encoded=self.image)],
            top_k=self.top_k,
            min_similarity=self.min_similarity,
        )


def add_search(app: FastAPI, search: SearchForwarder) -> None:
    """``POST``, ``GET`` and ``DELETE /v1/index``, and ``POST /v1/search``."""

    @app.post(INDEX_PATH, dependencies=[Depends(require_json)])
    async def index_pictures(body: IndexBody) -> Response:
        """Put pictures into an index, which is made if it isn't there."""
        answer = await search.IndexImages(body.to_proto(), None)
        return JSONResponse({"index": _told(answer.index), "replaced": answer.replaced})

    @app.get(INDEX_PATH)
    async def list_indexes() -> Response:
        """List the indexes."""
        answer = await search.ListIndexes(pb.ListIndexesRequest(), None)
        return JSONResponse({"indexes": [_told(one) for one in answer.indexes]})

    @app.delete(f"{INDEX_PATH}/{{name}}")
    async def delete_index(name: str) -> Response:
        """Delete an index with all that is in it."""
        await search.DeleteIndex(pb.DeleteIndexRequest(index=name), None)
        return Response(status_code=204)

    @app.post(SEARCH_PATH, dependencies=[Depends(require_json)])
    async def search_pictures(body: SearchBody) -> Response:
        """Find the pictures of an index that are most like one."""
        answer = await search.SearchImages(body.to_proto(), None)
        matches = [{"id": one.id, "similarity": one.similarity} for one in answer.results[0].matches]
        return JSONResponse({"matches": matches, "index": _told(answer.index)})


def _told(info: pb.IndexInfo) -> dict[str, Any]:
    pooling = {vit_service_pb2.POOLING_CLS: "cls", vit_service_pb2.POOLING_MEAN: "mean"}.get(info.pooling, "auto")
    return {
        "name": info.name,
        "model": info.model,
        "pooling": pooling,
        "width": info.width,
        "count": info.count,
        "store": info.store,
    }
