"""Every encoding that a camera sends becomes the grey image that it shows."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from kp_frontend.encodings import BIT_DEPTHS, LAYOUTS, GreyConverter, to_grey

RED, GREEN, BLUE = 250, 120, 10
GREY = int(cv2.cvtColor(np.uint8([[[RED, GREEN, BLUE]]]), cv2.COLOR_RGB2GRAY).item())
SCENE = np.random.default_rng(0).integers(0, 256, (6, 10)).astype(np.uint8)  # of grey values


def image(
    pixels: np.ndarray, encoding: str, padding: int = 0, big: bool = False
) -> SimpleNamespace:
    """A message of an image, its rows followed by `padding` unused bytes."""
    if pixels.dtype == np.uint16:
        pixels = pixels.astype(">u2" if big else "<u2")
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    return SimpleNamespace(
        height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, is_bigendian=int(big),
        step=rows.shape[1], data=rows.tobytes(),
    )  # fmt: skip


def compressed(suffix: str, pixels: np.ndarray, form: str) -> SimpleNamespace:
    return SimpleNamespace(format=form, data=cv2.imencode(suffix, pixels)[1].tobytes())


def scene(encoding: str, wide: bool) -> np.ndarray:
    """The scene in an encoding with all its colours equal."""
    layout = LAYOUTS[encoding.lower()]
    values = SCENE.astype(np.uint16) * 257 if wide else SCENE
    return values if layout.channels == 1 else np.repeat(values[..., None], layout.channels, 2)


PACKED = [name for name, layout in LAYOUTS.items() if layout.channels != 2 and layout.planes == 1]


@pytest.mark.parametrize("padding", [0, 2, 13])
@pytest.mark.parametrize("encoding", [n for n in PACKED if not n.startswith("bayer")])
def test_grey_in_every_layout_comes_back(encoding, padding):
    wide = LAYOUTS[encoding].bits == 16
    for big in (False, True):
        message = image(scene(encoding, wide), encoding, padding, big)
        np.testing.assert_array_equal(GreyConverter("16")(message), SCENE)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["rgb", "bgr", "rgba", "bgra"])
def test_colours_have_their_weights(order, bits):
    colour = {"r": RED, "g": GREEN, "b": BLUE, "a": 9}
    pixel = np.array([colour[c] for c in order])
    dtype = np.uint16 if bits == 16 else np.uint8
    pixels = np.broadcast_to(pixel * (257 if bits == 16 else 1), (4, 6, len(order))).astype(dtype)
    assert set(GreyConverter()(image(pixels, f"{order}{bits}")).ravel()) == {GREY}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_name_the_first_two_rows(pattern, bits):
    colour = {"r": RED, "g": GREEN, "b": BLUE}
    cell = np.reshape([colour[c] for c in pattern], (2, 2)) * (257 if bits == 16 else 1)
    mosaic = np.tile(cell, (4, 6)).astype(np.uint16 if bits == 16 else np.uint8)
    grey = GreyConverter()(image(mosaic, f"bayer_{pattern}{bits}", padding=3))
    assert np.abs(grey.astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(("encodings", "luma"), [(("yuv422", "uyvy"), 1),
                                                 (("yuv422_yuy2", "yuyv"), 0)])  # fmt: skip
def test_the_luma_of_packed_yuv_is_taken(encodings, luma):
    pixels = np.full((*SCENE.shape, 2), 128, np.uint8)
    pixels[..., luma] = SCENE
    for encoding in encodings:
        np.testing.assert_array_equal(GreyConverter()(image(pixels, encoding, 4)), SCENE)


@pytest.mark.parametrize("step", [10, 15, 20], ids=["of the luma", "of all planes", "doubled"])
@pytest.mark.parametrize("encoding", ["nv12", "nv21"])
def test_the_luma_of_planar_yuv_is_taken_whatever_step_means(encoding, step):
    data = np.concatenate([SCENE.ravel(), np.full(30, 128, np.uint8)])
    np.testing.assert_array_equal(to_grey(data, encoding, 10, 6, step), SCENE)


def test_planar_yuv_with_padded_rows_and_with_more_chroma():
    rows = np.pad(np.concatenate([SCENE, np.full((3, 10), 128, np.uint8)]), ((0, 0), (0, 6)))
    np.testing.assert_array_equal(to_grey(rows.ravel(), "nv12", 10, 6, 16), SCENE)
    data = np.concatenate([SCENE.ravel(), np.full(120, 128, np.uint8)])
    np.testing.assert_array_equal(to_grey(data, "nv24", 10, 6, 10), SCENE)


def test_mono8_is_not_copied():
    data = bytearray(SCENE.tobytes())
    grey = to_grey(data, "mono8", 10, 6, 10)
    data[13] = 200
    assert grey[1, 3] == 200


@pytest.mark.parametrize("bits", BIT_DEPTHS)
def test_values_are_scaled_so_that_the_greatest_is_white(bits):
    top = 2**bits - 1
    values = np.array([[0, top // 2, top, min(65535, top + 1)]], np.uint16)
    grey = GreyConverter(str(bits))(image(values, "mono16"))
    assert grey.tolist() == [[0, round(255 * (top // 2) / top), 255, 255]]


def test_auto_finds_the_bit_depth_and_says_each_change_once():
    said = []
    converter = GreyConverter(say=said.append)
    dim, bright = (np.array([[top // 2, top]], np.uint16) for top in (1000, 4000))
    for _ in range(3):
        assert converter(image(dim, "mono16")).tolist() == [[125, 249]]  # of 1023
    assert converter.images([image(dim, "mono16"), image(bright, "mono16")])[0][0, 1] == 62
    assert converter(image(dim, "mono16"))[0, 1] == 62  # it does not fall again
    assert [words.partition(": ")[2].split(" (")[0] for words in said] == [
        "read as 10 bits",
        "read as 12 bits",
    ]
    assert GreyConverter()(image(bright * 16, "mono16"))[0, 1] == 249


def test_16uc1_is_an_image_only_if_asked():
    message = image(np.full((2, 2), 1023, np.uint16), "16UC1")
    with pytest.raises(ValueError, match=r"16UC1 is usually depth.*bit_depth"):
        GreyConverter()(message)
    assert GreyConverter("10")(message).tolist() == [[255, 255], [255, 255]]
    png = compressed(".png", np.full((2, 2), 1023, np.uint16), "16UC1; png compressed ")
    with pytest.raises(ValueError, match="16UC1 is usually depth"):
        GreyConverter()(png)
    assert GreyConverter("10")(png)[0, 0] == 255


def test_compressed_images():
    smooth = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (40, 1))
    jpeg = compressed(".jpg", smooth, "mono8; jpeg compressed ")
    assert np.abs(GreyConverter()(jpeg).astype(int) - smooth).max() < 6
    png = compressed(".png", np.dstack([smooth] * 3), "rgb8; png compressed bgr8")
    np.testing.assert_array_equal(GreyConverter()(png), smooth)
    deep = compressed(".png", smooth.astype(np.uint16) * 4, "mono16; png compressed mono16")
    assert np.abs(GreyConverter()(deep).astype(int) - smooth).max() <= 1  # 10 bits
    cell = np.array([[RED, GREEN], [GREEN, BLUE]], np.uint8)
    raw = compressed(".png", np.tile(cell, (4, 4)), "bayer_rggb8; png compressed bayer_rggb8")
    assert np.abs(GreyConverter()(raw).astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"step": 9}, {"step": 11}, {"height": 7}, {"height": 5}, {"width": 11}, {"data": bytes(59)},
        {"data": b""}, {"height": 0, "data": b""}, {"width": 0}, {"width": 2**31, "step": 2**31},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_disagree_are_errors_of_one_line(change):
    message = image(SCENE, "mono8")
    vars(message).update(change)
    with pytest.raises(ValueError, match=r"^the left image: .*\d+x\d+.*") as error:
        GreyConverter().images([message], ("left",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["", "jpeg", "mono", "8UC", "32FC1", "8UC2", "nonsense"])
def test_unknown_encodings_are_errors(encoding):
    message = image(SCENE, encoding)
    with pytest.raises(ValueError, match=f"the encoding '{encoding}' is not one of"):
        GreyConverter()(message)


def test_broken_compressed_images_are_errors():
    whole = compressed(".jpg", np.tile(SCENE, (20, 20)), "jpeg")
    for data, form in ((whole.data[:-100], "jpeg"), (b"", "jpeg"), (b"no image", "h264"),
                       (bytes(200), "16UC1; compressedDepth png")):  # fmt: skip
        with pytest.raises(ValueError, match=r"compressed image \(.*\) (is|can)"):
            GreyConverter("16")(SimpleNamespace(format=form, data=data))
