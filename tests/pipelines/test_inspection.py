import io
from pathlib import Path

import pytest
from pictures import smooth_picture
from PIL import Image

from pipelines.inspection import inspect_all, inspect_image


def encoded(image: Image.Image, kind: str, **arguments) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def inspected(tmp_path: Path, data: bytes, name: str = "it.jpg"):
    (tmp_path / name).write_bytes(data)
    return inspect_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # of Pillow, about the cut TIFF
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_whole_image_has_its_size_and_a_truncated_one_a_fault(tmp_path, kind):
    data = encoded(smooth_picture(64, 48), kind)
    whole = inspected(tmp_path, data)
    assert (whole.height, whole.width, whole.bytes, whole.fault) == (48, 64, len(data), None)
    for cut in (1, len(data) // 3) if kind == "PNG" else (len(data) // 3, len(data) - 30):
        assert inspected(tmp_path, data[:-cut]).fault.startswith("not a readable image")


@pytest.mark.parametrize("cut", [1, 40, 500])
def test_a_jpeg_that_lacks_its_last_bytes_is_found_at_reduced_scale(tmp_path, cut):
    noise = Image.effect_noise((200, 160), 90).convert("RGB")
    fault = inspected(tmp_path, encoded(noise, "JPEG")[: -2 - cut]).fault
    assert "truncated" in fault


@pytest.mark.parametrize("data", [b"", b"hello" * 100])
def test_no_image_is_a_fault_that_does_not_repeat_the_path(tmp_path, data):
    fault = inspected(tmp_path, data).fault
    assert fault.startswith("not a readable image")
    assert str(tmp_path) not in fault


def test_the_size_is_that_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    found = inspected(tmp_path, encoded(smooth_picture(64, 48), "JPEG", exif=exif))
    assert (found.height, found.width) == (64, 48)


def test_what_dali_cannot_decode_is_a_fault_with_its_reason(tmp_path):
    picture = smooth_picture(64, 48)
    cases = {
        "GIF data": encoded(picture, "GIF"),
        "TIFF of mode F": encoded(picture.convert("F"), "TIFF"),
        "TIFF of mode I": encoded(picture.convert("I"), "TIFF"),
        "TIFF of mode LAB": encoded(picture.convert("LAB"), "TIFF"),
        "BitsPerSample": encoded(picture.convert("1"), "TIFF"),
        "lzma": encoded(picture, "TIFF", compression="lzma"),
    }
    for reason, data in cases.items():
        assert reason in inspected(tmp_path, data).fault


def test_webp_whose_exif_stands_behind_an_odd_block_is_a_fault(tmp_path):
    exif = Image.Exif()
    exif[274] = 1
    faults = {}
    for side in range(40, 60):
        picture = smooth_picture(side, side)
        bare = encoded(picture, "WEBP", lossless=True)
        odd = int.from_bytes(bare[16:20], "little") % 2
        data = encoded(picture, "WEBP", lossless=True, exif=exif)
        faults.setdefault(odd, set()).add(inspected(tmp_path, data).fault)
    assert faults[0] == {None}
    assert all("odd size" in fault for fault in faults[1])


def test_many_files_come_back_in_their_order_and_progress_reaches_the_end(tmp_path):
    paths = []
    for k in range(150):
        paths.append(tmp_path / f"{k}.png")
        Image.new("RGB", (k + 1, 3)).save(paths[-1])
    calls: list[tuple[int, int]] = []
    found = inspect_all(paths, lambda done, total: calls.append((done, total)))
    assert [it.width for it in found] == list(range(1, 151))
    assert calls[-1] == (150, 150)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
