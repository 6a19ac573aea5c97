"""What ``txt2img`` and ``img2img`` take: that API's fields, under its names and with its defaults."""

import math
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field

from imagemesh_gateway.http_body import Strict, Text
from imagemesh_runtime.limits import MAX_CONTROLS, MAX_IMAGES

# Most of a request's lists and objects of free form.
_MAX_FREE: Final = 200
_MAX_DEPTH: Final = 16


def _sayable(value: Any, depth: int = 0) -> Any:
    """What JSON can say again, since answers repeat it: no NaN, no half of a surrogate pair, nothing too deep."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    elif isinstance(value, dict | list):
        for one in value if isinstance(value, list) else (*value, *value.values()):
            _sayable(one, depth + 1)
    return value


Number = Annotated[float, Field(allow_inf_nan=False)] | None
Free = Annotated[Any, AfterValidator(_sayable)]


class GenerationBody(Strict):
    """What both calls take. Null is as good as absent, and so is what that API takes for no value (-1 for a seed)."""

    prompt: Text | None = ""
    negative_prompt: Text | None = ""
    styles: list[Text] | None = Field(None, max_length=_MAX_FREE)
    seed: int | None = -1
    subseed: int | None = -1
    subseed_strength: Number = 0.0
    sampler_name: Text | None = None
    sampler_index: Text | None = None
    scheduler: Text | None = None
    batch_size: int | None = Field(1, ge=1, le=MAX_IMAGES)
    n_iter: int | None = Field(1, ge=1, le=MAX_IMAGES)
    steps: int | None = None
    cfg_scale: Number = None
    width: int | None = None
    height: int | None = None
    clip_skip: int | None = None
    denoising_strength: Number = None
    override_settings: dict[Text, Free] | None = Field(None, max_length=_MAX_FREE)
    script_name: Text | None = None
    script_args: list[Free] | None = Field(None, max_length=_MAX_FREE)
    alwayson_scripts: dict[Text, Free] | None = Field(None, max_length=_MAX_FREE)
    restore_faces: bool | None = False
    tiling: bool | None = False
    send_images: bool | None = True
    infotext: Text | None = None
    # These change nothing here.
    save_images: bool | None = False
    do_not_save_samples: bool | None = False
    do_not_save_grid: bool | None = False
    override_settings_restore_afterwards: bool | None = True
    force_task_id: Text | None = None
    seed_resize_from_h: int | None = -1
    seed_resize_from_w: int | None = -1
    eta: Number = None
    s_min_uncond: Number = None
    s_churn: Number = None
    s_tmax: Number = None
    s_tmin: Number = None
    s_noise: Number = None
    refiner_checkpoint: Text | None = None
    refiner_switch_at: Number = None
    disable_extra_networks: bool | None = False
    firstpass_image: Text | None = None
    comments: dict[Text, Free] | None = Field(None, max_length=_MAX_FREE)


class Txt2ImgBody(GenerationBody):
    """Pictures from a prompt, and perhaps a second pass."""

    enable_hr: bool | None = False
    hr_scale: Number = 2.0
    hr_upscaler: Text | None = None
    hr_second_pass_steps: int | None = 0
    hr_resize_x: int | None = 0
    hr_resize_y: int | None = 0
    hr_checkpoint_name: Text | None = None
    hr_sampler_name: Text | None = None
    hr_scheduler: Text | None = None
    hr_prompt: Text | None = ""
    hr_negative_prompt: Text | None = ""
    firstphase_width: int | None = 0
    firstphase_height: int | None = 0


class Img2ImgBody(GenerationBody):
    """Pictures from a picture, redrawn whole or where a mask is bright."""

    init_images: list[Text] | None = Field(None, max_length=MAX_IMAGES)
    denoising_strength: Number = 0.75
    resize_mode: int | None = Field(0, ge=0, le=2)
    image_cfg_scale: Number = None
    mask: Text | None = None
    mask_blur: int | None = None
    mask_blur_x: int | None = None
    mask_blur_y: int | None = None
    mask_round: bool | None = None
    inpainting_fill: int | None = Field(0, ge=0, le=1)
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = 0
    inpainting_mask_invert: int | None = Field(0, ge=0, le=1)
    initial_noise_multiplier: Number = None
    latent_mask: Text | None = None
    include_init_images: bool | None = False


_TEXT, _WHOLE, _NUMBER = "a string of valid Unicode", "a whole number", "a finite number"
_FREE: Final = f"finite numbers and valid Unicode, nested at most {_MAX_DEPTH} deep"
_SAID: Final = {
    "batch_size": f"1 to {MAX_IMAGES}",
    "n_iter": f"1 to {MAX_IMAGES}",
    "resize_mode": "0 (just resize), 1 (crop and resize), 2 (resize and fill)",
    "inpainting_fill": "0 (fill), 1 (original)",
    "inpainting_mask_invert": "0, 1",
    "override_settings": f"an object of {_FREE}",
    "comments": f"an object of {_FREE}",
    "script_args": f"a list of {_FREE}",
    "init_images": "a list of pictures in base64",
    "alwayson_scripts": f"an object of ControlNet with args, at most {MAX_CONTROLS} units, of {_FREE}",
}


def _kind(name: str) -> str:
    for body in (Txt2ImgBody, Img2ImgBody):
        if name in body.model_fields:
            told = str(body.model_fields[name].annotation)
            kinds = {"bool": "true or false", "int": _WHOLE, "float": _NUMBER, "list": "a list", "dict": "an object"}
            return next((said for kind, said in kinds.items() if kind in told), _TEXT)
    return _TEXT


# What the fields of each body may be, for errors to say.
TXT2IMG_ALLOWED: Final = {name: _SAID.get(name, _kind(name)) for name in Txt2ImgBody.model_fields}
IMG2IMG_ALLOWED: Final = {name: _SAID.get(name, _kind(name)) for name in Img2ImgBody.model_fields}
