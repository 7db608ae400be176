"""Small pictures within a page."""

import base64
import io

import numpy as np
from PIL import Image

from sbf_dist.report import pictures


def decoded(address: str) -> Image.Image:
    kind, _, data = address.partition(",")
    assert kind.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_filter_is_a_square_of_tiles_with_gaps_signs_as_colours():
    weights = np.zeros((5, 3, 3), np.float32)
    weights[0, 0, 0], weights[4, 2, 2] = 2.0, -2.0
    picture = np.asarray(decoded(pictures.of_filter(weights, np.arange(5), 2.0)).convert("RGBA"))
    assert picture.shape == (7, 11, 4)
    red, _, blue, alpha = picture[0, 0]
    assert red > blue
    assert alpha == 255
    red, _, blue, alpha = picture[6, 6]
    assert blue > red
    assert alpha == 255
    assert (picture[..., 3] > 0).sum() == 2


def test_the_inputs_that_weigh_most_are_drawn():
    filters = np.ones((2, 20, 1, 1), np.float32)
    filters[:, [3, 7, 11, 19]] = 0.1
    kept = pictures.strongest_inputs(filters)
    assert len(kept) == 16
    assert not {3, 7, 11, 19} & set(kept.tolist())


def test_maps_and_photographs_are_small():
    values = np.linspace(0, 1, 224 * 112, dtype=np.float32).reshape(224, 112)
    assert max(decoded(pictures.of_map(values, 0, 1)).size) <= 72
    photo = np.zeros((300, 200, 3), np.uint8)
    assert decoded(pictures.of_photo(photo)).size == (107, 160)
