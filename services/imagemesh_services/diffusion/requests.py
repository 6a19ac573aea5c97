"""A request for samples, checked."""

from imagemesh.v1 import diffusion_service_pb2 as pb
from imagemesh.v1 import priority_pb2
from imagemesh.v1.priority_pb2 import Priority
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import (
    MAX_CONTROL_SCALE,
    MAX_CONTROLS,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MAX_TOKENS,
    check_block_weights,
    check_interval,
    check_pixels,
    check_range,
    check_size,
)
from imagemesh_runtime.tensors import FLOATS, Array, from_proto, require_finite
from imagemesh_services.diffusion.backend import DiffusionModel, ImageInputs, Moments, SampleInputs, Wants
from imagemesh_services.diffusion.checkpoint import read_message
from imagemesh_services.diffusion.features import read_features
from imagemesh_services.diffusion.generation import PATIENCE, Terms
from imagemesh_services.diffusion.guiders import find_guider
from imagemesh_services.diffusion.phases import PHASES, check_rows, phases_of
from imagemesh_services.diffusion.references import read_references
from imagemesh_services.diffusion.scheduler_options import with_options
from imagemesh_services.diffusion.schedulers import find_scheduler
from imagemesh_services.diffusion.thrift import read_savings

# A picture's latents, as the VAE answers, and the same of the picture without what is redrawn.
_MOMENTS = ("image_mean", "image_log_variance")
_MASKED = ("masked_image_mean", "masked_image_log_variance")
_INPUTS = (*_MOMENTS, "image_latents", "mask", *_MASKED)
_MAX_CONFIRM_AS = 64
# As torch's ``interpolate`` calls them.
LATENT_RESIZES = ("bilinear", "nearest", "nearest-exact", "bicubic")

_PRIORITIES = {
    priority_pb2.PRIORITY_UNSPECIFIED: "normal",
    priority_pb2.PRIORITY_INTERACTIVE: "interactive",
    priority_pb2.PRIORITY_NORMAL: "normal",
    priority_pb2.PRIORITY_BATCH: "batch",
}


def read_inputs(request: pb.SampleRequest, model: DiffusionModel) -> SampleInputs:
    """The request as arrays and numbers, each within its bounds and as the model wants it.

    Raises:
        InvalidArgument: one isn't.
        NotFound: there is no such scheduler or guider.
    """
    check_size("width", request.width, model.multiple)
    check_size("height", request.height, model.multiple)
    check_range("steps", request.steps, 1, MAX_STEPS)
    check_range("guidance_scale", request.guidance_scale, 0, MAX_GUIDANCE)
    check_range("seeds", len(request.seeds), 1, MAX_IMAGES)
    check_pixels("seeds", len(request.seeds), request.width, request.height)
    check_range("controls", len(request.controls), 0, MAX_CONTROLS)
    for i, seed in enumerate(request.seeds):
        check_range(f"seeds[{i}]", seed, 0, MAX_SEED)
    _check_controls(request)
    _check_variation(request)
    wants = model.wants
    guided = wants.negative and request.guidance_scale > 1
    return SampleInputs(
        conditioning=_phases(request) | _conditioning(request, guided, wants),
        width=request.width,
        height=request.height,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        scheduler=with_options(find_scheduler(request.scheduler), request.scheduler_options),
        seeds=tuple(request.seeds),
        image=_image(request),
        variation_seeds=tuple(request.variation_seeds),
        variation_strength=request.variation_strength,
        guider=find_guider(request.guider, request.guider_options),
        guidable=wants.negative,
        rounds_up=model.rounds_up,
        references=read_references(request, guided),
        features=read_features(request),
        savings=read_savings(request),
    )


def _check_controls(request: pb.SampleRequest) -> None:
    for i, unit in enumerate(request.controls):
        check_range(f"controls[{i}].scale", unit.scale, 0, MAX_CONTROL_SCALE)
        check_interval(f"controls[{i}]", unit.start, unit.end if unit.HasField("end") else 1.0)
        check_block_weights(f"controls[{i}].block_weights", unit.block_weights)
    for i, unit in enumerate(request.controls):
        shape = (request.height, request.width, 3)
        from_proto(unit.image, f"controls[{i}].image", dtypes=["uint8"], shape=shape)


def _check_variation(request: pb.SampleRequest) -> None:
    check_range("variation_strength", request.variation_strength, 0, 1)
    wanted = len(request.seeds) if request.variation_strength else 0
    if len(request.variation_seeds) != wanted:
        raise InvalidArgument("variation_seeds", f"{len(request.variation_seeds)} seeds", f"{wanted}, one a picture")
    for i, seed in enumerate(request.variation_seeds):
        check_range(f"variation_seeds[{i}]", seed, 0, MAX_SEED)


def _image(request: pb.SampleRequest) -> ImageInputs | None:
    unknown = sorted(set(request.inputs) - set(_INPUTS))
    if unknown:
        raise InvalidArgument("inputs", unknown, f"a map of {', '.join(_INPUTS)} alone")
    if not request.inputs:
        return None
    if not 0 < request.strength <= 1:
        raise InvalidArgument("strength", request.strength, "above 0, and at most 1")
    if int(request.steps * request.strength) < 1:
        allowed = f"at least {1 / request.steps:g}, so that one of {request.steps} steps is done"
        raise InvalidArgument("strength", request.strength, allowed)
    mask = None
    if "mask" in request.inputs:
        shape = (1, 1, request.height, request.width)
        mask = from_proto(request.inputs["mask"], "inputs['mask']", dtypes=["uint8"], shape=shape)
        check_range("the largest value of inputs['mask']", int(mask.max()), 0, 1)
    masked = _moments(request, _MASKED, rows=1) if set(_MASKED) & set(request.inputs) else None
    resize = request.latent_resize or LATENT_RESIZES[0]
    if resize not in LATENT_RESIZES:
        raise InvalidArgument("latent_resize", resize, ", ".join(LATENT_RESIZES))
    return ImageInputs(_source(request), request.strength, mask, masked, resize)


