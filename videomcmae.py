"""VideoMCMAE: MCMAE on clips, of which whole tubes are hidden.

Paper: "MCMAE: Masked Convolution Meets Masked Autoencoders", Secs. 2.4 and 3.4. Its code for video
was never released and the "appendix B" with the details is not in the paper; what it leaves out is
VideoMAE's here, which it builds on. Idea:
  1. cubes of 2 x 4 x 4 pixels are embedded; stages 1 and 2 mix them by 3-D convolutions, at strides
     4 and 8 in space, and stage 3 is a transformer over all cubes of 2 x 16 x 16;
  2. tubes are hidden, 90 % of the 14 x 14 patches, the same ones in every frame;
  3. hidden positions are zeroed before each convolution: nothing leaks, from other frames either;
     with `--sparse`, the default, they are not computed at all;
  4. a decoder of all cubes reads the three stages, summed on one grid;
  5. afterwards the encoder is fine-tuned on clips (downstream/finetune_clips.py).

Paper -> code; what it leaves open is a `NOTE paper unclear`, with a row in docs/decisions.md
  Sec. 2.4       cube embedding, three stages   Stem, Encoder.stages
  Sec. 3.4       tube mask                      make_mask
  Sec. 2.4       masked 3-D convolution         tubes.all_tubes, visible_tubes
  Eq. 1          multi-scale decoder            VideoMCMAE.predict
  Sec. 2.4       pixels of hidden cubes         VideoMCMAE.loss

  CPU:  python videomcmae.py --data shapes --model tiny
  GPU:  torchrun --nproc_per_node=8 videomcmae.py --data data/k400 --epochs 800
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clips
from common import Block, Mlp, Normalize, fill, init_weights, random_mask, split
from engine import UserError, arg, cosine, decay_groups, divides, nearest, parse, require
from noise import MASK, uniform
from tubes import all_tubes, cube_statistics, cut, merge, paste, pick, visible_tubes
from vit import ViT


@dataclass
class Config(engine.Config):
    """Every value the paper sets, with its source; `--model` presets change the size."""

    SAMPLES = "clips"
    data: str = arg("data/k400", "folder of clips, each a folder of frames, or shapes")
    epochs: int = arg(800, "Sec. 3.4; 200 as well")
    warmup_epochs: float = arg(40, "Sec. 3.1, whose protocol Sec. 3.4 follows")
    # NOTE paper unclear: batch. Sec. 3.1's; VideoMAE's command has 2048.
    batch_size: int = arg(1024, "Sec. 3.1; the global batch, of clips")
    base_lr: float = arg(1.5e-4, "Sec. 3.1; lr = base_lr * batch_size / 256")
    weight_decay: float = arg(0.05, "Sec. 3.1")
    beta2: float = arg(0.95, "AdamW; not given, VideoMAE's")
    image_size: int = arg(224, "as for images; VideoMAE's")
    # NOTE paper unclear: clip. Frames, strides, crop are VideoMAE's; flips the images'; SSv2: none.
    frames: int = arg(16, "of a clip; VideoMAE's", group="data")
    stride: int = arg(4, "frames from one to the next; VideoMAE's: 4, SSv2 2", group="data")
    flip: bool = arg(True, "half of the clips; --no-flip for SSv2, Sec. 3.4", group="data")
    patch_size: int = arg(16, "of stage 3; stages 1 and 2 have a quarter and a half of it")
    # NOTE paper unclear: cube embedding. 2 frames, VideoMAE's, and no other stride in time.
    cube_frames: int = arg(2, "frames of a cube; VideoMAE's")
    embed_dims: str = arg("256,384,768", "Table 7: C1,C2,C3 of MCMAE-B")
    depths: str = arg("2,2,11", "Table 7: L1,L2,L3")
    mlp_ratios: str = arg("4,4,4", "Table 7: P1,P2,P3")
    num_heads: int = arg(12, "Table 7: Ha, of stage 3", within="(0, inf)")
    # NOTE paper unclear: kernel of the 3-D convolution. 5 in time as well.
    kernel_size: int = arg(5, "of the depthwise convolutions, in all axes", choices=[3, 5, 7])
    mask_ratio: float = arg(0.9, "tubes, Sec. 3.4", within="(0, 1)", group="masking")
    multi_scale: bool = arg(True, "multi-scale decoder, Sec. 2.4, Eq. 1")
    sparse: bool = arg(True, "compute visible tubes alone: the same numbers, less work")
    # NOTE paper unclear: decoder. VideoMAE's for ViT-B; the image model's is 8 layers of 512.
    decoder_embed_dim: int = arg(384, "VideoMAE-B's")
    decoder_depth: int = arg(4, "VideoMAE-B's", within="[0, inf)")
    decoder_num_heads: int = arg(6, "VideoMAE-B's")
    norm_pix_loss: bool = arg(True, "pixels normalised by cube and channel; VideoMAE's")
    init: str | None = arg(None, "ours: weights of a run, or of mcmae.py, inflated", group="run")

    FREE = engine.Config.FREE + ("init",)
    SET = ("crop_scale_min",)  # the crop is VideoMAE's

    def resolve(self) -> None:
        """Refuse what cannot work; UserError naming the field and values that work."""
        super().resolve()
        for name in ("embed_dims", "depths", "mlp_ratios"):
            words = getattr(self, name).split(",")
            ok = len(words) == 3 and all(w.strip().isdecimal() and int(w) for w in words)
            require((ok, name, f"must be three positive integers, e.g. {getattr(Config, name)}"))
        divides(self, "decoder_embed_dim", "decoder_num_heads")
        divides(self, "frames", "cube_frames")
        for name, n, k in (
            ("patch_size", self.patch_size, 4),  # stage 1 has a quarter of it
            ("embed_dims", self.sizes[0][2], self.num_heads),
            ("embed_dims", self.sizes[0][2], 2),  # positions
            ("decoder_embed_dim", self.decoder_embed_dim, 2),
        ):
            require((n % k == 0, name, f"{n} is not divisible by {k}; nearest: {nearest(n, k)}"))
        n = self.grid[1] * self.grid[2]
        some = f"must hide some of {n} tubes, not all: {1 / n:.6g} to {1 - 1 / n:.6g}"
        require(
            (0 < self.num_visible < n, "mask_ratio", f"{self.mask_ratio} {some}"),
            (self.stride >= 0, "stride", f"{self.stride} must be 0, a single frame, or above"),
        )

    @property
    def sizes(self) -> list[list[int]]:
        """C1, C2, C3; L1, L2, L3; P1, P2, P3."""
        table = self.embed_dims, self.depths, self.mlp_ratios
        return [[int(n) for n in row.split(",")] for row in table]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cubes of a clip in time, down and across: 8, 14, 14."""
        side = self.image_size // self.patch_size
        return self.frames // self.cube_frames, side, side

    @property
    def num_visible(self) -> int:
        """Tubes that stay: 20 of 196, as VideoMAE counts, so 160 of 1568 cubes."""
        n = self.grid[1] * self.grid[2]
        return n - int(n * self.mask_ratio + 1e-6)


