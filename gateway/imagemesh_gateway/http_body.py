"""The body of ``POST /v1/generate``: the fields of GenerateRequest as JSON has them, pictures in base64."""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from imagemesh.v1 import gateway_service_pb2 as pb
from imagemesh.v1 import image_pb2, priority_pb2, vit_service_pb2
from imagemesh.v1.diffusion_service_pb2 import ControlSavings
from imagemesh_runtime.limits import (
    MAX_BLOCK_WEIGHTS,
    MAX_CONTROL_SCALE,
    MAX_CONTROLS,
    MAX_GUIDANCE,
    MAX_HIRES_SCALE,
    MAX_IMAGES,
    MAX_LABELS,
    MAX_MASK_BLUR,
    MAX_REFERENCES,
    MAX_RETRIES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
)
from imagemesh_runtime.preprocessing import MIN_RESOLUTION


def _valid(text: str) -> str:
    text.encode()  # UnicodeEncodeError, which is a ValueError: JSON can spell half of a surrogate pair
    return text


def _picture(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("not a string")
    head, comma, data = value.partition(",")
    return base64.b64decode(data if comma and head.startswith("data:") else value, validate=True)


Text = Annotated[str, AfterValidator(_valid)]
Picture = Annotated[bytes, BeforeValidator(_picture), WithJsonSchema({"type": "string", "format": "byte"})]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE, description="Pixels.")]
Number = Annotated[float, Field(allow_inf_nan=False)]  # JSON has no others to show again
Weight = Annotated[float, Field(ge=0, le=MAX_CONTROL_SCALE, allow_inf_nan=False)]
Strength = Annotated[float, Field(gt=0, le=1, description="How much is made anew.")]
Labels = Annotated[int, Field(ge=1, le=MAX_LABELS)]
PriorityName = Literal["interactive", "normal", "batch"]
PoolingName = Literal["auto", "cls", "mean"]

_TEXT = "a string of valid Unicode"
_SIDE = f"a whole number of pixels from 1 to {MAX_SIDE}"
_SEED = f"a whole number from 0 to {MAX_SEED}"
_STEPS = f"1 to {MAX_STEPS}"
_PICTURE = "a PNG, JPEG or WebP file in base64, or a data: URL of one"
_STRENGTH = "above 0, and at most 1"
_WEIGHT = f"0 to {MAX_CONTROL_SCALE}"
_LABELS = f"1 to {MAX_LABELS}"
# What the fields of GenerateBody may be, for errors to say; those of objects by their path.
ALLOWED: Final = {
    "prompt": _TEXT,
    "negative_prompt": _TEXT,
    "seed": _SEED,
    "steps": _STEPS,
    "guidance": f"0 to {MAX_GUIDANCE}",
    "width": _SIDE,
    "height": _SIDE,
    "scheduler": _TEXT,
    "model": _TEXT,
    "scheduler_options": "an object of numbers, strings, true and false by name",
    "guider": _TEXT,
    "guider_options": "an object of numbers, strings, lists of strings, true and false by name",
    "clip_skip": "a whole number from 0",
    "literal_prompt": "true or false",
    "num_images": f"1 to {MAX_IMAGES}",
    "seeds": f"a list of at most {MAX_IMAGES}, each {_SEED}",
    "variation_seed": _SEED,
    "variation_strength": "0 to 1",
    "image": _PICTURE,
    "strength": _STRENGTH,
    "mask": _PICTURE,
    "invert_mask": "true or false",
    "mask_blur": f"0 to {MAX_MASK_BLUR}",
    "keep_unmasked": "true or false",
    "mask_padding": f"0 to {MAX_SIDE}",
    "priority": ", ".join(get_args(PriorityName)),
    "hires": "an object",
    "hires.scale": f"above 1, and at most {MAX_HIRES_SCALE:g}",
    "hires.width": _SIDE,
    "hires.height": _SIDE,
    "hires.upscaler": _TEXT,
    "hires.steps": _STEPS,
    "hires.strength": _STRENGTH,
    "hires.scheduler": _TEXT,
    "controls": f"a list of at most {MAX_CONTROLS} objects",
    "controls.model": _TEXT,
    "controls.image": _PICTURE,
    "controls.scale": _WEIGHT,
    "controls.start": "0 to 1",
    "controls.end": "0 to 1",
    "controls.guess_mode": "true or false",
    "controls.block_weights": f"a list of at most {MAX_BLOCK_WEIGHTS} numbers, each {_WEIGHT}",
    "controls.control_type": _TEXT,
    "control_savings": "an object of reuse_steps, conditional_only and residuals",
    "control_savings.reuse_steps": f"0 to {MAX_STEPS}",
    "control_savings.conditional_only": "true or false",
    "control_savings.residuals": "an empty string, int8 or fp8",
    "references": f"a list of at most {MAX_REFERENCES} objects with an image",
    "references.image": _PICTURE,
    "references.adapter": _TEXT,
    "references.scale": _WEIGHT,
    "controls.preprocessor": _TEXT,
    "controls.preprocessor_parameters": "an object of numbers, strings, true and false by name",
    "controls.preprocessor_resolution": f"0, or {MIN_RESOLUTION} to {MAX_SIDE}",
    "controls.preprocessor_model": _TEXT,
    "classify": "an object of model and top_k",
    "classify.model": _TEXT,
    "classify.top_k": _LABELS,
    "embed": "an object of model, pooling and normalize",
    "embed.model": _TEXT,
    "embed.pooling": ", ".join(get_args(PoolingName)),
    "embed.normalize": "true or false",
    "keep": "an object of label, top_k, min_probability and retries",
    "keep.label": _TEXT,
    "keep.top_k": _LABELS,
    "keep.min_probability": "0 to 1",
    "keep.retries": f"0 to {MAX_RETRIES}",
}


