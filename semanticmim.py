"""SemanticMIM: masked image modelling through proxy tokens, on MaskFeat and on BEiT targets.

Paper: "SemanticMIM: Marring Masked Image Modeling with Semantics Compression for General Visual
Representation" (under review). Idea:
  1. in plain MIM [MASK] tokens attend to [IMG] tokens and copy their neighbours;
  2. here [IMG] and a few [PROXY] tokens run through a ViT that never sees [MASK]: compression;
  3. beside each layer a second block lets [MASK] read the [PROXY] tokens of that layer, and other
     [MASK] tokens, never [IMG]: reconstruction;
  4. the target of a hidden patch is its HOG (MaskFeat) or its code by DALL-E's tokenizer (BEiT);
  5. the second stack is thrown away; a ViT with proxies in place of a class token stays.

Equation -> code
  Eq. 1    loss on [MASK] tokens            SemanticMIM.loss
  Eq. 2    plain MIM, --proxies 0           SemanticMIM.tokens
  Eq. 3    [IMG], [PROXY]: compression      SemanticMIM.tokens
  Eq. 4    [MASK]: reconstruction           ReconstructionBlock.forward
  Table 2  recipes of both targets          RECIPES
  Sec. 3.1 HOG, dVAE codes                  targets.py
  Fig. 5   number of proxies                --proxies N
  Fig. 6   share of hidden patches          --mask-ratio R
  Figs. 1, 7-9, 13-16  attention            Encoder.attention

Where the paper and its public code contradict each other a `NOTE paper unclear` stands.

  CPU:       python semanticmim.py --data shapes --model tiny
  MaskFeat:  torchrun --nproc_per_node=8 semanticmim.py --data data/imagenet
  BEiT:      torchrun --nproc_per_node=8 semanticmim.py --data data/imagenet --model base-beit
             --tokenizer dalle_encoder.pth
  Baseline:  the same with --proxies 0: one class token, 40 % hidden

dalle_encoder.pth, 74 tensors, is where the public configurations have it from:
  https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/dalle_encoder.pth
--tokenizer random tries BEiT without it, on codes that mean nothing, and labels them so.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Block, CrossAttention, LayerScale, Mlp, Normalize, attend, drop_path
from common import gather, init_weights, patchify, random_mask, resize_position, split
from engine import arg, cosine, decay_groups, divides, parse, require
from noise import AUGMENT, DROP_PATH_2, MASK, uniform
from targets import DALLE, HOG, draw_hog, load_tokenizer
from vit import ViT

# Table 2, by target; base_lr * 2048 / 256 gives its peaks, 1.6e-3 and 1.5e-3. Drop path and layer
# scale as the public code.
RECIPES = {
    "hog": dict(base_lr=2e-4, min_lr=1e-6, warmup_epochs=30.0, clip_grad=0.02, crop_scale_min=0.5,
                color_jitter=0.0, drop_path=0.0, layer_scale=0.0),
    "dvae": dict(base_lr=1.875e-4, min_lr=1e-5, warmup_epochs=10.0, clip_grad=3.0,
                 crop_scale_min=0.08, color_jitter=0.4, drop_path=0.1, layer_scale=0.1),
}  # fmt: skip


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source. None: see RECIPES and `resolve`."""

    target: str = arg("hog", "Sec. 3.1: HOG (MaskFeat) or dVAE codes (BEiT)", ["hog", "dvae"])
    tokenizer: str | None = arg(None, "for dvae: dalle_encoder.pth (see above), or random: a trial")
    tokenizer_precision: str = arg("auto", "the dVAE's; auto: the step's", ["auto", "fp32", "bf16"])
    # NOTE paper unclear: ratio and proxies. The public code hides 0.8 on MaskFeat and has one proxy
    # on BEiT; the paper's 0.6 and 8 here.
    proxies: int = arg(8, "Sec. 4.1; 0: plain MIM (Eq. 2), a class token", within="[0, inf)")
    mask_ratio: float | None = arg(None, "Sec. 4.1: 0.6, plain MIM 0.4", group="masking")
    loss: str = arg("l2", "for hog: l1 (Sec. 3.1) or l2, the public code's", ["l2", "l1"])
    first_weights: str = arg("public", "public code's, or MAE's: short runs", ["public", "mae"])
    epochs: int = arg(300, "Sec. 4.1; Table 2 is garbled")
    warmup_epochs: float | None = arg(None, "Table 2: 30 (hog), 10 (dvae)")
    batch_size: int = arg(2048, "Table 2; the global batch")
    base_lr: float | None = arg(None, "Table 2: peak 1.6e-3 (hog), 1.5e-3 (dvae), * 256 / 2048")
    min_lr: float | None = arg(None, "Table 2: 1e-6 (hog), 1e-5 (dvae)")
    weight_decay: float = arg(0.05, "Table 2")
    beta1: float = arg(0.9, "Table 2")
    beta2: float = arg(0.999, "Table 2")
    clip_grad: float | None = arg(None, "Table 2: .02 (hog), 3 (dvae); 0: off", within="[0, inf)")
    drop_path: float | None = arg(None, "public code: 0 (hog), 0.1 (dvae)", within="[0, 1)")
    color_jitter: float | None = arg(None, "Table 2: 0, .4 (dvae)", within="[0, 1)", group="data")
    image_size: int = arg(224, "Sec. 4.1")
    crop_scale_min: float | None = arg(None, "Table 2: 0.5 (hog), 0.08 (dvae)")
    patch_size: int = arg(16, "Sec. 4.1")
    embed_dim: int = arg(768, "Sec. 4.1: ViT-B")
    depth: int = arg(12, "Sec. 4.1: ViT-B", within="(0, inf)")
    num_heads: int = arg(12, "Sec. 4.1: ViT-B")
    layer_scale: float | None = arg(None, "BEiT: 0.1 (dvae) to begin with; 0 = none")
    skip_last: bool = arg(True, "leave out the last layer's [IMG] rows, which reach no loss")

    FREE = engine.Config.FREE + ("tokenizer",)  # another place for the same file

    def resolve(self) -> None:
        """Fill in what target and proxies decide; UserError naming the field and what works."""
        for name, value in RECIPES[self.target].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.mask_ratio is None:
            self.mask_ratio = 0.6 if self.proxies else 0.4  # Sec. 4.1
        super().resolve()
        divides(self, "embed_dim", "num_heads")
        D, N, p = self.embed_dim, self.num_patches, self.patch_size
        dvae, codes = self.target == "dvae", self.tokenizer
        known = codes == "random" or Path(codes or "").is_file()
        ratio = f"{self.mask_ratio} must leave some of {N} patches visible, some hidden, e.g. 0.6"
        file = f"dvae needs --tokenizer PATH, DALL-E's image encoder, {DALLE}; "
        file += f"there is no file {codes}; " if codes else ""
        file += "--tokenizer random tries it without, --target hog needs no file"
        require(
            (D % 4 == 0, "embed_dim", f"{D} is not divisible by 4, as positions need"),
            (0 < self.mask_ratio < 1 and 0 < self.num_visible < N, "mask_ratio", ratio),
            (known or not dvae, "target", file),
            (dvae or not codes, "tokenizer", "is for --target dvae; --target hog needs none"),
            (not dvae or self.loss == "l2", "loss", "is for --target hog; codes are classified"),
            (dvae or p % 2 == 0, "patch_size", f"{p} is odd; a HOG has 2 x 2 cells"),
        )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:
        """V, rounded down: 78 of 196 at 60 % (App. C) and 117 at 40 %, as the public code."""
        return math.floor((1 - self.mask_ratio) * self.num_patches + 1e-9)


