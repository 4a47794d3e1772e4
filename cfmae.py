"""CFMAE: coarse-to-fine masked autoencoding over RGB, instance and semantic maps.

Paper: "From Semantics to Pixels: Coarse-to-Fine Masked Autoencoders for Hierarchical Visual
Understanding" (arXiv 2603.09955, where it is called C2FMAE). Idea:
  1. an image comes with an instance map and a semantic map; 98 of the 3 x 196 patches stay visible;
  2. one ViT encodes the visible patches of all three together;
  3. three decoder blocks predict semantics, then instances, then pixels, each reading the features
     of the one before;
  4. which patches are hidden follows a curriculum: spread over semantic regions, then on objects,
     then at random;
  5. after pre-training only the encoder is kept; RGB alone is enough for it.

Equation -> code
  Eq. 1      encoder on visible tokens     CFMAE.predict
  Eq. 2      cascaded decoder              CFMAE.decode
  Eq. 3      predictors                    CFMAE.predict
  Eq. 5      loss                          CFMAE.loss
  Eq. 6      random mask                   progressive_mask
  Eqs. 7, 8  instance-guided mask          choose_objects, instance_mask
  Eqs. 9, 10 semantic-guided mask          semantic_mask
  Eqs. 4, 11 mixed mask                    progressive_mask
  Fig. 5     schedule                      schedule

Two things about the curriculum as the paper prints it. Its smooth transition is a switch, where two
masks hide as many patches (`--mix sample`, ours, is smooth). And 5/6 hidden with alpha = 0.75 often
hides the chosen objects whole, in one granularity or in all three (log: `objects_hidden_whole`).
Where the paper is silent or contradicts itself stands a `NOTE paper unclear`; docs/decisions.md has
them all.

  CPU:  python cfmae.py --data shapes --model tiny
  GPU:  torchrun --nproc_per_node=8 cfmae.py --data data/imagenet --epochs 400
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pictures
from common import (
    DIRICHLET, INSTANCES, MASK, MIX, Block, CrossAttention, Mlp, Normalize, ViT, gather,
    init_weights, patch_statistics, patchify, sincos_2d, split, uniform, unpatchify,
)
from data import GRANULARITIES, MAX_INSTANCES, UNLABELLED
from shapes import ShapeScenes
from engine import UserError, arg

# NOTE paper unclear: resolution of label maps. A quarter of the image's side, as MultiMAE's.
LABELS = 16  # 4 x 4 a patch
ORDERS = ["-".join(p) for p in itertools.permutations("SIR")]
NAMES = {"S": "semantic", "I": "instance", "R": "rgb"}


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source; `--model` presets change the size."""

    epochs: int = arg(400, "Table 7 (400 or 1600)")
    # NOTE paper unclear: warm-up. "10/30, 10/40; 10/40" in Table 7, 40 in App. E.1.
    warmup_epochs: float = arg(40, "App. E.1; Table 7 is garbled")
    batch_size: int = arg(2048, "Table 7; the global batch")
    base_lr: float = arg(1e-4, "Table 7; lr = base_lr * batch_size / 256")
    min_lr: float = arg(0.0, "not given; MAE's")
    weight_decay: float = arg(0.05, "Table 7")
    beta1: float = arg(0.9, "Table 7")
    beta2: float = arg(0.95, "Table 7")
    image_size: int = arg(224, "Table 7")
    # NOTE paper unclear: random crop. MAE's.
    crop_scale_min: float = arg(0.2, "not given; MAE's RandomResizedCrop (0.2, 1)")
    patch_size: int = arg(16, "App. E.1")
    embed_dim: int = arg(768, "App. E.1: ViT-B")
    depth: int = arg(12, "App. E.1: ViT-B")
    num_heads: int = arg(12, "App. E.1: ViT-B")
    decoder_embed_dim: int = arg(256, "App. E.1")
    decoder_num_heads: int = arg(8, "App. E.1")
    decoder_depth: int = arg(2, "App. E.1: self-attention blocks after each cross-attention block")
    granularities: str = arg("R+I+S", "Table 6e", choices=["R+I+S", "R+S", "R+I", "R"])
    semantic_classes: int | None = arg(None, "133 (App. B); what the embedded data set has there")
    # NOTE paper unclear: mask ratio. "1/6" (App. E.1, Table 7) is the visible share.
    mask_ratio: float | None = arg(
        None, "hidden share of all patches. Table 6a: 5/6, 3/4, 2/3; 3/4 below three granularities"
    )
    masking: str | None = arg(
        None, "Table 6b, 6c. SG-IG-RD; RD below three granularities (Table 6e)",
        choices=["SG-IG-RD", "IG-SG-RD", "RD-IG-SG", "RD", "IG", "SG"],
    )  # fmt: skip
    mix: str = arg("score", "Eq. 11 as printed, or one mask kind drawn a sample (ours)",
                   choices=["score", "sample"])  # fmt: skip
    alpha: float = arg(0.75, "Eq. 8: share of hidden patches on objects; the paper: > 0.5")
    # NOTE paper unclear: e1 to e4. Fig. 5 has no numbers.
    e1: float = arg(0.2, "Fig. 5, as a share of training; values not given")
    e2: float = arg(0.4, "Fig. 5")
    e3: float = arg(0.6, "Fig. 5")
    e4: float = arg(0.8, "Fig. 5")
    decoder: str = arg("cascaded", "Table 6d",
                       choices=["cascaded", "parallel", "no-cross-attention"])  # fmt: skip
    order: str = arg("S-I-R", "Table 6d", choices=ORDERS)
    lambda_s: float = arg(1.0, "Eq. 5, Table 6f")
    lambda_i: float = arg(1.0, "Eq. 5, Table 6f")
    lambda_r: float = arg(1.0, "Eq. 5, Table 6f")
    # NOTE paper unclear: pixel target. MAE's.
    norm_pix_loss: bool = arg(True, "not given; MAE's per-patch normalised pixels")

    def data_options(self) -> dict:
        """What the loader must bring (see data.open_dataset)."""
        return {"granularities": self.names, "semantic_classes": self.semantic_classes}

    def resolve(self) -> None:
        """Fill in what depends on other fields, and refuse what cannot work.

        Errors: UserError naming the field and values that work.
        """
        super().resolve()
        M = len(self.names)
        classes = ShapeScenes.SEMANTIC_CLASSES if self.data == "shapes" else 0
        if self.semantic_classes is None:
            self.semantic_classes = classes or 133  # App. B
        if not max(classes, 1) <= self.semantic_classes <= UNLABELLED:
            low, n = max(classes, 1), self.semantic_classes
            raise UserError(f"--semantic-classes {n} is outside [{low}, {UNLABELLED}]")
        # NOTE paper unclear: visible tokens with fewer granularities. A quarter, as MAE.
        if self.mask_ratio is None:
            self.mask_ratio = 5 / 6 if M == 3 else 3 / 4  # Tables 6a, 6e
        self.masking = self.masking or ("SG-IG-RD" if M == 3 else "RD")
        for kind, m in (("IG", "instance"), ("SG", "semantic")):
            if kind in self.masking and m not in self.names:
                raise UserError(
                    f"--masking {self.masking} needs the {m} maps, which --granularities "
                    f"{self.granularities} leaves out; the paper then has --masking RD"
                )
        if not (0 < self.mask_ratio < 1 and self.num_visible <= self.num_patches):
            raise UserError(
                f"--mask-ratio {self.mask_ratio} is outside [{1 - 1 / M:.3f}, 1): visible patches "
                f"are shared out at random and one of {M} granularities may get them all"
            )
        if not 0 <= self.e1 <= self.e2 <= self.e3 <= self.e4 <= 1:
            raise UserError("--e1 <= --e2 <= --e3 <= --e4 must lie in [0, 1], e.g. 0.2 0.4 0.6 0.8")
        if not 0.5 < self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha} is outside (0.5, 1] (Eq. 8), e.g. 0.75")
        engine.divides(self, "embed_dim", "num_heads")
        engine.divides(self, "decoder_embed_dim", "decoder_num_heads")
        for name in ("embed_dim", "decoder_embed_dim"):
            if (width := getattr(self, name)) % 4:  # sines and cosines of two coordinates
                raise UserError(f"{engine.flag(name)} {width} is not divisible by 4")
        for name in ("depth", "decoder_depth", "lambda_s", "lambda_i", "lambda_r"):
            if getattr(self, name) < (name == "depth"):
                raise UserError(f"{engine.flag(name)} {getattr(self, name)} is too small")
        if not 1 <= self.num_visible < M * self.num_patches:
            raise UserError(f"--mask-ratio {self.mask_ratio} leaves {self.num_visible} patches")

    @property
    def names(self) -> tuple[str, ...]:
        """The granularities, in the order of data.GRANULARITIES."""
        return tuple(NAMES[letter] for letter in self.granularities.split("+"))

    @property
    def num_patches(self) -> int:
        """N, the patches of one granularity."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:
        """Visible tokens of all granularities together: 98, 147, 196 for Table 6a."""
        M = len(self.names)
        return round((1 - self.mask_ratio) * M * self.num_patches)


# ---------------------------------------------------------------------------------------- masking
# Pure functions of the samples' seeds and label maps. M granularities have N patches each; `n`
# (B, M, 1) int64 is how many of them are hidden, r_m N in the paper; `order` (B, M, N) int64 is a
# random permutation of the patches.


def visible_counts(seed: Tensor, num_visible: int, M: int) -> Tensor:
    """Visible patches of each granularity, (B, M) int64 with row sums `num_visible`.

    Shares are Dirichlet(1, ..., 1) (App. C, after MultiMAE): exponential draws over their sum.
    """
    # NOTE paper unclear: share of each granularity. The shares are laid end to end and their ends
    # rounded, which keeps the total at exactly 98.
    ends = (-uniform(seed, M, DIRICHLET).log()).cumsum(1)  # (B, M)
    ends = (num_visible * (ends / ends[:, -1:])).round().long()
    return ends.diff(dim=1, prepend=ends.new_zeros(len(seed), 1))


def patch_labels(label_map: Tensor) -> Tensor:
    """Cut a label map (B, 4h, 4w) uint8 into the 16 labels of each patch, (B, h*w, 16) int64."""
    return patchify(label_map[:, None], 4).long()


def patch_region(labels: Tensor) -> Tensor:
    """Label that covers most of each patch, ties to the smaller id: (B, N, 16) to (B, N) int64."""
    # NOTE paper unclear: region of a patch. The label that covers most of it.
    count = (labels[..., :, None] == labels[..., None, :]).sum(-1)  # (B, N, 16)
    return 255 - (count * 256 + 255 - labels).amax(-1) % 256


def choose_objects(seed: Tensor, region: Tensor) -> Tensor:
    """Draw a non-empty subset of each image's instances, large ones more often.

    Args:
        seed: (B,) int64.
        region: (B, N) int64 instance of each patch: 0 background, 1..K, 255 unlabelled.
    Returns: (B, N) bool, Omega_obj: patches of a chosen instance; none where there is no instance.
    """
    # NOTE paper unclear: choice of instances. "all or a subset ... based on their size and spatial
    # significance": the subset's size is uniform in 1..K; its members are drawn without replacement
    # in proportion to area, by the largest log(u) / area.
    ids = torch.arange(1, MAX_INSTANCES + 1, device=region.device)
    area = (region[..., None] == ids).sum(1)  # (B, 16)
    u = uniform(seed, MAX_INSTANCES + 1, INSTANCES)
    take = (u[:, :1] * (area > 0).sum(1, keepdim=True)).long() + 1  # 1..K
    key = (u[:, 1:].log() / area).where(area > 0, -torch.inf)
    rank = key.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = ids.where((rank < take) & (area > 0), -1)
    return (region[..., None] == chosen[:, None]).any(-1)  # Eq. (7), step 2


def instance_mask(n: Tensor, objects: Tensor, order: Tensor, alpha: float) -> Tensor:
    """Hide a share alpha of n on the chosen objects (B, N), the rest outside: (B, M, N) bool."""
    # NOTE paper unclear: images without instances. Their mask is then the random one.
    # NOTE paper unclear: share on objects. Eq. 8 asks for more patches than a small object has, and
    # hides one that fills the image less densely than its background. The share is at least the
    # objects' area, and clipped to the patches there are on either side.
    N, area = objects.shape[1], objects.sum(1)[:, None, None]  # |Omega_obj|, (B, 1, 1)
    on = (alpha * n.double()).floor().long()  # Eq. (8)
    on = on.maximum((n * area + N - 1) // N).minimum(area)  # the background has room for the rest
    rank = (order + N * ~objects[:, None]).argsort(-1).argsort(-1)  # objects first
    return (rank < on) | ((rank >= area) & (rank < area + n - on))  # Eq. (7)


def semantic_mask(n: Tensor, region: Tensor, order: Tensor) -> Tensor:
    """Hide patches of each region in proportion to its size, Eq. 10 with equal weights w.

    `region` (B, N) int64 in 0..255; 255, unlabelled, is a region too. Returns (B, M, N) bool.
    """
    # NOTE paper unclear: floor of Eq. 10. It loses patches. With the patches in order of region,
    # and random within, n of N are hidden at even distances: a region gets the floor, or one more.
    N = region.shape[1]
    by_region = (order + N * region[:, None]).argsort(-1)
    place = torch.arange(N, device=n.device)
    hidden = (place + 1) * n // N > place * n // N  # Eq. (10)
    return torch.zeros_like(hidden).scatter_(-1, by_region, hidden)  # Eq. (9)


def schedule(progress: Tensor, cfg: Config) -> dict[str, Tensor]:
    """Coefficients of the three masks (Fig. 5): the first phase gives way to the second between e1
    and e2, the second to the third between e3 and e4. They are non-negative and sum to 1.
    """
    # NOTE paper unclear: order of phases. App. C tells them from random to semantic, Sec. 3.3 and
    # Table 6c's best row from semantic to random. `--masking RD-IG-SG` is the other one.
    if cfg.masking in ("RD", "IG", "SG"):  # Table 6b
        return {k: torch.full_like(progress, float(k == cfg.masking)) for k in ("RD", "IG", "SG")}

    def ramp(a: float, b: float) -> Tensor:
        return ((progress - a) / max(b - a, 1e-9)).clamp(0, 1)

    second, third = ramp(cfg.e1, cfg.e2), ramp(cfg.e3, cfg.e4)
    return dict(zip(cfg.masking.split("-"), (1 - second, second - third, third)))


def progressive_mask(
    cfg: Config, seed: Tensor, progress: Tensor, instance: Tensor, semantic: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mask of all granularities at a moment of training (Sec. 3.3, App. C).

    Args:
        seed: (B,) int64.
        progress: 0-d float in [0, 1].
        instance, semantic: (B, N) int64, region of each patch; zeros where `cfg.masking` does not
            need them.
    Returns: mask (B, M, N) bool with exactly `cfg.num_visible` False a sample; logs.
    """
    (B, N), M = instance.shape, len(cfg.names)
    n = N - visible_counts(seed, cfg.num_visible, M)[..., None]  # r_m N, (B, M, 1)
    order = uniform(seed, M * N, MASK).view(B, M, N).argsort(dim=-1, stable=True).argsort(-1)
    random = order < n  # Eq. (6)
    if cfg.masking == "RD":
        return random, {}
    objects = choose_objects(seed, instance)
    masks = {
        "RD": random,
        "IG": instance_mask(n, objects, order, cfg.alpha),
        "SG": semantic_mask(n, semantic, order),
    }
    coefficients = schedule(progress, cfg)  # 1 - alpha_I - alpha_S, alpha_I, alpha_S
    if cfg.mix == "score":
        # NOTE paper unclear: which patches are ranked together. Eq. 4 has all 3N, Eq. 11 those of
        # one granularity; we follow Eq. 11, and `order` breaks ties.
        # NOTE paper unclear: smooth transition. Our three masks have n ones each, so with two at a
        # time the n highest scores are the heavier one, whole: as printed it is a switch.
        score = sum(a.double() * masks[k] for k, a in coefficients.items())  # Eq. (4)
        mask = (score - 1e-9 * order).argsort(-1, descending=True).argsort(-1) < n  # Eq. (11)
    else:
        u, a = uniform(seed, 1, MIX)[:, :, None], coefficients  # (B, 1, 1)
        mask = masks["IG"].where(u < a["SG"] + a["IG"], random)
        mask = masks["SG"].where(u < a["SG"], mask)
    whole = (mask | ~objects[:, None]).all(-1) & objects.any(1, keepdim=True)  # (B, M)
    logs = {f"a_{k}": v for k, v in coefficients.items()}
    return mask, logs | {"objects_hidden_whole": whole.float().mean()}


