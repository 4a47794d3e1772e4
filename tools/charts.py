"""Charts for tools/visualize.py: curves of logs, results over a setting of pre-training.

matplotlib draws them, which is optional: pip install matplotlib
"""

import argparse
import csv
import io
import json
import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import engine  # before torch: it sets how threads wait

from PIL import Image

from downstream.encoders import open_encoder
from engine import UserError, writing
from tools.figures import save

CURVES = Path(__file__).parents[1] / "docs" / "curves"  # METHOD.jsonl: see docs/curves.md
# Okabe and Ito's colours, which the colour-blind can tell apart; black last
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


@dataclass
class Series:
    """Points of a chart: numbers x and y of equal length, a line or dots, a place in COLOURS."""

    label: str  # "": not in the legend
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dots: bool = False


def matplotlib() -> tuple[type, type]:
    """Its Figure and MaxNLocator; UserError where it is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("charts need matplotlib: pip install matplotlib") from None
    return Figure, MaxNLocator


def chart(
    path: str | Path, caption: str, panels: Sequence[tuple[str, str, Sequence[Series]]],
    columns: int = 1, size: tuple[int, int] = (560, 280), palette: bool = False,
) -> None:  # fmt: skip
    """Write line charts as PNG.

    Args:
        panels: (title, name of the x axis, series) of each; points that are not finite are left
            out. y starts at 0 where all values are positive and spread over most of the range.
        columns: panels side by side.
        size: of a panel, in pixels.
    """
    Figure, MaxNLocator = matplotlib()
    columns, dpi = min(columns, len(panels)), 100
    (W, H), count = size, math.ceil(len(panels) / columns)
    caption = textwrap.fill(caption, W * columns // 6)
    top = 12 * (caption.count("\n") + 1) + 8
    figure = Figure((W * columns / dpi, (H * count + top) / dpi), dpi, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, H * count / (H * count + top)))
    figure.text(4 / (W * columns), 1 - 4 / (H * count + top), caption, va="top", size=7)
    for n, (title, axis, series) in enumerate(panels):
        axes = figure.add_subplot(count, columns, n + 1)
        for s in series:
            how = "o" if s.dots or len(s.x) == 1 else "-"
            label, colour = textwrap.fill(s.label, 40), COLOURS[s.colour % len(COLOURS)]
            axes.plot(s.x, s.y, how, c=colour, ms=3, lw=1.5, label=label or "_")
        low, high = axes.get_ylim()
        if 0 <= min((y for s in series for y in s.y if math.isfinite(y)), default=0) < 0.5 * high:
            axes.set_ylim(bottom=0)
        if all(x == int(x) for s in series for x in s.x if math.isfinite(x)):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, loc="left", size=8)
        axes.set_xlabel(axis, size=8)
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", c="#dddddd")
        axes.set_axisbelow(True)
        if any(s.label for s in series):
            axes.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png)
    save(Image.open(png).convert("RGB"), path, palette)


# ------------------------------------------------------------------------------------------- logs


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log.jsonl that belong to steps; a torn last line is left out."""
    try:
        lines = [x for x in path.read_text().splitlines() if x.endswith("}")]
        records = [json.loads(x) for x in lines]
    except OSError as e:
        raise UserError(f"cannot read the log {path}: {e.strerror}") from None
    except ValueError:  # not UTF-8, or no JSON
        records = []
    records = [r for r in records if isinstance(r, dict) and "step" in r]
    if not records:
        raise UserError(f"{path} holds no lines of a run's log; wanted a run's folder or log.jsonl")
    return records


def write_csv(path: str, names: dict[Path, str]) -> None:
    """Logs as one table: a row a line of a log, `val/` before what is of the val split."""
    rows = []
    for log, name in names.items():
        for r in read_log(log):
            val = {f"val/{k}": v for k, v in r.pop("val", {}).items()}
            rows.append({"run": name, **r, **val})
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "w", newline="") as f:
        table = csv.DictWriter(f, dict.fromkeys(k for row in rows for k in row))
        table.writeheader()
        table.writerows(rows)


