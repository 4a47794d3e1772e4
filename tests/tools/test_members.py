"""tools/members.py: maps as palette PNG, names of images (whole shards: test_pack.py)."""

import io

import numpy as np
from PIL import Image

import data
import files
from tools import members


def test_encode_map__keeps_ids_and_decodes_without_pillow():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (31, 17), np.uint8)
    for g in ("instance", "semantic"):
        content = np.frombuffer(members.encode_map(ids, g), np.uint8)
        assert np.array_equal(files.unfiltered(content.tobytes()), ids)
        assert np.array_equal(files.decode_map(content), ids)
        assert Image.open(io.BytesIO(content)).mode == "P"
    narrow = members.encode_map(ids.astype(np.uint16) % 200, "semantic")
    assert np.array_equal(files.decode_map(np.frombuffer(narrow, np.uint8)), ids % 200)


def test_encode_map__renumbers_wide_instances_as_relabel_cannot_tell():
    rng = np.random.default_rng(0)
    for count in (254, 255):
        values = np.r_[0, 65535, np.sort(rng.choice(np.arange(1, 65535), count, False))]
        values[5] = 255  # of a wide map: an id like others
        ids = np.r_[values, rng.choice(values, 38 * 20 - len(values))].astype(np.uint16)
        ids = ids.reshape(38, 20)
        kept = files.decode_map(np.frombuffer(members.encode_map(ids, "instance"), np.uint8))
        assert (kept.dtype == np.uint8) == (count == 254)
        assert np.array_equal(data.renumber(kept), data.renumber(ids))


def test_suffix_of__believes_the_first_bytes():
    assert members.suffix_of("a.PNG", b"\xff\xd8\xff\xe0") == "jpg"
    assert members.suffix_of("a/b.JPEG", b"\x89PNG\r\n") == "png"
    assert members.suffix_of("a/b.WebP", b"RIFF") == "webp"
    assert members.suffix_of("c.jpe", b"") == "jpe"