# ------------------------------------------------------------------------------------------ model


class LabelEmbed(nn.Module):
    """Linear projection of the one-hot labels of a patch (Sec. 3.1), done by looking rows up.

    16 positions x (classes + 1) one-hot numbers times a matrix is the sum of 16 of its rows.
    """

    # NOTE paper unclear: projection of label patches. Linear on one-hot labels, as Sec. 3.1 says.
    # NOTE paper unclear: unlabelled pixels (255). A row of their own; the loss leaves them out.

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        # NOTE paper unclear: first weights of that projection. Xavier's bound for the 16 inputs
        # that are not zero; counting all of them, tokens would begin half as large.
        bound = (6 / (LABELS + dim)) ** 0.5
        weight = torch.empty(LABELS * (num_classes + 1), dim).uniform_(-bound, bound)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(dim))

    def forward(self, labels: Tensor) -> Tensor:
        """Embed (B, K, 16) int64 labels, 255 = unlabelled: (B, K, D)."""
        rows = labels.where(labels != UNLABELLED, self.num_classes)
        rows = rows + torch.arange(LABELS, device=labels.device) * (self.num_classes + 1)
        return F.embedding_bag(rows.flatten(0, 1), self.weight, mode="sum").view(
            *labels.shape[:2], -1
        ) + self.bias