def log(args: argparse.Namespace) -> None:
    """A panel a term: the runs', and with --healthy a kept one's of the method's README command.

    As a table where --output ends with .csv.
    """
    panels: dict[str, list[Series]] = {}
    logs = [Path(run, "log.jsonl") if Path(run).is_dir() else Path(run) for run in args.runs]
    names = {p: p.parent.name if p.name == "log.jsonl" else p.stem for p in logs}
    if args.healthy:
        names[kept := CURVES / f"{args.healthy}.jsonl"] = f"healthy {args.healthy}"
        if not kept.is_file():
            known = ", ".join(sorted(p.stem for p in CURVES.glob("*.jsonl")))
            raise UserError(f"--healthy {args.healthy}: {CURVES} has {known or 'no curves'}")
    if args.output.endswith(".csv"):
        return write_csv(args.output, names)
    for n, (path, name) in enumerate(names.items()):
        points: dict[tuple[str, bool], list] = {}
        for r in read_log(path):
            for term, value in {**r, **r.get("val", {})}.items():
                if isinstance(value, (int, float)) and term not in ("step", "epoch"):
                    points.setdefault((term, "val" in r), []).append((r["step"], value))
        for (term, val), xy in points.items():
            if args.keys and term not in args.keys.split(","):
                continue
            named = len(names) > 1 and not args.apart and (not val or (term, False) not in points)
            series = Series(name if named else "", *zip(*xy), n, dots=val)
            panels.setdefault(f"{name}: {term}" if args.apart else term, []).append(series)
    if not panels:
        raise UserError(
            f"--keys {args.keys}: the log has {', '.join(dict.fromkeys(k for k, _ in points))}"
        )
    caption = f"logs of {', '.join(map(str, logs))}"
    caption += f" and docs/curves/{args.healthy}.jsonl" if args.healthy else ""
    caption += "; lines: means over training steps, dots: the val split"
    charts = [(title, "step", series) for title, series in panels.items()]
    chart(args.output, caption, charts, 3, (360, 220), args.palette)


# ---------------------------------------------------------------------------------------- results


def peek(path: str) -> dict:
    """What a checkpoint says of itself, tensors not yet read: {} where it is none of ours."""
    try:
        found = engine.read(path, mapped=True)
        return {k: found[k] for k in ("method", "step", "config")}
    except Exception:  # whoever reads the file whole says what is wrong with it
        return {}


def read_result(path: Path) -> dict:
    """A result.json with what its checkpoint says: {"method", "step", "config"} added to it."""
    try:
        facts = json.loads(path.read_text())
        found = [facts.get(k) for k in ("checkpoint", "source", "init")]
    except OSError as e:
        raise UserError(f"cannot read the result {path}: {e.strerror}") from None
    except (ValueError, AttributeError):
        raise UserError(f"{path} is no result.json of finetune, probe or segment") from None
    source = next((x for x in found if x), None)
    if source is None or not Path(source).is_file():
        raise UserError(
            f"{path}: its encoder's file, {source}, is not here (paths start in the "
            "folder where the command ran), and only that has the settings"
        )
    about = peek(source)
    config = about.get("config", {})
    if epoch := re.fullmatch(r"epoch-(\d+)\.pt", Path(source).name):  # a snapshot
        config = {**config, "epochs": int(epoch[1])}
    return {
        **facts,
        "of": source,
        "ours": bool(about),
        "config": config,
        "method": about.get("method", Path(source).stem),
        "step": about.get("step"),
    }


def setting(facts: dict, name: str, path: Path) -> object:
    """The value of a setting: of pre-training if it has it, else of the transfer itself."""
    if name == "parameters":  # M, of the encoder
        encoder = open_encoder(**{"checkpoint" if facts["ours"] else "init": facts["of"]},
                               random=True)[0]  # fmt: skip
        return sum(p.numel() for p in encoder.parameters()) / 1e6
    value = facts["config"].get(name, facts.get(name))
    if value is None:
        known = ", ".join(sorted({*facts["config"], "parameters", "step"}))
        raise UserError(f"{path}: {facts['of']} has no {name}, but {known}")
    return value


def results(args: argparse.Namespace) -> None:
    """A panel a protocol, a line a method through the means, a dot a result."""
    panels: dict[tuple[str, str], dict[str, list]] = {}
    paths = [Path(f, "result.json") if Path(f).is_dir() else Path(f) for f in args.files]
    for path in paths:
        facts = read_result(path)
        x = setting(facts, args.x, path)
        metric = args.metric or ("mIoU" if "mIoU" in facts else "top1")
        if any(not isinstance(v, (int, float)) for v in (x, facts.get(metric))):
            had = ", ".join(k for k, v in facts.items() if isinstance(v, float))
            raise UserError(f"{path}: {args.x} {x!r} and {metric} {facts.get(metric)!r} are not "
                            f"both numbers; --metric is one of {had}")  # fmt: skip
        label = facts["method"] + ", fresh weights" * bool(facts.get("random"))
        for name in filter(None, (args.by or "").split(",")):
            label += f", {name} {setting(facts, name, path)}"
        lines = panels.setdefault((str(facts.get("protocol", "")), metric), {})
        lines.setdefault(label, []).append((x, facts[metric]))
    colours = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    charts = []
    for (protocol, metric), lines in panels.items():
        series = []
        for label, points in lines.items():
            colour, xs = colours.index(label), sorted({x for x, _ in points})
            means = [statistics.mean(y for at, y in points if at == x) for x in xs]
            series += [Series("", *zip(*points), colour, dots=True)]
            series += [Series(label, xs, means, colour)]
        unit = {"top1": "top-1, %", "top5": "top-5, %"}.get(metric, metric)
        axis = "parameters of the encoder, M" if args.x == "parameters" else args.x
        charts.append((f"{protocol}: {unit}", axis, series))
    caption = f"{len(paths)} results over {args.x} of pre-training; dots are results, lines go "
    chart(args.output, caption + "through their means", charts, 2, (420, 300), args.palette)
