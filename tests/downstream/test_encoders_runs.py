"""The grid that pre-training saw goes through a chain of runs: classification, UperNet, export."""

import pytest
import torch
from test_finetune import run, write_checkpoint
from test_segment_run import train

from common import sincos_2d
from downstream.encoders import open_encoder
from tools.export import export


@pytest.mark.slow
def test_trained_size__through_classification_upernet_and_export(tmp_path):
    path = write_checkpoint(tmp_path, "cfmae")
    pre, description, _ = open_encoder(checkpoint=path)
    trained = tuple(description["trained_size"])
    run("--checkpoint", path, "--image-size", 48, "--batch-size", 8, "--steps", 1,
        "--no-train-position", "--output", tmp_path / "a")  # fmt: skip
    tuned, description, _ = open_encoder(checkpoint=tmp_path / "a/last.pt")
    assert tuned.grid == (6, 6) and tuple(description["trained_size"]) == trained == (32, 32)
    assert torch.equal(tuned.pos_embed, sincos_2d(pre.embed_dim, 6, 6, trained=(4, 4)))
    source = ("--checkpoint", tmp_path / "a/last.pt")
    train(tmp_path / "b", "--steps", 1, "--image-size", 64, "--crop-width", 80, source=source)
    export(tmp_path / "b/last.pt", tmp_path / "c.pt")
    for name in ("b/last.pt", "c.pt"):
        encoder, description, _ = open_encoder(checkpoint=tmp_path / name)
        assert encoder.grid == (8, 10) and tuple(description["trained_size"]) == trained
        assert torch.equal(encoder.pos_embed, sincos_2d(pre.embed_dim, 8, 10, trained=(4, 4)))
