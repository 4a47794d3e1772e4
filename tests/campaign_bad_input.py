"""Make every mistake a user can make with cfmae.py, and read what the program says.

    python tests/campaign_bad_input.py [--only WORD] [--jobs 2]

Each row is a command in a process of its own. It must exit with 2, say one message with the words
that the row wants, print no traceback, and leave a folder in which the mended command can run. Data
folders are made on the spot. Prints command, status and message of every row, then a count; exit
status 1 where a row fails. Takes about four seconds a row. (torchrun adds a traceback of its own.)
"""

import argparse
import os
import pickle
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent / "engine"))

import tiny_run
import torch
from PIL import Image
from test_checkpoint import Bomb

KINDS = ("rgb", "instance", "semantic")


def make_data(root: Path, split: str = "train", images: int = 12) -> Path:
    """A folder of 64 x 48 images with maps, in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(images):
        for kind in KINDS:
            folder = root / split / kind / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            if kind == "rgb":
                pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.jpg")
            else:
                ids = rng.integers(0, 9, (48, 64), np.uint8)
                Image.fromarray(ids).save(folder / f"{i:02d}.png")
    return root


def data_rows(at: Path):
    """(name, flags, wanted words) of data folders that cannot work."""

    def spoil(name, change, split="train"):
        root = make_data(at / name)
        if split != "train":
            make_data(root, split)
        change(root / split)
        return ["--data", root]

    def save_map(kind, image, form="png"):
        return lambda root: image.save(root / kind / "class1/05.png", form)

    def labels(value, dtype=np.uint8, size=(48, 64)):
        return Image.fromarray(np.full(size, value, dtype))

    def remove(*files):
        return lambda root: [(root / f).unlink() for f in files]

    def rotate(root):
        image = Image.open(root / "rgb/class1/05.jpg")
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(root / "rgb/class1/05.jpg", exif=exif)

    def cut(pattern):
        return lambda root: [f.write_bytes(f.read_bytes()[:60]) for f in root.glob(pattern)]

    (at / "empty").mkdir(parents=True)
    for kind in KINDS:
        (at / "no-images/train" / kind).mkdir(parents=True)
    (at / "no-images/train/rgb/notes.txt").touch()
    (at / "file").touch()
    rgb_only = make_data(at / "rgb-only")
    for kind in KINDS[1:]:
        (rgb_only / "train" / kind).rename(rgb_only / "train" / f"my-{kind}")
    start = ["--data shapes", "Expected"]
    yield "data missing", ["--data", at / "nothing"], ["no folder", str(at / "nothing"), *start]
    yield "data not given", [], ["data/imagenet", *start]
    yield "data empty", ["--data", at / "empty"], ["no folder", "train", *start]
    yield "data is a file", ["--data", at / "file"], [*start]
    yield "no images", ["--data", at / "no-images"], ["no images", "rgb", *start]
    yield "no map folders", ["--data", rgb_only], ["instance", "semantic", *start]
    gone = remove("semantic/class1/05.png", "semantic/class0/06.png", "instance/class0/06.png")
    yield "images without maps", spoil("a", gone), ["2 of 12", "05", "06"]
    turned = save_map("semantic", labels(1, size=(64, 48)))
    yield "map of other size", spoil("b", turned), ["05.png", "48 x 64", "64 x 48", "EXIF"]
    yield "image turned by EXIF", spoil("c", rotate), ["05", "EXIF"]
    rgb = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
    yield "RGB map", spoil("d", save_map("semantic", rgb)), ["05.png", "RGB"]
    yield "1-bit map", spoil("e", save_map("instance", labels(1).convert("1"))), ["05.png", "1-bit"]
    yield "semantic id 200", spoil("f", save_map("semantic", labels(200))), ["05.png", "200", "133"]
    yield "16-bit id 300", spoil("g", save_map("semantic", labels(300, np.uint16))), ["id 300"]
    yield "JPEG map", spoil("h", save_map("semantic", labels(1), "jpeg")), ["05.png", "PNG"]
    yield "cut map", spoil("i", cut("semantic/class1/05.png")), ["05.png"]
    yield "no readable image", spoil("j", cut("rgb/*/*")), ["can be read"]
    yield "bad map in val", spoil("k", save_map("semantic", rgb), "val"), ["val", "05.png", "RGB"]
    small = ["--data", make_data(at / "small", images=4)]
    yield "fewer images than a batch", small, ["4 samples", "batch of 8"]


NAMED = """
    --batch-size 0; --mask-ratio 0; --mask-ratio 1; --mask-ratio 1.5; --mask-ratio -1; --alpha 1.2;
    --mask-ratio 0.5; --mask-ratio 0.9999; --mask-ratio nan; --alpha 0.4; --embed-dim 30;
    --embed-dim 0;
    --decoder-embed-dim 30; --num-heads 3; --depth 0; --decoder-depth -1; --crop-scale-min 0;
    --semantic-classes 0; --semantic-classes 300; --semantic-classes 3; --lambda-s nan;
    --lambda-s -1; --base-lr nan; --base-lr -1; --min-lr -1; --weight-decay -1; --beta2 1;
    --warmup-epochs -1; --epochs 0; --steps 0; --micro-batch 0; --workers -1; --log-every 0;
    --val-samples 0; --save-minutes -1; --save-epochs -1; --val-epochs -1; --preview-epochs -1;
    --patch-size 0; --image-size -8; --clip-grad 0; --seed -1; --nonsense 3; --epoch 3
    """  # the message repeats them as they stand here

FIELDS = """
    --image-size 70 | 70 is not divisible by --patch-size 8; nearest that work: 64 or 72
    --patch-size 6 --image-size 36 | multiple of 4
    --batch-size 99999 | 20000
    --e1 0.5 | --e1
    --embed-dim 33 | --embed-dim 33 is not divisible by --num-heads 2; nearest that work: 32 or 34
    --granularities R --masking SG-IG-RD | --masking SG-IG-RD | RD
    --epochs | --epochs
    --epochs many | --epochs
    --model huge | --model | 'tiny'
    --precision fp16 | --precision | 'bf16'
    --granularities depth | --granularities | 'R+I+S'
    --order R-R-R | --order | 'S-I-R'
    --masking XX | --masking | 'SG-IG-RD'
    --decoder deep | --decoder | 'cascaded'
    --mix blend | --mix | 'score'
    --device tpu | --device | 'cuda'
    """


def field_rows():
    for flags in NAMED.replace("\n", "").split(";"):
        yield flags.strip(), flags.split(), [flags.strip()]
    for line in FIELDS.strip().splitlines():
        flags, *wanted = (part.strip() for part in line.split("|"))
        yield flags, flags.split(), wanted
    if not torch.cuda.is_available():
        yield "--device cuda", ["--device", "cuda"], ["no CUDA device", "--device cpu"]
    yield "--output under a file", ["--output", "/dev/null/run"], ["cannot create", "/dev/null/run"]


def folder_rows(at: Path):
    """Rows about run folders and checkpoints, most of them a changed copy of a real one."""
    tiny_run.train(at / "real", "--steps", 2)
    real = tiny_run.checkpoint(at / "real")
    model, name = real["model"], "decoder_embed.weight"

    def resumed(row, content, *flags):
        folder = at / row.replace(" ", "-")
        folder.mkdir()
        path = folder / "last.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return row, [*flags, "--resume", "--output", folder]

    def with_model(change):
        return real | {"model": model | change}

    no_optimizer = {k: v for k, v in real.items() if k != "optimizer"}
    raw = (at / "real/last.pt").read_bytes()
    less = {k: v for k, v in model.items() if k != name}
    bad_optimizer = {**real["optimizer"], "param_groups": real["optimizer"]["param_groups"][:1]}
    bad_state = {**real["optimizer"], "state": {0: {"exp_avg": torch.zeros(3)}}}
    for row, wanted in (
        (resumed("other method", real | {"method": "mcmae"}), ["mcmae", "cfmae"]),
        (resumed("other format", real | {"format": 99}), ["99"]),
        (resumed("other preset", real, "--model", "small"), ["--model was tiny, is small"]),
        (resumed("other fields", real, "--alpha", "0.6"), ["--alpha was 0.75, is 0.6"]),
        (resumed("missing key", real | {"model": less}), ["missing " + name, "nothing was loaded"]),
        (resumed("unexpected key", with_model({"x": torch.ones(1)})), ["unexpected x"]),
        (resumed("other shape", with_model({name: torch.ones(2)})), [name, "shape (2,)"]),
        (resumed("not a tensor", with_model({name: "x"})), [name]),
        (resumed("no optimizer", no_optimizer), ["not a checkpoint"]),
        (resumed("cut optimizer", real | {"optimizer": bad_optimizer}), ["optimizer"]),
        (resumed("odd optimizer", real | {"optimizer": bad_state}), ["optimizer"]),
        (resumed("pickle bomb", pickle.dumps(real | {"config": Bomb(at / "BOOM")})), ["safely"]),
        (resumed("zip bomb", real | {"config": Bomb(at / "BOOM")}), ["safely"]),
        (resumed("random bytes", np.random.default_rng(0).bytes(5000)), ["cannot be read safely"]),
        (resumed("empty file", b""), ["cannot be read safely"]),
        (resumed("cut file", raw[: len(raw) // 2]), ["cannot be read safely"]),
        (("--resume without --output", ["--resume", "--output", ""]), ["--resume needs --output"]),
        (("folder with a run", ["--output", at / "real"]), ["holds a run", "--resume"]),
    ):
        yield *row, wanted
    yield "3 ranks, batch", [], ["--batch-size 8 is not divisible by the 3 ranks", "6 or 9"]

    # A map that breaks after the check: rank 1 meets it, all must stop and one must say why.
    whole = make_data(at / "whole")
    flags = ["--data", whole, "--crop-scale-min", "0.5"]
    for row in ("map breaks later", "map breaks later, workers", "2 ranks, map breaks later"):
        out = at / row.replace(" ", "-")
        tiny_run.train(out, "--steps", 2, *flags)
        workers = ["--workers", "2" if "workers" in row else "0"]
        yield row, [*flags, *workers, "--resume", "--output", out], ["05.png"]
    (whole / "train/semantic/class1/05.png").write_bytes(b"")


def judge(at: Path, number: int, row: tuple) -> tuple[str, str | None]:
    """Run a row; what to print and what is wrong with it."""
    name, flags, wanted = row
    out = at / f"out-{number}"
    base = tiny_run.FLAGS if "--data" in flags or name != "data not given" else tiny_run.FLAGS[4:]
    ranks = name[0] if "ranks" in name else None
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    program = [*(launcher if ranks else []), tiny_run.ROOT / "cfmae.py"]
    flags = [*flags, *([] if "--output" in flags else ["--output", out])]
    command = [*map(str, [sys.executable, *program, *base, "--steps", 4, *flags])]
    before = sorted((at / "folders/real").glob("*"))
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=at)
    said = re.split(r"^W?\d{4} |^[WE]\d{4} |^Traceback", run.stderr, flags=re.M)[0].strip()
    problems = [f"no {w!r}" for w in wanted if w not in said]
    if run.returncode != (1 if ranks else 2):  # torchrun has a status and a traceback of its own
        problems += [f"status {run.returncode}"]
    problems += ["traceback"] * ("Traceback" in run.stderr + run.stdout and not ranks)
    problems += [] if len(re.findall("cfmae: error: ", run.stderr)) == 1 else ["not one message"]
    problems += ["the folder is blocked"] * any((out / n).exists() for n in tiny_run.RUN_FILES)
    problems += ["the run was touched"] * (before != sorted((at / "folders/real").glob("*")))
    problems += ["EXECUTED"] * (at / "folders/BOOM").exists()
    shown = f"[{name}] {' '.join(map(str, flags))}\n  status {run.returncode}: {said[-1500:]}"
    return shown, ", ".join(problems) or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the rows with this in their name")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    at = Path(tempfile.mkdtemp(prefix="campaign-bad-input-"))
    rows = [*data_rows(at / "data"), *field_rows(), *folder_rows(at / "folders")]
    rows = [row for row in rows if args.only in row[0]]
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for shown, problem in pool.map(lambda x: judge(at, *x), enumerate(rows)):
            failed += problem is not None
            print(shown + (f"\n  FAILED: {problem}" if problem else ""), flush=True)
    print(f"{len(rows)} rows, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
