import io

import numpy as np
import pytest
from nvidia.dali.pipeline import Pipeline
from pictures import smooth_picture
from PIL import Image, ImageOps

from pipelines.graphs import Form, evaluate_graph, train_graph
from pipelines.inspection import inspect_image
from sbf_dist.settings import Augmentation

# Output values are then the levels 0..255 themselves.
AS_LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
IDENTITY = np.array([[1, 0, 0], [0, 1, 0]], dtype=np.float32)


def run(pipe: Pipeline, path, **inputs) -> np.ndarray:
    """The image that comes out for one file."""
    pipe.feed_input("path", [np.frombuffer(str(path).encode(), dtype=np.uint8)])
    for name, value in inputs.items():
        pipe.feed_input(name, [np.asarray(value)])
    (images,) = pipe.run()
    return np.array(images.as_array()[0])


def form(size: int, **arguments) -> Form:
    return Form(
        **(
            {"batch_size": 1, "image_size": size, "threads": 1, "device_id": None, "prefetch": 1}
            | AS_LEVELS
            | arguments
        )
    )


def evaluation(size: int, crop: float = 1.0, **arguments) -> Pipeline:
    return evaluate_graph(form(size, **arguments), crop=crop)


def training(size: int, augmentation: Augmentation, **arguments) -> Pipeline:
    return train_graph(form(size, **arguments), augmentation)


def view(anchor=(0, 0), shape=(1, 1), mirror=0) -> dict:
    return {
        "anchor": np.array(anchor, dtype=np.float32),
        "shape": np.array(shape, dtype=np.float32),
        "mirror": np.int32(mirror),
    }


@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 401), (32, 32), (40, 24)])
def test_evaluation_is_resize_and_centre_crop_as_pillow_does_it(tmp_path, width, height):
    size, crop = (64, 0.875) if width > 100 else (24, 0.75)
    picture = smooth_picture(width, height)
    picture.save(tmp_path / "it.png")
    out = run(evaluation(size, crop), tmp_path / "it.png")
    short = round(size / crop)
    scale = short / min(width, height)
    resized = picture.resize(
        (round(width * scale), round(height * scale)), Image.Resampling.BILINEAR
    )
    # Half a pixel goes up in DALI's crop.
    left, top = (resized.width - size + 1) // 2, (resized.height - size + 1) // 2
    reference = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=float)
    assert out.shape == (size, size, 3)
    assert np.abs(out - reference).mean() < 1
    assert np.abs(out - reference).max() <= 4


def test_normalisation_is_exact(tmp_path):
    colour = np.array([10, 130, 255])
    Image.new("RGB", (30, 30), tuple(colour.tolist())).save(tmp_path / "it.png")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    out = run(evaluation(24, mean=mean.tolist(), std=std.tolist()), tmp_path / "it.png")
    assert out.dtype == np.float32
    assert np.abs(out - (colour / 255 - mean) / std).max() < 1e-5


def test_a_view_is_the_crop_resized(tmp_path):
    picture = smooth_picture(200, 100)
    picture.save(tmp_path / "it.png")
    out = run(training(24, Augmentation()), tmp_path / "it.png", **view((0.1, 0.5), (0.8, 0.25)))
    reference = picture.resize((24, 24), Image.Resampling.BILINEAR, box=(100, 10, 150, 90))
    assert np.abs(out - np.asarray(reference, dtype=float)).max() <= 2


def test_mirror_turns_left_and_right_round(tmp_path):
    smooth_picture(48, 48).save(tmp_path / "it.png")
    pipe = training(24, Augmentation())
    plain = run(pipe, tmp_path / "it.png", **view())
    assert np.array_equal(run(pipe, tmp_path / "it.png", **view(mirror=1)), plain[:, ::-1])


def test_the_matrix_shifts_and_turns_about_pixel_centres(tmp_path):
    smooth_picture(24, 24).save(tmp_path / "it.png")
    pipe = training(24, Augmentation(rotate=90))
    same = run(pipe, tmp_path / "it.png", **view(), matrix=IDENTITY)
    shifted = run(pipe, tmp_path / "it.png", **view(), matrix=np.float32([[1, 0, 2], [0, 1, -3]]))
    assert np.array_equal(shifted[3:, :-2], same[:-3, 2:])
    assert np.array_equal(shifted[0], shifted[2])  # the border is repeated
    turned = run(pipe, tmp_path / "it.png", **view(), matrix=np.float32([[0, -1, 24], [1, 0, 0]]))
    assert any(np.abs(turned - np.rot90(same, k)).max() <= 1 for k in (1, 3))


def test_colour_factors_change_brightness_contrast_and_saturation(tmp_path):
    smooth_picture(24, 24).save(tmp_path / "it.png")
    pipe = training(24, Augmentation(color=0.5))

    def coloured(*factors: float) -> np.ndarray:
        return run(pipe, tmp_path / "it.png", **view(), color=np.float32(factors))

    plain = coloured(1, 1, 1)
    assert np.abs(coloured(0.5, 1, 1) - plain / 2).max() <= 1
    assert coloured(1, 0.5, 1).std() == pytest.approx(plain.std() / 2, rel=0.05)
    assert coloured(1, 1, 0).std(axis=2).max() <= 1


def encoded(image: Image.Image, kind: str, **arguments) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def test_images_of_every_mode_that_passes_inspection_come_out_as_rgb(tmp_path):
    picture = smooth_picture(24, 24)
    transparent = picture.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((24, 24)))
    exif = Image.Exif()
    exif[274] = 6
    files = {
        "rgb.jpg": encoded(picture, "JPEG"),
        "progressive.jpg": encoded(picture, "JPEG", progressive=True),
        "grey.jpg": encoded(picture.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "stereo.jpg": encoded(picture, "MPO", save_all=True, append_images=[picture.rotate(90)]),
        "turned.jpg": encoded(picture, "JPEG", exif=exif),
        "misnamed.jpg": encoded(picture, "PNG"),
        "palette.png": encoded(picture.convert("P"), "PNG"),
        "grey.png": encoded(picture.convert("L"), "PNG"),
        "bits.png": encoded(picture.convert("1"), "PNG"),
        "grey_alpha.png": encoded(picture.convert("LA"), "PNG"),
        "alpha.png": encoded(transparent, "PNG"),
        "alpha.webp": encoded(transparent, "WEBP"),
        "lossless.webp": encoded(picture, "WEBP", lossless=True),
        "palette.bmp": encoded(picture.convert("P"), "BMP"),
        "cmyk.tif": encoded(picture.convert("CMYK"), "TIFF"),
        "lzw.tif": encoded(picture, "TIFF", compression="tiff_lzw"),
        "fax.tif": encoded(picture.convert("1"), "TIFF", compression="group4"),
        "grey.pgm": encoded(picture.convert("L"), "PPM"),
        "rgb.ppm": encoded(picture, "PPM"),
    }
    pipe = evaluation(24)
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert inspect_image(path).fault is None, name
        with Image.open(path) as image:
            reference = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=float)
        assert np.abs(run(pipe, path) - reference).max() <= 1, name


def test_sixteen_bit_greys_are_scaled_to_the_same_range(tmp_path):
    levels = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    for name in ("it.png", "it.tif", "it.pgm"):
        Image.fromarray(levels).save(tmp_path / name)
        assert inspect_image(tmp_path / name).fault is None
        out = run(evaluation(24), tmp_path / name)
        assert np.abs(out - (levels / 257)[:, :, None]).max() <= 1, name
