"""What survives pre-training: an encoder that gives features, a pyramid, attention.

Encoder   what plain and hierarchical encoders share; a hierarchical one is its script's own
ViT       plain, with timm's parameter names
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor, nn

from common import IMAGENET_MEAN, IMAGENET_STD, Block, Normalize, PatchEmbed, drop_path, patchify
from common import resize_position, sincos_2d


class Encoder(nn.Module):
    """What plain and hierarchical encoders share: the grid of patches, and drop path.

    Args:
        image_size: (H, W) the position embedding is kept for; any other size works and costs
            computing it anew.
        trained_size: (H, W) that pre-training saw, which positions of any size refer to (see
            `sincos_2d`); None: `image_size`.
        depth: number of blocks, of all stages.
        drop_path: the last block's rate, used when `seed` is given (fine-tuning, BEiT).
    """

    num_prefix = 0  # tokens before the patches
    trained_norm = True  # pre-training's final norm sees what features are taken from
    probe_layer: float | None = None  # where a linear probe reads, of the depth; None: after it

    def __init__(
        self, image_size: Sequence[int], patch_size: int, embed_dim: int, depth: int,
        trained_size: Sequence[int] | None = None, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.depth, self.drop_path = depth, drop_path
        self.grid = tuple(n // patch_size for n in image_size)
        self.trained_grid = tuple(n // patch_size for n in trained_size or image_size)

    @property
    def num_layers(self) -> int:
        """How many outputs `forward_features` can choose from."""
        return self.depth

    def preprocess(
        self, image, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> Tensor:
        """Make an image, of Pillow (turned as EXIF says) or (3, H, W) uint8, or a batch of the
        latter, what `self` takes.

        Its middle, resized bicubically to the size of `grid`, normalised: (B, 3, H, W) float.
        """
        if not isinstance(image, Tensor):
            if image.mode[0] in "IF":  # Pillow would clip them
                raise ValueError(f"Pillow's mode {image.mode}: scale it to 8 bits a channel first")
            image = ImageOps.exif_transpose(image)
            shape, rgb = (*image.size[::-1], 3), bytearray(image.convert("RGB").tobytes())
            image = torch.frombuffer(rgb, dtype=torch.uint8).view(shape).permute(2, 0, 1)
        if image.dtype != torch.uint8 or image.shape[-3:-2] != (3,):
            raise ValueError(f"an image is (3, H, W) uint8, not {[*image.shape]} {image.dtype}")
        x, size = image.reshape(-1, *image.shape[-3:]), [n * self.patch_size for n in self.grid]
        scale = max(new / old for new, old in zip(size, x.shape[2:]))
        whole = [max(round(n * scale), new) for n, new in zip(x.shape[2:], size)]
        x = F.interpolate(x.float(), whole, mode="bicubic", antialias=True).clamp(0, 255)
        top, left = ((a - b) // 2 for a, b in zip(whole, size))
        x = x[..., top : top + size[0], left : left + size[1]]
        return Normalize(mean, std).to(x.device)(x)

    def forward(self, imgs: Tensor) -> Tensor:
        """The last layer's tokens after the norm, prefix first, (B, P + L, D), as timm's."""
        ((tokens, prefix),) = self.forward_features(imgs)
        return torch.cat([prefix, tokens], dim=1)

    def attention(self, imgs: Tensor, layer: int) -> Tensor:
        raise ValueError(f"{type(self).__name__} has no attention matrix over patches")

    def check_layers(self, layers: Sequence[int]) -> None:
        """ValueError where there is none of such a number."""
        n = self.num_layers
        if any(not 1 <= i <= n for i in layers):
            raise ValueError(f"layers {[*layers]}: this encoder has 1 to {n}")

    def grid_of(self, imgs: Tensor) -> tuple[int, int]:
        """Patch grid (h, w) of images; ValueError where a patch does not divide them."""
        if imgs.ndim != 4 or not imgs.is_floating_point():
            wanted = "(B, 3, H, W) float, normalised, as encoder.preprocess makes them"
            raise ValueError(f"images are {wanted}, not {[*imgs.shape]} {imgs.dtype}")
        (H, W), p = imgs.shape[-2:], self.patch_size
        if H % p or W % p:
            raise ValueError(f"image size {H}x{W} is not divisible by the patch size {p}")
        return H // p, W // p

    def drops(self, seed: Tensor | None) -> Sequence:
        """Scales of each block's branches (see `drop_path`), of all `depth` blocks; or None."""
        if seed is None or self.drop_path == 0:
            return [None] * self.depth
        return drop_path(seed, self.depth, self.drop_path)


