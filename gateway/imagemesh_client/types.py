"""What the mesh answers, as plain values."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from imagemesh_client.images import ImageInput
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.tensors import Array

PoolingName = Literal["auto", "cls", "mean"]
# File name suffixes that a picture can be saved under.
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Control:
    """A control unit: the picture that a ControlNet follows.

    Attributes:
        image: as the ControlNet expects it (edges, depth...), or what a preprocessor is to make that of.
        model: empty: the mesh's default ControlNet.
        scale: its weight.
        start, end: the part of the steps in which it steers, 0 to 1.
        guess_mode: the picture counts more than the prompt.
        block_weights: one for each of the ControlNet's residuals, the middle block's last; empty: all 1.
        control_type: of a ControlNet-union, the kind of picture: "canny", "depth"... or its number; empty for others.
        preprocessor: a name that ``preprocessors()`` tells; empty: none.
        parameters: the preprocessor's.
        resolution: pixels of the shorter side that it works at; None: the generation's size.
        preprocessor_model: where one is needed; empty: the first that there is.
    """

    image: ImageInput
    model: str = ""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False
    block_weights: Sequence[float] = ()
    preprocessor: str = ""
    parameters: Mapping[str, bool | float | str] = field(default_factory=dict)
    resolution: int | None = None
    preprocessor_model: str = ""
    control_type: str = ""


@dataclass(frozen=True)
class ControlSavings:
    """What to save on the ControlNets; each changes the picture, and is named in ``Parameters.lossy``.

    Attributes:
        reuse_steps: ask at every so many evaluations of the model, and take the same residuals between; 1: at each.
        conditional_only: steer the prompt's half alone, and not the negative prompt's.
        residuals: round them to 8 bits on the wire: "int8" or "fp8"; empty: not at all.
    """

    reuse_steps: int = 1
    conditional_only: bool = False
    residuals: str = ""


@dataclass(frozen=True)
class Reference:
    """A picture to be like, by an IP-Adapter.

    Attributes:
        adapter: empty: the first that the mesh has.
        scale: how much it counts, 0 to 10.
    """

    image: ImageInput
    adapter: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Hires:
    """A second pass: the picture of the first is enlarged, and made anew in part.

    Attributes:
        scale: how many times as wide and high, above 1; None where ``size`` is given.
        size: width and height in pixels instead.
        upscaler: "Latent", "Latent (nearest)", "Latent (nearest-exact)", "Latent (bicubic)", "Lanczos", "Bicubic",
            "Bilinear" or "Nearest"; empty: "Latent".
        steps: None: as in the first pass.
        strength: how much of it is made anew, above 0 to 1. None: 0.7.
        scheduler: empty: as in the first pass.
    """

    scale: float | None = None
    size: tuple[int, int] | None = None
    upscaler: str = ""
    steps: int | None = None
    strength: float | None = None
    scheduler: str = ""


@dataclass(frozen=True)
class Classify:
    """Look at what was made, and tell its ``top_k`` likeliest labels; an empty model is the mesh's default."""

    top_k: int = 5
    model: str = ""


@dataclass(frozen=True)
class Embed:
    """Tell the vectors of what was made; fields as in ``embed``, an empty model is the mesh's default."""

    pooling: PoolingName = "auto"
    normalize: bool = False
    model: str = ""


@dataclass(frozen=True)
class Keep:
    """Keep only pictures that show something.

    Attributes:
        label: one of the classifier's (the model of ``Classify``, else the mesh's default)...
        top_k: ... is among so many likeliest ones...
        min_probability: ... with at least this probability.
        retries: how often to draw another picture in the place of one that isn't kept, up to 8; its seed follows from
            the request's, see GenerateKeep.
    """

    label: str
    top_k: int = 1
    min_probability: float = 0.0
    retries: int = 0


@dataclass(frozen=True)
class Prediction:
    """A label for a picture; the probability is a softmax over all of the model's labels."""

    label: str
    probability: float
    index: int
    logit: float


