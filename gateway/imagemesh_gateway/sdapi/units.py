"""Control units as the ControlNet extension has them."""

import json
from typing import Any, Final

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2, preprocess_service_pb2
from imagemesh_gateway.sdapi.pictures import file_of
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.limits import MAX_CONTROL_SCALE, MAX_CONTROLS, MAX_SIDE, check_range
from imagemesh_runtime.preprocessing import MIN_RESOLUTION, find_preprocessor

SCRIPT: Final = "controlnet"
_NONE: Final = frozenset({"", "none"})
_MODES: Final = {"balanced": False, "0": False, "controlnet is more important": True, "2": True}
# The fields of a unit in which pictures come.
PICTURES: Final = frozenset({
    "image", "input_image", "mask", "mask_image", "effective_region_mask", "ipadapter_input", "batch_images",
    "generated_image", "batch_input_gallery", "batch_mask_gallery", "multi_inputs_gallery",
})  # fmt: skip
_MAX_THRESHOLD: Final = 1e9
# All fields of a unit; the ones behind the first line change nothing here.
_FIELDS: Final = (
    "enabled", "image", "input_image", "module", "model", "weight", "processor_res", "threshold_a", "threshold_b",
    "guidance_start", "guidance_end", "control_mode", "guessmode", "pixel_perfect", "mask", "mask_image",
    "resize_mode", "low_vram", "lowvram", "hr_option", "save_detected_map", "advanced_weighting",
    "effective_region_mask", "ipadapter_input", "inpaint_crop_input_image", "pulid_mode", "union_control_type", "is_ui",
    "input_mode", "batch_images", "output_dir", "loopback", "animatediff_batch", "batch_modifiers",
    "use_preview_as_input", "generated_image", "batch_image_dir", "batch_input_gallery", "batch_mask_dir",
    "batch_mask_gallery", "multi_inputs_gallery", "bypass_average",
)  # fmt: skip


def units_of(scripts: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The units that are on, of ``alwayson_scripts``.

    Raises:
        InvalidArgument: another script is asked for, or what is there is no list of units.
    """
    units: list[dict[str, Any]] = []
    for name, script in (scripts or {}).items():
        if name.casefold() != SCRIPT:
            raise InvalidArgument("alwayson_scripts", name, "an object of ControlNet alone: there are no other scripts")
        args = script.get("args", []) if isinstance(script, dict) else script
        if not isinstance(args, list) or not all(isinstance(unit, dict) for unit in args):
            raise InvalidArgument("alwayson_scripts.ControlNet.args", type(args).__name__, "a list of units")
        units += [unit for unit in args if unit.get("enabled", True)]
    if len(units) > MAX_CONTROLS:
        raise InvalidArgument("alwayson_scripts.ControlNet.args", f"{len(units)} units", f"at most {MAX_CONTROLS}")
    return units


def control(
    unit: dict[str, Any], field: str, start: bytes | None, infos: list[preprocess_service_pb2.PreprocessorInfo]
) -> pb.GenerateControl:
    """The unit as the mesh has it; ``start`` is the picture that it follows where it brings none.

    Raises:
        InvalidArgument: a value isn't allowed.
        NotFound: there is no such preprocessor.
    """
    for name in unit:
        if name not in _FIELDS:
            raise InvalidArgument(f"{field}.{name[:80]}", unit[name], f"left out (the fields are {', '.join(_FIELDS)})")
    told = pb.GenerateControl(
        model=_name(unit, "model", field).partition(" [")[0],
        image=image_pb2.Image(encoded=_file(unit, field, start)),
        scale=_number(unit, "weight", field, 1.0, MAX_CONTROL_SCALE),
        start=_number(unit, "guidance_start", field, 0.0, 1.0),
        end=_number(unit, "guidance_end", field, 1.0, 1.0),
        guess_mode=_guess_mode(unit, field),
    )
    module = _name(unit, "module", field)
    if module:
        info = find_preprocessor(infos, module)
        told.preprocessor = info.name
        resolution = _resolution(unit, field)
        told.preprocessor_resolution = resolution
        given = thresholds(info, unit.get("threshold_a"), unit.get("threshold_b"), f"{field}.")
        for name, value in given.items():
            told.preprocessor_parameters[name] = value
    return told


def thresholds(info: preprocess_service_pb2.PreprocessorInfo, a: Any, b: Any, prefix: str) -> dict[str, str]:
    """The first two thresholds of the preprocessor, as JSON; values of no kind and negative ones are its defaults.

    Raises:
        InvalidArgument: one is larger than any preprocessor's, told by its field's name behind ``prefix``.
    """
    names = [parameter.name for parameter in info.parameters if "threshold" in parameter.name]
    given = {}
    for name, side, value in zip(names, "ab", (a, b), strict=False):
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            check_range(f"{prefix}threshold_{side}", value, 0, _MAX_THRESHOLD)
            given[name] = json.dumps(int(value) if float(value).is_integer() else value)
    return given


def _resolution(unit: dict[str, Any], field: str) -> int:
    value = unit.get("processor_res")
    if unit.get("pixel_perfect") or value in (None, -1, 0):
        return 0
    check_range(f"{field}.processor_res", value if isinstance(value, int | float) else -1, MIN_RESOLUTION, MAX_SIDE)
    return int(value)


def _file(unit: dict[str, Any], field: str, start: bytes | None) -> bytes:
    given = unit.get("image") or unit.get("input_image")
    if isinstance(given, dict):
        given = given.get("image")
    if not given and start is not None:
        return start
    return file_of(given, f"{field}.image")


def _name(unit: dict[str, Any], key: str, field: str) -> str:
    value = unit.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidArgument(f"{field}.{key}", value, "a name")
    return "" if (value or "").casefold() in _NONE else str(value)


def _number(unit: dict[str, Any], key: str, field: str, default: float, most: float) -> float:
    value = unit.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float):
        raise InvalidArgument(f"{field}.{key}", value, f"0 to {most:g}")
    check_range(f"{field}.{key}", value, 0, most)
    return float(value)


def _guess_mode(unit: dict[str, Any], field: str) -> bool:
    mode = str(unit.get("control_mode", "balanced")).casefold()
    if mode not in _MODES:
        raise InvalidArgument(f"{field}.control_mode", mode, "Balanced (0), ControlNet is more important (2)")
    return _MODES[mode]
