"""VideoMAE-B's layout, written with our blocks, for `benchmark` to set VideoMCMAE beside.

A linear layer over cubes of 2 x 16 x 16, a ViT-B over the visible 160 of 1568 cubes, a decoder of 4
layers of width 384 over all of them (github.com/MCG-NJU/VideoMAE; it predicts the hidden ones
alone, here all are). Settings, masks, decoder and loss are those of videomcmae.py.
"""

from unittest import mock

import engine  # noqa: F401  before torch: it sets how threads wait

import torch
from torch import Tensor, nn

import videomcmae
from common import init_weights, split
from tubes import cut, pick
from videomcmae import Config, VideoMCMAE, sincos_1d
from vit import ViT


class VideoViT(ViT):
    """A ViT over cubes, as wide as stage 3 and one layer deeper: ViT-B for MCMAE-B."""

    def __init__(self, cfg: Config):
        (*_, dim), (*_, depth), _ = cfg.sizes
        size, (t, h, w) = (cfg.image_size,) * 2, cfg.grid
        super().__init__(size, cfg.patch_size, dim, depth + 1, cfg.num_heads, class_token=False)
        self.patch_embed = nn.Linear(3 * cfg.cube_frames * cfg.patch_size**2, dim)
        index = torch.arange(h * w)[:, None] + h * w * torch.arange(t)  # tube by tube
        self.register_buffer("pos_embed", sincos_1d(dim, index), persistent=False)


class VideoMAE(VideoMCMAE):
    """VideoMCMAE's decoder, masks and loss around another encoder."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.encoder = VideoViT(cfg)
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, cfg.decoder_embed_dim, bias=False)
        if cfg.multi_scale:
            del self.stage1_output_decode, self.stage2_output_decode
        init_weights(self)

    def predict(self, imgs: Tensor, mask: Tensor) -> Tensor:
        ids_keep, _, ids_restore = split(mask, self.cfg.num_visible)
        cubes = cut(imgs, self.cfg.patch_size, self.cfg.cube_frames).flatten(3)
        x = self.encoder.patch_embed(pick(cubes, ids_keep)) + self.encoder.pos_embed[ids_keep]
        (x,) = self.encoder.run(x.flatten(1, 2))  # (B, V*t, D)
        return self.decode(self.encoder.norm(x), ids_restore)


def main(argv: list[str] | None = None) -> None:
    """The loop of videomcmae.py around this model."""
    with mock.patch.object(videomcmae, "VideoMCMAE", VideoMAE):
        videomcmae.main(argv)