class Strict(BaseModel):
    """A body that has no fields but its own."""

    model_config = ConfigDict(extra="forbid")

    def fields(self) -> dict[str, Any]:
        """What was given."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in given.items() if value is not None}


class HiresBody(Strict):
    """A second pass, larger: by ``scale``, or to ``width`` and ``height``."""

    scale: float | None = Field(None, gt=1, le=MAX_HIRES_SCALE, allow_inf_nan=False)
    width: Side | None = None
    height: Side | None = None
    upscaler: Text = Field("", description="'Latent' if empty.")
    steps: Steps | None = None
    strength: Strength | None = None
    scheduler: Text = ""


class ControlBody(Strict):
    """A ControlNet and the picture that it follows."""

    image: Picture
    model: Text = Field("", description="Empty is the mesh's default ControlNet.")
    scale: Weight = 1.0
    start: float = Field(0.0, ge=0, le=1, description="It steers from here on: a part of the steps.")
    end: float = Field(1.0, ge=0, le=1, description="And up to here.")
    guess_mode: bool = Field(False, description="The picture counts more than the prompt.")
    block_weights: list[Weight] = Field(
        default_factory=list, max_length=MAX_BLOCK_WEIGHTS, description="A weight for each of its residuals."
    )
    control_type: Text = Field("", description="Of a ControlNet-union: which kind of picture, by name or number.")
    preprocessor: Text = Field("", description="What makes of the picture what is followed; empty: it is that already.")
    preprocessor_parameters: dict[Text, bool | int | Number | Text] = Field(default_factory=dict)
    preprocessor_resolution: int = Field(0, ge=0, le=MAX_SIDE, description="Pixels of the shorter side.")
    preprocessor_model: Text = ""

    def to_proto(self) -> pb.GenerateControl:
        parameters = _json_values(self.preprocessor_parameters)
        given = {"image": image_pb2.Image(encoded=self.image), "preprocessor_parameters": parameters}
        return pb.GenerateControl(**self.fields() | given)


class SavingsBody(Strict):
    """What to save on the ControlNets, which changes the picture."""

    reuse_steps: int = Field(0, ge=0, le=MAX_STEPS, description="Ask at every so many evaluations; 0 or 1: at each.")
    conditional_only: bool = Field(False, description="Steer the prompt's half alone.")
    residuals: Literal["", "int8", "fp8"] = Field("", description="Round residuals on the wire.")


class ReferenceBody(Strict):
    """A picture to be like, by an IP-Adapter."""

    image: Picture
    adapter: Text = Field("", description="Empty is the first that the mesh has.")
    scale: Weight = 1.0

    def to_proto(self) -> pb.GenerateReference:
        return pb.GenerateReference(**self.fields() | {"image": image_pb2.Image(encoded=self.image)})


class ClassifyBody(Strict):
    """Tell what each picture shows."""

    model: Text = Field("", description="Empty is the mesh's default.")
    top_k: Labels = Field(5, description="Labels to tell.")


class EmbedBody(Strict):
    """Tell each picture's vector."""

    model: Text = Field("", description="Empty is the mesh's default.")
    pooling: PoolingName = "auto"
    normalize: bool = False

    def to_proto(self) -> pb.GenerateEmbed:
        name = "UNSPECIFIED" if self.pooling == "auto" else self.pooling.upper()
        pooling = vit_service_pb2.Pooling.Value(f"POOLING_{name}")
        return pb.GenerateEmbed(**self.fields() | {"pooling": pooling})


