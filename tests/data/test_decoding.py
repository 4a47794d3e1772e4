"""data.py: images and maps of every kind, against Pillow."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_data import smooth

import data
import files


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def pillow(encoded):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))


@pytest.mark.parametrize("kind, mode", [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("TIFF", "CMYK"), ("JPEG2000", "RGB"),
    ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("WEBP", "RGB"),
    ("WEBP", "RGBA"), ("BMP", "RGB"), ("GIF", "P"),
])  # fmt: skip
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
    for kind in ("PNG", "TIFF"):
        assert (data.decode_image(encode(Image.fromarray(grey), kind)).numpy() == grey >> 8).all()
    for deep, kind in ((grey, "PPM"), (np.int32(grey), "TIFF"), (np.float32(grey), "TIFF")):
        with pytest.raises(ValueError, match="more than 8 bits"):  # their range is not known
            data.decode_image(encode(Image.fromarray(deep), kind))


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


def chunk(name, content):
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def palette_png(ids, filters, kind=(8, 3, 0, 0, 0), cut=0, more=b"", end=True):
    """A palette PNG by hand; row k is stored with filter `filters[k]`: 0 none, 1 left, 2 above."""
    left, above = np.zeros_like(ids), np.zeros_like(ids)
    left[:, 1:], above[1:] = ids[:, :-1], ids[:-1]
    rows = [ids[k] - (0, left[k], above[k])[f] for k, f in enumerate(filters)]
    stream = zlib.compress(b"".join(bytes([f]) + r.tobytes() for f, r in zip(filters, rows)) + more)
    stream = stream[: len(stream) - cut]
    half = len(stream) // 2
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", ids.shape[1], ids.shape[0], *kind))
        + chunk(b"tEXt", b"Title\0of no use")
        + chunk(b"PLTE", bytes(range(256)) * 3)
        + b"".join(chunk(b"IDAT", part) for part in (stream[:half], stream[half:]))
        + chunk(b"IEND", b"") * end
    )


def test_unfiltered__is_what_pillow_reads_or_left_to_it(monkeypatch):
    ids = np.random.default_rng(0).integers(0, 256, (5, 9), np.uint8)
    plain = palette_png(ids, [0] * 5)
    assert np.array_equal(files.unfiltered(plain), ids)
    for filters in ([0, 0, 0, 0, 1], [2, 0, 1, 2, 1]):
        content = palette_png(ids, filters)
        assert files.unfiltered(content) is None
        assert np.array_equal(files.decode_map(np.frombuffer(content, np.uint8)), ids)
    left = [
        palette_png(ids, [0] * 5, kind=(8, 0, 0, 0, 0)),  # grey
        palette_png(ids, [0] * 5, kind=(8, 3, 0, 0, 1)),  # interlaced
        palette_png(ids, [0] * 5, kind=(4, 3, 0, 0, 0)),
        palette_png(ids, [0] * 5, cut=4),  # its checksum is missing
        palette_png(ids, [0] * 5, cut=30),
        palette_png(ids, [0] * 5, more=b"\0"),
        palette_png(ids, [0] * 5, end=False),
        palette_png(ids[:4], [0] * 4).replace(struct.pack(">2I", 9, 4), struct.pack(">2I", 9, 5)),
        *(plain[:n] for n in range(0, len(plain) - 12)),
    ]
    assert all(files.unfiltered(content) is None for content in left)
    for content in [plain, *left]:  # and so nothing that Pillow refuses is taken
        mine = theirs = None
        with contextlib.suppress(Exception):
            mine = files.decode_map(np.frombuffer(content, np.uint8))
        with monkeypatch.context() as patch, contextlib.suppress(Exception):
            patch.setattr(files, "unfiltered", lambda data: None)
            theirs = files.decode_map(np.frombuffer(content, np.uint8))
        assert np.array_equal(mine, theirs)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 45)
    assert files.unfiltered(plain) is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 44)  # Pillow says what it does with bombs
    assert files.unfiltered(plain) is None
