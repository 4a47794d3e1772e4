"""CFMAE: coarse-to-fine masked autoencoding over RGB, instance and semantic maps.

Paper: "From Semantics to Pixels: Coarse-to-Fine Masked Autoencoders for Hierarchical Visual
Understanding" (arXiv 2603.09955, where it is called C2FMAE). Idea:
  1. one ViT encodes 98 of the 3 x 196 patches of an image, its instance map and its semantic map;
  2. three decoder blocks predict semantics, instances, pixels, each reading the one before;
  3. what is hidden follows a curriculum: over semantic regions, then on objects, then at random;
  4. after pre-training only the encoder is kept; RGB alone is enough for it.

Equation -> code
  Eqs. 1, 3  encoder, predictors           CFMAE.predict
  Eq. 2      cascaded decoder              CFMAE.decode
  Eq. 5      loss                          CFMAE.loss
  Eq. 6      random mask                   MASKS
  Eqs. 7, 8  instance-guided mask          choose_objects, instance_mask
  Eqs. 9, 10 semantic-guided mask          semantic_mask
  Eqs. 4, 11 mixed mask                    make_mask

As printed the curriculum is a switch, not a ramp, and often hides the chosen objects whole. Every
`NOTE paper unclear` has a row in docs/decisions.md.

  CPU:  python cfmae.py --data shapes --model tiny
  GPU:  torchrun --nproc_per_node=8 cfmae.py --data data/imagenet --epochs 400
"""

from dataclasses import dataclass, replace

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Block, CrossAttention, Mlp, Normalize, PatchEmbed, fill, gather
from common import init_weights, patchify, pixel_picture, pixel_target, sincos_2d, split, unpatchify
from data import GRANULARITIES, MAX_INSTANCES, UNLABELLED
from engine import arg, cosine, decay_groups, divides, parse, require
from noise import DIRICHLET, INSTANCES, MASK, MIX, uniform
from shapes import ShapeScenes
from vit import ViT

