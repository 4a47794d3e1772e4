"""ADE20K's and VOC's own folders laid out as ours: links to images, maps with our ids.

python -m downstream.segment prepare-ade SRC DST
python -m downstream.segment prepare-voc SRC DST
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine  # before torch: it sets how threads wait

import numpy as np
from PIL import Image

from data import UserError, decode_map


def link(source: Path, target: Path) -> None:
    if not source.is_file():
        raise UserError(f"{source} is missing")
    if not target.is_symlink():
        os.symlink(source.resolve(), target)


def read_map(path: Path) -> np.ndarray:
    """Ids (H, W) of a label map; UserError where it cannot be read."""
    try:
        return decode_map(np.fromfile(path, np.uint8))
    except Exception as error:  # Pillow raises anything on broken files
        raise UserError(f"{path}: {str(error) or type(error).__name__}") from None


def folders(dst: Path) -> dict[str, tuple[Path, Path]]:
    """Create DST/{train,val}/{rgb,semantic}; {split: (rgb, semantic)}."""
    made = {s: (dst / s / "rgb", dst / s / "semantic") for s in ("train", "val")}
    for folder in (f for pair in made.values() for f in pair):
        folder.mkdir(parents=True, exist_ok=True)
    return made


def prepare_ade(argv: list[str]) -> int:
    """Lay out ADEChallengeData2016: link images; in maps 0 (other) becomes 255, others one less."""
    src, dst = arguments(argv, "prepare-ade", prepare_ade.__doc__, "images/training")
    for split, (rgb, semantic) in folders(dst).items():
        part = {"train": "training", "val": "validation"}[split]
        images = sorted((src / "images" / part).glob("*.jpg"))

        def one(image: Path, part=part, rgb=rgb, semantic=semantic) -> None:
            name = f"{image.stem}.png"
            ids = read_map(src / "annotations" / part / name)
            Image.fromarray(ids.astype(np.uint8) - np.uint8(1)).save(semantic / name)
            link(image, rgb / image.name)

        with ThreadPoolExecutor() as pool:
            list(pool.map(one, images))
        print(f"{split}: {len(images)} images")
    if (table := src / "objectInfo150.txt").is_file():  # the last column; its first line is a head
        rows = table.read_text().splitlines()[1:]
        (dst / "classes.txt").write_text("".join(r.split("\t")[-1].strip() + "\n" for r in rows))
    return 0


VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


def prepare_voc(argv: list[str]) -> int:
    """Lay out VOCdevkit/VOC2012 by links: its palette maps, with 255 as border, fit as they are.

    SemanticMIM's probe is trained on the larger set of 10,582 images: put its list, trainaug.txt,
    and its maps, SegmentationClassAug, beside VOC's own 1,464, which are taken otherwise.
    """
    src, dst = arguments(argv, "prepare-voc", prepare_voc.__doc__, "ImageSets/Segmentation")
    for split, (rgb, semantic) in folders(dst).items():
        lists, maps = src / "ImageSets" / "Segmentation", "SegmentationClass"
        if split == "train" and (lists / "trainaug.txt").is_file():
            split, maps = "trainaug", "SegmentationClassAug"
        names = (lists / f"{split}.txt").read_text().split()
        for name in names:
            own = (src / maps / f"{name}.png").is_file()  # else VOC's
            png = src / (maps if own else "SegmentationClass") / f"{name}.png"
            link(src / "JPEGImages" / f"{name}.jpg", rgb / f"{name}.jpg")
            link(png, semantic / f"{name}.png")
        print(f"{split}: {len(names)} images")
        if split == "train":
            print(f"  VOC's own: there is no {lists}/trainaug.txt, SemanticMIM's training set")
    (dst / "classes.txt").write_text("\n".join(VOC) + "\n")
    return 0


def arguments(argv: list[str], name: str, doc: str, must_have: str) -> tuple[Path, Path]:
    parser = engine.Parser(prog=f"downstream.segment {name}", description=doc)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    args = parser.parse_args(argv)
    if not (args.src / must_have).is_dir():
        raise UserError(f"there is no folder {args.src / must_have}")
    return args.src, args.dst
