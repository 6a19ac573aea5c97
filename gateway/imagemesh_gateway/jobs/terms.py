"""What a caller asked for, checked and filled in, so that every attempt at the job draws the same picture."""

import hashlib
import secrets
import time
from dataclasses import dataclass

from imagemesh.v1 import gateway_service_pb2, job_service_pb2, priority_pb2
from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.config import GatewayConfig
from imagemesh_gateway.costs import amount
from imagemesh_gateway.jobs.record import NewJob
from imagemesh_gateway.plan import Plan
from imagemesh_runtime.context import current_call
from imagemesh_runtime.errors import InvalidArgument

MAX_KEY_CHARACTERS = 200
# Seconds, as priority.proto has it.
PATIENCE = {
    priority_pb2.PRIORITY_UNSPECIFIED: 30.0,
    priority_pb2.PRIORITY_INTERACTIVE: 0.0,
    priority_pb2.PRIORITY_NORMAL: 30.0,
    priority_pb2.PRIORITY_BATCH: 300.0,
}


@dataclass(frozen=True)
class Terms:
    """The part of the request that is about the job."""

    key: str | None
    digest: bytes
    timeout: float | None
    retention: float


def check(request: job_service_pb2.CreateJobRequest, config: GatewayConfig) -> Terms:
    """Read the terms.

    Raises:
        InvalidArgument: a value isn't allowed.
    """
    if not request.HasField("generate"):
        raise InvalidArgument("generate", None, "a GenerateRequest")
    if len(request.idempotency_key) > MAX_KEY_CHARACTERS:
        got = f"{len(request.idempotency_key)} characters"
        raise InvalidArgument("idempotency_key", got, f"at most {MAX_KEY_CHARACTERS} characters")
    timeout = request.timeout_seconds if request.HasField("timeout_seconds") else None
    if timeout is not None and not 0 < timeout <= config.max_job_retention_seconds:
        allowed = f"above 0, and at most {config.max_job_retention_seconds:g}"
        raise InvalidArgument("timeout_seconds", timeout, allowed)
    retention = request.retention_seconds if request.HasField("retention_seconds") else config.job_retention_seconds
    if not 0 < retention <= config.max_job_retention_seconds:
        allowed = f"above 0, and at most {config.max_job_retention_seconds:g}"
        raise InvalidArgument("retention_seconds", retention, allowed)
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
    return Terms(request.idempotency_key or None, digest, timeout, retention)


def new_job(terms: Terms, request: gateway_service_pb2.GenerateRequest, plan: Plan) -> NewJob:
    """The job, accepted now from the current caller."""
    now, caller = time.time(), current_caller()
    resolved = _resolved(request, plan)
    resolved.priority = caller.capped(request.priority)
    return NewJob(
        id=secrets.token_hex(8),
        key=terms.key,
        digest=terms.digest,
        request=resolved.SerializeToString(),
        summary=_without_pictures(resolved).SerializeToString(),
        created=now,
        due=now + PATIENCE[resolved.priority],
        deadline=None if terms.timeout is None else now + terms.timeout,
        retention=terms.retention,
        tenant=caller.tenant,
        owner=caller.id,
        model=plan.model,
        amount=amount(plan),
        trace=current_call().trace.header,
    )


def _resolved(request: gateway_service_pb2.GenerateRequest, plan: Plan) -> gateway_service_pb2.GenerateRequest:
    """The request with what was drawn, and with the model's defaults of today."""
    resolved = gateway_service_pb2.GenerateRequest()
    resolved.CopyFrom(request)
    resolved.model, resolved.width, resolved.height = plan.model, plan.width, plan.height
    resolved.steps, resolved.guidance_scale = plan.steps, plan.guidance_scale
    if not request.seeds:
        resolved.seed = plan.seeds[0]
    if plan.variation_seeds:
        resolved.variation_seed = plan.variation_seeds[0]
    for unit, control in zip(resolved.controls, plan.controls, strict=True):
        unit.model = control.model
        if control.preprocess is not None:
            unit.preprocessor_model = control.preprocess.model
    if plan.look.classifier:
        resolved.classify.model, resolved.classify.top_k = plan.look.classifier, plan.look.labels
    if plan.look.embedder:
        resolved.embed.model = plan.look.embedder
    for reference, made in zip(resolved.references, plan.references, strict=True):
        reference.adapter = made.adapter
    return resolved


def _without_pictures(
    request: gateway_service_pb2.GenerateRequest,
) -> gateway_service_pb2.GenerateRequest:
    light = gateway_service_pb2.GenerateRequest()
    light.CopyFrom(request)
    light.ClearField("image")
    light.ClearField("mask")
    for one in (*light.controls, *light.references):
        one.ClearField("image")
    return light