class Encoder(ViT):
    """ViT that also takes label maps; without them it is timm's ViT with the same names."""

    def __init__(self, semantic_classes: int, granularities: tuple[str, ...], **kwargs):
        super().__init__(**kwargs)
        # NOTE paper unclear: instance ids. data.py numbers them by size in the crop, 1 = largest.
        if "instance" in granularities:
            self.instance_embed = LabelEmbed(MAX_INSTANCES + 1, self.embed_dim)
        if "semantic" in granularities:
            self.semantic_embed = LabelEmbed(semantic_classes, self.embed_dim)

    def grid_of(self, imgs: Tensor | dict[str, Tensor]) -> tuple[int, int]:
        if isinstance(imgs, Tensor):
            return super().grid_of(imgs)
        if "rgb" in imgs:
            return super().grid_of(imgs["rgb"])
        h, w = next(iter(imgs.values())).shape[-2:]
        return h // 4, w // 4

    def embed_patches(self, patches: dict[str, Tensor], h: int, w: int) -> Tensor:
        """Tokens with position, (B, M*N, D), from patches in the order of GRANULARITIES."""
        # NOTE paper unclear: position and granularity. Fixed sine-cosine; each granularity has a
        # projection and bias of its own here, and a learned embedding in the decoder.
        embeds = {"rgb": self.patch_embed}
        embeds |= {m: getattr(self, f"{m}_embed") for m in patches if m != "rgb"}
        position = self.position(h, w)
        return torch.cat([embeds[m](patches[m]) + position for m in patches], dim=1)

    def embed(self, imgs: Tensor | dict[str, Tensor]) -> Tensor:
        """Tokens of normalised images (B, 3, H, W), or of a dict of granularities (maps uint8)."""
        imgs = {"rgb": imgs} if isinstance(imgs, Tensor) else imgs
        patches = {
            m: patchify(imgs[m], self.patch_size) if m == "rgb" else patch_labels(imgs[m])
            for m in GRANULARITIES
            if m in imgs
        }
        return self.embed_patches(patches, *self.grid_of(imgs))