def _source(request: pb.SampleRequest) -> Moments | Array:
    """Latents as they are, or the distribution to draw them from."""
    if "image_latents" not in request.inputs:
        return _moments(request, _MOMENTS)
    both = [name for name in _MOMENTS if name in request.inputs]
    if both:
        raise InvalidArgument("inputs", both, "absent where image_latents are given")
    return _latents(request, "image_latents", len(request.seeds))


def _moments(request: pb.SampleRequest, names: tuple[str, str], rows: int | None = None) -> Moments:
    missing = [name for name in names if name not in request.inputs]
    if missing:
        raise InvalidArgument("inputs", sorted(request.inputs), f"a map with {' and '.join(missing)} too")
    mean, log_variance = (_latents(request, name, rows) for name in names)
    if mean.shape != log_variance.shape:
        raise InvalidArgument(f"inputs[{names[1]!r}].shape", list(log_variance.shape), str(list(mean.shape)))
    if len(mean) not in (1, len(request.seeds)):
        raise InvalidArgument(f"inputs[{names[0]!r}].shape[0]", len(mean), f"1 or {len(request.seeds)}, as seeds")
    return Moments(mean, log_variance)


def _latents(request: pb.SampleRequest, name: str, rows: int | None) -> Array:
    field = f"inputs[{name!r}]"
    found = from_proto(request.inputs[name], field, dtypes=FLOATS, shape=(rows, None, None, None))
    for axis in range(1, 4):
        check_range(f"{field}.shape[{axis}]", found.shape[axis], 1, MAX_SIDE)
    return require_finite(found, field)


def read_terms(request: pb.SampleRequest, fingerprint: str) -> Terms:
    """On what terms the generation runs.

    Raises:
        InvalidArgument: a bound is passed, or the checkpoint is not one of this request on this model.
    """
    check_range("checkpoint_every", request.checkpoint_every, 0, MAX_STEPS)
    given = request.HasField("resume_from")
    resume_from = read_message(request.resume_from, fingerprint) if given else None
    if request.priority not in _PRIORITIES:
        raise InvalidArgument("priority", request.priority, ", ".join(map(Priority.Name, _PRIORITIES)))
    check_range("preview_every", request.preview_every, 0, MAX_STEPS)
    check_range("confirm_as", len(request.confirm_as), 0, _MAX_CONFIRM_AS)
    patience = PATIENCE[_PRIORITIES[request.priority]]
    return Terms(
        patience, request.checkpoint_every, resume_from, request.alone, request.preview_every, request.confirm_as
    )


def _phases(request: pb.SampleRequest) -> dict[str, Array]:
    given = [name for name in PHASES if name in request.conditioning]
    shape = (request.steps,)
    return {
        name: from_proto(request.conditioning[name], f"conditioning[{name!r}]", dtypes=["int32"], shape=shape)
        for name in given
    }


def _conditioning(request: pb.SampleRequest, guided: bool, wants: Wants) -> dict[str, Array]:
    names = [*wants.names, *(f"negative_{name}" for name in wants.names if guided)]
    found: dict[str, Array] = {}
    for name in names:
        if name not in request.conditioning:
            raise InvalidArgument("conditioning", sorted(request.conditioning), f"a map with {name!r}")
        found[name] = _embeddings(request, name)
    changing = [name for name in PHASES if wants.changing]
    allowed = [*wants.names, *(f"negative_{name}" for name in wants.names if wants.negative), *changing]
    unknown = sorted(set(request.conditioning) - set(allowed))
    if unknown:
        raise InvalidArgument("conditioning", unknown, f"a map of {' and '.join(allowed)} alone")
    for name in wants.names if guided and wants.equal else ():
        pair = {one: found[one].shape[1:] for one in (name, f"negative_{name}")}
        if len(set(pair.values())) > 1:
            raise InvalidArgument("conditioning", pair, "embeddings of equal shape")
    for name in (one for one in found if one.endswith("_mask")):
        embeds = name.removesuffix("_mask")
        pair = {one: found[one].shape[:2] for one in (name, embeds)}
        if len(set(pair.values())) > 1:
            raise InvalidArgument("conditioning", pair, "a mask of as many tokens as the embeddings have")
    return found


def _embeddings(request: pb.SampleRequest, name: str) -> Array:
    """One of the tensors, by what its name says: a mask [1, tokens], a summary [1, width], or [1, tokens, width].

    Of a prompt that changes a row a phase.
    """
    field, phases = f"conditioning[{name!r}]", phases_of(name)
    if name.endswith("_mask"):
        found = from_proto(request.conditioning[name], field, dtypes=["int64"], shape=(1, None))
    else:
        rows = None if phases in request.conditioning else 1
        shape = (rows, None) if "pooled" in name else (rows, None, None)
        found = require_finite(from_proto(request.conditioning[name], field, dtypes=FLOATS, shape=shape), field)
    check_range(f"{field}.shape[1]", found.shape[1], 1, MAX_TOKENS)
    if name.endswith("_mask") and (found.min() < 0 or found.max() != 1):
        raise InvalidArgument(field, f"{found.min()} to {found.max()}", "of 0 and 1, not all 0")
    if phases in request.conditioning:
        check_rows(f"conditioning[{phases!r}]", _phases(request)[phases], len(found))
    return found
