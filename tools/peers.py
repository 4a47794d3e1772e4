"""Other libraries' base models at 224, each as its makers ship it, for `benchmark --peers`.

Each takes our batch and returns (loss, {}), so that the same loop times them. All are optional:

    pip install transformers lightly timm vit-pytorch hiera-transformer mmpretrain mmcv-lite

transformers' and mmpretrain's MAE are the paper's, ViT-B/16 at 75 %. What differs in the others:

    lightly             raw pixels; the class token is among those that a mask may hide
    vit-pytorch         raw pixels, no class token, q, k, v without a bias, attention written out
    hiera               MAE of another network, Hiera-B at 60 %, to set CoMA beside
    mmpretrain-maskfeat masks are its loader's (here: uniform), 78 hidden; ours plain MIM hides 79
    mmpretrain-beit     so are 75 masks, the jitter and the tokenizer's 112 pixels (here: means of
                        2 x 2). Relative positions, attention written out. Its tokenizer follows
                        autocast, and is in fp16 on CUDA; ours stays in fp32
"""

from importlib.util import find_spec
from types import SimpleNamespace

import engine  # noqa: F401 - before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from common import Normalize, patchify
from engine import UserError


class Peer(nn.Module):
    """`make` imports the library and builds its model; `loss` takes images both ways."""

    def __init__(self):
        super().__init__()
        self.normalize = Normalize()
        self.make()

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        return self.loss(self.normalize(batch["rgb"]), batch["rgb"]), {}

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        return self.model(imgs)


class Transformers(Peer):
    def make(self) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        self.model = ViTMAEForPreTraining(ViTMAEConfig(mask_ratio=0.75, norm_pix_loss=True))

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        return self.model(pixel_values=imgs).loss


class Lightly(Peer):
    """Lightly's MAE parts around timm's ViT, put together as in its own example."""

    def make(self) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import vit_base_patch16_224

        self.encoder = MaskedVisionTransformerTIMM(vit=vit_base_patch16_224())
        self.decoder = MAEDecoderTIMM(196, 16, embed_dim=768, decoder_embed_dim=512,
                                      decoder_depth=8, decoder_num_heads=16)  # fmt: skip

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        from lightly.models.utils import get_at_index, random_token_mask, repeat_token, set_at_index

        keep, masked = random_token_mask((len(imgs), 197), 0.75, device=imgs.device)
        x = self.decoder.embed(self.encoder.encode(imgs, idx_keep=keep))
        tokens = repeat_token(self.decoder.mask_token, (len(imgs), 197))
        tokens = set_at_index(tokens, keep, x.type_as(tokens))
        pred = self.decoder.predict(get_at_index(self.decoder.decode(tokens), masked))
        return nn.functional.mse_loss(pred, get_at_index(patchify(imgs, 16), masked - 1))


class ViTPytorch(Peer):
    def make(self) -> None:
        from vit_pytorch import MAE, ViT

        vit = ViT(image_size=224, patch_size=16, num_classes=0, dim=768, depth=12, heads=12,
                  mlp_dim=3072, pool="mean")  # fmt: skip
        self.model = MAE(encoder=vit, decoder_dim=512, masking_ratio=0.75, decoder_depth=8,
                         decoder_heads=16, decoder_dim_head=32)  # fmt: skip


class Hiera(Peer):
    def make(self) -> None:
        from hiera.hiera_mae import mae_hiera_base_224

        self.model = mae_hiera_base_224()

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        return self.model(imgs, mask_ratio=0.6)[0]


class MMPretrain(Peer):
    """A model by the name of its configuration. This one, MAE, draws its own masks."""

    config, changes, hidden = "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k", {}, 0

    def make(self) -> None:
        from mmpretrain import get_model

        self.model = get_model(self.config, **self.changes).train()
        self.model.init_weights()

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        masks = torch.rand(len(rgb), 196, device=rgb.device).argsort(1) < self.hidden
        samples = [SimpleNamespace(mask=m) for m in masks.long().unflatten(1, (14, 14))]
        return self.model.loss(imgs, samples)["loss"]


class MaskFeat(MMPretrain):
    config, hidden = "maskfeat_vit-base-p16_8xb256-amp-coslr-300e_in1k", 78

    def make(self) -> None:
        super().make()
        hog = self.model.target_generator
        for device in ("cpu", "cuda"):  # in fp32, as ours: a CPU's autocast gives it two dtypes
            hog.forward = torch.autocast(device, enabled=False)(hog.forward)


class BEiT(MMPretrain):
    config, hidden = "beit_beit-base-p16_8xb256-amp-coslr-300e_in1k", 75
    changes = {"target_generator": {"init_cfg": None}}  # no download: random weights

    def make(self) -> None:
        super().make()
        self.model.target_generator.requires_grad_(False)  # runs under no_grad, reaches no loss

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        return super().loss([imgs, 0.8 * nn.functional.avg_pool2d(rgb / 255, 2) + 0.1], rgb)


PEERS = {  # name: (class, modules that it imports, what installs them)
    "peer-transformers": (Transformers, "transformers", "transformers"),
    "peer-lightly": (Lightly, "lightly timm", "lightly timm"),
    "peer-vit-pytorch": (ViTPytorch, "vit_pytorch", "vit-pytorch"),
    "peer-hiera": (Hiera, "hiera", "hiera-transformer"),
    "peer-mmpretrain-mae": (MMPretrain, "mmpretrain mmcv", "mmpretrain mmcv-lite"),
    "peer-mmpretrain-maskfeat": (MaskFeat, "mmpretrain mmcv", "mmpretrain mmcv-lite"),
    "peer-mmpretrain-beit": (BEiT, "mmpretrain mmcv", "mmpretrain mmcv-lite"),
}


def missing(name: str) -> str | None:
    """A line that says what to install for one of PEERS; None where its modules are there."""
    _, needs, pip = PEERS[name]
    lacking = ", ".join(m for m in needs.split() if find_spec(m) is None)
    return f"{name}: no module {lacking}; pip install {pip}" if lacking else None


def build(name: str) -> nn.Module:
    """One of PEERS; UserError where something that it imports is not installed."""
    torch.manual_seed(0)
    try:
        return PEERS[name][0]()
    except ImportError as e:
        raise UserError(f"{name}: {e}; pip install {PEERS[name][2]}") from None
