"""The commands about jobs."""

from argparse import Namespace
from datetime import datetime

from imagemesh_cli.client_commands import generation_options, save, tell_generation
from imagemesh_cli.console import connected, counted, print_json, print_table, progress_bar
from imagemesh_client import Job

_SHOWN = 40  # characters of a prompt in the table


def create_job(args: Namespace) -> int:
    """Have pictures made; tell the job's id."""
    options = generation_options(args)
    with connected(args) as client:
        job = client.jobs.create(
            args.prompt,
            idempotency_key=args.key,
            finish_within=args.finish_within,
            keep_for=args.keep_for,
            **options,
        )
    if args.json:
        print_json(_json(job))
    else:
        print(job.id)
    return 0


def list_jobs(args: Namespace) -> int:
    """List jobs, the newest first."""
    with connected(args) as client:
        jobs = client.jobs.list(args.state, args.limit)
    if args.json:
        print_json({"jobs": [_json(job) for job in jobs]})
        return 0
    rows = [(job.id, job.state, _standing(job), _local(job.created), job.tenant, _cut(job.prompt)) for job in jobs]
    print_table(("ID", "STATE", "", "CREATED", "TENANT", "PROMPT"), rows)
    return 0


def watch_job(args: Namespace) -> int:
    """Follow a job to its end; write its pictures where that is wanted."""
    with connected(args) as client, progress_bar("job") as show:
        made = client.jobs.wait(args.job, on_progress=show)
        job = client.jobs.get(args.job)
    if args.output is not None:
        tell_generation(made, save(made, args.output), args.json)
    elif args.json:
        print_json(_json(job))
    else:
        print(f"{job.id}: {job.state}, {counted(len(made.images), 'picture')}")
    return 0 if made.images else 1


def cancel_job(args: Namespace) -> int:
    """Cancel a job unless it is finished; tell which of the two it is."""
    with connected(args) as client:
        job = client.jobs.cancel(args.job)
    if args.json:
        print_json(_json(job))
    else:
        print(f"{job.id}: {job.state}")
    return 0


def _standing(job: Job) -> str:
    """How far it is."""
    if job.state == "queued":
        return f"{job.position} ahead"
    if job.progress is not None:
        return f"{job.progress.step}/{job.progress.steps}"
    return job.error.code if job.error is not None else ""


def _json(job: Job) -> object:
    times = ("created", "started", "finished", "deadline", "expires")
    return {
        "id": job.id,
        "state": job.state,
        "position": job.position,
        "step": job.progress.step if job.progress else None,
        "steps": job.progress.steps if job.progress else None,
        "prompt": job.prompt,
        "model": job.model,
        "attempts": job.attempts,
        "tenant": job.tenant,
        "error": {"code": job.error.code, "message": job.error.message} if job.error else None,
        **{name: at.isoformat() if (at := getattr(job, name)) else None for name in times},
    }


def _local(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
