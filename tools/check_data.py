"""Look over a folder of images and maps: list its splits and decode every file.

python -m tools.check_data ROOT [--semantic-classes 133] [--list]
"""

import argparse
import sys
from collections.abc import Sequence

from data import FolderDataset, UserError, check
from files import layout


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 where maps do not fit their images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="the folder that holds train/ and val/")
    parser.add_argument("--semantic-classes", type=int, default=133, help="how many (default 133)")
    parser.add_argument("--list", action="store_true", help="list the splits, decode nothing")
    args = parser.parse_args(argv)
    try:
        for split in [s for s in ("train", "val") if layout(args.root, s)] or ["train"]:
            found = tuple(layout(args.root, split)) or ("rgb",)
            options = {"granularities": found, "semantic_classes": args.semantic_classes}
            dataset = FolderDataset(args.root, split, None, **options)
            kinds, classes = ", ".join(dataset.files.folders), len(dataset.classes)
            print(f"{split}: {len(dataset)} images, {classes} class folders, {kinds}")
            if not args.list:
                print(f"{split}: {check(dataset, None)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
