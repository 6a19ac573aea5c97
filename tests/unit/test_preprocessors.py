"""Preprocessors without weights: each against OpenCV's own call, and what all of them promise."""

import math

import cv2
import numpy as np
import pytest

from imagemesh_runtime.preprocessing import check_parameters, folded
from imagemesh_services.controlnet.preprocessors import edges, pictures, seen, skeleton
from imagemesh_services.controlnet.preprocessors.palette import PALETTE
from imagemesh_services.controlnet.preprocessors.table import PREPROCESSORS
from tests.support.sizes import ROOT

FREE = sorted(name for name, one in PREPROCESSORS.items() if one.task is None)


def picture(height: int = 96, width: int = 128) -> np.ndarray:
    """Shapes on a ground with some noise; read-only, as pictures that share a message's memory are."""
    image = np.full((height, width, 3), (200, 220, 240), np.uint8)
    cv2.rectangle(image, (width // 8, height // 8), (width // 2, height * 3 // 4), (30, 60, 20), -1)
    cv2.circle(image, (width * 3 // 4, height // 2), height // 4, (180, 20, 40), -1)
    noise = np.random.default_rng(0).integers(-9, 10, image.shape)
    image = np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)
    image.flags.writeable = False
    return image


def drawn(name: str, image: np.ndarray, **parameters: object) -> np.ndarray:
    """With the defaults of all that isn't given."""
    preprocessor = PREPROCESSORS[name]
    return preprocessor.draw(image, **check_parameters(preprocessor.to_proto(name, {}), {}, "") | parameters)


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3), (3, 2), (61, 47)])
def test_every_size_has_a_picture_of_its_size(name, size):
    image = picture()[: size[0], : size[1]]
    result = drawn(name, image)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)


@pytest.mark.parametrize("name", FREE)
def test_the_same_picture_gives_the_same_and_stays_as_it_was(name):
    image, kept = picture(), picture().copy()
    np.testing.assert_array_equal(drawn(name, image), drawn(name, image))
    np.testing.assert_array_equal(image, kept)


@pytest.mark.parametrize("name", sorted(set(FREE) - {"none"}))
def test_every_preprocessor_sees_what_there_is(name):
    parameters = {"factor": 4.0} if name == "tile" else {}
    result = drawn(name, picture(), **parameters)
    assert result.std() > 3
    assert (result != picture()).any()


@pytest.mark.parametrize("name", ["canny", "scribble", "softedge", "lineart", "mlsd"])
def test_lines_are_bright_on_black_and_a_plain_picture_has_none(name):
    plain = np.full((40, 50, 3), 77, np.uint8)
    assert drawn(name, plain).max() == 0
    assert drawn(name, picture()).max() == 255
    assert drawn(name, picture()).mean() < 128


@pytest.mark.parametrize("bounds", [(100, 200), (10, 250), (0, 0)])
def test_canny_is_opencvs(bounds):
    wanted = cv2.Canny(picture(), *bounds)
    found = edges.canny(picture(), low_threshold=bounds[0], high_threshold=bounds[1])
    np.testing.assert_array_equal(found, np.dstack([wanted] * 3))


def test_blur_is_opencvs():
    found = pictures.blur(picture(), sigma=3.5)
    np.testing.assert_array_equal(found, cv2.GaussianBlur(picture(), (0, 0), 3.5))


def test_soft_edges_are_opencvs_gradient():
    smooth = cv2.GaussianBlur(picture().astype(np.float32), (0, 0), 2.0)
    steep = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)).max(axis=2)
    wanted = np.minimum(steep / np.percentile(steep, 99) * 255, 255)
    assert np.abs(edges.soft_edge(picture(), sigma=2.0)[..., 0] - wanted).max() <= 1


def test_straight_lines_are_those_that_opencvs_detector_finds():
    image = picture()
    segments = cv2.createLineSegmentDetector().detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0].reshape(-1, 4)
    wanted = np.zeros(image.shape[:2], np.uint8)
    for x1, y1, x2, y2 in segments:
        if math.hypot(round(x2) - round(x1), round(y2) - round(y1)) >= 0.3 * 96:
            cv2.line(wanted, (round(x1), round(y1)), (round(x2), round(y2)), 255, 3)
    assert wanted.any()
    found = edges.straight_lines(image, min_length=0.3, line_width=3)
    np.testing.assert_array_equal(found[..., 2], wanted)
    assert edges.straight_lines(image, min_length=1.0, line_width=3).sum() < found.sum()


