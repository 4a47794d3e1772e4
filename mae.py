"""MAE: the baseline of three of the four papers, and the first page to read.

Paper: "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377). Idea:
  1. an image is cut into patches and three quarters of them, drawn at random, are hidden;
  2. a ViT encodes the visible quarter alone, so a step costs a fraction of a whole pass;
  3. mask tokens take the hidden places and a small, narrow transformer decodes them all;
  4. the loss is the squared error of hidden patches, each normalised by itself;
  5. after pre-training only the encoder is kept.

The paper numbers no equations. Its words -> code, with github.com/facebookresearch/mae's values
  masking                      make_mask
  encoder, decoder             MAE.predict
  reconstruction target        MAE.loss, common.pixel_target
  recipe                       Config

  CPU:  python mae.py --data shapes --model tiny
  GPU:  torchrun --nproc_per_node=8 mae.py --data data/imagenet --epochs 800
"""

from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn

from common import Block, Normalize, fill, gather, init_weights, is_sincos, patchify
from common import pixel_picture, pixel_target, random_mask, sincos_2d, split
from engine import UserError, arg, cosine, decay_groups, divides, parse, require
from noise import MASK, uniform
from vit import ViT


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source; `--model` presets change the size."""

    epochs: int = arg(800, "PRETRAIN.md of its public code")
    warmup_epochs: float = arg(40, "PRETRAIN.md")
    batch_size: int = arg(4096, "PRETRAIN.md; the global batch")
    base_lr: float = arg(1.5e-4, "PRETRAIN.md; lr = base_lr * batch_size / 256")
    weight_decay: float = arg(0.05, "PRETRAIN.md")
    beta1: float = arg(0.9, "main_pretrain.py")
    beta2: float = arg(0.95, "main_pretrain.py")
    crop_scale_min: float = arg(0.2, "main_pretrain.py: RandomResizedCrop (0.2, 1)")
    image_size: int = arg(224, "main_pretrain.py")
    patch_size: int = arg(16, "ViT-B/16, L/16, H/14")
    mask_ratio: float = arg(0.75, "PRETRAIN.md", within="(0, 1)", group="masking")
    embed_dim: int = arg(768, "ViT-B")
    depth: int = arg(12, "ViT-B", within="(0, inf)")
    num_heads: int = arg(12, "ViT-B")
    decoder_embed_dim: int = arg(512, "models_mae.py")
    decoder_depth: int = arg(8, "models_mae.py", within="(0, inf)")
    decoder_num_heads: int = arg(16, "models_mae.py")
    norm_pix_loss: bool = arg(True, "PRETRAIN.md: pixels of a patch normalised")
    init: str | None = arg(None, "weights to start from: a public MAE's, or ours", group="run")

    FREE = engine.Config.FREE + ("init",)

    def resolve(self) -> None:
        """Refuse what cannot work; UserError naming the field and values that work."""
        super().resolve()
        for name in ("", "decoder_"):
            divides(self, f"{name}embed_dim", f"{name}num_heads")
            n = getattr(self, f"{name}embed_dim")
            require((n % 4 == 0, f"{name}embed_dim", f"{n} is not divisible by 4, for positions"))
        ok = 0 < self.num_visible < self.num_patches
        require((ok, "mask_ratio", f"{self.mask_ratio} leaves {self.num_visible} visible patches"))

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:
        """49 of 196: rounded down, as its public code."""
        return int(self.num_patches * (1 - self.mask_ratio) + 1e-6)


# ---------------------------------------------------------------------------------------- masking


def make_mask(cfg: Config, batch: dict[str, Tensor], progress: Tensor) -> Tensor:
    """Hide patches at random: (B, N) bool, True = hidden; `progress` changes nothing here."""
    noise = uniform(batch["seed"], cfg.num_patches, MASK)
    return random_mask(noise, cfg.num_patches - cfg.num_visible)


# ------------------------------------------------------------------------------------------ model


def make_encoder(cfg: Config, **kwargs) -> ViT:
    """The network that survives; kwargs as `vit.ViT`'s: image_size (H, W), drop_path, ..."""
    sizes = {k: getattr(cfg, k) for k in ("patch_size", "embed_dim", "depth", "num_heads")}
    return ViT(**{"image_size": (cfg.image_size,) * 2, **sizes, **kwargs})


