"""What a transfer adds to MCMAE's encoder goes through checkpoints: options, trained positions."""

import pytest
import torch
from test_encoders import our_checkpoint, transfer_of

from downstream import encoders
from downstream.encoders import build, describe, open_encoder

OPTIONS = {"relative_bias": True, "init_values": 1.0, "fourth": "conv"}


@pytest.mark.slow
def test_options__of_mcmae(tmp_path):
    torch.manual_seed(0)
    our_checkpoint(tmp_path / "a.pt", "mcmae")
    description = describe(checkpoint=tmp_path / "a.pt") | {"options": OPTIONS}
    encoder = build(description, 96, train_position=True)
    report = encoders.load(encoder, description, tmp_path / "a.pt")
    assert "left out: nothing" in report and "fresh: pos_embed, blocks3 (9), fourth (7)" in report
    ids = encoder.layer_ids()
    assert ids["pos_embed"] == 0 and set(ids) == {k for k, _ in encoder.named_parameters()}
    for p in encoder.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    transfer_of(tmp_path / "b.pt", encoder, description, 96)
    again, found, report = open_encoder(checkpoint=tmp_path / "b.pt")
    assert "fresh: nothing" in report and found["options"] == OPTIONS
    assert found["learned_position"] and found["trained_size"] == [96, 96]
    imgs = torch.randn(1, 3, 96, 96)
    for a, b in zip(again.eval().forward_pyramid(imgs), encoder.eval().forward_pyramid(imgs)):
        assert torch.equal(a, b)
    wide, found, report = open_encoder(checkpoint=tmp_path / "b.pt", image_size=128)
    assert "positions resized from 12x12 to 16x16" in report and "fresh: nothing" in report
    wide.forward_pyramid(torch.randn(1, 3, 128, 128))  # biases are for the new grid, too
