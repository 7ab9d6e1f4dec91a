import contextlib
import random

import numpy as np
import pytest
import torch
from data_helpers import make_image, quadrants
from PIL import Image, ImageCms

from vislora.data.images import (
    WHITE,
    BadImage,
    cover_box,
    crop_positions,
    decode,
    is_animated,
    load_image,
    to_pixels,
)
from vislora.errors import DataError

INVERSE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def at(image, x, y):
    return image.getpixel((x, y))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, suffix):
    upright = quadrants()
    stored = upright.transpose(INVERSE[orientation]) if INVERSE[orientation] is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if suffix == ".webp" else {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    stored.save(tmp_path / f"a{suffix}", exif=exif, **how)
    loaded = load_image(tmp_path / f"a{suffix}")
    assert loaded.size == upright.size
    difference = np.abs(np.asarray(loaded, dtype=int) - np.asarray(upright, dtype=int))
    assert difference.max() <= 4


def test_damaged_exif_is_not_fatal(tmp_path):
    quadrants().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert load_image(tmp_path / "a.jpg").size == (32, 24)


def test_hidden_colours_under_transparency_do_not_show(tmp_path):
    rgba = np.zeros((10, 10, 4), dtype=np.uint8)
    rgba[..., 0] = 255  # red everywhere, but the left half is fully transparent
    rgba[:, 5:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert at(image, 0, 0) == WHITE
    assert at(image, 9, 0) == (255, 0, 0)
    assert at(load_image(tmp_path / "a.png", (1, 2, 3)), 0, 0) == (1, 2, 3)


def test_half_transparency_is_mixed(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert at(load_image(tmp_path / "a.png"), 0, 0) == (127, 127, 127)


def test_gray_with_alpha(tmp_path):
    Image.new("LA", (8, 8), (50, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (8, 8), (50, 255)).save(tmp_path / "solid.png")
    assert at(load_image(tmp_path / "clear.png", (9, 8, 7)), 0, 0) == (9, 8, 7)
    assert at(load_image(tmp_path / "solid.png"), 0, 0) == (50, 50, 50)


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palette_transparency(tmp_path, suffix):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    image.paste(1, (4, 0, 8, 8))
    image.save(tmp_path / f"a{suffix}", transparency=0)
    loaded = load_image(tmp_path / f"a{suffix}", (1, 1, 1))
    assert at(loaded, 0, 0) == (1, 1, 1)
    assert at(loaded, 7, 0) == (200, 100, 50)


def test_rgb_with_a_transparent_colour(tmp_path):
    make_image(tmp_path / "a.png", (8, 8), (5, 6, 7), transparency=(5, 6, 7))
    assert at(load_image(tmp_path / "a.png"), 0, 0) == WHITE


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 32896, 65535]] * 8, dtype=np.uint16).repeat(2, axis=1)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    image = load_image(tmp_path / f"a{suffix}")
    assert [at(image, x, 0)[0] for x in (0, 2, 4, 6)] == [0, 1, 128, 255]
    assert at(image, 4, 0) == (128, 128, 128)


def test_16_bit_gray_with_a_transparent_value(tmp_path):
    values = np.full((8, 8), 1000, dtype=np.uint16)
    values[:, 4:] = 65535
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    image = load_image(tmp_path / "a.png", (3, 3, 3))
    assert at(image, 0, 0) == (3, 3, 3)
    assert at(image, 7, 0) == WHITE


def test_big_endian_16_bit_tiff(tmp_path):
    image = Image.frombytes("I;16B", (8, 8), b"\x80\x80" * 64)
    image.save(tmp_path / "a.tif")
    assert at(load_image(tmp_path / "a.tif"), 0, 0) == (128, 128, 128)


def test_32_bit_pixels_have_no_known_white(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(DataError, match=rf"{name}.*8 or 16 bits"):
            load_image(tmp_path / name)


def test_cmyk_gray_and_black_white(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = at(load_image(tmp_path / "a.jpg"), 0, 0)
    assert red > 250
    assert max(green, blue) < 6
    Image.new("1", (8, 8), 1).save(tmp_path / "b.png")
    assert at(load_image(tmp_path / "b.png"), 0, 0) == WHITE
    Image.new("L", (8, 8), 77).save(tmp_path / "c.bmp")
    assert at(load_image(tmp_path / "c.bmp"), 0, 0) == (77, 77, 77)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert at(load_image(tmp_path / "a.gif"), 0, 0) == (255, 0, 0)
    assert is_animated(tmp_path / "a.gif")
    assert not is_animated(make_image(tmp_path / "b.png"))


def test_embedded_profiles(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colour = (13, 77, 211)
    make_image(tmp_path / "srgb.png", colour=colour, icc_profile=srgb)
    assert at(load_image(tmp_path / "srgb.png"), 0, 0) == colour
    make_image(tmp_path / "broken.png", colour=colour, icc_profile=b"nonsense")
    assert at(load_image(tmp_path / "broken.png"), 0, 0) == colour
    Image.new("L", (8, 8), 99).save(tmp_path / "misfit.png", icc_profile=srgb)
    assert at(load_image(tmp_path / "misfit.png"), 0, 0) == (99, 99, 99)


def test_a_wider_profile_is_converted(tmp_path):
    """A matrix profile with red and blue exchanged, made from the sRGB one by exchanging two tag names."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")).replace(b"sRGB", b"test")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=swapped)
    red, _, blue = at(load_image(tmp_path / "a.png"), 0, 0)
    assert red < 5
    assert blue > 250
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "b.png", icc_profile=swapped)
    assert at(load_image(tmp_path / "b.png"), 0, 0) == WHITE


def test_bad_files_are_named_with_the_reason(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    with pytest.raises(DataError, match=r"a\.png: not an image"):
        load_image(tmp_path / "a.png")
    with pytest.raises(BadImage, match="link to nothing"):
        decode(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tif"])
def test_damaged_bytes_give_an_image_or_a_reason(tmp_path, suffix):
    chance = random.Random(suffix)
    path = tmp_path / f"a{suffix}"
    Image.effect_noise((40, 30), 60).convert("RGB").save(path)
    whole = path.read_bytes()
    for _ in range(40):
        data = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.choice([1, 5, 20])):
            place = chance.randrange(chance.choice([64, len(whole)]))
            data[place : place + 1] = bytes([chance.randrange(256)])
        path.write_bytes(data)
        with contextlib.suppress(BadImage):
            assert decode(path).mode == "RGB"


def test_pixels_range_and_layout(tmp_path):
    image = Image.new("RGB", (20, 10), (255, 0, 127))
    pixels = to_pixels(image, (8, 8))
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, -1 / 255])
    assert torch.equal(to_pixels(quadrants(16, 8), (16, 8))[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_an_image_of_the_buckets_size_is_untouched():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    back = ((to_pixels(image, (32, 24)) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(back, np.asarray(image))


def test_crop_keeps_the_aspect_and_the_chosen_part():
    image = quadrants(64, 16)  # left half red over blue, right half green over white
    left = to_pixels(image, (16, 16), (0.0, 0.5))
    assert left[0, 0].min() == 1.0  # all red
    assert to_pixels(image, (16, 16), (1.0, 0.5))[1, 0].min() == 1.0
    centre = to_pixels(image, (16, 16))
    assert centre[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert centre[:, 0, -1].tolist() == [-1.0, 1.0, -1.0]
    assert torch.equal(to_pixels(image, (16, 16), flip=True), centre.flip(2))


def test_cover_box_has_the_buckets_aspect():
    assert cover_box((100, 50), (8, 8)) == (25, 0, 75, 50)
    assert cover_box((100, 50), (8, 8), (0.0, 0.0)) == (0, 0, 50, 50)
    assert cover_box((50, 100), (8, 8), (0.5, 0.0)) == (0, 0, 50, 50)
    left, top, right, bottom = cover_box((4032, 3024), (576, 448), (1.0, 1.0))
    assert (right, bottom) == (4032, 3024)
    assert (right - left) / (bottom - top) == pytest.approx(576 / 448)


def test_crop_positions():
    assert crop_positions("top", "x") == [(0.5, 0.0)]
    places = crop_positions("random", "x")
    assert len(set(places)) == 4
    assert places == crop_positions("random", "x") != crop_positions("random", "y")
    with pytest.raises(DataError, match="center, top or random"):
        crop_positions("bottom", "x")