NAMES = {g[0].upper(): g for g in GRANULARITIES}  # letters in --granularities, --order, --lambda-*
MAPS = [g for g, row in GRANULARITIES.items() if row.kind == "labels"]  # the others are "pixels"
SIZES = {"rgb": 3, "instance": MAX_INSTANCES + 1}  # NOTE paper unclear: instance ids. By size.
LABELS = 16  # of a patch, 4 x 4 as MultiMAE's; Sec. 3.1 has all 256 (docs/decisions.md).
Tensors = dict[str, Tensor]  # by granularity


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source; `--model` presets change the size."""

    epochs: int = arg(400, "Table 7 (400 or 1600)")
    warmup_epochs: float = arg(40, "App. E.1; Table 7 is garbled")  # NOTE paper unclear: warm-up.
    batch_size: int = arg(2048, "Table 7; the global batch")
    base_lr: float = arg(1e-4, "Table 7; lr = base_lr * batch_size / 256")
    weight_decay: float = arg(0.05, "Table 7")
    beta1: float = arg(0.9, "Table 7")
    beta2: float = arg(0.95, "Table 7")
    image_size: int = arg(224, "Table 7")
    crop_scale_min: float = arg(0.2, "not given; MAE's")  # NOTE paper unclear: random crop.
    patch_size: int = arg(16, "App. E.1")
    embed_dim: int = arg(768, "App. E.1: ViT-B")
    depth: int = arg(12, "App. E.1: ViT-B", within="(0, inf)")
    num_heads: int = arg(12, "App. E.1: ViT-B")
    decoder_embed_dim: int = arg(256, "App. E.1")
    decoder_num_heads: int = arg(8, "App. E.1")
    decoder_depth: int = arg(2, "App. E.1: self-attention blocks of a task", within="[0, inf)")
    granularities: str = arg("R+I+S", "Table 6e", ["R+I+S", "R+S", "R+I", "R"], group="data")
    semantic_classes: int | None = arg(None, "133 (App. B)", within="[1, 255]", group="data")
    # NOTE paper unclear: mask ratio. "1/6" (App. E.1, Table 7) is the visible share.
    mask_ratio: float | None = arg(None, "5/6 (Table 6a); below R+I+S 3/4", group="masking")
    masking: str | None = arg(None, "SG-IG-RD (Tables 6b, c); below R+I+S RD", group="masking")
    mix: str = arg("score", "Eq. 11; sample: ours", ["score", "sample"], group="masking")
    alpha: float = arg(0.75, "Eq. 8: share hidden on objects; the paper: > 0.5", group="masking")
    e1: float = arg(0.2, "Fig. 5; not given", group="masking")  # NOTE paper unclear: e1 to e4.
    e2: float = arg(0.4, "Fig. 5", group="masking")
    e3: float = arg(0.6, "Fig. 5", group="masking")
    e4: float = arg(0.8, "Fig. 5", group="masking")
    decoder: str = arg("cascaded", "Table 6d", ["cascaded", "parallel", "no-cross-attention"])
    order: str = arg("S-I-R", "Table 6d", ["S-I-R", "S-R-I", "I-S-R", "I-R-S", "R-S-I", "R-I-S"])
    lambda_s: float = arg(1.0, "Eq. 5, Table 6f", within="[0, inf)")
    lambda_i: float = arg(1.0, "Eq. 5, Table 6f", within="[0, inf)")
    lambda_r: float = arg(1.0, "Eq. 5, Table 6f", within="[0, inf)")
    norm_pix_loss: bool = arg(True, "not given; MAE's")  # NOTE paper unclear: pixel target.

    FURTHER = engine.Config.FURTHER + ("e1", "e2", "e3", "e4")

    def resolve(self) -> None:
        """Fill in what depends on other fields; UserError on values that cannot work."""
        super().resolve()
        M, N = len(self.names), self.num_patches
        own = ShapeScenes.SEMANTIC_CLASSES if self.data == "shapes" else 0
        n = self.semantic_classes = self.semantic_classes or own or 133  # App. B
        require((n >= own, "semantic_classes", f"{n} is outside [{own}, {UNLABELLED}]"))
        # NOTE paper unclear: visible tokens with fewer granularities. A quarter, as MAE.
        if self.mask_ratio is None:
            self.mask_ratio = 5 / 6 if M == 3 else 3 / 4  # Tables 6a, 6e
        n, most = self.num_visible, min(N, M * N - 1)
        words = f"{self.mask_ratio} leaves {n} patches; use one that leaves 1 to {most}, as 0.75"
        require((1 <= n <= most, "mask_ratio", words))
        self.masking = self.masking or ("SG-IG-RD" if M == 3 else "RD")
        kinds, known = self.masking.split("-"), [k for k in MASKS if MASKS[k][1] in self.names]
        ok = len(kinds) in (1, 3) and len({*kinds} & {*known}) == len(kinds)
        words = ", ".join(f"{k} with {g} maps" for k, (_, g) in MASKS.items())
        require((ok, "masking", f"{self.masking}: one, as RD, or three different of {words}"))
        require((0.5 < self.alpha <= 1, "alpha", f"{self.alpha} is outside (0.5, 1] (Eq. 8)"))
        ok = 0 <= self.e1 <= self.e2 <= self.e3 <= self.e4 <= 1
        require((ok, "e1", "<= --e2 <= --e3 <= --e4 must lie in [0, 1], e.g. 0.2 0.4 0.6 0.8"))
        for name in ("embed_dim", "decoder_embed_dim"):
            divides(self, name, name.replace("embed_dim", "num_heads"))
            require((getattr(self, name) % 4 == 0, name, "must be divisible by 4, for positions"))

    @property
    def names(self) -> tuple[str, ...]:  # in the order of GRANULARITIES
        return tuple(NAMES[letter] for letter in self.granularities.split("+"))

    @property
    def num_patches(self) -> int:  # N, of one granularity
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:  # of all granularities: 98, 147, 196 for Table 6a
        return round((1 - self.mask_ratio) * len(self.names) * self.num_patches)


# ---------------------------------------------------------------------------------------- masking
# M granularities have N patches each. A kind of mask is a function of `region` (B, N), the label of
# each patch of the map that guides it, `n` (B, M, 1), how many patches it hides of each granularity
# (r_m N in the paper), and `order` (B, M, N), a random permutation; it returns (B, M, N) bool.
def visible_counts(seed: Tensor, num_visible: int, M: int) -> Tensor:
    """Visible patches of each granularity, (B, M) int64 with row sums `num_visible`."""
    # NOTE paper unclear: share of each granularity. Dirichlet(1, ..., 1), rounded end to end.
    draws = -uniform(seed, M, DIRICHLET).log().double()  # (B, M); torch 2.6 has no deterministic
    ends = torch.stack([draws[:, : m + 1].sum(1) for m in range(M)], 1).float()  # cumsum on CUDA
    return F.pad((num_visible * (ends / ends[:, -1:])).round().long(), (1, 0)).diff(dim=1)


def patch_labels(label_map: Tensor) -> Tensor:
    """Cut a label map (B, 4h, 4w) uint8 into the 16 labels of each patch, (B, h*w, 16) int64."""
    return patchify(label_map[:, None], 4).long()


def patch_region(labels: Tensor) -> Tensor:
    """Label that covers most of each patch, ties to the smaller id: (B, N, 16) to (B, N) int64."""
    n = (labels[..., :, None] == labels[..., None, :]).sum(-1)  # (B, N, 16)
    return 255 - (n * 256 + 255 - labels).amax(-1) % 256  # NOTE paper unclear: region of a patch.


def choose_objects(seed: Tensor, region: Tensor) -> Tensor:
    """Draw a non-empty subset of the instances, large ones more often: Omega_obj (B, N) bool."""
    # NOTE paper unclear: choice of instances. 1..K of them, drawn by area: largest log(u) / area.
    u = uniform(seed, MAX_INSTANCES + 1, INSTANCES)
    on = region[..., None] == torch.arange(1, MAX_INSTANCES + 1, device=u.device)  # (B, N, 16)
    area = on.sum(1)  # (B, 16)
    rank = (u[:, 1:].log() / area).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    take = rank <= u[:, :1] * (area > 0).sum(1, keepdim=True)  # 1 to K of them
    return (on & take[:, None]).any(-1)  # Eq. (7), step 2


def instance_mask(cfg: Config, seed: Tensor, region: Tensor, n: Tensor, order: Tensor) -> Tensor:
    """Hide a share alpha of n on the chosen objects, the rest outside."""
    # NOTE paper unclear: images without instances. Their mask is then the random one.
    # NOTE paper unclear: share on objects. At least their share of the area, at most all of them.
    objects, N = choose_objects(seed, region), region.shape[1]
    area = objects.sum(1)[:, None, None]  # |Omega_obj|, (B, 1, 1)
    on = (cfg.alpha * n.double()).floor().long()  # Eq. (8)
    on = on.maximum((n * area + N - 1) // N).minimum(area)  # no less densely than the rest
    rank = (order + N * ~objects[:, None]).argsort(-1).argsort(-1)  # objects first
    return (rank < on) | ((rank >= area) & (rank < area + n - on))  # Eq. (7)


def semantic_mask(cfg: Config, seed: Tensor, region: Tensor, n: Tensor, order: Tensor) -> Tensor:
    """Hide patches of each region (255, unlabelled, is one too) in proportion to its size."""
    # NOTE paper unclear: floor of Eq. 10. It loses patches. With the patches in order of region,
    # n of N are hidden at even distances from a random start: a region gets the floor or one more.
    N, u = region.shape[1], uniform(seed, 2, MIX)[:, 1:, None]  # (B, 1, 1); --mix takes the first
    at = n * (order + N * region[:, None]).argsort(-1).argsort(-1) + (N * u).long()  # Eq. (9)
    return (at + n) // N > at // N  # Eq. (10), with equal weights w


MASKS = {  # a kind's function, and the granularity that guides it
    "SG": (semantic_mask, "semantic"),
    "IG": (instance_mask, "instance"),
    "RD": (lambda cfg, seed, region, n, order: order < n, "rgb"),  # Eq. (6)
}


def schedule(cfg: Config, progress: Tensor) -> dict[str, Tensor]:
    """Weight of each kind of mask (Fig. 5); they are non-negative and sum to 1."""
    # NOTE paper unclear: order of phases. Sec. 3.3's; App. C's is `--masking RD-IG-SG`.
    if cfg.masking in MASKS:  # Table 6b
        return {cfg.masking: torch.ones_like(progress)}
    second = ((progress - cfg.e1) / max(cfg.e2 - cfg.e1, 1e-9)).clamp(0, 1)
    third = ((progress - cfg.e3) / max(cfg.e4 - cfg.e3, 1e-9)).clamp(0, 1)
    return dict(zip(cfg.masking.split("-"), (1 - second, second - third, third)))


def make_mask(cfg: Config, batch: Tensors, progress: Tensor) -> tuple[Tensor, Tensors]:
    """Mask (B, M, N), True = hidden, exactly `cfg.num_visible` False a sample; and logs.

    `progress` is 0-d in [0, 1]; `--masking RD` reads neither it nor label maps.
    """
    seed, M, N = batch["seed"], len(cfg.names), cfg.num_patches
    n = N - visible_counts(seed, cfg.num_visible, M)[..., None]  # r_m N, (B, M, 1)
    order = uniform(seed, M * N, MASK).view(-1, M, N).argsort(dim=-1, stable=True).argsort(-1)
    if cfg.masking == "RD":
        return order < n, {}
    region = {g: patch_region(patch_labels(batch[g])) for g in MAPS if g in cfg.names}
    a = schedule(cfg, progress)
    masks = {k: f(cfg, seed, region.get(g), n, order) for k, (f, g) in MASKS.items() if k in a}
    logs = {f"a_{k}": x for k, x in a.items()}
    if cfg.mix == "sample":  # a kind for each sample: its share is 1, the others' 0
        u, end = uniform(seed, 1, MIX)[..., None], 0.0  # (B, 1, 1)
        for k in masks:
            a[k], end = (end <= u) & (u < end + a[k]), end + a[k]
    # NOTE paper unclear: which patches are ranked together. Those of one granularity, as Eq. 11.
    # NOTE paper unclear: smooth transition. Masks of n ones each make it a switch, as printed.
    score = sum(x.double() * masks[k] for k, x in a.items())  # Eq. (4)
    mask = (score - 1e-9 * order).argsort(-1, descending=True).argsort(-1) < n  # Eq. (11)
    if "instance" in region:
        objects = choose_objects(seed, region["instance"])
        whole = (mask | ~objects[:, None]).all(-1) & objects.any(1, keepdim=True)  # (B, M)
        logs["objects_hidden_whole"] = whole.float().mean()
    return mask, logs


# ------------------------------------------------------------------------------------------ model
class LabelEmbed(nn.Module):  # NOTE paper unclear: projection of label patches. As Sec. 3.1 says.
    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        # NOTE paper unclear: unlabelled pixels (255). A row of their own; the loss leaves them out.
        # NOTE paper unclear: first weights of that projection. Xavier's, of 16 inputs that are 1.
        bound = (6 / (LABELS + dim)) ** 0.5
        weight = torch.empty(LABELS * (num_classes + 1), dim).uniform_(-bound, bound)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(dim))

    def forward(self, labels: Tensor) -> Tensor:
        """Project one-hot labels (B, K, 16), given as int64: sums of 16 rows, (B, K, D)."""
        rows = labels.where(labels != UNLABELLED, self.num_classes)
        rows = rows + torch.arange(LABELS, device=labels.device) * (self.num_classes + 1)
        x = F.embedding_bag(rows.flatten(0, 1), self.weight, mode="sum")
        return x.view(*labels.shape[:2], -1) + self.bias


class Encoder(ViT):
    """ViT that also takes label maps; without them it is timm's ViT. kwargs as `vit.ViT`'s."""

    def __init__(self, cfg: Config, **kwargs):
        shape = {k: getattr(cfg, k) for k in ("patch_size", "embed_dim", "depth", "num_heads")}
        super().__init__(**{"image_size": (cfg.image_size,) * 2, **shape, **kwargs})
        sizes = SIZES | {"semantic": cfg.semantic_classes}  # channels or classes
        self.sizes = {g: sizes[g] for g in cfg.names}
        for g, n in self.sizes.items():
            if g in MAPS:
                self.add_module(f"{g}_embed", LabelEmbed(n, self.embed_dim))
            elif g != "rgb":  # that one is ViT's own
                self.add_module(f"{g}_embed", PatchEmbed(self.patch_size, n, self.embed_dim))

    def grid_of(self, imgs: Tensor | dict[str, Tensor]) -> tuple[int, int]:
        x = next(iter(imgs.values())) if isinstance(imgs, dict) else imgs
        return super().grid_of(x) if x.ndim == 4 else tuple(n // 4 for n in x.shape[1:])

    def embed(self, imgs: Tensor | dict[str, Tensor]) -> Tensor:
        """Tokens with position (B, M*N, D) of normalised images, or of granularities by name."""
        imgs = {"rgb": imgs} if isinstance(imgs, Tensor) else imgs
        position, tokens = self.position(*self.grid_of(imgs)), []
        for g in (g for g in GRANULARITIES if g in imgs):
            x = patch_labels(imgs[g]) if g in MAPS else patchify(imgs[g], self.patch_size)
            embed = self.patch_embed if g == "rgb" else getattr(self, f"{g}_embed")
            tokens.append(embed(x) + position)  # NOTE paper unclear: position and granularity.
        return torch.cat(tokens, dim=1)


class DecoderBlock(nn.Module):  # NOTE paper unclear: decoder block. App. E.1's, not Sec. 3.2's.
    def __init__(self, cfg: Config):
        super().__init__()
        D, heads = cfg.decoder_embed_dim, cfg.decoder_num_heads
        self.cross = cfg.decoder != "no-cross-attention"
        if self.cross:
            self.norm_q, self.norm_kv = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
            self.cross_attn = CrossAttention(D, heads)
            self.norm2, self.mlp = nn.LayerNorm(D, eps=1e-6), Mlp(D, 4 * D)
        self.blocks = nn.Sequential(*(Block(D, heads) for _ in range(cfg.decoder_depth)))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Cross-attention from x (B, N, D) to context (B, M*N, D), MLP, self-attention blocks."""
        if self.cross:
            x = x + self.cross_attn(self.norm_q(x), self.norm_kv(context))
            x = x + self.mlp(self.norm2(x))
        return self.blocks(x)