# ------------------------------------------------------------------------------- masking, jitter


def make_mask(cfg: Config, batch: dict[str, Tensor], progress: Tensor) -> Tensor:
    """Hide patches at random (Sec. 4.3): (B, N) bool, True = hidden; `progress` changes nothing."""
    noise = uniform(batch["seed"], cfg.num_patches, MASK)
    return random_mask(noise, cfg.num_patches - cfg.num_visible)


def color_jitter(rgb: Tensor, seed: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation, each by 1 +- strength, in a random order.

    Args:
        rgb: (B, 3, H, W) uint8.
        seed: (B,) int64.
    Returns: (B, 3, H, W) uint8. Each is torchvision's blend of the image with black, with its mean
        grey or with its own grey version.
    """
    # The public code has the jitter before the crop, we after it, so that contrast moves about the
    # mean grey of the crop. Model and tokenizer see the same.
    u = uniform(seed, 6, AUGMENT)
    factors, order = 1 + strength * (2 * u[:, :3] - 1), u[:, 3:].argsort(dim=1, stable=True)
    x = rgb.float()
    for step in order.split(1, dim=1):  # (B, 1)
        factor, kind = factors.gather(1, step)[..., None, None], step[..., None, None]
        grey = 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]  # (B, 1, H, W)
        other = torch.where(kind == 1, grey.mean((2, 3), keepdim=True), grey).where(kind > 0, 0)
        x = (factor * x + (1 - factor) * other).clamp(0, 255)
    return x.round().to(torch.uint8)


# ------------------------------------------------------------------------------------------ model


class Encoder(ViT):
    """What survives: a ViT with [PROXY] tokens (timm's register tokens), in place of a class token.

    `attention` has the prefix first. The rows of a patch, [:, :, P + patch, P:], are Figs. 7 and
    14, and with distances between patches Fig. 13; the rows of a proxy, [:, :, proxy, P:], are
    Fig. 8, their mean over images Fig. 9.
    """

    trained_norm, probe_layer = False, 7 / 12  # the norm sees [MASK] alone; Sec. 4.2

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.learn_position()  # `SemanticMIM.init` says how it starts


def make_encoder(cfg: Config, **kwargs) -> Encoder:
    """The network that survives; kwargs as `vit.ViT`'s: image_size (H, W), drop_path, ..."""
    sizes = {k: getattr(cfg, k) for k in ("patch_size", "embed_dim", "depth", "num_heads")}
    tokens = {"class_token": not cfg.proxies, "reg_tokens": cfg.proxies}
    sizes |= {"image_size": (cfg.image_size,) * 2, "init_values": cfg.layer_scale}
    return Encoder(**{**sizes, **tokens, **kwargs})


def first_rows(block: Block, x: Tensor, n: int, drop: Tensor | None = None) -> Tensor:
    """Return block(x, drop)[:, :n]; the other rows of x are keys and values alone.

    Args: block and drop as common.Block; x (B, L, D). Returns: (B, n, D).
    """
    attn, drop, y = block.attn, (1.0, 1.0) if drop is None else drop, block.norm1(x)
    (B, L, D), heads = x.shape, (attn.num_heads, x.shape[2] // attn.num_heads)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(y[:, :n], weight[:D], bias[:D]).reshape(B, n, *heads).transpose(1, 2)
    k, v = F.linear(y, weight[D:], bias[D:]).reshape(B, L, 2, *heads).permute(2, 0, 3, 1, 4)
    y = attend(q, k, v).transpose(1, 2).flatten(2)
    x = x[:, :n] + drop[0] * block.ls1(attn.proj(y))
    return x + drop[1] * block.ls2(block.mlp(block.norm2(x)))


class ReconstructionBlock(nn.Module):
    """One layer of the second stack (Eq. 4): [MASK] tokens read [PROXY] and [MASK] tokens."""

    # As the public code: the first norm serves queries and what they read.

    def __init__(self, dim: int, num_heads: int, init_values: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = CrossAttention(dim, num_heads), Mlp(dim, 4 * dim)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(self, x: Tensor, proxies: Tensor, drop: Tensor | None = None) -> Tensor:
        """[MASK] tokens x (B, M, D) and this layer's [PROXY^{i+1}] (B, P, D) give (B, M, D)."""
        context = self.norm1(torch.cat([proxies, x], dim=1))  # (B, P + M, D)
        y = self.ls1(self.attn(context[:, proxies.shape[1] :], context))  # Eq. (4)
        x = x + (y if drop is None else drop[0] * y)
        y = self.ls2(self.mlp(self.norm2(x)))
        return x + (y if drop is None else drop[1] * y)


class SemanticMIM(nn.Module):
    """Both stacks, target and loss; `model(batch, progress)` returns (loss, logs)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, D = cfg, cfg.embed_dim
        self.normalize, self.encoder = Normalize(), make_encoder(cfg)
        # The final norm sees only [MASK] in the loss, so it is thrown away (decoder_norm); the
        # encoder keeps a fresh one, which transfer trains, as the public code.
        self.encoder.norm.requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_blocks = nn.ModuleList(
            ReconstructionBlock(D, cfg.num_heads, cfg.layer_scale)
            for _ in range(cfg.depth if cfg.proxies else 0)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        if cfg.target == "hog":
            self.hog = HOG(cfg.patch_size, cfg.image_size)
        else:
            sizes = cfg.image_size, self.encoder.grid[0]
            self.tokenizer = load_tokenizer(cfg.tokenizer, *sizes, cfg.tokenizer_precision)
        self.label = "random_codes_" if cfg.tokenizer == "random" else ""  # of all it says of them
        size = self.hog.size if cfg.target == "hog" else self.tokenizer.num_codes
        self.decoder_pred = nn.Linear(D, size)
        self.init()

    @torch.no_grad()
    def init(self) -> None:
        """Set first weights as the public code, or as MAE; those of the head in either case."""
        # BEiT has no key bias: it adds one number to all logits of a query, so ours does nothing.
        public, dvae = self.cfg.first_weights == "public", self.cfg.target == "dvae"
        init_weights(self)
        if public:
            for m in self.modules():
                if isinstance(m, (nn.Linear, nn.Conv2d)):
                    nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.trunc_normal_(self.encoder.pos_embed, std=0.02)
        for stack in (self.encoder.blocks, self.decoder_blocks) if public and dvae else ():
            for i, block in enumerate(stack, start=1):  # BEiT
                block.attn.proj.weight /= math.sqrt(2 * i)
                block.mlp.fc2.weight /= math.sqrt(2 * i)
        # the public code's; Xavier's predict 8 to 16 times a HOG's mean square and shrink first
        nn.init.trunc_normal_(self.decoder_pred.weight, std=0.02)

    def tokens(self, imgs: Tensor, mask: Tensor, seed: Tensor | None = None) -> Tensor:
        """Run both stacks side by side.

        Args:
            imgs: (B, 3, H, W) float, normalised; what the mask hides is not read.
            mask: (B, N) bool with exactly `cfg.num_visible` False a sample.
            seed: (B,) int64 turns drop path on.
        Returns: [MASK] tokens in raster order after the final norm, (B, M, D).
        """
        encoder, P = self.encoder, self.encoder.num_prefix
        ids_keep, ids_mask, _ = split(mask, self.cfg.num_visible)
        position = encoder.position(*encoder.grid_of(imgs)).expand(len(imgs), -1, -1)
        img = encoder.patch_embed(gather(patchify(imgs, encoder.patch_size), ids_keep))
        x = encoder.add_prefix(img + gather(position, ids_keep))  # [PROXY, IMG], (B, P + V, D)
        hidden = self.mask_token + gather(position, ids_mask)  # [MASK], (B, M, D)
        depth, rate = len(encoder.blocks), self.cfg.drop_path
        scales = scales_2 = [None] * depth
        if seed is not None and rate > 0:
            scales = drop_path(seed, depth, rate)
            scales_2 = drop_path(seed, depth, rate, DROP_PATH_2)  # independent of the first
        if not self.decoder_blocks:  # the baseline as printed: its last layer is whole
            x = torch.cat([x, hidden], dim=1)  # [CLS, IMG, MASK]; order matters to none of them
            for block, scale in zip(encoder.blocks, scales):
                x = block(x, scale)  # Eq. (2)
            return self.decoder_norm(x[:, -hidden.shape[1] :])
        layers = zip(encoder.blocks, scales, self.decoder_blocks, scales_2)
        for i, (compress, scale, decode, scale_2) in enumerate(layers, start=1):
            if i == depth and self.cfg.skip_last:
                x = first_rows(compress, x, P, scale)  # Eq. (3), its [PROXY] rows
            else:
                x = compress(x, scale)  # Eq. (3)
            hidden = decode(hidden, x[:, :P], scale_2)
        return self.decoder_norm(hidden)

    def predict(self, imgs: Tensor, mask: Tensor, seed: Tensor | None = None) -> Tensor:
        """Head's numbers of hidden patches, (B, M, 108 or codes); arguments as `tokens`."""
        return self.decoder_pred(self.tokens(imgs, mask, seed))

    @torch.no_grad()
    def make_target(self, rgb: Tensor) -> Tensor:
        """Targets of (B, 3, H, W) uint8: HOG (B, N, 108) float32, or codes (B, N, 1) int64."""
        if self.cfg.target == "hog":
            return self.hog(self.normalize(rgb))
        return self.tokenizer(rgb)[..., None]

    def loss(self, pred: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over a sample's [MASK] tokens, then over samples; every sample has as many (Eq. 1).

        Args: prediction and target of hidden patches, (B, M, C) and (B, M, 108 or 1).
        Returns: the loss in fp32; logs.
        """
        pred, logs = pred.float(), {}
        if self.cfg.target == "dvae":
            hit = pred.argmax(-1) == target[..., 0]
            logs[f"{self.label}accuracy"] = hit.float().mean()
            error = F.cross_entropy(pred.transpose(1, 2), target[..., 0], reduction="none")
        else:
            # NOTE paper unclear: HOG loss. Sec. 3.1 names l1, the public code has l2.
            error = pred - target
            error = (error.abs() if self.cfg.loss == "l1" else error.square()).mean(-1)
        return error.mean(), logs  # Eq. (1), over (B, M)

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py for its keys) and logs."""
        rgb, seed = batch["rgb"], batch["seed"]
        if self.training and self.cfg.color_jitter:
            rgb = color_jitter(rgb, seed, self.cfg.color_jitter)
        mask = make_mask(self.cfg, batch, progress)
        pred = self.predict(self.normalize(rgb), mask, seed if self.training else None)
        ids_mask = split(mask, self.cfg.num_visible)[1]
        return self.loss(pred, gather(self.make_target(rgb), ids_mask))


@torch.no_grad()
def evaluate(model: SemanticMIM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss on held-out images, beside guesses that learn nothing of the image.

    `loss_other`: the model's own, where it sees another image's visible patches.
    HOG: `loss_visible`, the mean HOG of the image's visible patches; `loss_position`, that at the
    same position in the batch's other images (what the training set's mean would score, worse by
    one in the batch's size); the nearest visible patch. Codes: accuracy of the most frequent one
    among the batch's hidden patches, and of the nearest visible patch's. A batch of one has no
    others: `loss_other` is the loss.
    """
    cfg, imgs, label = model.cfg, model.normalize(batch["rgb"]), model.label
    mask, target = make_mask(cfg, batch, None), model.make_target(batch["rgb"])
    ids_keep, ids_mask, _ = split(mask, cfg.num_visible)
    truth = gather(target, ids_mask)
    loss, logs = model.loss(model.predict(imgs, mask), truth)
    logs = {"loss": loss, **logs}
    logs["loss_other"] = model.loss(model.predict(imgs.roll(1, 0), mask), truth)[0]
    h, w = model.encoder.grid
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(imgs)
    far = torch.cdist(at, at) + mask[:, None] * 1e6  # (B, N, N), from each patch to visible ones
    nearest = gather(gather(target, far.argmin(-1)), ids_mask)
    if cfg.target == "dvae":
        logs[f"{label}accuracy_frequent"] = (truth == truth.flatten().mode().values).float().mean()
        logs[f"{label}accuracy_nearest"] = (truth == nearest).float().mean()
    else:
        others = (target.sum(0) - target) / max(len(target) - 1, 1)  # (B, N, 108), all but its own
        logs["loss_visible"] = model.loss(gather(target, ids_keep).mean(1, True), truth)[0]
        logs["loss_position"] = model.loss(gather(others, ids_mask), truth)[0]
        logs["loss_nearest"] = model.loss(nearest, truth)[0]
    return logs


@torch.no_grad()
def reconstruct(model: SemanticMIM, batch: dict[str, Tensor]) -> dict[str, tuple]:
    """The image and its target, which patches are hidden (B, h, w), and the target as predicted.

    A HOG is drawn as the edges it stands for. Colours of codes are arbitrary.
    """
    cfg, rgb, grid = model.cfg, batch["rgb"], model.encoder.grid
    mask, target = make_mask(cfg, batch, None), model.make_target(rgb)
    pred = model.predict(model.normalize(rgb), mask).float()  # (B, M, 108 or codes)
    pred = pred.argmax(-1, keepdim=True) if cfg.target == "dvae" else pred
    pair = target, target.masked_scatter(mask[..., None], pred)  # (B, N, 108 or 1)
    if cfg.target == "dvae":
        name = "random codes" if model.label else "codes"
        truth, guess = (x.view(-1, *grid) % 254 + 1 for x in pair)
    else:
        name = "HOG"
        truth, guess = ((255 * draw_hog(x, grid)).byte().expand(-1, 3, -1, -1) for x in pair)
    hidden = mask.unflatten(1, grid)
    return {"rgb": (rgb, hidden, None), name: (truth, hidden, guess)}


def load_encoder(path: str | Path, **kwargs) -> Encoder:
    """The encoder of a checkpoint; kwargs: image_size (H, W) and drop_path."""
    cfg, state = engine.load_encoder(path, "semanticmim", Config)
    encoder, side = make_encoder(cfg, **kwargs), cfg.image_size // cfg.patch_size
    x = state.get("pos_embed")
    if getattr(x, "shape", None) == (1, side**2, cfg.embed_dim):  # else the next line refuses it
        state["pos_embed"] = resize_position(x, (side, side), encoder.grid)
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------- presets, loop

PRESETS = {
    # Ours, for a laptop: 64 x 64 scenes, three minutes on two cores. Cells of 8 pixels, as in the
    # public code: the gradients of smaller ones are noise. Small batches, as it lacks steps.
    "tiny": dict(
        image_size=64, embed_dim=128, depth=4, num_heads=4, proxies=4, epochs=3, warmup_epochs=0.3,
        batch_size=32, base_lr=8e-3, beta2=0.95, clip_grad=1.0, data="shapes", val_epochs=1,
        first_weights="mae",
    ),
    # ViT-S, not in the paper.
    "small": dict(embed_dim=384, num_heads=6, micro_batch=256),
    "base": dict(),  # the paper's on MaskFeat
    "base-beit": dict(target="dvae"),  # the paper's on BEiT; RECIPES has what differs
}  # fmt: skip


def no_decay(target: str, name: str, ndim: int) -> bool:
    """As the public code: biases, norms; on MaskFeat [MASK]; on BEiT other tokens and positions."""
    spared = {"hog": ("mask_token",), "dvae": ("cls_token", "reg_token", "pos_embed")}[target]
    return ndim <= 1 or name.endswith(spared)


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, PRESETS, __doc__, argv)
    with engine.Run("semanticmim", cfg) as run:
        smim = SemanticMIM(cfg)
        model = run.place(smim)
        groups = decay_groups(smim, cfg.weight_decay, functools.partial(no_decay, cfg.target))
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True)
        for step in run.steps(model, optimizer, evaluate, reconstruct):
            for batch in step.micro_batches():  # rgb (B, 3, H, W) uint8, seed (B,)
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(cosine(cfg, step))  # clips the gradient at cfg.clip_grad: Table 2


if __name__ == "__main__":
    engine.command("semanticmim", main)