def test_dark_lines_are_drawn_and_bright_ones_are_not():
    image = np.full((64, 64, 3), 128, np.uint8)
    image[20:22], image[42:44] = 30, 230
    for result in (drawn("scribble", image), drawn("lineart", image)):
        assert result[20:22].min() > 100
        assert result[42:44].max() == 0


def test_threshold_wants_every_channel_above_it():
    image = np.array([[[128, 128, 128], [127, 255, 255], [255, 255, 0], [200, 130, 128]]], np.uint8)
    assert drawn("threshold", image)[0, :, 0].tolist() == [255, 0, 0, 255]


def test_inverting_twice_gives_the_picture():
    np.testing.assert_array_equal(drawn("invert", drawn("invert", picture())), picture())
    np.testing.assert_array_equal(drawn("none", picture()), picture())


def test_the_grid_has_the_mean_colour_of_each_square():
    found = pictures.colour_grid(picture(96, 128), cell=32)
    means = picture(96, 128).reshape(3, 32, 4, 32, 3).mean(axis=(1, 3))
    assert np.abs(found[16::32, 16::32] - means).max() <= 1
    assert (found == np.repeat(np.repeat(found[::32, ::32], 32, axis=0), 32, axis=1)).all()


def test_tile_takes_the_details_and_leaves_the_content():
    np.testing.assert_array_equal(pictures.tile(picture(), factor=1.0), picture())
    found = pictures.tile(picture(), factor=4.0)
    small = cv2.resize(picture(), (32, 24), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(found, cv2.resize(small, (128, 96)))


def test_recolour_leaves_lightness():
    found = pictures.grey(picture(), method="intensity", gamma=1.0)
    np.testing.assert_array_equal(found[..., 1], picture().max(axis=2))
    lightness = cv2.cvtColor(picture(), cv2.COLOR_RGB2LAB)[..., 0]
    np.testing.assert_array_equal(pictures.grey(picture(), method="luminance", gamma=1.0)[..., 1], lightness)
    assert pictures.grey(picture(), method="luminance", gamma=2.0).mean() < lightness.mean()


def test_shuffling_keeps_the_colours_and_depends_on_the_seed():
    one, other = (pictures.shuffle(picture(), scale=16, seed=seed) for seed in (1, 2))
    assert np.abs(one.astype(int) - other).mean() > 5
    colours, shuffled = ({*map(tuple, some.reshape(-1, 3) // 64)} for some in (picture(), one))
    assert len(shuffled & colours) >= 3
    assert np.mean([tuple(pixel) in colours for pixel in one.reshape(-1, 3) // 64]) > 0.9


def test_depth_is_brought_to_the_pictures_size_and_range():
    near = np.linspace(-3, 7, 12, dtype=np.float32).reshape(3, 4)
    found = seen.depth(picture(), near, invert=False)
    assert found.shape == picture().shape
    assert (found.min(), found.max()) == (0, 255)
    assert found[0, 0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(seen.depth(picture(), near, invert=True), 255 - found)
    assert seen.depth(picture(), np.full((3, 4), 5, np.float32), invert=False).max() == 0


def test_normals_follow_the_slopes_as_the_formula_says():
    near = (np.arange(8, dtype=np.float32) / 7).repeat(8).reshape(8, 8)  # rises downwards
    image = np.zeros((8, 8, 3), np.uint8)
    slopes = cv2.Sobel(near * 30, cv2.CV_32F, 0, 1, ksize=3)
    length = np.hypot(slopes, 2 * math.pi)
    wanted = np.dstack([np.full((8, 8), 127.5), slopes / length * 127.5 + 127.5, 2 * math.pi / length * 127.5 + 127.5])
    wanted[:3, :, 1:] = [127.5, 255]  # farther than 0.4
    found = seen.normal(image, near, background=0.4, strength=30.0)
    assert np.abs(found - wanted).max() <= 1
    flat = seen.normal(image, np.ones((8, 8), np.float32), background=0.0, strength=30.0)
    assert flat.reshape(-1, 3).tolist() == [[127, 127, 255]] * 64


def test_classes_have_the_colours_of_ade20k():
    assert PALETTE.shape == (150, 3)
    assert len(np.unique(PALETTE, axis=0)) == 149  # two of the benchmark's classes share a grey
    some = [[120, 120, 120], [180, 120, 120], [6, 230, 230], [150, 5, 61], [92, 0, 255]]
    assert PALETTE[[0, 1, 2, 12, 149]].tolist() == some  # wall, building, sky, person, flag
    classes = np.array([[0, 2], [12, 149]], np.int32)
    found = seen.segmentation(picture(), classes)
    assert found.shape == picture().shape
    for (row, column), number in np.ndenumerate(classes):
        corner = found[row * 48 : row * 48 + 48, column * 64 : column * 64 + 64]
        assert (corner == PALETTE[number]).all()


def person(**changed: tuple[float, float, float]) -> np.ndarray:
    """COCO's 17 points of somebody who stands in the middle of 512 x 512 pixels."""
    points = {
        "nose": (256, 100), "left_eye": (266, 90), "right_eye": (246, 90),
        "left_ear": (280, 95), "right_ear": (232, 95),
        "left_shoulder": (310, 160), "right_shoulder": (202, 160), "left_elbow": (340, 240), "right_elbow": (172, 240),
        "left_wrist": (350, 320), "right_wrist": (162, 320), "left_hip": (290, 320), "right_hip": (222, 320),
        "left_knee": (295, 410), "right_knee": (217, 410), "left_ankle": (298, 500), "right_ankle": (214, 500),
    }  # fmt: skip
    rows = {name: (*at, 0.9) for name, at in points.items()} | changed
    return np.array(list(rows.values()), np.float32)


def skeletons(*people: np.ndarray, min_confidence: float = 0.3) -> np.ndarray:
    canvas = np.zeros((512, 512, 3), np.uint8)
    return skeleton.openpose(canvas, np.array(people).reshape(-1, 17, 3), min_confidence=min_confidence)


def test_joints_have_openposes_colours_and_limbs_are_dimmer():
    found = skeletons(person())
    joints = {(256, 100): (255, 0, 0), (256, 160): (255, 85, 0), (202, 160): (255, 170, 0), (350, 320): (0, 255, 85),
              (246, 90): (170, 0, 255), (280, 95): (255, 0, 85)}  # fmt: skip
    for (x, y), colour in joints.items():
        assert tuple(found[y, x]) == colour
    assert tuple(found[160, 229]) == (153, 0, 0)  # from the neck to the right shoulder
    assert tuple(found[455, 296]) == (0, 51, 153)  # from the left knee to the ankle
    assert found[5:40].max() == 0


def test_points_that_are_uncertain_are_left_out_with_their_limbs():
    unsure = person(left_wrist=(350, 320, 0.1))
    assert skeletons(unsure)[320, 350].max() == 0
    assert skeletons(unsure)[290, 346].max() == 0
    assert skeletons(unsure, min_confidence=0.05)[320, 350].max() == 255
    no_neck = person(left_shoulder=(310, 160, 0.0))
    assert skeletons(no_neck)[160, 256].max() == 0


def test_nobody_is_black_and_everybody_is_drawn():
    assert skeletons().max() == 0
    aside = person()
    aside[:, 0] += 100
    assert (skeletons(person(), aside) >= skeletons(person())).mean() > 0.99
    assert skeletons(person(), aside)[100, 356].tolist() == [255, 0, 0]


def test_points_far_outside_are_clipped():
    assert skeletons(person(nose=(-5000, 9000, 0.9))).shape == (512, 512, 3)


def test_names_and_aliases_are_each_one_preprocessors():
    names = [folded(name) for key, one in PREPROCESSORS.items() for name in {folded(key), *map(folded, one.aliases)}]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "parameter"), [(n, p) for n, one in PREPROCESSORS.items() for p in one.parameters])
def test_defaults_are_within_their_bounds_and_bounds_work(name, parameter):
    assert parameter.about
    if parameter.minimum is None:
        assert isinstance(parameter.default, bool) or parameter.default in parameter.choices
        return
    assert parameter.minimum <= parameter.default <= parameter.maximum
    if name in FREE:
        for bound in (parameter.minimum, parameter.maximum):
            result = drawn(name, picture(), **{parameter.name: type(parameter.default)(bound)})
            assert result.shape == picture().shape


def test_every_preprocessor_and_parameter_is_documented():
    page = (ROOT / "docs" / "control.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in reversed(page.splitlines()) if line.startswith("| `")}
    assert {f"`{name}`" for name in PREPROCESSORS} <= set(rows)
    for name, one in PREPROCESSORS.items():
        for parameter in one.parameters:
            assert f"`{parameter.name}` (" in rows[f"`{name}`"], (name, parameter.name)