class KeepBody(Strict):
    """Keep only pictures of which the classifier says this."""

    label: Text
    top_k: Labels = Field(1, description="It is among so many likeliest labels...")
    min_probability: float = Field(0.0, ge=0, le=1, description="... with at least this probability.")
    retries: int = Field(0, ge=0, le=MAX_RETRIES, description="How often to draw another picture in its place.")


class GenerateBody(Strict):
    """What to generate; what is left out is the mesh's choice, and told in the answer."""

    prompt: Text
    negative_prompt: Text = ""
    seed: Seed | None = Field(None, description="Drawn if left out; picture i of several takes seed + i.")
    steps: Steps | None = None
    guidance: float | None = Field(None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    width: Side | None = Field(None, description="Pixels; the model's own size if left out.")
    height: Side | None = None
    scheduler: Text = Field("", description="Such as 'Euler a' or 'DPM++ 2M Karras'; empty is the model's own.")
    model: Text = ""
    scheduler_options: dict[Text, bool | int | Number | Text] = Field(default_factory=dict)
    guider: Text = Field("", description="How guidance is done, such as 'APG' or 'PAG'; empty is 'CFG'.")
    guider_options: dict[Text, bool | int | Number | Text | list[Text]] = Field(default_factory=dict)
    clip_skip: int = Field(0, ge=0, le=2**31)
    literal_prompt: bool = Field(False, description="Brackets are text, and neither weigh words nor change them.")
    num_images: int | None = Field(None, ge=1, le=MAX_IMAGES)
    seeds: list[Seed] = Field(default_factory=list, max_length=MAX_IMAGES, description="A seed a picture.")
    variation_seed: Seed | None = None
    variation_strength: float = Field(0.0, ge=0, le=1)
    image: Picture | None = Field(None, description="Start from this picture.")
    strength: Strength | None = None
    mask: Picture | None = Field(None, description="Redraw only where this picture is bright.")
    invert_mask: bool = False
    mask_blur: int = Field(0, ge=0, le=MAX_MASK_BLUR, description="Pixels.")
    keep_unmasked: bool = False
    mask_padding: int | None = Field(None, ge=0, le=MAX_SIDE, description="Pixels around the only part redrawn.")
    priority: PriorityName = "normal"
    hires: HiresBody | None = None
    controls: list[ControlBody] = Field(default_factory=list, max_length=MAX_CONTROLS)
    control_savings: SavingsBody | None = None
    references: list[ReferenceBody] = Field(default_factory=list, max_length=MAX_REFERENCES)
    classify: ClassifyBody | None = None
    embed: EmbedBody | None = None
    keep: KeepBody | None = None

    def to_proto(self) -> pb.GenerateRequest:
        """The same request for the pipeline."""
        values = self.fields()
        for name, change in _CHANGED.items():
            if name in values:
                values[_RENAMED.get(name, name)] = change(values.pop(name))
        return pb.GenerateRequest(**values)


def _json_values(given: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in given.items()}


# From the body's names and values to the message's, where they differ.
_RENAMED: Final = {"guidance": "guidance_scale"}
_CHANGED: Final[Mapping[str, Callable[[Any], Any]]] = {
    "guidance": float,
    "scheduler_options": _json_values,
    "guider_options": _json_values,
    "image": lambda file: image_pb2.Image(encoded=file),
    "mask": lambda file: image_pb2.Image(encoded=file),
    "priority": lambda name: priority_pb2.Priority.Value(f"PRIORITY_{name.upper()}"),
    "hires": lambda one: pb.GenerateHires(**one.fields()),
    "controls": lambda units: [unit.to_proto() for unit in units],
    "control_savings": lambda one: ControlSavings(**one.fields()),
    "references": lambda pictures: [one.to_proto() for one in pictures],
    "classify": lambda one: pb.GenerateClassify(**one.fields()),
    "embed": lambda one: one.to_proto(),
    "keep": lambda one: pb.GenerateKeep(**one.fields()),
}