# ---------------------------------------------------------------------------------------- masking


def make_mask(cfg: Config, batch: dict[str, Tensor], progress: Tensor) -> Tensor:
    """Hide tubes at random, each in all frames of the clip: (B, h*w) bool, True = hidden."""
    n = cfg.grid[1] * cfg.grid[2]
    return random_mask(uniform(batch["seed"], n, MASK), n - cfg.num_visible)


# ------------------------------------------------------------------------------------------ model
# Tokens lie tube by tube, (B, V, t, k*k, C), see tubes.py: V of the L tubes, t steps in time, at
# each k x k positions, k = 4, 2, 1 in stages 1, 2, 3. Only convolutions look beyond one.


class Stem(nn.Module):
    """Into a stage: a linear layer over joined neighbours, and as in images LayerNorm, GELU."""

    def __init__(self, side: int, in_dim: int, dim: int):
        super().__init__()
        self.side, self.proj, self.norm = side, nn.Linear(side**2 * in_dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(merge(x, self.side))))


class ConvBlock(nn.Module):
    """Transformer block with a depthwise 3-D convolution in the place of attention (Sec. 2.4)."""

    def __init__(self, dim: int, mlp_ratio: int, kernel: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv1, self.conv2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attn = nn.Conv3d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def forward(self, x: Tensor, convolve: Callable, drop: Tensor | None = None) -> Tensor:
        """x (B, V, t, k*k, C); `drop` (2, B, 1, 1) scales the branches, None = 1."""
        y = self.conv2(convolve(self.attn, self.conv1(self.norm1(x))))
        x = x + (y if drop is None else drop[0, ..., None, None] * y)
        y = self.mlp(self.norm2(x))
        return x + (y if drop is None else drop[1, ..., None, None] * y)


def sincos_1d(dim: int, at: Tensor) -> Tensor:
    """Sines and cosines in turn of positions (...) that are one number each, (..., dim)."""
    angle = at.double()[..., None] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2).float()


