"""Stable Diffusion's own client, unmodified, and what it does not say, against the mesh."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

from tests.support.mesh import running_mesh


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    with running_mesh(backend="torch", models=str(models)) as host:
        yield host.http_address


@pytest.fixture
def api(address: str) -> webuiapi.WebUIApi:
    host, port = address.split(":")
    return webuiapi.WebUIApi(host=host, port=int(port), sampler="Euler", steps=2)


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address}", timeout=60) as http:
        yield http


SIZE = {"width": 64, "height": 64}


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def generated(http: httpx.Client, **body: Any) -> list[np.ndarray]:
    answer = http.post("/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(image["png"]) for image in answer.json()["images"]]
    return [pixels(Image.open(io.BytesIO(file))) for file in files]


def test_txt2img_draws_what_generate_draws(api: webuiapi.WebUIApi, http: httpx.Client) -> None:
    made = api.txt2img(
        prompt="a fox", negative_prompt="blur", seed=7, cfg_scale=3, n_iter=2, scheduler="Karras", **SIZE
    )
    asked = {"prompt": "a fox", "negative_prompt": "blur", "seed": 7, "guidance": 3, "num_images": 2, "steps": 2}
    expected = generated(http, **asked, scheduler="Euler Karras", **SIZE)
    for picture, drawn in zip(made.images, expected, strict=True):
        np.testing.assert_array_equal(pixels(picture), drawn)
    info = made.info
    assert (info["seed"], info["all_seeds"], info["steps"], info["sampler_name"]) == (7, [7, 8], 2, "Euler Karras")
    assert (info["width"], info["height"], info["sd_model_name"]) == (64, 64, "tiny-sd")
    assert made.parameters["n_iter"] == 2
    assert info["infotexts"][0] == made.image.info["parameters"]


def test_a_varied_seed_is_ours(api: webuiapi.WebUIApi, http: httpx.Client) -> None:
    made = api.txt2img(prompt="x", seed=1, subseed=5, subseed_strength=0.3, sampler_name="Euler", **SIZE)
    (drawn,) = generated(
        http,
        prompt="x",
        seed=1,
        variation_seed=5,
        variation_strength=0.3,
        scheduler="Euler",
        steps=2,
        guidance=7,
        **SIZE,
    )
    np.testing.assert_array_equal(pixels(made.image), drawn)
    assert made.info["subseed"] == 5


def test_hires_is_a_second_pass(api: webuiapi.WebUIApi, http: httpx.Client) -> None:
    made = api.txt2img(
        prompt="x", seed=1, enable_hr=True, hr_scale=2, hr_upscaler="Latent", denoising_strength=0.5, **SIZE
    )
    hires = {"scale": 2, "upscaler": "Latent", "strength": 0.5}
    (drawn,) = generated(http, prompt="x", seed=1, scheduler="Euler", steps=2, guidance=7, hires=hires, **SIZE)
    np.testing.assert_array_equal(pixels(made.image), drawn)
    assert made.image.size == (128, 128)


def test_a_control_unit_steers(api: webuiapi.WebUIApi, http: httpx.Client, control_image: Image.Image) -> None:
    assert api.has_controlnet
    unit = webuiapi.ControlNetUnit(
        image=control_image, module="canny", model="tiny-controlnet [abc123]", weight=0.7, processor_res=64,
        threshold_a=50, threshold_b=100, guidance_end=0.9, control_mode=2,
    )  # fmt: skip
    made = api.txt2img(prompt="x", seed=1, controlnet_units=[unit], **SIZE)
    control = {
        "image": encoded(control_image), "model": "tiny-controlnet", "scale": 0.7, "end": 0.9, "guess_mode": True,
        "preprocessor": "canny", "preprocessor_resolution": 64,
        "preprocessor_parameters": {"low_threshold": 50, "high_threshold": 100},
    }  # fmt: skip
    (drawn,) = generated(http, prompt="x", seed=1, scheduler="Euler", steps=2, guidance=7, controls=[control], **SIZE)
    np.testing.assert_array_equal(pixels(made.image), drawn)


def test_img2img_starts_from_the_picture(
    api: webuiapi.WebUIApi, http: httpx.Client, control_image: Image.Image
) -> None:
    made = api.img2img(images=[control_image], prompt="x", seed=1, steps=4, denoising_strength=0.5, **SIZE)
    (drawn,) = generated(
        http,
        prompt="x",
        seed=1,
        scheduler="Euler",
        steps=4,
        guidance=7,
        strength=0.5,
        image=encoded(control_image),
        **SIZE,
    )
    np.testing.assert_array_equal(pixels(made.image), drawn)
    assert made.info["denoising_strength"] == 0.5


def test_img2img_redraws_where_the_mask_is_bright(api: webuiapi.WebUIApi, control_image: Image.Image) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    for fill in (0, 1):
        made = api.img2img(
            images=[control_image], mask_image=mask, prompt="x", seed=1, denoising_strength=0.9, mask_blur=0,
            inpaint_full_res=False, inpainting_fill=fill, **SIZE,
        )  # fmt: skip
        after, before = pixels(made.image), pixels(control_image)
        np.testing.assert_array_equal(after[:, 32:], before[:, 32:])
        assert np.abs(after[:, :32] - before[:, :32]).mean() > 10
    alone = api.img2img(
        images=[control_image.resize((96, 96))], mask_image=mask, prompt="x", inpaint_full_res=True, mask_blur=0, **SIZE
    )
    assert alone.image.size == (96, 96)


@pytest.mark.parametrize("mode", [1, 2])
def test_a_picture_of_another_shape_is_fitted(api: webuiapi.WebUIApi, mode: int) -> None:
    wide = Image.new("RGB", (128, 64), "red")
    made = api.img2img(images=[wide], prompt="x", resize_mode=mode, **SIZE)
    assert made.image.size == (64, 64)


def test_a_picture_restores_its_request(api: webuiapi.WebUIApi, http: httpx.Client) -> None:
    made = api.txt2img(prompt="a fox,\na hen", negative_prompt="blur", seed=11, cfg_scale=4, scheduler="Karras", **SIZE)
    file = base64.b64decode(made.json["images"][0])
    told = http.post("/sdapi/v1/png-info", json={"image": base64.b64encode(file).decode()}).json()
    assert told["info"] == made.info["infotexts"][0] == api.png_info(made.image).info
    assert told["parameters"]["Prompt"] == "a fox,\na hen"
    assert told["parameters"]["Seed"] == "11"
    again = http.post("/sdapi/v1/txt2img", json={"infotext": told["info"]}).json()
    assert base64.b64decode(again["images"][0]) == file


def test_a_picture_without_parameters_tells_none(api: webuiapi.WebUIApi, control_image: Image.Image) -> None:
    assert api.png_info(control_image).info == ""


def test_extras_resize(api: webuiapi.WebUIApi, control_image: Image.Image) -> None:
    single = api.extra_single_image(control_image, upscaler_1="Lanczos", upscaling_resize=1.5)
    assert single.image.size == (96, 96)
    np.testing.assert_array_equal(
        pixels(single.image), pixels(control_image.resize((96, 96), Image.Resampling.LANCZOS))
    )
    batch = api.extra_batch_images(
        [control_image, control_image],
        upscaler_1="Nearest",
        resize_mode=1,
        upscaling_resize_w=32,
        upscaling_resize_h=48,
    )
    assert [picture.size for picture in batch.images] == [(32, 48)] * 2
    with pytest.raises(RuntimeError, match=r"ESRGAN_4x.* not found"):
        api.extra_single_image(control_image, upscaler_1="ESRGAN_4x")


def test_interrogate_names_the_picture_and_says_by_what(
    api: webuiapi.WebUIApi, http: httpx.Client, control_image: Image.Image
) -> None:
    caption = api.interrogate(control_image).info
    told = http.post("/sdapi/v1/interrogate", json={"image": encoded(control_image)}).json()
    assert caption == told["caption"] != ""
    assert (told["model"], told["kind"]) == ("tiny-vit", "label")


def test_lists_are_what_there_is(api: webuiapi.WebUIApi) -> None:
    assert {"Euler", "Euler a", "DPM++ 2M", "DDIM"} <= set(api.util_get_sampler_names())
    assert not any(name.endswith("Karras") for name in api.util_get_sampler_names())
    assert api.util_get_scheduler_names() == ["automatic", "beta", "exponential", "karras"]
    assert "tiny-sd" in api.util_get_model_names()
    assert {"None", "Lanczos"} <= {one["name"] for one in api.get_upscalers()}
    assert {"Latent"} <= {one["name"] for one in api.get_latent_upscale_modes()}
    for empty in (api.get_sd_vae, api.get_loras, api.get_hypernetworks, api.get_face_restorers, api.get_prompt_styles):
        assert empty() == []
    assert api.get_embeddings()["skipped"] == {}
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_cmd_flags() == {}
    assert api.refresh_checkpoints() is None
    assert api.controlnet_version() == 2
    assert api.controlnet_model_list() == ["tiny-controlnet"]
    assert {"none", "canny"} <= set(api.controlnet_module_list())


def test_detect_preprocesses(http: httpx.Client, control_image: Image.Image) -> None:
    body = {
        "controlnet_module": "canny",
        "controlnet_input_images": [encoded(control_image)],
        "controlnet_processor_res": 64,
    }
    answer = http.post("/controlnet/detect", json=body)
    assert answer.status_code == 200, answer.text
    png = base64.b64decode(answer.json()["images"][0])
    same = http.post(
        "/v1/preprocess", json={"preprocessor": "canny", "image": encoded(control_image), "resolution": 64}
    )
    np.testing.assert_array_equal(
        pixels(Image.open(io.BytesIO(png))), pixels(Image.open(io.BytesIO(base64.b64decode(same.json()["png"]))))
    )


def test_options_are_kept_and_used(api: webuiapi.WebUIApi, http: httpx.Client) -> None:
    assert api.get_options()["sd_model_checkpoint"] == api.util_get_current_model() == "tiny-sd"
    api.set_options({"CLIP_stop_at_last_layers": 2, "samples_format": "png"})
    try:
        made = api.txt2img(prompt="x", seed=1, **SIZE)
        (drawn,) = generated(http, prompt="x", seed=1, scheduler="Euler", steps=2, guidance=7, clip_skip=1, **SIZE)
        np.testing.assert_array_equal(pixels(made.image), drawn)
        own = api.txt2img(prompt="x", seed=1, override_settings={"CLIP_stop_at_last_layers": 1, "eta_ddim": 1}, **SIZE)
        assert (own.info["clip_skip"], own.info["ignored_settings"]) == (1, ["eta_ddim"])
    finally:
        api.set_options({"CLIP_stop_at_last_layers": 1})
    refused = http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "dreams"})
    assert (refused.status_code, refused.json()["error"]) == (404, "NOT_FOUND")
    assert http.post("/sdapi/v1/options", json={"sneed": 1}).json()["field"] == "sneed"


def test_progress_and_interrupt_are_of_what_runs(api: webuiapi.WebUIApi, http: httpx.Client) -> None:
    assert api.get_progress()["state"]["job_count"] == 0
    made: list[Any] = []
    body = {"prompt": "x", "steps": 900, **SIZE}
    call = threading.Thread(target=lambda: made.append(http.post("/sdapi/v1/txt2img", json=body).json()))
    call.start()
    now = api.get_progress()
    while not now["current_image"]:
        now = api.get_progress()
    assert 0 < now["progress"] < 1
    assert now["state"]["job_count"] == 1
    assert now["state"]["sampling_steps"] == 900
    assert now["eta_relative"] > 0
    assert Image.open(io.BytesIO(base64.b64decode(now["current_image"]))).format == "JPEG"
    assert http.get("/sdapi/v1/progress", params={"skip_current_image": True}).json()["current_image"] is None
    assert api.interrupt() == {}
    call.join(30)
    assert made[0]["images"] == []
    assert json.loads(made[0]["info"])["interrupted"] is True
    assert api.get_progress()["progress"] == 0
    assert api.skip() == {}


def test_pictures_need_not_be_sent(http: httpx.Client) -> None:
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "x", "steps": 1, "send_images": False}).json()
    assert answer["images"] == []
    assert len(json.loads(answer["info"])["all_seeds"]) == 1


PNG = encoded(Image.new("RGB", (8, 8)))
BAD = [
    ("txt2img", {"steps": -3}, 422, "steps"),
    ("txt2img", {"width": 10**12}, 422, "width"),
    ("txt2img", {"seed": -2}, 422, "seed"),
    ("txt2img", {"cfg_scale": 1e9}, 422, "cfg_scale"),
    ("txt2img", {"n_iter": 64, "batch_size": 64}, 422, "n_iter times batch_size"),
    ("txt2img", {"sneed": 1}, 422, "sneed"),
    ("txt2img", {"prompt": 7}, 422, "prompt"),
    ("txt2img", {"tiling": True}, 422, "tiling"),
    ("txt2img", {"scheduler": "Turbo", "sampler_name": "Euler"}, 422, "scheduler"),
    ("txt2img", {"sampler_name": "Eular"}, 404, None),
    ("txt2img", {"styles": ["anime"]}, 404, None),
    ("txt2img", {"script_name": "x/y/z plot"}, 404, None),
    ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True]}}}, 422, "alwayson_scripts"),
    ("txt2img", {"alwayson_scripts": {"ControlNet": {"args": "x"}}}, 422, "alwayson_scripts.ControlNet.args"),
    ("txt2img", {"alwayson_scripts": {"ControlNet": {"args": [{}]}}}, 422, "alwayson_scripts.ControlNet.args[0].image"),
    ("txt2img", {"override_settings": {"sd_model_checkpoint": "../../etc/passwd"}}, 404, None),
    ("txt2img", {"enable_hr": True, "hr_upscaler": "4x-Magic"}, 422, "hires.upscaler"),
    ("img2img", {}, 422, "init_images"),
    ("img2img", {"init_images": ["!"]}, 422, "init_images[0]"),
    ("img2img", {"init_images": [PNG], "mask": "AAAA"}, 422, "mask"),
    ("img2img", {"init_images": [PNG], "inpainting_fill": 3}, 422, "inpainting_fill"),
    ("extra-single-image", {"image": PNG, "upscaler_1": "Lanczos", "upscaling_resize": 1e6}, 422, "upscaling_resize"),
    ("extra-single-image", {"image": PNG, "gfpgan_visibility": 1}, 422, "gfpgan_visibility"),
    ("png-info", {"image": "AAAA"}, 422, "image"),
    ("interrogate", {"image": ""}, 422, "image"),
    ("interrogate", {"image": PNG, "model": "blip"}, 404, None),
]


@pytest.mark.parametrize(("call", "body", "status", "field"), BAD, ids=[f"{one[0]} {list(one[1])}" for one in BAD])
def test_bad_fields_are_named(
    http: httpx.Client, call: str, body: dict[str, Any], status: int, field: str | None
) -> None:
    answer = http.post(f"/sdapi/v1/{call}", json=body)
    assert (answer.status_code, answer.json().get("field")) == (status, field), answer.text
    assert answer.json()["detail"]
