"""Ids of label maps are renumbered at once, counted, and nothing else of a map changes."""

import numpy as np
import pytest
from test_data import write

import files
from engine import UserError
from tools import map_files, remap_labels


def ids_of(path):
    return files.decode_map(np.fromfile(path, np.uint8))


def test_main__void_becomes_unlabelled(tmp_path, capsys):
    palette = map_files.encode(np.array([[0, 11, 3], [11, 11, 2]], np.uint8))
    map_files.write(tmp_path / "in/a/x.png", palette)
    write(tmp_path / "in/y.png", np.array([[5]], np.uint8))
    remap_labels.main([str(tmp_path / "in"), str(tmp_path / "out"), "11=255", "7=8"])
    found = ids_of(tmp_path / "out/a/x.png")
    assert found.dtype == np.uint8 and found.tolist() == [[0, 255, 3], [255, 255, 2]]
    assert ids_of(tmp_path / "out/y.png").tolist() == [[5]]
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"wrote       2 maps: {tmp_path / 'out'}"
    words = [line.split()[1:4] for line in said[:-1]]
    assert ["11", "->", "255"] in words and "42.857%" in said[4] and ["5", "stays"] == words[3][:2]
    assert said[5] == "id 7     is in no map"


def test_main__all_at_once_and_ranges(tmp_path):
    """1 becomes 0 and 0 becomes 255: one after the other, both would be 255 or 0."""
    write(tmp_path / "in/x.png", np.arange(151, dtype=np.uint8)[None])
    remap_labels.main([str(tmp_path / "in"), str(tmp_path / "out"), "1-150=0-149", "0=255"])
    assert ids_of(tmp_path / "out/x.png").tolist() == [[255, *range(150)]]


def test_main__sixteen_bits_stay(tmp_path):
    """In them 255 is an instance like any other, 65535 unlabelled."""
    write(tmp_path / "in/x.png", np.array([[1, 255, 65535]], np.uint16))
    write(tmp_path / "in/small.png", np.array([[1, 255]], np.uint16))
    write(tmp_path / "in/wide.png", np.array([[1, 4]], np.uint8))
    remap_labels.main([str(tmp_path / "in"), str(tmp_path / "out"), "1=300"])
    assert ids_of(tmp_path / "out/x.png").tolist() == [[300, 255, 65535]]
    for name, wanted in (("x", [[300, 255, 65535]]), ("small", [[300, 255]]), ("wide", [[300, 4]])):
        found = ids_of(tmp_path / f"out/{name}.png")
        assert found.dtype != np.uint8 and found.tolist() == wanted
    remap_labels.main([str(tmp_path / "in"), str(tmp_path / "again"), "1=2"])
    assert ids_of(tmp_path / "again/small.png").dtype != np.uint8


def test_main__bad_input_is_one_line(tmp_path):
    write(tmp_path / "in/x.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "none").mkdir()
    src, dst = str(tmp_path / "in"), str(tmp_path / "out")
    for words, message in (
        ((src, dst, "11"), "'11': wanted OLD=NEW"),
        ((src, dst, "a=b"), "wanted OLD=NEW"),
        ((src, dst, "1=2=3"), "wanted OLD=NEW"),
        ((src, dst, "3-1=0-2"), "wanted OLD=NEW"),
        ((src, dst, "1-3=0-1"), "wanted OLD=NEW"),
        ((src, dst, "0-1=3"), "wanted OLD=NEW"),
        ((src, dst, "1=65536"), "wanted OLD=NEW"),
        ((src, dst, "1=2", "0-4=5-9"), "id 1 is named twice"),
        ((src, src, "1=2"), "exists; name a new folder"),
        ((str(tmp_path / "nowhere"), dst, "1=2"), "there is no folder"),
        ((str(tmp_path / "none"), dst, "1=2"), "no .png in"),
        ((src, dst), "required: changes"),
    ):
        with pytest.raises(UserError, match=message):
            remap_labels.main([*words])
    (tmp_path / "in/x.png").write_bytes(b"noise")
    with pytest.raises(UserError, match="x.png: not a PNG file"):
        remap_labels.main([src, dst, "1=2"])