class Encoder(ViT):
    """Three stages at a quarter, a half, the whole of `patch_size` (Table 7); the last is a ViT.

    Args: `size`: (T, H, W) of the clips it keeps positions for, None: pre-training's, to which
    positions of any size refer; `drop_path`: the last block's rate.
    """

    trained_norm = False  # the norm is trained on E1 + E2 + E3

    def __init__(self, cfg: Config, size: Sequence[int] | None = None, drop_path: float = 0.0):
        (C1, C2, C3), (L1, L2, L3), (P1, P2, P3) = cfg.sizes
        T, H, W = size or (cfg.frames, cfg.image_size, cfg.image_size)
        p, c = cfg.patch_size, cfg.cube_frames
        super(ViT, self).__init__((H, W), p, C3, L1 + L2 + L3, drop_path=drop_path)
        self.kernel, self.cube_frames, self.strides = cfg.kernel_size, c, (p // 4, p // 2, p)
        self.trained_grid, self.grid = cfg.grid, (T // c, H // p, W // p)
        self.patch_embed1 = Stem(p // 4, 3 * c, C1)
        self.patch_embed2, self.patch_embed3 = Stem(2, C1, C2), Stem(2, C2, C3)
        self.patch_embed4 = nn.Linear(C3, C3)
        self.blocks1 = nn.ModuleList(ConvBlock(C1, P1, self.kernel) for _ in range(L1))
        self.blocks2 = nn.ModuleList(ConvBlock(C2, P2, self.kernel) for _ in range(L2))
        self.blocks3 = nn.ModuleList(Block(C3, cfg.num_heads, P3) for _ in range(L3))
        self.register_buffer("pos_embed", self.table(C3, self.grid), persistent=False)
        self.norm = nn.LayerNorm(C3, eps=1e-6)

    blocks = property(lambda self: self.blocks3)  # a ViT's: what `layers` counts

    def table(self, dim: int, grid: Sequence[int]) -> Tensor:
        """Positions of a grid (t, h, w), between those of the trained one: (h*w, t, dim)."""
        # NOTE paper unclear: spatial-temporal embedding. VideoMAE's: fixed, of the one index. That
        # has no halves (half a step in time is another row), so other grids take what lies between.
        t, h, w = self.trained_grid
        x = sincos_1d(dim, torch.arange(t * h * w).view(t, h, w)).permute(3, 0, 1, 2)
        x = F.interpolate(x[None], tuple(grid), mode="trilinear")[0]  # (dim, t, h, w)
        return x.permute(2, 3, 1, 0).flatten(0, 1)

    def grid_of(self, imgs: Tensor) -> tuple[int, int, int]:
        """Cubes (t, h, w) of clips (B, T, 3, H, W); ValueError where cubes do not fill them."""
        if imgs.ndim != 5 or not imgs.is_floating_point():
            raise ValueError(f"clips are (B, T, 3, H, W) float, not {(*imgs.shape,)} {imgs.dtype}")
        (T, _, H, W), p, c = imgs.shape[1:], self.patch_size, self.cube_frames
        if T % c or H % p or W % p:
            raise ValueError(f"{T} frames of {H}x{W} are not divisible by {c} and {p}")
        return T // c, H // p, W // p

    def stages(
        self, imgs: Tensor, ids: Tensor | None = None, visible: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Stages 1 and 2 and the way into stage 3.

        Args:
            imgs: (B, T, 3, H, W) float, normalised.
            ids: (B, V) int64, the tubes to compute; None: all of them,
            visible: of which convolutions see these, (B, L) bool; None: all.
            seed: (B,) int64 turns drop path on.
        Returns: E1 (B, V, t, 16, C1); E2 (B, V, t, 4, C2); stage 3's tokens (B, V, t, C3), with
            position.
        """
        grid = self.grid_of(imgs)
        x, position = cut(imgs, self.patch_size, self.cube_frames), self.pos_embed
        if grid != self.grid:
            position = self.table(self.embed_dim, grid).to(position)
        if ids is None:
            seen = None if visible is None else visible[..., None, None, None]
            convolve1, convolve2 = (all_tubes(grid, k, seen) for k in (4, 2))
        else:
            x, position = pick(x, ids), position[ids]
            convolve1, convolve2 = (visible_tubes(grid, k, self.kernel, ids) for k in (4, 2))
        E1, drop = self.patch_embed1(x), iter(self.drops(seed))
        for block in self.blocks1:
            E1 = block(E1, convolve1, next(drop))
        E2 = self.patch_embed2(E1)
        for block in self.blocks2:
            E2 = block(E2, convolve2, next(drop))
        x = self.patch_embed4(self.patch_embed3(E2)).squeeze(3)
        return [E1, E2, x + position]

    def tokens(self, imgs: Tensor, seed: Tensor | None = None) -> Tensor:
        return self.stages(imgs, seed=seed)[2].flatten(1, 2)  # (B, L*t, C3)

    def forward_pyramid(self, imgs: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        raise NotImplementedError("no task here reads maps of clips")


def make_encoder(cfg: Config, **kwargs) -> Encoder:
    """The network that survives; kwargs as Encoder's."""
    return Encoder(cfg, **kwargs)


class VideoMCMAE(nn.Module):
    """Encoder and multi-scale decoder."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.normalize, self.encoder = cfg, Normalize(), make_encoder(cfg)
        (C1, C2, C3), D = cfg.sizes[0], cfg.decoder_embed_dim
        if cfg.multi_scale:
            self.stage1_output_decode = nn.Linear(16 * C1, C3)  # of size and stride 4 in space
            self.stage2_output_decode = nn.Linear(4 * C2, C3)
        self.decoder_embed, self.mask_token = nn.Linear(C3, D), nn.Parameter(torch.zeros(1, 1, D))
        position = self.encoder.table(D, cfg.grid).flatten(0, 1)
        self.register_buffer("decoder_pos_embed", position, persistent=False)
        self.decoder_blocks = nn.ModuleList(
            Block(D, cfg.decoder_num_heads) for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = nn.Linear(D, 3 * cfg.cube_frames * cfg.patch_size**2)
        # NOTE paper unclear: first weights. Xavier for linear layers, as VideoMAE; torch's own for
        # the 3-D convolutions, as the image model's public code.
        init_weights(self)

    def predict(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Predict pixels of every cube, (B, L, t, p*p, c*3), as `cut` has them.

        Args:
            imgs: (B, T, 3, H, W) float, normalised.
            mask: (B, L) bool, True = hidden, with exactly `cfg.num_visible` False a sample.
        """
        cfg, encoder = self.cfg, self.encoder
        ids_keep, _, ids_restore = split(mask, cfg.num_visible)
        E1, E2, x = encoder.stages(imgs, *((ids_keep, None) if cfg.sparse else (None, ~mask)))
        scales = [x]
        if cfg.multi_scale:
            scales.append(self.stage1_output_decode(merge(E1, 4)).squeeze(3))
            scales.append(self.stage2_output_decode(merge(E2, 2)).squeeze(3))
        if not cfg.sparse:  # hidden tubes end before stage 3
            scales = [pick(x, ids_keep) for x in scales]
        x, *others = (x.flatten(1, 2) for x in scales)  # (B, V*t, C3)
        (E3,) = encoder.run(x)
        return self.decode(encoder.norm(sum(others, E3)), ids_restore)  # Eq. (1)

    def decode(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Pixels of all cubes from the visible ones (B, V*t, C3)."""
        cfg, t = self.cfg, self.cfg.grid[0]
        x = self.decoder_embed(x).unflatten(1, (-1, t)).flatten(2)  # (B, V, t*D)
        x = fill(x, self.mask_token.repeat(1, 1, t), ids_restore)
        x = x.unflatten(2, (t, -1)).flatten(1, 2) + self.decoder_pos_embed  # (B, L*t, D)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_pred(self.decoder_norm(x))
        return x.view(len(x), -1, t, cfg.patch_size**2, 3 * cfg.cube_frames)

    def loss(self, pred: Tensor, imgs: Tensor, mask: Tensor) -> Tensor:
        """Squared error over the pixels of hidden tubes, in fp32 (Sec. 2.2)."""
        target = cut(imgs, self.cfg.patch_size, self.cfg.cube_frames)
        if self.cfg.norm_pix_loss:
            mean, std = cube_statistics(target)
            target = (target - mean) / std
        error = (pred.float() - target).square().mean((2, 3, 4))  # (B, L)
        return ((error * mask).sum(1) / mask.sum(1)).mean()

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch, whose `rgb` is (B, T, 3, H, W) uint8, and logs, of which it has none."""
        imgs, mask = self.normalize(batch["rgb"]), make_mask(self.cfg, batch, progress)
        return self.loss(self.predict(imgs, mask), imgs, mask), {}


@torch.no_grad()
def evaluate(model: VideoMCMAE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss on held-out clips; beside it that of a guess, each cube in its own mean colour, and the
    model's own where it sees another clip's visible tubes (a lone clip's: its own): not looking.
    """
    imgs, mask = model.normalize(batch["rgb"]), make_mask(model.cfg, batch, None)
    cubes = cut(imgs, model.cfg.patch_size, model.cfg.cube_frames)
    flat = 0 * cubes + (0 if model.cfg.norm_pix_loss else cube_statistics(cubes)[0])
    other = model.predict(imgs.roll(1, 0), mask)
    return {
        "loss": model(batch, None)[0],
        "loss_flat": model.loss(flat, imgs, mask),
        "loss_other": model.loss(other, imgs, mask),
    }


@torch.no_grad()
def reconstruct(
    model: VideoMCMAE, batch: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Film strips of four frames: images, what is hidden (B, h, 4*w), and the prediction."""
    cfg, imgs = model.cfg, model.normalize(batch["rgb"])
    (p, c), mask = (cfg.patch_size, cfg.cube_frames), make_mask(cfg, batch, None)
    pred = model.predict(imgs, mask).float()
    if cfg.norm_pix_loss:  # a cube's mean and deviation are the true ones
        mean, std = cube_statistics(cut(imgs, p, c))
        pred = pred * std + mean
    pred, n = model.normalize.undo(paste(pred, p, c, cfg.grid)), min(4, cfg.frames)
    shown = [i * cfg.frames // n for i in range(n)]
    truth, pred = (torch.cat(x[:, shown].unbind(1), -1) for x in (batch["rgb"], pred))
    return {f"frames {shown}": (truth, mask.unflatten(1, cfg.grid[1:]).repeat(1, 1, n), pred)}


def inflate(state: dict[str, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Weights of mcmae.py for clips: on one that stands still stages 1 and 2 give what they gave.

    A cube's embedding is the mean over its frames; a 5 x 5 kernel lies in the middle of a zero one.
    """
    found = {}
    for name, x in state.items():
        if x.ndim == 4 and x.shape[1] == 1 and ".attn." in name:  # (C, 1, K, K)
            x = F.pad(x[:, :, None], (0,) * 4 + (x.shape[-1] // 2,) * 2)
        elif name == "encoder.patch_embed1.proj.weight":  # (C, 3, k, k)
            x = x.permute(0, 2, 3, 1).repeat(1, 1, 1, cfg.cube_frames).flatten(1) / cfg.cube_frames
        elif x.ndim == 4:
            x = x.permute(0, 2, 3, 1).flatten(1)
        found[name] = x
    return found


def load_init(model: VideoMCMAE, path: str | Path) -> str:
    """Start from a run's weights, or from an image model's encoder; a report, or UserError."""
    checkpoint = engine.read(path)
    method = checkpoint.get("method") if isinstance(checkpoint, dict) else None
    if method not in ("videomcmae", "mcmae"):
        raise UserError(f"--init {path}: wanted a checkpoint of videomcmae.py or mcmae.py")
    state = checkpoint["model"]
    if method == "videomcmae":
        return engine.load_weights(model, state, path)
    parts = ("encoder.", "stage1_output", "stage2_output")  # the decoder is another
    state = inflate({k: v for k, v in state.items() if k.startswith(parts)}, model.cfg)
    fresh, left = ("decoder_", "mask_token", "stage"), ("stage", "pos_embed")  # positions: fixed
    words = engine.load_weights(
        model, state, path, lambda k: k.startswith(fresh), lambda k: k.startswith(left)
    )
    return f"{words}; inflated in time"


def load_encoder(path: str | Path, **kwargs) -> Encoder:
    """The encoder of a checkpoint; kwargs as Encoder's."""
    cfg, state = engine.load_encoder(path, "videomcmae", Config)
    encoder = make_encoder(cfg, **kwargs)
    engine.load_weights(encoder, state, path)
    return encoder


# ---------------------------------------------------------------------------------- presets, loop

PRESETS = {
    # Ours, for a laptop: 8 frames of 48 x 48 scenes in motion, three minutes on two cores. 90 % of
    # 36 tubes would leave four; plain pixels are learned sooner than textures without colour.
    "tiny": dict(
        data="shapes", frames=8, stride=1, image_size=48, patch_size=8, embed_dims="16,48,96",
        depths="1,1,3", num_heads=4, mask_ratio=0.75, norm_pix_loss=False, decoder_embed_dim=64,
        decoder_depth=2, decoder_num_heads=4, epochs=1, warmup_epochs=0.1, batch_size=16,
        base_lr=2e-2, val_samples=256,
    ),
    # Table 7: MCMAE-B, the paper's; S and L with VideoMAE's decoders.
    "small": dict(embed_dims="128,256,384", num_heads=6, decoder_embed_dim=192,
                  decoder_num_heads=3),
    "base": dict(micro_batch=32),
    "large": dict(embed_dims="384,768,1024", depths="2,2,23", mlp_ratios="8,8,4", num_heads=16,
                  decoder_embed_dim=512, decoder_depth=12, decoder_num_heads=8, micro_batch=16),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, PRESETS, __doc__, argv)
    loading = {"source": clips, "frames": cfg.frames, "stride": cfg.stride, "flip": cfg.flip}
    then = ("downstream.finetune_clips {data} --checkpoint {last}",)
    with engine.Run("videomcmae", cfg, then=then, **loading) as run:
        video = VideoMCMAE(cfg)
        if cfg.init and run.checkpoint is None:
            run.say(f"init        {load_init(video, cfg.init)}")
        model = run.place(video)
        optimizer = torch.optim.AdamW(
            decay_groups(video, cfg.weight_decay), lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True
        )
        for step in run.steps(model, optimizer, evaluate, reconstruct):
            for batch in step.micro_batches():  # rgb (B, T, 3, H, W) uint8, seed (B,)
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(cosine(cfg, step))


if __name__ == "__main__":
    engine.command("videomcmae", main)
