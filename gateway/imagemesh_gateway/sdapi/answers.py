"""Answers of ``txt2img`` and ``img2img``: pictures, the request again, and as a JSON string what was made."""

import io
import json
from typing import Any, Final

from PIL import Image

from imagemesh.v1 import gateway_service_pb2
from imagemesh.v1 import job_service_pb2 as pb
from imagemesh_gateway.sdapi.bodies import GenerationBody
from imagemesh_gateway.sdapi.pictures import in_base64
from imagemesh_gateway.sdapi.units import PICTURES

# Pictures that come in are not sent back.
_LEFT_OUT: Final = ("init_images", "mask", "latent_mask", "firstpass_image", "infotext")


def without_pictures(value: Any) -> Any:
    """The scripts' arguments again, their pictures null."""
    if isinstance(value, dict):
        return {name: None if name in PICTURES else without_pictures(one) for name, one in value.items()}
    return [without_pictures(one) for one in value] if isinstance(value, list) else value


def generation_json(
    job: pb.Job, result: gateway_service_pb2.GenerateResult | None, body: GenerationBody, ignored: list[str]
) -> dict[str, Any]:
    """The whole answer; no result: it was interrupted."""
    images = [] if result is None else list(result.images)
    parameters = body.model_dump(exclude=set(_LEFT_OUT)) | dict.fromkeys(_LEFT_OUT[:2])
    parameters["alwayson_scripts"] = without_pictures(body.alwayson_scripts)
    info = _info(job, result, body) | {"ignored_settings": ignored, "interrupted": result is None}
    shown = images if body.send_images is not False else []
    return {
        "images": [in_base64(image.png) for image in shown],
        "parameters": parameters,
        "info": json.dumps(info),
    }


def _info(job: pb.Job, result: gateway_service_pb2.GenerateResult | None, body: GenerationBody) -> dict[str, Any]:
    made = gateway_service_pb2.GenerateParameters() if result is None else result.parameters
    images = [] if result is None else list(result.images)
    subseed = made.variation_seed if made.HasField("variation_seed") else -1
    count = len(images)
    return {
        "prompt": job.request.prompt,
        "all_prompts": [job.request.prompt] * count,
        "negative_prompt": job.request.negative_prompt,
        "all_negative_prompts": [job.request.negative_prompt] * count,
        "seed": job.request.seed,
        "all_seeds": [image.seed for image in images],
        "subseed": subseed,
        "all_subseeds": [subseed + i if subseed >= 0 else -1 for i in range(count)],
        "subseed_strength": made.variation_strength,
        "width": made.width,
        "height": made.height,
        "sampler_name": made.scheduler,
        "cfg_scale": made.guidance_scale,
        "steps": made.steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": job.request.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": job.request.strength if job.request.HasField("strength") else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [infotext_of(image.png) for image in images],
        "styles": [],
        "job_timestamp": job.created.ToJsonString(),
        "clip_skip": made.clip_skip + 1,
        "is_using_inpainting_conditioning": False,
        "backends": dict(made.backends),
    }


def infotext_of(png: bytes) -> str:
    """What the picture says of how it was made; empty: nothing."""
    with Image.open(io.BytesIO(png)) as picture:
        text = picture.info.get("parameters", "")
    return text if isinstance(text, str) else ""
