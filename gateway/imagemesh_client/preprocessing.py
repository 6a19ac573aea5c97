"""Preprocessors: what they make of pictures, and which there are."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh_client.fields import text, whole_or_absent
from imagemesh_client.images import ImageInput, image_to_proto
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array, from_proto

Value = bool | float | str


@dataclass(frozen=True)
class PreprocessorParameter:
    """A parameter of a preprocessor.

    Attributes:
        type: "integer", "number", "boolean" or "string".
        minimum: of numbers, as ``maximum``.
        choices: all that a string may be.
    """

    name: str
    about: str
    type: str
    default: Value
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Preprocessor:
    """What makes of a picture what a ControlNet follows.

    Attributes:
        aliases: other names that are understood.
        needs_model: whether it needs a model's weights.
        models: those that it can use, the default first.
    """

    name: str
    about: str
    aliases: tuple[str, ...]
    parameters: tuple[PreprocessorParameter, ...]
    needs_model: bool
    models: tuple[str, ...]

    @property
    def available(self) -> bool:
        """Whether it can run here."""
        return bool(self.models) or not self.needs_model


@dataclass(frozen=True, eq=False)
class Preprocessed:
    """What a preprocessor made.

    Attributes:
        pixels: uint8 [height, width, 3], RGB.
        model: what saw depth, classes or people; empty: nothing was needed.
        backend: what ran it, such as "torch" or "opencv".
    """

    pixels: Array = field(repr=False)
    preprocessor: str
    model: str
    backend: str

    def to_pil(self) -> Image.Image:
        """The picture for Pillow."""
        return Image.fromarray(self.pixels)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture in the format that the suffix says, PNG without one.

        Raises:
            InvalidArgument: another suffix than a PNG, JPEG or WebP file's.
            OSError: the file can't be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in ("", ".png", ".jpg", ".jpeg", ".webp"):
            raise InvalidArgument("path", str(path), "a file name that ends in .png, .jpg, .jpeg, .webp")
        self.to_pil().save(path, None if suffix else "PNG", quality=95)
        return path


def parameters_to_proto(name: str, parameters: Mapping[str, Value]) -> dict[str, str]:
    """JSON values by name; ``name`` is the field's in errors.

    Raises:
        InvalidArgument: a value that JSON has no place for.
    """
    found: dict[str, str] = {}
    for key, value in parameters.items():
        try:
            found[text(name, key)] = json.dumps(value)
        except (TypeError, ValueError):
            raise InvalidArgument(f"{name}[{key!r}]", value, "a number, a string, true or false") from None
    return found


def preprocess_request(
    image: ImageInput, preprocessor: str, parameters: Mapping[str, Value], resolution: int | None, model: str
) -> pb.PreprocessRequest:
    """The request for ``preprocess``; reads files."""
    return pb.PreprocessRequest(
        preprocessor=text("preprocessor", preprocessor),
        image=image_to_proto(image, "image"),
        parameters=parameters_to_proto("parameters", parameters),
        resolution=whole_or_absent("resolution", resolution),
        model=text("model", model),
    )


def preprocessed(response: pb.PreprocessResponse) -> Preprocessed:
    """The picture, the caller's own to change."""
    pixels = from_proto(response.image, "image", dtypes=["uint8"], shape=(None, None, 3)).copy()
    return Preprocessed(pixels, response.preprocessor, response.model, response.backend)


def preprocessors(infos: Iterable[pb.PreprocessorInfo]) -> tuple[Preprocessor, ...]:
    """What the mesh has."""
    return tuple(
        Preprocessor(
            name=info.name,
            about=info.about,
            aliases=tuple(info.aliases),
            parameters=tuple(map(_parameter, info.parameters)),
            needs_model=info.needs_model,
            models=tuple(info.models),
        )
        for info in infos
    )


def _parameter(parameter: pb.PreprocessorParameter) -> PreprocessorParameter:
    return PreprocessorParameter(
        name=parameter.name,
        about=parameter.about,
        type=parameter.type,
        default=json.loads(parameter.default_value),
        minimum=parameter.minimum if parameter.HasField("minimum") else None,
        maximum=parameter.maximum if parameter.HasField("maximum") else None,
        choices=tuple(parameter.choices),
    )