@dataclass(frozen=True)
class Classification:
    """What a picture shows, best first."""

    model: str
    # What ran the model, such as "torch".
    backend: str
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class GeneratedImage:
    """A PNG file whose "parameters" text chunk holds what made it.

    Attributes:
        index: which of the request's pictures it is, from 0; others may not have been kept.
        classification: where ``Classify`` or ``Keep`` was asked for.
        embedding: float32 [width], where ``Embed`` was.
    """

    png: bytes = field(repr=False)
    seed: int
    index: int = 0
    classification: Classification | None = None
    embedding: Array | None = field(default=None, repr=False, compare=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture: the PNG unchanged, or as JPEG or WebP (without the parameters) if the suffix says so.

        Raises:
            InvalidArgument: another suffix.
            OSError: the file can't be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise InvalidArgument("path", str(path), f"a file name that ends in {', '.join(SUFFIXES[1:])}")
        if suffix in SUFFIXES[2:]:
            self.to_pil().save(path, quality=95)
        else:
            path.write_bytes(self.png)
        return path

    def to_pil(self) -> Image.Image:
        """The picture for Pillow, decoded."""
        picture = Image.open(io.BytesIO(self.png))
        picture.load()
        return picture


@dataclass(frozen=True)
class RejectedImage:
    """A picture that ``Keep`` did not let pass, and why; ``index``: which of the request's it would have been."""

    seed: int
    index: int
    reason: str
    classification: Classification


@dataclass(frozen=True)
class Parameters:
    """The request with every default and drawn value filled in."""

    prompt: str
    negative_prompt: str
    model: str
    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str
    seed: int
    clip_skip: int
    # What ran each stage, such as "vae" to "torch".
    backends: Mapping[str, str]
    guider: str = ""
    # JSON values by name, as far as the request set them.
    guider_options: Mapping[str, str] = field(default_factory=dict)
    # What was saved at the picture's cost, such as "control_residuals" to "int8".
    lossy: Mapping[str, str] = field(default_factory=dict)
    # None: the noise was not varied.
    variation_seed: int | None = None
    variation_strength: float = 0.0
    # The models that looked at the pictures, where that was asked for.
    classifier: str = ""
    embedder: str = ""


@dataclass(frozen=True)
class Timing:
    """What one hop cost; times in seconds, of which ``seconds`` is the whole as the gateway saw it."""

    stage: str
    seconds: float
    compute_seconds: float
    queue_seconds: float
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True)
class Generation:
    """A finished generation; ``rejected`` pictures were drawn and not kept, and ``images`` may be empty then."""

    id: str
    images: tuple[GeneratedImage, ...]
    parameters: Parameters
    timings: tuple[Timing, ...]
    rejected: tuple[RejectedImage, ...] = ()


@dataclass(frozen=True)
class Queued:
    """The generation was accepted; ``position`` requests are ahead of it."""

    id: str
    position: int


@dataclass(frozen=True)
class Progress:
    """``step`` of ``steps`` is done; where previews were asked for and are due, a small JPEG a picture."""

    step: int
    steps: int
    previews: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Result:
    """The last event."""

    generation: Generation


Event: TypeAlias = Queued | Progress | Result


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors that stand for pictures, and what made them.

    Attributes:
        model: its name.
        backend: what ran it, such as "torch".
        vectors: float32, float16 or int8 [pictures, width].
        scales: float32 [pictures], where the vectors are int8.
        hidden_states: float32 or float16 [layers asked for, pictures, tokens, width]; None unless asked for.
        attention_maps: a grey PNG file a picture, if asked for: what the class token looks at is bright.
    """

    model: str
    backend: str
    vectors: Array
    scales: Array | None = None
    hidden_states: Array | None = None
    attention_maps: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.vectors)

    def as_float32(self) -> Array:
        """The vectors as float32 [pictures, width], also where they came in 8 or 16 bits."""
        wide = self.vectors.astype(np.float32)
        return wide if self.scales is None else wide * self.scales[:, None]


@dataclass(frozen=True)
class Model:
    """Something that a service of the mesh can run."""

    name: str
    # "text-encoder", "diffusion", "vae", "controlnet" or "vit".
    role: str
    backend: str
    dtype: str
    device: str
    loaded: bool
    properties: Mapping[str, str]


@dataclass(frozen=True)
class Models:
    """All that the mesh can run; the models of ``unreachable`` services are missing.

    Attributes:
        roots: folders, where the services run, below which they look for models.
    """

    models: tuple[Model, ...]
    unreachable: tuple[str, ...]
    roots: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Model]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)


@dataclass(frozen=True)
class Choice:
    """A scheduler or a guider by its name.

    Attributes:
        class_name: diffusers' class behind it.
        about: what it does, where the mesh says so.
        options: what the name stands for, or what is taken where a request says nothing.
        accepts: the options that a request may set, and to which values, in words.
    """

    name: str
    class_name: str
    about: str
    options: Mapping[str, object]
    accepts: Mapping[str, str]


@dataclass(frozen=True)
class Sampling:
    """What ``generate`` takes as its scheduler and its guider."""

    schedulers: tuple[Choice, ...]
    guiders: tuple[Choice, ...]
