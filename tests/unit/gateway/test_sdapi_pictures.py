"""Pictures of any shape are fitted without being blown up on the way."""

import numpy as np
import pytest
from PIL import Image

from imagemesh_gateway.sdapi.pictures import fitted


@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000)])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_strip_is_fitted(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], mode: int) -> None:
    made: list[int] = []
    resize = Image.Image.resize

    def watched(picture: Image.Image, size: tuple[int, int], *args: object, **named: object) -> Image.Image:
        made.append(size[0] * size[1])
        assert made[-1] <= 512 * 512
        return resize(picture, size, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert fitted(Image.new("RGB", size, "red"), 512, 512, mode).size == (512, 512)
    assert made


def test_the_middle_of_a_wide_picture_stays() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    assert (np.asarray(fitted(Image.fromarray(pixels), 32, 32, mode=1)) == 255).all()
