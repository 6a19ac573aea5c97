"""What an answer must say again is checked before the work, and pictures are not said again."""

from typing import Any

import pytest
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from imagemesh.v1 import job_service_pb2, preprocess_service_pb2
from imagemesh_gateway.sdapi.answers import generation_json
from imagemesh_gateway.sdapi.bodies import TXT2IMG_ALLOWED, Img2ImgBody, Txt2ImgBody
from imagemesh_gateway.sdapi.units import thresholds
from imagemesh_runtime.errors import InvalidArgument

NAN, INFINITE, TORN = float("nan"), float("inf"), "\ud800"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eta", NAN),
        ("s_tmax", INFINITE),
        ("eta", 10**400),
        ("hr_scale", NAN),
        ("override_settings", {"a": TORN}),
        ("override_settings", {"a": {TORN: 1}}),
        ("comments", {"a": [NAN]}),
        ("script_args", [INFINITE]),
        ("script_args", nested(500)),
        ("alwayson_scripts", {"ControlNet": {"args": [{"module": TORN}]}}),
    ],
    ids=str,
)
def test_what_json_cannot_say_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Txt2ImgBody.model_validate({field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_numbers_are_asked_for_as_numbers() -> None:
    assert TXT2IMG_ALLOWED["eta"] == TXT2IMG_ALLOWED["hr_scale"] == "a finite number"
    assert TXT2IMG_ALLOWED["steps"] == "a whole number"


def test_an_answer_repeats_the_request_without_its_pictures() -> None:
    unit = {"image": "A" * 99, "mask": "B" * 99, "input_image": {"image": "C" * 99}, "module": "canny"}
    scripts = {"ControlNet": {"args": [unit]}}
    body = Img2ImgBody(init_images=["D" * 99], override_settings={"a": [1, "b"]}, alwayson_scripts=scripts, eta=1)
    told = generation_json(job_service_pb2.Job(), None, body, [])
    assert told["parameters"]["override_settings"] == {"a": [1, "b"]}
    assert told["parameters"]["alwayson_scripts"]["ControlNet"]["args"] == [
        {"image": None, "mask": None, "input_image": None, "module": "canny"}
    ]
    text = bytes(JSONResponse(told).body)
    assert not any(letter * 99 in text for letter in (b"A", b"B", b"C", b"D"))


@pytest.mark.parametrize("value", [10**400, INFINITE, 1e300])
def test_a_threshold_beyond_all_is_refused_by_name(value: float) -> None:
    parameters = [preprocess_service_pb2.PreprocessorParameter(name="low_threshold")]
    info = preprocess_service_pb2.PreprocessorInfo(name="canny", parameters=parameters)
    assert thresholds(info, 50.0, None, "") == {"low_threshold": "50"}
    assert thresholds(info, NAN, None, "") == {}
    with pytest.raises(InvalidArgument, match="controlnet_threshold_a must be"):
        thresholds(info, value, None, "controlnet_")