def make_encoder(cfg: Config, **kwargs) -> Encoder:
    return Encoder(
        cfg.semantic_classes, cfg.names, patch_size=cfg.patch_size,
        embed_dim=cfg.embed_dim, depth=cfg.depth, num_heads=cfg.num_heads, **kwargs,
    )  # fmt: skip


class DecoderBlock(nn.Module):
    """Cross-attention and MLP, then self-attention blocks, pre-norm (Eq. 2)."""

    # NOTE paper unclear: decoder block. "self-attention, self-attention, FFN" (Sec. 3.2), "self-
    # attention, cross-attention" and FFN (Fig. 2), "one cross-attention and two self-attention
    # transformer blocks" (App. E.1). The last. MultiMAE's decoder has that order too, but no
    # residual around the cross-attention, visible tokens alone as context, and a projection and a
    # mask token for each task; here the task embedding tells the tasks apart.

    def __init__(self, dim: int, num_heads: int, depth: int, cross: bool):
        super().__init__()
        self.cross = cross
        if cross:
            self.norm_q, self.norm_kv = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
            self.cross_attn = CrossAttention(dim, num_heads)
            self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """query (B, N, D) and context (B, M*N, D), which is key and value, give (B, N, D)."""
        x = query
        if self.cross:
            x = x + self.cross_attn(self.norm_q(x), self.norm_kv(context))
            x = x + self.mlp(self.norm2(x))
        for block in self.blocks:
            x = block(x)
        return x