class CFMAE(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, D = cfg, cfg.decoder_embed_dim
        self.tasks = [NAMES[t] for t in cfg.order.split("-") if NAMES[t] in cfg.names]
        self.normalize, self.encoder = Normalize(), Encoder(cfg)  # NOTE paper unclear: class token.
        self.decoder_embed = nn.Linear(cfg.embed_dim, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.task_embed = nn.Parameter(torch.zeros(len(cfg.names), 1, D))
        position = sincos_2d(D, *self.encoder.grid)
        self.register_buffer("decoder_pos_embed", position, persistent=False)
        places = {g: LABELS if g in MAPS else cfg.patch_size**2 for g in cfg.names}  # of a patch
        sizes = {g: n * places[g] for g, n in self.encoder.sizes.items()}
        self.decoder_blocks = nn.ModuleDict({t: DecoderBlock(cfg) for t in self.tasks})
        self.decoder_pred = nn.ModuleDict({t: nn.Linear(D, sizes[t]) for t in self.tasks})
        init_weights(self)

    def images(self, batch: Tensors) -> Tensors:  # maps stay as they are
        return {g: self.normalize(batch[g]) if g == "rgb" else batch[g] for g in self.cfg.names}

    def predict(self, imgs: Tensors, mask: Tensor, num_visible: int | None = None) -> Tensors:
        """Predict pixels (B, N, p*p*3) and logits (B, N, 16*classes) from the visible patches.

        `mask` (B, M, N) has exactly `num_visible` (default: the configured) False a sample.
        """
        ids_keep, _, ids_restore = split(mask.flatten(1), num_visible or self.cfg.num_visible)
        tokens = gather(self.encoder.embed(imgs), ids_keep)  # (B, V, D)
        (x,) = self.encoder.run(self.encoder.add_prefix(tokens))  # Eq. (1)
        x = self.encoder.norm(x)[:, self.encoder.num_prefix :]
        features = self.decode(self.decoder_embed(x), ids_restore)
        return {t: self.decoder_pred[t](features[t]) for t in self.tasks}  # Eq. (3)

    def decode(self, x: Tensor, ids_restore: Tensor) -> dict[str, Tensor]:
        """Run the cascade on visible tokens x (B, V, D): F_k of each task, (B, N, D)."""
        names, decoder = self.cfg.names, self.cfg.decoder
        H = fill(x, self.mask_token, ids_restore).unflatten(1, (len(names), -1))  # (B, M, N, D)
        H = H + self.decoder_pos_embed + self.task_embed
        features, previous = {}, None
        for t in self.tasks:
            query, context = H[:, names.index(t)], H
            if previous and decoder == "cascaded":
                # NOTE paper unclear: where F_{k-1} is added. To the slice of the task that made it.
                context = H.clone()  # K_k = V_k = H (+) F_{k-1}
                context[:, names.index(previous)] += features[previous]
            elif previous and decoder == "no-cross-attention":
                # NOTE paper unclear: "w/o CA". Without a context F_{k-1} joins the query.
                query = query + features[previous]
            features[t] = self.decoder_blocks[t](query, context.flatten(1, 2))  # Eq. (2)
            previous = t
        return features

    def loss(self, pred: Tensors, imgs: Tensors, mask: Tensor) -> tuple[Tensor, Tensors]:
        """Weighted sum of the losses of all granularities, in fp32; and each of them as logs."""
        cfg, logs, terms = self.cfg, {}, []  # NOTE paper unclear: loss over which patches. Hidden.
        for g, hidden in zip(cfg.names, mask.unbind(1)):
            x = pred[g].float()
            if g in MAPS:
                labels, logits = patch_labels(imgs[g]), x.unflatten(-1, (LABELS, -1)).flatten(0, 2)
                valid = hidden[..., None] & (labels != UNLABELLED)  # (B, N, 16)
                error = F.cross_entropy(logits, labels.where(valid, 0).flatten(), reduction="none")
            else:
                target, valid = pixel_target(imgs[g], cfg.patch_size, cfg.norm_pix_loss), hidden
                error = (x - target).square().mean(-1)  # (B, N)
            loss = sample_mean(error, valid)
            terms.append(getattr(cfg, f"lambda_{g[0]}") * loss)
            logs[f"loss_{g}"] = loss.detach()
        # One term of weight 1 must not be the tensor that is logged: compiled, it has no gradient.
        return torch.stack(terms).sum(), logs  # Eq. (5)

    def forward(self, batch: Tensors, progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see data.py for its keys) at `progress`, 0-d in [0, 1]; and logs."""
        imgs, (mask, mask_logs) = self.images(batch), make_mask(self.cfg, batch, progress)
        loss, logs = self.loss(self.predict(imgs, mask), imgs, mask)
        return loss, logs | mask_logs


def sample_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of x over `valid` a sample (0 where there is none), then over samples."""
    x, valid = x.view_as(valid).where(valid, 0).flatten(1), valid.flatten(1)
    return (x.sum(1) / valid.sum(1).clamp(min=1)).mean()


@torch.no_grad()
def evaluate(model: CFMAE, batch: Tensors) -> Tensors:
    """Losses on random masks; accuracy on hidden labels, beside two guesses that learn nothing."""
    cfg, imgs = replace(model.cfg, masking="RD"), model.images(batch)
    mask, _ = make_mask(cfg, batch, None)
    pred = model.predict(imgs, mask)
    loss, logs = model.loss(pred, imgs, mask)
    place = torch.cartesian_prod(*(torch.arange(n, device=mask.device) for n in model.encoder.grid))
    distance = (place[:, None] - place).square().sum(-1)  # (N, N)
    for g, hidden in zip(cfg.names, mask.unbind(1)):
        if g in MAPS:
            labels, guess = patch_labels(imgs[g]), pred[g].unflatten(-1, (LABELS, -1)).argmax(-1)
            valid = hidden[..., None] & (labels != UNLABELLED)
            frequent = labels[valid].bincount(minlength=1).argmax()  # of these samples' hidden ones
            nearest = gather(labels, (distance + hidden[:, None] * 10**6).argmin(-1))
            nearest = nearest.where(~hidden.all(-1)[:, None, None], frequent)
            for name, x in {"": guess, "_frequent": frequent, "_nearest": nearest}.items():
                logs[f"accuracy_{g}{name}"] = sample_mean((x == labels).float(), valid)
    return {"loss": loss, **logs}


@torch.no_grad()
def reconstruct(model: CFMAE, batch: Tensors) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Each granularity, where it is hidden at the end of training, and its prediction."""
    cfg, grid, imgs, found = model.cfg, model.encoder.grid, model.images(batch), {}
    mask, _ = make_mask(cfg, batch, torch.ones((), device=batch["seed"].device))
    for g, x in model.predict(imgs, mask).items():
        if g in MAPS:
            x = unpatchify(x.unflatten(-1, (LABELS, -1)).argmax(-1), 4, grid)[:, 0]
        else:
            x = model.normalize.undo(pixel_picture(x, imgs[g], cfg.patch_size, cfg.norm_pix_loss))
        found[g] = batch[g], mask[:, cfg.names.index(g)].unflatten(1, grid), x
    return found


def load_encoder(path: str, **kwargs) -> Encoder:
    """The encoder of a checkpoint; kwargs: image_size (H, W) and drop_path."""
    cfg, state = engine.load_encoder(path, "cfmae", Config)
    encoder = Encoder(cfg, **{"trained_size": (cfg.image_size,) * 2, **kwargs})
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------- presets, loop
make_encoder = Encoder
PRESETS = {
    "tiny": dict(  # ours, for a laptop: three minutes on two cores
        data="shapes", image_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4, epochs=1,
        decoder_embed_dim=64, decoder_num_heads=2, warmup_epochs=0.1, batch_size=32, base_lr=8e-3),
    "base": dict(),  # NOTE paper unclear: results in circulation. These are of Table 7.
    "small": dict(embed_dim=384, depth=12, num_heads=6, micro_batch=256),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, micro_batch=64),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, PRESETS, __doc__, argv)
    maps = {"granularities": cfg.names, "semantic_classes": cfg.semantic_classes}
    with engine.Run("cfmae", cfg, **maps) as run:
        cfmae = CFMAE(cfg)
        model = run.place(cfmae)
        optimizer = torch.optim.AdamW(
            decay_groups(cfmae, cfg.weight_decay), lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True
        )
        for step in run.steps(model, optimizer, evaluate, reconstruct):
            for batch in step.micro_batches():  # rgb, maps uint8, seed (B,)
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(cosine(cfg, step))


if __name__ == "__main__":
    engine.command("cfmae", main)
