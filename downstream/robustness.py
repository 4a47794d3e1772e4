"""Robustness of a fine-tuned classifier (CFMAE Table 4): ImageNet-A, -R, -Sketch, -C and the score.

    python -m downstream.robustness --finetuned runs/.../last.pt --output runs/robust \\
        --imagenet-a DIR --imagenet-r DIR --imagenet-sketch DIR --imagenet-c DIR
    torchrun --nproc_per_node=8 -m downstream.robustness --finetuned ... (the same on 8 GPUs)
    python -m downstream.robustness --init mae_finetuned_vit_base.pth --data data/imagenet ...

Any subset of the four will do; the score needs all. Folders are as published:

    -A, -R     DIR/<class>/NAME: some of the model's classes; logits of the others are left out
    -Sketch    DIR/<class>/NAME: all of them
    -C         DIR/<corruption>/<severity>/<class>/NAME, all classes; the distribution's groups
               (noise, blur, weather, digital) between DIR and <corruption> may be there or not.
               Its files are centre crops already and are taken whole

Class folders have the names the model was fine-tuned with; a public file has none, so --data says
them, by its class folders. A folder of --output with a result in it is left alone.

mCE (arXiv 1903.12261) is the mean over corruptions of the model's error over a baseline's, errors
averaged over the five severities. The baseline is AlexNet's, as published, or --baseline FILE: JSON
{"corruption": error} or CSV lines `corruption,error`, errors as fractions averaged over severities.

Map: `mean_corruption_error`, `score`     the arithmetic
     `test_folder`                        one test set
     `main`                               counts, robustness.json and robustness.csv
"""

import argparse
import csv
import json
from pathlib import Path

import engine  # before torch: it sets how threads wait

import data
from downstream.evaluate import model_flags, open_model
from downstream.classifier import Classifier
from downstream.scores import count_hits, match_classes, shares
from engine import UserError
from engine.ranks import World

# AlexNet's errors on ImageNet-C, over the five severities (the published table behind mCE).
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = ("1", "2", "3", "4", "5")
SETS = {"imagenet_a": True, "imagenet_r": True, "imagenet_sketch": False}  # restricted?
ALL = (*SETS, "imagenet_c")
PUBLISHED = {"imagenet_a": 200, "imagenet_r": 200}  # classes


def mean_corruption_error(errors: dict[str, float], baseline: dict[str, float]) -> float:
    """mCE in per cent: the mean of error / baseline's error over the baseline's corruptions.

    Args:
        errors, baseline: error of each corruption, a fraction averaged over severities. More in
            `errors` than in `baseline` (ImageNet-C's extra corruptions) does not count.
    """
    return 100 * sum(errors[name] / baseline[name] for name in baseline) / len(baseline)


def score(imagenet_a: float, imagenet_r: float, imagenet_sketch: float, mce: float) -> float:
    """CFMAE Table 4's score: the mean of three top-1 accuracies and 100 - mCE, all in per cent."""
    return (imagenet_a + imagenet_r + imagenet_sketch + 100 - mce) / 4


def read_baseline(path: str | None) -> dict[str, float]:
    """Errors by corruption from a JSON or CSV file; None: AlexNet's. UserError on other files."""
    if path is None:
        return ALEXNET
    try:
        text = Path(path).read_text()
        rows = json.loads(text) if path.endswith(".json") else dict(csv.reader(text.splitlines()))
        found = {name: float(x) for name, x in rows.items() if name != "corruption"}
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"--baseline {path}: {e}; JSON or CSV of corruption, error") from None
    wrong = [f"{name} {x}" for name, x in found.items() if not 0 < x <= 1]
    if wrong or not found:
        raise UserError(f"--baseline {path}: errors are fractions in (0, 1]; found {wrong[:3]}")
    return found


