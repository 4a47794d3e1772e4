"""Other libraries' base models at 224, each as its makers ship it, for `benchmark --peers`.

Each takes our batch and returns (loss, {}), so that the same loop times them. All are optional:

    pip install transformers lightly timm vit-pytorch mmpretrain mmcv-lite

mmpretrain 1.2 cannot be imported where transformers 5 and pycocotools are: it wants an environment
without one of them. Its and transformers' MAE are the paper's, ViT-B/16 at 75 %. The others:

    lightly             raw pixels; the class token is among those that a mask may hide
    vit-pytorch         raw pixels, no class token, q, k, v without a bias, attention written out
    mmpretrain-maskfeat masks are its loader's (here: uniform), 78 hidden; ours plain MIM hides 79
    mmpretrain-beit     so are 75 masks, the jitter and the tokenizer's 112 pixels (here: means of
                        2 x 2). Relative positions, attention written out. Its tokenizer follows
                        autocast, and is in fp16 on CUDA; ours stays in fp32

Five are the authors' own code, which no registry has: `--peers DIR` names a folder of clones,
DIR/mae of https://github.com/facebookresearch/mae and so on (CLONES). Some were written for timm
0.3.2; with a new timm they get its blocks with attention written out, as it was then.

    mae-authors         MAE ViT-B, 75 %, normalised pixels
    multimae            MultiMAE-B as configured: 98 tokens of RGB, depth and semantic maps,
                        normalised RGB as a fourth output. Here depth and labels are made of RGB
    convmae             ConvMAE-B, 75 %, normalised pixels, masked convolution over all patches
    hiera               MAE of another network, Hiera-B at 60 %, to set CoMA beside
    semanticmim, -dvae  its configurations for MaskFeat and BEiT, at the paper's 60 % and 8 proxies;
                        masks, jitter, 112 pixels as for mmpretrain's, which it is built upon
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import engine  # noqa: F401 - before torch: it sets how threads wait

import numpy as np
import torch
from torch import Tensor, nn

from common import Normalize, patchify
from engine import UserError


class Peer(nn.Module):
    """`make` imports the library and builds its model; `loss` takes images both ways."""

    def __init__(self, clone: Path = Path()):
        super().__init__()
        self.clone, self.normalize = clone, Normalize()
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


class MMPretrain(Peer):
    """A model by the name of its configuration. This one, MAE, draws its own masks."""

    config, changes, hidden = "mae_vit-base-p16_8xb512-amp-coslr-300e_in1k", {}, 0

    def make(self) -> None:
        self.model = self.build().train()
        self.model.init_weights()

    def build(self) -> nn.Module:
        from mmpretrain import get_model

        return get_model(self.config, **self.changes)

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        masks = torch.rand(len(rgb), 196, device=rgb.device).argsort(1) < self.hidden
        masks = masks.long().unflatten(1, (14, 14))
        samples = [SimpleNamespace(mask=m, mask_index=m, img_index=1 - m) for m in masks]
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


@contextmanager
def imports_of(clone: Path) -> Iterator[None]:
    """Let modules be imported from a clone that was written for timm 0.3.2, torch 1.8, NumPy 1.19.

    Afterwards its modules are forgotten: all three have a package `util` or `utils`.
    """
    from timm.layers import set_fused_attn, use_fused_attn
    from timm.models import vision_transformer as timm

    def block(*args, qk_scale: None = None, **kwargs) -> nn.Module:
        return found(*args, **kwargs)

    utils = ModuleType("utils")
    utils.__path__ = [str(clone / "utils")]  # MultiMAE's own imports all that its scripts need
    found, timm.Block, fused = timm.Block, block, use_fused_attn()
    before = set(sys.modules)
    sys.modules["utils"], np.float = utils, float
    sys.path.insert(0, str(clone))
    set_fused_attn(False)
    try:
        yield
    finally:
        sys.path.remove(str(clone))
        set_fused_attn(bool(fused))
        timm.Block = found
        del np.float
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(clone)) or name in ("util", "utils"):
                del sys.modules[name]


class MAE(Peer):
    """A model by the name of its module and function in a clone."""

    module, function, options = "models_mae", "mae_vit_base_patch16", {"norm_pix_loss": True}
    ratio = 0.75

    def make(self) -> None:
        with imports_of(self.clone):
            build = getattr(importlib.import_module(self.module), self.function)
            self.model = build(**self.options)

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        return self.model(imgs, mask_ratio=self.ratio)[0]


class ConvMAE(MAE):
    module, function = "models_convmae", "convmae_convvit_base_patch16"


class Hiera(MAE):
    module, function, options, ratio = "hiera.hiera_mae", "mae_hiera_base_224", {}, 0.6


class Bottleneck:
    """A model of SemanticMIM's by its configuration, with eight proxies; mmseg is not needed."""

    hidden = 118

    def build(self) -> nn.Module:
        from mmengine import Config, Registry
        from mmpretrain.registry import MODELS

        cfg = Config.fromfile(self.clone / "configs" / self.config).model
        cfg.backbone.num_cls_tokens = 8
        cfg.target_generator.pop("init_cfg", None)  # no download: random weights
        other = SimpleNamespace(MODELS=Registry("another", scope="mmseg"))
        mmseg = {"mmseg": ModuleType("mmseg"), "mmseg.registry": other}  # it registers there, too
        sys.modules.update(mmseg)
        try:
            with imports_of(self.clone):
                importlib.import_module(Path(self.config).parts[0])
            return MODELS.build(cfg)
        finally:
            for module in mmseg:
                del sys.modules[module]


