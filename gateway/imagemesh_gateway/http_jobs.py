"""Jobs over HTTP."""

from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Header, Query, Response
from fastapi.responses import JSONResponse
from google.rpc import status_pb2

from imagemesh.v1 import gateway_service_pb2
from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.http_errors import Conflict
from imagemesh_gateway.http_job_body import JobBody, job_json, state_name, state_number
from imagemesh_gateway.http_job_events import add_job_events
from imagemesh_gateway.http_media import JSON, PNG, generation_answer, negotiated, require_json
from imagemesh_gateway.jobs.record import State
from imagemesh_gateway.jobs.service import DEFAULT_PAGE, MAX_PAGE, Jobs
from imagemesh_runtime.errors import InvalidArgument, NotFound, RemoteError

JOBS_PATH: Final = "/v1/jobs"
# What may stand in the query of a list, for errors to say.
JOB_LIST_ALLOWED: Final = {"state": ", ".join(State), "page_size": f"1 to {MAX_PAGE}"}


def add_jobs(app: FastAPI, jobs: Jobs) -> None:
    """All routes below ``/v1/jobs``."""
    _add_create_and_cancel(app, jobs)
    _add_look(app, jobs)
    _add_results(app, jobs)
    add_job_events(app, jobs)


def _add_create_and_cancel(app: FastAPI, jobs: Jobs) -> None:
    @app.post(JOBS_PATH, status_code=202, dependencies=[Depends(require_json)])
    async def create_job(
        body: JobBody, idempotency_key: Annotated[str, Header(description="Instead of the field.")] = ""
    ) -> Response:
        """Accept a generation: 202, or 200 with the job that has this idempotency key already."""
        job, existed = await jobs.create(body.to_create(_one_key(body.idempotency_key, idempotency_key)))
        return JSONResponse(job_json(job), 200 if existed else 202, {"Location": f"{JOBS_PATH}/{job.id}"})

    @app.post("/v1/jobs/{job}/cancel")
    async def cancel_job(job: str) -> Response:
        """Cancel a job unless it is finished, and tell how it stands now."""
        return JSONResponse(job_json(await jobs.cancel(job)))


def _one_key(field: str, header: str) -> str:
    if field and header and field != header:
        raise InvalidArgument("idempotency_key", field, "the same as the header Idempotency-Key, or left out")
    return field or header


def _add_look(app: FastAPI, jobs: Jobs) -> None:
    @app.get(JOBS_PATH)
    async def list_jobs(
        state: Annotated[list[State] | None, Query(description="Only jobs in one of these.")] = None,
        page_size: Annotated[int, Query(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE,
        page_token: Annotated[str, Query(description="next_page_token of the page before.")] = "",
    ) -> Response:
        """List jobs, the newest first."""
        numbers = [state_number(one) for one in state or ()]
        asked = pb.ListJobsRequest(states=numbers, page_size=page_size, page_token=page_token)
        page, token = await jobs.page(asked)
        return JSONResponse({"jobs": [job_json(job) for job in page], "next_page_token": token})

    @app.get("/v1/jobs/{job}")
    async def get_job(job: str) -> Response:
        """Tell how a job stands."""
        return JSONResponse(job_json(await jobs.get(job, pictures=False)))


def _add_results(app: FastAPI, jobs: Jobs) -> None:
    pictures: dict[int | str, dict[str, Any]] = {200: {"content": {PNG: {}, JSON: {}}, "description": "The pictures."}}

    @app.get("/v1/jobs/{job}/result", responses=pictures)
    async def get_result(job: str, media: Annotated[str, Depends(negotiated)]) -> Response:
        """Answer what ``/v1/generate`` would have; 409 unless the job has succeeded, or as it failed."""
        return generation_answer(result_of(await jobs.get(job)), media)

    @app.get("/v1/jobs/{job}/images/{index}", responses={200: {"content": {PNG: {}}, "description": "The picture."}})
    async def get_image(job: str, index: int) -> Response:
        """Answer one picture of a job that succeeded."""
        images = result_of(await jobs.get(job)).images
        if not 0 <= index < len(images):
            raise NotFound("image", str(index), map(str, range(len(images))))
        image = images[index]
        return Response(image.png, media_type=PNG, headers={"X-Imagemesh-Seed": str(image.seed)})


def result_of(job: pb.Job) -> gateway_service_pb2.GenerateResult:
    """The job's result.

    Raises:
        RemoteError: the job failed, with its own code.
        Conflict: it is not finished, or was cancelled.
    """
    if job.state == pb.JOB_STATE_FAILED:
        raise RemoteError(status_pb2.Status(code=job.error.code, message=job.error.message))
    if job.state != pb.JOB_STATE_SUCCEEDED:
        raise Conflict(f"job {job.id} has no result: it is {state_name(job)}")
    return job.result
