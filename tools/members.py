"""What a sample becomes in a shard of tools/pack.py: its image, its maps, its class, as bytes."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import data
from data import UserError
from tools import map_files


def encode_map(ids: np.ndarray, granularity: str) -> bytes:
    """A map as palette PNG without row filters, which decodes fastest; its ids stay.

    Instances of a wide map are renumbered in their order, which `data.relabel` cannot tell, if 8
    bits suffice.
    """
    if ids.dtype != np.uint8 and granularity == "instance":
        found = np.unique(ids[(ids != 0) & (ids != 65535)])
        if len(found) > 254:
            return map_files.encode(ids)
        known = (np.searchsorted(found, ids) + 1).astype(np.uint8)
        ids = np.where(ids == 65535, 255, np.where(ids == 0, 0, known))
    return map_files.encode(ids.astype(np.uint8))


def shrink(rgb: Tensor, maps: dict, short_side: int) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Scale an image (3, H, W) uint8 and its maps (H, W) to this shorter side."""
    height, width = rgb.shape[1:]
    share = short_side / min(height, width)
    h, w = round(height * share), round(width * share)
    rgb = rgb[None].contiguous(memory_format=torch.channels_last)
    rgb = F.interpolate(rgb, (h, w), mode="bicubic", antialias=True)[0]
    rows, cols = data.nearest(0, height, h), data.nearest(0, width, w)
    return rgb, {g: ids[rows[:, None], cols] for g, ids in maps.items()}


def suffix_of(name: str, content: bytes) -> str:
    """What an image is called by: its first bytes, then its name."""
    heads = {b"\xff\xd8": "jpg", b"\x89PNG": "png"}
    found = (suffix for head, suffix in heads.items() if content.startswith(head))
    return next(found, name.rpartition(".")[2].lower())


class Members(Dataset):
    """Each sample's members of a shard: [(what follows its key, bytes), ...], or {"error": words}.

    An image that cannot be read or needs no reduction stays as it is, with its maps, so that
    samples keep their numbers; one that cannot even be opened becomes an empty member.
    """

    def __init__(self, dataset: data.FolderDataset, short_side: int, quality: int):
        self.dataset, self.short_side, self.quality = dataset, short_side, quality
        if short_side:
            import torchvision.io  # noqa: F401 - here, and not in each process that decodes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[tuple[str, bytes]] | dict:
        try:
            members, label = self.images(index), int(self.dataset.files.labels[index])
        except UserError as error:
            return {"error": str(error)}
        return members + ([("cls", b"%d" % label)] if label >= 0 else [])

    def images(self, index: int) -> list[tuple[str, bytes]]:
        if self.short_side:
            try:
                rgb, maps = self.dataset.load(index)
                if min(rgb.shape[1:]) > self.short_side:
                    return self.encode(*shrink(rgb, maps, self.short_side))
            except data.Unreadable:
                pass
        return [self.as_it_is(g, index) for g in self.dataset.files.folders]

    def encode(self, rgb: Tensor, maps: dict[str, np.ndarray]) -> list[tuple[str, bytes]]:
        image = Image.fromarray(rgb.permute(1, 2, 0).numpy())
        image.save(file := io.BytesIO(), "JPEG", quality=self.quality)
        return [("jpg", file.getvalue())] + [
            (f"{g}.png", encode_map(ids, g)) for g, ids in maps.items()
        ]

    def as_it_is(self, granularity: str, index: int) -> tuple[str, bytes]:
        files, root = self.dataset.files, self.dataset.root
        try:
            content = files.read(root, granularity, index).tobytes()
        except OSError as error:
            if granularity != "rgb":
                where = files.where(root, granularity, index)
                raise UserError(f"{where}: {error.strerror}") from None
            content = b""
        if granularity != "rgb":
            return f"{granularity}.png", content
        return suffix_of(files.name(index), content), content
