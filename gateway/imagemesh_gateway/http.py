"""The gateway's HTTP face: generate, scrape, probe."""

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client.exposition import choose_encoder

from imagemesh_gateway.direct import Direct
from imagemesh_gateway.http_body import ALLOWED, GenerateBody
from imagemesh_gateway.http_errors import add_error_handlers
from imagemesh_gateway.http_faces import tell
from imagemesh_gateway.http_job_body import JOB_ALLOWED
from imagemesh_gateway.http_jobs import JOB_LIST_ALLOWED, JOBS_PATH, add_jobs
from imagemesh_gateway.http_media import JSON, PNG, generation_answer, negotiated, require_json
from imagemesh_gateway.http_openai import add_openai
from imagemesh_gateway.http_openapi import describe
from imagemesh_gateway.http_preprocess import PATH, PREPROCESS_ALLOWED, add_preprocessors
from imagemesh_gateway.http_search import INDEX_PATH, SEARCH_ALLOWED, SEARCH_PATH, add_search
from imagemesh_gateway.jobs.service import Jobs
from imagemesh_gateway.mesh import Mesh
from imagemesh_gateway.preprocess import PreprocessServicer
from imagemesh_gateway.readiness import Readiness
from imagemesh_gateway.sdapi.routes import add_sdapi
from imagemesh_gateway.search import SearchForwarder
from imagemesh_runtime.metrics import Metrics


def create_app(mesh: Mesh, jobs: Jobs, metrics: Metrics, ready: Callable[[], bool]) -> FastAPI:
    """The application; bounds and the call's context are up to ``http_guard``."""
    app = FastAPIOffline(  # whose page of all fields asks no other host for its script
        redoc_url=None,
        static_url="/docs-files",
        title="imagemesh",
        summary="Images made and understood by a mesh of gRPC services",
        swagger_ui_parameters={"validatorUrl": None},
    )
    _add_probes(app, Readiness(mesh, metrics), ready)
    direct = Direct(mesh, jobs.admission, metrics)

    @app.get("/metrics", include_in_schema=False)
    async def scrape(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)

    @app.post(
        "/v1/generate",
        dependencies=[Depends(require_json)],
        responses={200: {"content": {PNG: {}, JSON: {}}, "description": "The picture."}},
    )
    async def generate_picture(body: GenerateBody, media: Annotated[str, Depends(negotiated)]) -> Response:
        """Make a picture: JSON with the picture in base64, or a PNG where the client likes that better."""
        return generation_answer(await direct.result(body.to_proto()), media)

    add_preprocessors(app, PreprocessServicer(mesh.preprocessors, metrics))
    add_search(app, SearchForwarder(mesh, metrics))
    add_jobs(app, jobs)
    add_openai(app, mesh, jobs)
    add_sdapi(app, mesh, jobs)
    by_path = {PATH: PREPROCESS_ALLOWED, JOBS_PATH: JOB_ALLOWED, f"{JOBS_PATH}?": JOB_LIST_ALLOWED}
    by_path |= {INDEX_PATH: SEARCH_ALLOWED, SEARCH_PATH: SEARCH_ALLOWED}
    add_error_handlers(app, tell, ALLOWED, by_path)
    describe(app)
    return app


def _add_probes(app: FastAPI, readiness: Readiness, ready: Callable[[], bool]) -> None:
    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> Response:
        return Response("alive\n")

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        state = await readiness.state()
        serves = state.serves if ready() else []
        told = {"ready": bool(serves), "serves": serves, "draining": not ready(), "services": dict(state.services)}
        return JSONResponse(told, 200 if serves else 503)
