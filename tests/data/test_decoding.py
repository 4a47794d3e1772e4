"""data.py: images and maps of every kind, against Pillow."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_data import smooth

import data


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def pillow(encoded):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))


@pytest.mark.parametrize(
    "kind, mode",
    [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("TIFF", "CMYK"),
        ("JPEG2000", "RGB"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "LA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("WEBP", "RGB"),
        ("WEBP", "RGBA"),
        ("BMP", "RGB"),
        ("GIF", "P"),
    ],
)
def test_decode_image__equals_pillow(kind, mode):
    image = Image.fromarray(smooth(37, 53)).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(smooth(37, 53, 1)[..., 0]))
    for turn in (1, 6) if kind in ("JPEG", "PNG", "WEBP") else (1,):
        exif = Image.Exif()
        exif[0x0112] = turn
        encoded = encode(image, kind, **({"exif": exif} if turn > 1 else {}))
        got = data.decode_image(encoded)
        assert got.dtype == torch.uint8 and got.shape == ((3, 37, 53) if turn == 1 else (3, 53, 37))
        difference = np.abs(got.permute(1, 2, 0).numpy().astype(int) - pillow(encoded))
        assert difference.max() <= (2 if kind == "JPEG" else 0)  # two builds may round apart


@pytest.mark.parametrize("turn", range(1, 9))
def test_decode_image__turns_by_exif(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    encoded = encode(Image.fromarray(smooth(32, 48)), "JPEG", exif=exif, quality=95)
    got = data.decode_image(encoded).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - pillow(encoded)).max() <= 2


def test_decode_image__deep_grey_keeps_its_upper_byte():
    grey = (smooth(20, 30)[..., 0].astype(np.uint16) << 8) + 77
    assert (data.decode_image(encode(Image.fromarray(grey), "PNG")).numpy() == grey >> 8).all()


def test_decode_image__refuses_a_decompression_bomb():
    encoded = encode(Image.fromarray(smooth(16, 16)), "JPEG")
    frame = bytes(encoded).index(b"\xff\xc0")
    encoded[frame + 5 : frame + 9] = 250  # claims 64250 x 64250
    with pytest.raises(Image.DecompressionBombError):
        data.decode_image(encoded)


def test_decode_map__reads_grey_and_palette_indices():
    ids = np.random.default_rng(0).integers(0, 256, (9, 13), np.uint8)
    wide = ids.astype(np.uint16) * 257
    assert (data.decode_map(encode(Image.fromarray(ids), "PNG")) == ids).all()
    assert (data.decode_map(encode(Image.fromarray(wide), "PNG")) == wide).all()
    for bits in (1, 2, 4, 8):
        few = ids & (2**bits - 1)
        image = Image.fromarray(few)
        image.putpalette([255 - i % 256 for i in range(3 * 2**bits)])
        encoded = encode(image, "PNG", bits=bits)
        assert encoded[24:26].tolist() == [bits, 3] and (data.decode_map(encoded) == few).all()


def grey_png(bits):
    """A PNG of `bits`-bit grey, which Pillow does not write: one of 1 bit with another IHDR."""
    encoded = encode(Image.fromarray(np.zeros((4, 8), bool)), "PNG")
    encoded[24] = bits
    encoded[29:33] = list(zlib.crc32(encoded[12:29]).to_bytes(4, "big"))
    return encoded


def test_decode_map__refuses_what_decoders_would_stretch():
    for bits in (1, 2, 4):
        with pytest.raises(ValueError, match=f"{bits}-bit grey;"):
            data.decode_map(grey_png(bits))
    for mode in ("RGB", "RGBA", "LA"):
        with pytest.raises(ValueError, match="8-bit"):
            data.decode_map(encode(Image.fromarray(smooth(8, 8)).convert(mode), "PNG"))
    with pytest.raises(ValueError, match="not a PNG file"):
        data.decode_map(encode(Image.fromarray(smooth(8, 8)), "JPEG"))