class MAE(nn.Module):
    """Encoder of visible patches, decoder of all; names as in the public code."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, D = cfg, cfg.decoder_embed_dim
        self.normalize, self.encoder = Normalize(), make_encoder(cfg)
        self.decoder_embed = nn.Linear(cfg.embed_dim, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        fixed = sincos_2d(D, *self.encoder.grid)
        self.register_buffer("decoder_pos_embed", fixed, persistent=False)
        blocks = (Block(D, cfg.decoder_num_heads) for _ in range(cfg.decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = nn.Linear(D, 3 * cfg.patch_size**2)
        init_weights(self)

    def predict(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Predict all patches from the visible ones.

        Args:
            imgs: (B, 3, H, W) float, normalised.
            mask: (B, N) bool, True = hidden, with exactly `cfg.num_visible` False a sample.
        Returns: (B, N, p*p*3); at visible patches nothing that was trained.
        """
        encoder = self.encoder
        ids_keep, _, ids_restore = split(mask, self.cfg.num_visible)
        patches = gather(patchify(imgs, encoder.patch_size), ids_keep)
        x = encoder.patch_embed(patches) + encoder.pos_embed[ids_keep]  # (B, V, D)
        (x,) = encoder.run(encoder.add_prefix(x))
        x = self.decoder_embed(encoder.norm(x))  # (B, 1 + V, D_dec)
        prefix, x = x[:, :1], fill(x[:, 1:], self.mask_token, ids_restore)
        x = torch.cat([prefix, x + self.decoder_pos_embed], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x)[:, 1:])

    def loss(self, pred: Tensor, imgs: Tensor, mask: Tensor) -> Tensor:
        """Squared error over hidden pixels, in fp32."""
        target = pixel_target(imgs, self.cfg.patch_size, self.cfg.norm_pix_loss)
        error = (pred.float() - target).square().mean(-1)  # (B, N)
        return ((error * mask).sum(1) / mask.sum(1)).mean()

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py for its keys), and logs, of which it has none."""
        imgs, mask = self.normalize(batch["rgb"]), make_mask(self.cfg, batch, progress)
        return self.loss(self.predict(imgs, mask), imgs, mask), {}


@torch.no_grad()
def evaluate(model: MAE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss on held-out images, beside that of a guess: each patch in its own mean, one grey."""
    imgs, mask = model.normalize(batch["rgb"]), make_mask(model.cfg, batch, None)
    target = pixel_target(imgs, model.cfg.patch_size, model.cfg.norm_pix_loss)
    flat = target.mean(-1, keepdim=True).expand_as(target)
    loss = model.loss(model.predict(imgs, mask), imgs, mask)
    return {"loss": loss, "loss_flat": model.loss(flat, imgs, mask)}


@torch.no_grad()
def reconstruct(model: MAE, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Images, which patches are hidden (B, h, w), and the prediction, as pictures.py draws them."""
    cfg, imgs, mask = model.cfg, model.normalize(batch["rgb"]), make_mask(model.cfg, batch, None)
    pred = pixel_picture(model.predict(imgs, mask), imgs, cfg.patch_size, cfg.norm_pix_loss)
    hidden = mask.unflatten(1, model.encoder.grid)
    return {"rgb": (batch["rgb"], hidden, model.normalize.undo(pred))}


def load_init(model: MAE, path: str | Path) -> str:
    """Start from a public MAE's weights or ours; a report, or UserError and nothing is loaded."""
    state, report = engine.read_state(path, "--init")
    state = {k.removeprefix("encoder."): v for k, v in state.items()}
    for k in ("pos_embed", "decoder_pos_embed"):
        if k in state and not is_sincos(state[k]):
            raise UserError(f"--init {path}: {k} was learned; here it is fixed, sine-cosine")
    # A file of the encoder alone is whole, too; one with a part of a part is not.
    there = {k.split(".")[0] for k in state} | {"cls_token", "patch_embed", "blocks", "norm"}
    rules = lambda k: k.split(".")[0] not in there, lambda k: not k.startswith("blocks.")
    return engine.load_weights(model, state, path, *rules, report)


def load_encoder(path: str | Path, **kwargs) -> ViT:
    """The encoder of a checkpoint; kwargs: image_size (H, W) and drop_path."""
    cfg, state = engine.load_encoder(path, "mae", Config)
    encoder = make_encoder(cfg, **{"trained_size": (cfg.image_size,) * 2, **kwargs})
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------- presets, loop

PRESETS = {
    # Ours, for a laptop: 64 x 64 scenes.
    "tiny": dict(
        data="shapes", image_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4,
        decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2, epochs=1, warmup_epochs=0.1,
        batch_size=32, base_lr=8e-3,
    ),
    "base": dict(),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, micro_batch=64),
    "huge": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16, micro_batch=32),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, PRESETS, __doc__, argv)
    with engine.Run("mae", cfg) as run:
        mae = MAE(cfg)
        if cfg.init and run.checkpoint is None:
            run.say(f"init        {load_init(mae, cfg.init)}")
        model = run.place(mae)
        optimizer = torch.optim.AdamW(
            decay_groups(mae, cfg.weight_decay), lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True
        )
        for step in run.steps(model, optimizer, evaluate, reconstruct):
            for batch in step.micro_batches():  # rgb (B, 3, H, W) uint8, seed (B,)
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(cosine(cfg, step))


if __name__ == "__main__":
    engine.command("mae", main)