class SemanticMIM(Bottleneck, MaskFeat):
    config = "maskfeat/maskfeat_bottleneck_pretrain.py"


class SemanticMIMdVAE(Bottleneck, BEiT):
    config = "beit/beit_bottleneck_pretrain.py"


class MultiMAE(Peer):
    """Put together as its pre-training script does it with cfgs/pretrain/multimae-b_98_*.yaml."""

    def make(self) -> None:
        with imports_of(self.clone):
            from multimae import criterion, input_adapters, multimae, output_adapters

        patches, classes = input_adapters.PatchedInputAdapter, input_adapters.SemSegInputAdapter
        made = {"rgb": (patches, 3, 1), "depth": (patches, 1, 1), "semseg": (classes, 133, 4)}
        inputs = {
            task: kind(channels, stride_level=stride, patch_size_full=16)
            for task, (kind, channels, stride) in made.items()
        }
        outputs = {
            name: output_adapters.SpatialOutputAdapter(
                channels, stride_level=stride, patch_size_full=16, dim_tokens=256, depth=2,
                num_heads=8, use_task_queries=True, task=task, context_tasks=list(made),
                use_xattn=True,
            )
            for name, task in (*((t, t) for t in made), ("norm_rgb", "rgb"))
            for _, channels, stride in [made[task]]
        }  # fmt: skip
        self.model = multimae.pretrain_multimae_base(inputs, outputs, num_global_tokens=1)
        self.criteria = {
            "rgb": criterion.MaskedMSELoss(16, 1), "depth": criterion.MaskedL1Loss(16, 1),
            "semseg": criterion.MaskedCrossEntropyLoss(16, 4),
            "norm_rgb": criterion.MaskedMSELoss(16, 1, norm_pix=True),
        }  # fmt: skip

    def loss(self, imgs: Tensor, rgb: Tensor) -> Tensor:
        labels = rgb[:, 0, ::4, ::4].long() % 133
        x = {"rgb": imgs, "depth": imgs.mean(1, keepdim=True), "semseg": labels}
        pred, masks = self.model(x, num_encoded_tokens=98, fp32_output_adapters=["semseg"])
        x["norm_rgb"], masks["norm_rgb"] = imgs, masks["rgb"]
        return sum(self.criteria[t](y.float(), x[t], mask=masks[t]) for t, y in pred.items())


PEERS = {  # name: (class, what pip installs for it, the repository that is cloned for it)
    "peer-transformers": (Transformers, "transformers", ""),
    "peer-lightly": (Lightly, "lightly timm", ""),
    "peer-vit-pytorch": (ViTPytorch, "vit-pytorch", ""),
    "peer-mmpretrain-mae": (MMPretrain, "mmpretrain mmcv-lite", ""),
    "peer-mmpretrain-maskfeat": (MaskFeat, "mmpretrain mmcv-lite", ""),
    "peer-mmpretrain-beit": (BEiT, "mmpretrain mmcv-lite", ""),
    "peer-mae-authors": (MAE, "timm", "facebookresearch/mae"),
    "peer-multimae": (MultiMAE, "timm einops", "EPFL-VILAB/MultiMAE"),
    "peer-convmae": (ConvMAE, "timm", "Alpha-VL/ConvMAE"),
    "peer-hiera": (Hiera, "timm", "facebookresearch/hiera"),
    "peer-semanticmim": (SemanticMIM, "mmpretrain mmcv-lite timm", "yyk-wew/SemanticMIM"),
    "peer-semanticmim-dvae": (SemanticMIMdVAE, "mmpretrain mmcv-lite timm", "yyk-wew/SemanticMIM"),
}


def missing(name: str, clones: str) -> str | None:
    """A line that says what to install or clone for one of PEERS; None where all is there.

    Args: `clones`, --peers' DIR; "" where none is given.
    """
    _, pip, repository = PEERS[name]
    folder, at = Path(repository).name, clones or "DIR"
    if repository and not (clones and Path(clones, folder).is_dir()):
        url = f"https://github.com/{repository}"
        return f"{name}: no folder {at}/{folder}; git clone {url} there, --peers {at}"
    modules = [package.removesuffix("-lite").replace("-", "_") for package in pip.split()]
    lacking = ", ".join(m for m in modules if find_spec(m) is None)
    return f"{name}: no module {lacking}; pip install {pip}" if lacking else None


def build(name: str, clones: str = "") -> nn.Module:
    """One of PEERS; UserError where something that it imports is not installed."""
    kind, pip, repository = PEERS[name]
    torch.manual_seed(0)
    try:
        return kind(Path(clones, Path(repository).name))
    except ImportError as e:
        raise UserError(f"{name}: {e}; pip install {pip}") from None