def scan(path: Path) -> data.FileList:
    """List DIR/<class>/NAME; UserError where it is no folder, or images lie elsewhere in it."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    files = data.scan(str(path.parent), path.name)
    if (files.labels < 0).any():
        raise UserError(f"{path}: images must lie in class folders, {path}/<class>/NAME")
    return files


def test_folder(
    model: Classifier, path: Path, world: World, restrict: bool, crop_pct: float
) -> dict:
    """Top-1 and top-5 over a folder, with how many of the model's classes it has.

    Args:
        restrict: whether it may lack classes, whose logits are then left out.
        crop_pct: the side of the centre crop over the image's.
    """
    cfg, classes = model.cfg, model.classes
    files = world.from_rank_0(lambda: scan(path))
    dataset = data.FolderDataset(  # prepared as a val split
        str(path.parent), path.name, files, cfg.image_size, train=False, crop_pct=crop_pct
    )
    # a folder beside train/ and val/ would count their classes too: keep those that have images
    used = sorted(set(dataset.files.labels.tolist()))
    found = match_classes([dataset.classes[i] for i in used], classes, str(path))
    if not restrict and len(used) < len(classes):
        here = {dataset.classes[i] for i in used}
        lacking = ", ".join([name for name in classes if name not in here][:5])
        raise UserError(f"{path} has {len(used)} of {len(classes)} classes; lacking {lacking}, ...")
    numbers = found.new_zeros(len(dataset.classes)).index_copy(0, found.new_tensor(used), found)
    counts, unreadable = count_hits(
        model, dataset, cfg, world, numbers, found if restrict else None
    )
    return shares(counts) | {"classes": len(used), "unreadable": unreadable}


test_folder.__test__ = False  # no test of pytest's


def corruptions(root: Path) -> dict[str, Path]:
    """Folders of corruptions below `root`, directly or in groups; UserError without severities."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    found = {}
    for depth in ("*/1", "*/*/1"):
        found = found or {p.parent.name: p.parent for p in sorted(root.glob(depth))}
    if not found:
        raise UserError(f"{root}: no <corruption>/<severity>/<class> in it")
    for name, path in found.items():
        if lacking := [s for s in SEVERITIES if not (path / s).is_dir()]:
            raise UserError(f"{path}: {name} lacks severity {', '.join(lacking)}")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = engine.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        prog="robustness",
    )
    parser.add_argument("--data", help="for --init: its class folders name the classes")
    parser.add_argument("--output", required=True, help="folder of the result")
    for name in ALL:
        parser.add_argument(engine.flag(name), help=f"the folder of {name}")
    parser.add_argument(
        "--baseline", help="errors of the baseline, JSON or CSV; default: AlexNet's"
    )
    model_flags(parser)
    args = parser.parse_args(argv)
    if not any(getattr(args, name) for name in ALL):
        raise UserError(f"nothing to test: give one or more of {', '.join(map(engine.flag, ALL))}")
    if bool(args.finetuned) == bool(args.init) or bool(args.init) != bool(args.data):
        raise UserError("which model? --finetuned RUN/last.pt, or --init FILE with --data ROOT")
    if (Path(args.output) / "robustness.json").exists():
        raise UserError(
            f"{args.output}/robustness.json is a finished result; give another --output"
        )
    return args


def write(out: Path, facts: dict, rows: dict[str, dict]) -> None:
    """Write robustness.json and robustness.csv."""
    (out / "robustness.json").write_text(json.dumps(facts | {"sets": rows}, indent=1) + "\n")
    with open(out / "robustness.csv", "w", newline="") as f:
        table = csv.DictWriter(f, ["set", *next(iter(rows.values()))])
        table.writeheader()
        table.writerows({"set": name, **row} for name, row in rows.items())


def main(argv: list[str] | None = None) -> None:
    """Test a fine-tuned model on the folders given."""
    args = parse(argv)
    given = {name: Path(p) for name in ALL if (p := getattr(args, name))}
    out, baseline = Path(args.output), read_baseline(args.baseline)
    world = World(args.device, args.precision)
    model, rows = open_model(args, world), {}
    if len(model.cfg.names) > 1:
        raise UserError(f"{args.finetuned} reads label maps, which these data sets have not")
    found = corruptions(given["imagenet_c"]) if "imagenet_c" in given else {}
    if found and (lacking := [name for name in baseline if name not in found]):
        raise UserError(f"mCE needs every corruption of the baseline; lacking {', '.join(lacking)}")
    out.mkdir(parents=True, exist_ok=True)

    def test(name: str, path: Path, restrict: bool, crop_pct: float) -> float:
        rows[name] = row = test_folder(model, path, world, restrict, crop_pct)
        if world.rank == 0:
            shown = (f"{k} {v:.5g}" for k, v in row.items())
            print("  ".join([f"{name:<28}", *shown]), flush=True)
            if row["classes"] < PUBLISHED.get(name, 0):
                print(
                    f"{name} has {row['classes']} class folders, the published set "
                    f"{PUBLISHED[name]}: this is not its figure",
                    flush=True,
                )
        return row["top1"]

    chosen = [name for name in SETS if name in given]
    result = {n: test(n, given[n], SETS[n], model.cfg.crop_pct) for n in chosen}
    errors = {
        name: sum(100 - test(f"{name}/{s}", path / s, False, 1.0) for s in SEVERITIES) / 500
        for name, path in found.items()
    }
    if errors:
        result["mce"] = mean_corruption_error(errors, baseline)
    if len(result) == len(ALL):
        result["score"] = score(**result)
    if world.rank == 0:
        facts = {"finetuned": args.finetuned, "init": args.init}
        facts |= {"baseline": args.baseline or "AlexNet"}
        write(out, facts | {"result": result, "corruption_errors": errors}, rows)
        print("  ".join(f"{k} {v:.2f}" for k, v in result.items()) + f"; {out}/robustness.json")


if __name__ == "__main__":
    engine.command("robustness", main)
