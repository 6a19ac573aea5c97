"""All preprocessors. Adding one is adding a row."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from imagemesh.v1 import preprocess_service_pb2 as pb
from imagemesh_runtime.preprocessing import Value
from imagemesh_runtime.tensors import Array
from imagemesh_services.controlnet.preprocessors import edges, pictures, seen, skeleton
from imagemesh_services.controlnet.preprocessors.backend import Task


@dataclass(frozen=True)
class Parameter:
    """A parameter with its default, whose type it has, and its bounds or choices."""

    name: str
    default: Value
    about: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def to_proto(self) -> pb.PreprocessorParameter:
        """As clients are told of it."""
        kind = {bool: "boolean", int: "integer", float: "number", str: "string"}[type(self.default)]
        return pb.PreprocessorParameter(
            name=self.name, about=self.about, type=kind, default_value=json.dumps(self.default),
            minimum=self.minimum, maximum=self.maximum, choices=self.choices,
        )  # fmt: skip


@dataclass(frozen=True)
class Preprocessor:
    """What it makes, and the function that makes it.

    Attributes:
        draw: uint8 [h, w, 3] to the same shape, with the parameters by name; where there is a task, what the model saw
            is its second argument.
        aliases: names that other programs have for it.
    """

    about: str
    draw: Callable[..., Array]
    aliases: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    task: Task | None = None

    def to_proto(self, name: str, models: Mapping[Task, list[str]]) -> pb.PreprocessorInfo:
        """As clients are told of it, with the models of its task."""
        return pb.PreprocessorInfo(
            name=name,
            about=self.about,
            aliases=self.aliases,
            parameters=[parameter.to_proto() for parameter in self.parameters],
            needs_model=self.task is not None,
            models=models.get(self.task, []) if self.task else [],
        )


_STANDARD_LINEART = ("lineart_standard", "lineart_standard (from white bg & black line)")
_INVERT = ("invert (from white bg & black line)",)
_DEPTHS = (
    "depth_anything", "depth_anything_v2", "depth_midas", "depth_zoe", "midas", "Midas Depth Hybrid", "Zoe Depth",
    "DPT Depth Hybrid", "GLPN Depth", "Depth Pro", "Depth Anything V2 Small", "Depth Anything V2 Large",
)  # fmt: skip
_POSES = ("openpose_body", "ViTPose")
_LIGHTS = ("luminance", "intensity")
_CLASSES = ("seg", "seg_ofade20k", "seg_ufade20k")

PREPROCESSORS: Final[Mapping[str, Preprocessor]] = {
    "none": Preprocessor("the picture as it is", pictures.unchanged),
    "canny": Preprocessor(
        "thin edges, all or nothing (Canny)", edges.canny, (),
        (
            Parameter("low_threshold", 100, "edges that continue others are at least this steep", 0, 255),
            Parameter("high_threshold", 200, "edges begin where it is at least this steep", 0, 255),
        ),
    ),
    "scribble": Preprocessor(
        "broad strokes where it is dark, all or nothing (difference of Gaussians)", edges.scribble, ("scribble_xdog",),
        (Parameter("threshold", 32, "the lower, the more strokes", 1, 64),),
    ),
    "softedge": Preprocessor(
        "edges in grades: the smoothed picture's gradient, without weights", edges.soft_edge, ("edge",),
        (Parameter("sigma", 2.0, "pixels of smoothing", 0.1, 64.0),),
    ),
    "softedge_dexined": Preprocessor(
        "edges in grades, as a network has learned to see them (DexiNed)", seen.edges, ("dexined",), (), Task.EDGES,
    ),
    "lineart": Preprocessor(
        "drawn lines in grades, without weights", edges.lineart, _STANDARD_LINEART,
        (
            Parameter("sigma", 6.0, "pixels of the surroundings that lines are darker than", 0.1, 64.0),
            Parameter("intensity_threshold", 8, "what is at least this much darker counts as a clear line", 0, 64),
        ),
    ),
    "mlsd": Preprocessor(
        "straight lines, as of buildings (OpenCV's line segment detector, without weights)", edges.straight_lines,
        ("lsd",),
        (
            Parameter("min_length", 0.05, "of the shorter side", 0.0, 1.0),
            Parameter("line_width", 2, "pixels", 1, 16),
        ),
    ),
    "depth": Preprocessor(
        "how near it is, the nearest white", seen.depth, _DEPTHS,
        (Parameter("invert", False, "the nearest black"),), Task.DEPTH,
    ),
    "normal": Preprocessor(
        "which way surfaces face, from the depth", seen.normal, ("normal_map", "normal_midas"),
        (
            Parameter("background", 0.4, "what is farther than this, 0 to 1, stands upright", 0.0, 1.0),
            Parameter("strength", 30.0, "how steep slopes are", 0.1, 1000.0),
        ),
        Task.DEPTH,
    ),
    "openpose": Preprocessor(
        "people as coloured skeletons", skeleton.openpose, _POSES,
        (Parameter("min_confidence", 0.3, "points less certain are left out", 0.0, 1.0),), Task.PEOPLE,
    ),
    "segmentation": Preprocessor("what is where, in ADE20K's colours", seen.segmentation, _CLASSES, (), Task.CLASSES),
    "shuffle": Preprocessor(
        "its colours and textures in another order", pictures.shuffle, (),
        (
            Parameter("scale", 256, "pixels of what stays together", 8, 1024),
            Parameter("seed", 0, "of the order", 0, 2**32 - 1),
        ),
    ),
    "tile": Preprocessor(
        "the picture without its details", pictures.tile, ("tile_resample",),
        (Parameter("factor", 1.0, "how many times smaller it is made, and enlarged again", 1.0, 8.0),),
    ),
    "blur": Preprocessor(
        "the picture blurred (Gaussian)", pictures.blur, ("blur_gaussian",),
        (Parameter("sigma", 9.0, "pixels", 0.1, 64.0),),
    ),
    "colour": Preprocessor(
        "a grid of mean colours", pictures.colour_grid, ("color", "t2ia_color_grid"),
        (Parameter("cell", 64, "pixels of a square", 2, 512),),
    ),
    "recolour": Preprocessor(
        "lightness without colour", pictures.grey, ("recolor",),
        (
            Parameter("method", "luminance", "CIE's lightness, or the highest channel", choices=_LIGHTS),
            Parameter("gamma", 1.0, "above 1 is darker", 0.1, 2.0),
        ),
    ),
    "invert": Preprocessor("the negative", pictures.invert, _INVERT),
    "threshold": Preprocessor(
        "white where every channel is bright, else black", pictures.threshold, ("binary",),
        (Parameter("threshold", 127, "of 255", 0, 255),),
    ),
}  # fmt: skip