class CFMAE(nn.Module):
    """Encoder, cascaded decoder and loss; `model(batch, progress)` returns (loss, logs)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.granularities = cfg.names
        self.tasks = [NAMES[t] for t in cfg.order.split("-") if NAMES[t] in self.granularities]
        h = w = cfg.image_size // cfg.patch_size
        D, C = cfg.decoder_embed_dim, cfg.semantic_classes
        self.normalize = Normalize()
        # NOTE paper unclear: class token. One, in the encoder alone; the decoder reads 3N tokens.
        self.encoder = make_encoder(cfg, image_size=(cfg.image_size,) * 2)
        self.decoder_embed = nn.Linear(cfg.embed_dim, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.task_embed = nn.Parameter(torch.zeros(len(self.granularities), 1, D))
        self.register_buffer("decoder_pos_embed", sincos_2d(D, h, w), persistent=False)
        self.decoder_blocks = nn.ModuleDict()
        self.decoder_pred = nn.ModuleDict()
        sizes = {"rgb": 3 * cfg.patch_size**2, "instance": LABELS * (MAX_INSTANCES + 1)}
        sizes["semantic"] = LABELS * C
        shape = (D, cfg.decoder_num_heads, cfg.decoder_depth, cfg.decoder != "no-cross-attention")
        for t in self.tasks:
            self.decoder_blocks[t] = DecoderBlock(*shape)
            self.decoder_pred[t] = nn.Linear(D, sizes[t])
        init_weights(self)

    def patches(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cut a batch: rgb (B, N, p*p*3) normalised float; maps (B, N, 16) int64 labels."""
        return {
            m: patchify(self.normalize(batch[m]), self.cfg.patch_size)
            if m == "rgb" else patch_labels(batch[m])
            for m in self.granularities
        }  # fmt: skip

    def make_mask(
        self, patches: dict[str, Tensor], seed: Tensor, progress: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mask (B, M, N) of this moment of training, from the samples' seeds and label maps."""
        nothing = seed.new_zeros(len(seed), self.cfg.num_patches)
        regions = {
            m: patch_region(patches[m]) if m in patches and self.cfg.masking != "RD" else nothing
            for m in ("instance", "semantic")
        }
        return progressive_mask(self.cfg, seed, progress, **regions)

    def predict(
        self, patches: dict[str, Tensor], mask: Tensor, num_visible: int
    ) -> dict[str, Tensor]:
        """Predict every granularity from the visible patches, whichever they are.

        Args:
            patches: as `patches` returns them; what the mask hides is not read.
            mask: (B, M, N) bool with exactly `num_visible` False a sample. All of one granularity
                visible and the rest hidden gives Figs. 4, 8-10.
        Returns: rgb (B, N, p*p*3); instance (B, N, 16*17) and semantic (B, N, 16*C) logits.
        """
        h = w = self.cfg.image_size // self.cfg.patch_size
        ids_keep, _, ids_restore = split(mask.flatten(1), num_visible)
        tokens = gather(self.encoder.embed_patches(patches, h, w), ids_keep)  # (B, V, D)
        (x,) = self.encoder.run(self.encoder.add_prefix(tokens))  # Eq. (1)
        x = self.encoder.norm(x)[:, self.encoder.num_prefix :]
        features = self.decode(self.decoder_embed(x), ids_restore)
        return {t: self.decoder_pred[t](features[t]) for t in self.tasks}  # Eq. (3)

    def decode(self, x: Tensor, ids_restore: Tensor) -> dict[str, Tensor]:
        """Run the cascade on visible tokens x (B, V, D): F_k of each task, (B, N, D)."""
        B, V, D = x.shape
        M, N = len(self.granularities), self.decoder_pos_embed.shape[0]
        hidden = self.mask_token.to(x.dtype).expand(B, M * N - V, -1)
        H = gather(torch.cat([x, hidden], dim=1), ids_restore).view(B, M, N, D)
        H = H + self.decoder_pos_embed + self.task_embed
        features, previous = {}, None
        for t in self.tasks:
            query, context = H[:, self.granularities.index(t)], H
            if previous is not None and self.cfg.decoder == "cascaded":
                # NOTE paper unclear: where F_{k-1} is added. H has 3N tokens, F_{k-1} has N: on the
                # slice of the task that produced it ("tokens at corresponding positions").
                context = H.clone()  # K_k = V_k = H (+) F_{k-1}
                context[:, self.granularities.index(previous)] += features[previous]
            elif previous is not None and self.cfg.decoder == "no-cross-attention":
                # NOTE paper unclear: "w/o CA". Without a context F_{k-1} joins the query.
                query = query + features[previous]
            features[t] = self.decoder_blocks[t](query, context.flatten(1, 2))  # Eq. (2)
            previous = t
        return features

    def loss(
        self, pred: dict[str, Tensor], patches: dict[str, Tensor], mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the three losses over hidden patches, in fp32 (Eq. 5).

        Each is a mean over a sample's hidden numbers, then over samples: a sample with nothing to
        predict counts as 0.
        """
        # NOTE paper unclear: loss over which patches. Hidden ones, as MAE.
        logs = {}
        for m, t in enumerate(self.granularities):
            if t == "rgb":
                target = patches[t]
                if self.cfg.norm_pix_loss:
                    mean, std = patch_statistics(target)
                    target = (target - mean) / std
                error = (pred[t].float() - target).square().mean(-1)  # (B, N)
                valid = mask[:, m]
            else:
                valid = mask[:, m, :, None] & (patches[t] != UNLABELLED)  # (B, N, 16)
                target = patches[t].where(valid, UNLABELLED)
                logits = pred[t].float().unflatten(-1, (LABELS, -1))  # (B, N, 16, C)
                error = F.cross_entropy(
                    logits.flatten(0, 2), target.flatten(), ignore_index=UNLABELLED,
                    reduction="none",
                ).view_as(valid)  # fmt: skip
            logs[f"loss_{t}"] = _sample_mean(error, valid)
        weights = {"semantic": self.cfg.lambda_s, "instance": self.cfg.lambda_i}
        weights["rgb"] = self.cfg.lambda_r
        terms = [weights[t] * logs[f"loss_{t}"] for t in self.granularities]
        # One term of weight 1 must not be the tensor that is logged: compiled, it has no gradient.
        total = torch.stack(terms).sum()  # Eq. (5)
        return total, {k: v.detach() for k, v in logs.items()}

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py for its keys) at `progress`, 0-d in [0, 1]; and logs."""
        patches = self.patches(batch)
        mask, mask_logs = self.make_mask(patches, batch["seed"], progress)
        pred = self.predict(patches, mask, self.cfg.num_visible)
        total, logs = self.loss(pred, patches, mask)
        return total, logs | mask_logs


def _sample_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x over `valid` a sample (0 where there is none), then over samples."""
    x, valid = x.where(valid, 0).flatten(1), valid.flatten(1)
    return (x.sum(1) / valid.sum(1).clamp(min=1)).mean()


# ------------------------------------------------------------------------- looking at a model


@torch.no_grad()
def evaluate(model: CFMAE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses on random masks and accuracy on hidden labels, beside two guesses that learn nothing.

    Guesses: the label that is most frequent among the batch's hidden ones (it knows the answers'
    frequencies, so it is a little better than any constant can be), and the labels of the nearest
    visible patch of the same granularity (that same label where all of it is hidden).
    """
    patches = model.patches(batch)
    M, N = len(model.granularities), model.cfg.num_patches
    noise = uniform(batch["seed"], M * N, MASK).view(-1, M, N)
    n = N - visible_counts(batch["seed"], model.cfg.num_visible, M)[..., None]
    mask = noise.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True) < n
    pred = model.predict(patches, mask, model.cfg.num_visible)
    total, logs = model.loss(pred, patches, mask)
    side = model.cfg.image_size // model.cfg.patch_size
    at = torch.arange(N, device=mask.device)
    distance = ((at // side)[:, None] - at // side) ** 2 + ((at % side)[:, None] - at % side) ** 2
    for m, t in enumerate(model.granularities):
        if t == "rgb":
            continue
        labels, hidden = patches[t], mask[:, m]
        valid = hidden[..., None] & (labels != UNLABELLED)
        frequent = labels[valid].mode().values if valid.any() else labels.new_zeros(())
        nearest = (distance + hidden[:, None] * 10**6).argmin(-1)  # (B, N)
        copied = gather(labels, nearest).where(~hidden.all(-1)[:, None, None], frequent)
        guess = pred[t].float().unflatten(-1, (LABELS, -1)).argmax(-1)
        for name, x in (("", guess), ("_frequent", frequent), ("_nearest", copied)):
            logs[f"accuracy_{t}{name}"] = _sample_mean((x == labels).float(), valid)
    return {"loss": total, **logs}


def preview(model: CFMAE, batch: dict[str, Tensor], path: Path, step: int) -> None:
    """Write a picture: for each granularity the input, what is visible of it, and the prediction.

    The input is the truth; the prediction shows visible patches as they are, which have no loss.
    """
    cfg, (h, w) = model.cfg, (model.cfg.image_size // model.cfg.patch_size,) * 2
    patches = model.patches(batch)
    mask, _ = model.make_mask(patches, batch["seed"], torch.ones((), device=batch["seed"].device))
    pred = model.predict(patches, mask, cfg.num_visible)
    columns = {}
    for m, t in enumerate(model.granularities):
        if t == "rgb":
            guess, note = pred[t].float(), ""
            if cfg.norm_pix_loss:
                mean, std = patch_statistics(patches[t])
                guess, note = guess * std + mean, " (true patch mean, std)"
            guess = unpatchify(guess, cfg.patch_size, (h, w)) * model.normalize.std
            guess = ((guess + model.normalize.mean) * 255).clamp(0, 255).byte()
            truth = batch[t]
        else:
            guess = pred[t].float().unflatten(-1, (LABELS, -1)).argmax(-1)  # (B, N, 16)
            guess, note = pictures.colorize(unpatchify(guess, 4, (h, w))[:, 0]), ""
            truth = pictures.colorize(batch[t])
        hidden = mask[:, m].view(-1, 1, h, w).float()
        hidden = F.interpolate(hidden, truth.shape[-2:], mode="nearest").bool()
        columns |= {f"{t}: input = truth": truth, f"{t}: visible": truth.masked_fill(hidden, 128)}
        columns[f"{t}: prediction{note}"] = guess.where(hidden, truth)
    caption = f"cfmae {cfg.model}, step {step}, {cfg.data} val, masks as at the end of training"
    pictures.contact_sheet(columns, path, caption)


def load_encoder(path: str | Path, **overrides) -> Encoder:
    """Rebuild the encoder of a checkpoint.

    Args:
        path: a checkpoint that a run of this script wrote.
        overrides: image_size (H, W) and drop_path, as `common.ViT` takes them.
    Errors: UserError where the file is no such checkpoint.
    """
    cfg, state = engine.load_encoder(path, "cfmae", Config)
    size = (cfg.image_size,) * 2  # positions of another size refer to it
    encoder = make_encoder(cfg, **{"image_size": size, "trained_size": size, **overrides})
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------------- presets

PRESETS = {
    # Ours, for a laptop: 64 x 64 scenes, three minutes on two cores.
    "tiny": dict(
        data="shapes", image_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4,
        decoder_embed_dim=64, decoder_num_heads=2, epochs=1, warmup_epochs=0.1, batch_size=32,
        base_lr=8e-3,
    ),
    # ViT-S, not in the paper.
    "small": dict(embed_dim=384, depth=12, num_heads=6, micro_batch=256),
    # NOTE paper unclear: results in circulation. A short summary gives others than the paper's.
    "base": dict(),  # the paper's (Table 7)
    # ViT-L, not in the paper.
    "large": dict(embed_dim=1024, depth=24, num_heads=16, micro_batch=64),
}  # fmt: skip


def main() -> None:
    engine.main("cfmae", Config, PRESETS, __doc__, CFMAE, evaluate=evaluate, preview=preview)


if __name__ == "__main__":
    main()
