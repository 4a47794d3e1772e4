"""Other libraries' MAE ViT-B/16 at 75 %, each as its makers ship it, for `benchmark --peers`.

Each takes our batch and returns (loss, {}), so that the same loop times them. They are optional:
`pip install transformers`, `pip install lightly timm`.
"""

import engine  # noqa: F401 - before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from common import Normalize, patchify
from engine import UserError


class Transformers(nn.Module):
    """Hugging Face's `ViTMAEForPreTraining`."""

    def __init__(self):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        self.normalize = Normalize()
        self.model = ViTMAEForPreTraining(ViTMAEConfig(mask_ratio=0.75, norm_pix_loss=True))

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        return self.model(pixel_values=self.normalize(batch["rgb"])).loss, {}


class Lightly(nn.Module):
    """Lightly's MAE parts around timm's ViT, put together as in its own example."""

    def __init__(self):
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from lightly.models.utils import random_token_mask
        from timm.models.vision_transformer import vit_base_patch16_224

        self.random_token_mask, self.normalize = random_token_mask, Normalize()
        self.encoder = MaskedVisionTransformerTIMM(vit=vit_base_patch16_224())
        self.decoder = MAEDecoderTIMM(
            num_patches=196, patch_size=16, embed_dim=768, decoder_embed_dim=512, decoder_depth=8,
            decoder_num_heads=16, mlp_ratio=4.0, proj_drop_rate=0.0, attn_drop_rate=0.0,
        )  # fmt: skip

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        from lightly.models.utils import get_at_index, repeat_token, set_at_index

        imgs = self.normalize(batch["rgb"])
        keep, masked = self.random_token_mask((len(imgs), 197), 0.75, device=imgs.device)
        x = self.decoder.embed(self.encoder.encode(imgs, idx_keep=keep))
        tokens = repeat_token(self.decoder.mask_token, (len(imgs), 197))
        tokens = set_at_index(tokens, keep, x.type_as(tokens))
        pred = self.decoder.predict(get_at_index(self.decoder.decode(tokens), masked))
        target = get_at_index(patchify(imgs, 16), masked - 1)
        return nn.functional.mse_loss(pred, target), {}


PEERS = {"peer-transformers": Transformers, "peer-lightly": Lightly}


def build(name: str) -> nn.Module:
    """One of PEERS; UserError where its library is not installed."""
    torch.manual_seed(0)
    try:
        return PEERS[name]()
    except ImportError as e:
        raise UserError(f"{name}: {e}; pip install transformers lightly timm") from None