class ViT(Encoder):
    """Plain vision transformer with timm's parameter names and fixed position embedding.

    kwargs as `Encoder`'s; class_token, reg_tokens: timm's prefix tokens, which have no position.
    """

    def __init__(
        self, image_size: Sequence[int] = (224, 224), patch_size: int = 16, embed_dim: int = 768,
        depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0, class_token: bool = True,
        reg_tokens: int = 0, init_values: float | None = None, **kwargs,
    ):  # fmt: skip
        super().__init__(image_size, patch_size, embed_dim, depth, **kwargs)
        self.strides = (patch_size,) * 4
        self.patch_embed = PatchEmbed(patch_size, 3, embed_dim)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if reg_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim))
        self.num_prefix = int(class_token) + reg_tokens
        self.add_position()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, init_values) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def add_position(self) -> None:
        position = sincos_2d(self.embed_dim, *self.grid, self.trained_grid)
        self.register_buffer("pos_embed", position, persistent=False)  # (L, D)

    def learn_position(self) -> None:
        """Make the position embedding a parameter, (1, L, D) as timm's, which starts as it is."""
        position = self.pos_embed
        del self.pos_embed
        self.pos_embed = nn.Parameter(position[None].clone())

    def position(self, h: int, w: int) -> Tensor:
        """Position embedding of a grid, (h*w, D); a learned one, (1, L, D), is resized."""
        if isinstance(self.pos_embed, nn.Parameter):
            return resize_position(self.pos_embed, self.grid, (h, w))
        if (h, w) == self.grid:
            return self.pos_embed
        return sincos_2d(self.embed_dim, h, w, self.trained_grid).to(self.pos_embed)

    def embed(self, imgs: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to tokens with position, (B, L, D)."""
        h, w = self.grid_of(imgs)
        return self.patch_embed(patchify(imgs, self.patch_size)) + self.position(h, w)

    def add_prefix(self, x: Tensor) -> Tensor:
        """Put the prefix tokens before x: (B, L, D) to (B, P + L, D)."""
        prefix = [getattr(self, n) for n in ("cls_token", "reg_token") if hasattr(self, n)]
        return torch.cat([*(t.expand(len(x), -1, -1) for t in prefix), x], dim=1)

    def tokens(self, imgs: Tensor, seed: Tensor | None = None) -> Tensor:
        """What enters the blocks, (B, P + L, D); `seed` is for blocks that come before."""
        return self.add_prefix(self.embed(imgs))

    def run(
        self, x: Tensor, layers: Sequence[int] = (), seed: Tensor | None = None
    ) -> list[Tensor]:
        """Run the blocks on (B, P + L, D); the outputs after `layers` (1-based), then the last."""
        outputs, scales = {}, self.drops(seed)[-len(self.blocks) :]
        for i, (block, scale) in enumerate(zip(self.blocks, scales), start=1):
            x = block(x, scale)
            if i in layers:
                outputs[i] = x
        return [outputs[i] for i in layers] + [x]

    def forward_features(
        self, imgs: Tensor, layers: Sequence[int] | None = None, seed: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Features of whole images.

        Args:
            imgs: (B, 3, H, W) float, normalised; H and W multiples of the patch size.
            layers: 1-based blocks, outputs before the final norm; None = the last, after it.
            seed: (B,) int64 turns drop path on.
        Returns: for each layer, (tokens (B, L, D), prefix (B, P, D)).
        """
        self.check_layers(layers or ())
        *chosen, x = self.run(self.tokens(imgs, seed), layers or (), seed)
        chosen = [self.norm(x)] if layers is None else chosen
        return [(x[:, self.num_prefix :], x[:, : self.num_prefix]) for x in chosen]

    def forward_pyramid(self, imgs: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """Four maps (B, D, h, w) from a third, a half, two thirds and all of the depth.

        For depth 12 these are blocks 4, 6, 8, 12, the ones that BEiT and MAE give to UperNet.
        """
        layers = [max(1, round(len(self.blocks) * f)) for f in (1 / 3, 1 / 2, 2 / 3, 1)]
        h, w = self.grid_of(imgs)
        features = self.forward_features(imgs, layers, seed)
        return [t[:, : h * w].transpose(1, 2).unflatten(2, (h, w)) for t, _ in features]

    def attention(self, imgs: Tensor, layer: int) -> Tensor:
        """Attention matrices of one block (1-based), (B, heads, P + L, P + L)."""
        self.check_layers([layer])
        x = self.tokens(imgs)
        for block in self.blocks[: layer - 1]:
            x = block(x)
        return self.blocks[layer - 1].attn.weights(self.blocks[layer - 1].norm1(x))

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter for layer-wise decay: 0 embedding, 1.. blocks, last the norm."""
        parts = enumerate([*self.blocks, self.norm], start=1)
        depth = {p: i for i, part in parts for p in part.parameters()}
        return {name: depth.get(p, 0) for name, p in self.named_parameters()}
