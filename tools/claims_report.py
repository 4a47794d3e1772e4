"""What the runs of tools/claims.py say: values, verdicts, tables, a picture."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import engine  # noqa: F401 - before torch: it sets how threads wait

from engine import UserError
from tools.charts import matplotlib
from tools.claims_table import Arm, Claim

LIMIT = 2.0  # standard errors of a difference that count
SEEDS = 3  # of each arm, below which nothing is judged
BEGIN, END = "<!-- tools.claims begins -->", "<!-- tools.claims ends -->"


class Measure(NamedTuple):
    program: str  # key of claims.PROGRAMS; "": pre-training's own log
    words: str
    lower: bool = False  # is better
    digits: int = 1


MEASURES = {
    "linear": Measure("linear", "linear probe, top-1 %"),
    "linear CLS": Measure("linear", "linear probe on class or proxy tokens, top-1 %"),
    "linear patch": Measure("linear", "linear probe on patch tokens, top-1 %"),
    "knn": Measure("knn", "20 nearest neighbours, top-1 %"),
    "finetuned": Measure("finetuned", "fine-tuned, top-1 %"),
    "segmentation": Measure("segmentation", "linear segmentation, mIoU %"),
    "loss": Measure("", "pre-training loss on val", True, 4),
}


def found(program: str, result: dict) -> dict[str, float]:
    """The measures in a result.json; of a probe the best feature and rate, all alike."""
    if program == "segmentation":
        return {"segmentation": 100 * result["mIoU"]}
    if program == "finetuned":
        return {"finetuned": result["top1"]}
    tops = {}
    for row in result["sweep"]:
        kind = row["features"].partition("/")[2]
        for name in (program, {"prefix": f"{program} CLS", "patch": f"{program} patch"}.get(kind)):
            if name:
                tops[name] = max(tops.get(name, 0.0), row["top1"])
    return tops


def logged(out: Path) -> dict[str, float]:
    """The last evaluation of a pre-training, beside the guesses that it is compared with."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {k: round(v, 5) for k, v in [x for x in lines if "val" in x][-1]["val"].items()}


def values(rows: Sequence[dict], arm: str, measure: str) -> list[float]:
    return [r["values"][measure] for r in rows if r["arm"] == arm and measure in r["values"]]


def judge(a: Sequence[float], b: Sequence[float], lower: bool = False) -> dict:
    """Whether `a` is better than `b`: difference of means, its standard error, a verdict.

    The error is of two independent samples, sqrt(s_a^2 / n_a + s_b^2 / n_b). A positive difference
    is in favour of `a`.
    """
    if min(len(a), len(b)) < SEEDS:
        return {"difference": None, "se": None, "verdict": "unfinished"}
    difference = (statistics.fmean(a) - statistics.fmean(b)) * (-1 if lower else 1)
    se = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    beyond = abs(difference) > LIMIT * se
    verdict = ("seen" if difference > 0 else "opposite") if beyond else "not seen"
    return {"difference": round(difference, 4), "se": round(se, 4), "verdict": verdict}


def verdicts(claim: Claim, rows: Sequence[dict]) -> list[dict]:
    """A verdict for each pair of arms that the claim compares, and each measure of both."""
    table = []
    for better, worse in claim.better:
        for m in claim.measures:
            if m == "loss" and (better, worse) in claim.unlike:
                continue
            a, b = values(rows, better, m), values(rows, worse, m)
            pair = {"better": better, "worse": worse, "measure": m}
            table.append(pair | judge(a, b, MEASURES[m].lower))
    return table


def read_results(folder: Path) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"no results in {folder}: run python -m tools.claims NAME first")
    return found


def reached(m: Measure, x: Sequence[float]) -> str:
    """A measure's mean, and the standard error of it where there are two values or more."""
    error = f" ± {statistics.stdev(x) / math.sqrt(len(x)):.{m.digits}f}" if len(x) > 1 else ""
    return f"{m.words.partition(',')[0]} {statistics.fmean(x):.{m.digits}f}{error}"


def tables(results: Sequence[dict]) -> str:
    """Markdown: verdicts of what was begun; what every arm reached; what it cost and where."""
    lines = [
        "| claim | better | than | by | difference ± SE | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for x in results:
        words = f"{x['source']}: {x['sentence']} ([{x['claim']}](results/{x['claim']}.json))"
        begun = {k for r in x["runs"] for k in r["values"]}
        for v in (v for v in x["verdicts"] if v["measure"] in begun):
            m, shown = MEASURES[v["measure"]], ""
            if v["se"] is not None:
                shown = f"{v['difference']:+.{m.digits}f} ± {v['se']:.{m.digits}f}"
            cells = words, v["better"], v["worse"], m.words, shown, f"**{v['verdict']}**"
            lines.append(f"| {' | '.join(cells)} |")
            words = ""
    lines += ["", "Means over seeds ± their standard error:", ""]
    lines += ["| claim | arm | seeds | CPU s a seed | reached, in the units above |"]
    lines += ["|---|---|---|---|---|"]
    for x in results:
        for arm in x["arms"]:
            of = {m: values(x["runs"], arm, m) for m in x["measures"]}
            means = "; ".join(reached(MEASURES[m], v) for m, v in of.items() if v)
            rows = [r["commands"].values() for r in x["runs"] if r["arm"] == arm]
            cost = sum(c["cpu_seconds"] for row in rows for c in row) / max(1, len(rows))
            cells = x["claim"], arm, str(len(rows)), f"{cost:.0f}", means
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Budgets and costs:", "", *costs(results)])


def costs(results: Sequence[dict]) -> list[str]:
    """A line a claim: data, epochs, cost, machine, revision."""
    lines = ["| claim | data | epochs | fine-tuned | CPU hours | on | revision |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for x in results:
        records = [c for r in x["runs"] for c in r["commands"].values()]
        hours = sum(c["cpu_seconds"] for c in records) / 3600
        on = ", ".join(sorted({f"{c['hardware']}, {c['threads']} thread" for c in records}))
        at = ", ".join(sorted({c["revision"] for c in records}))
        longer = "; ".join(f"{k}: {n}" for k, n in x["budget"]["epochs_of"].items())
        epochs = f"{x['budget']['epochs']}" + f" ({longer})" * bool(longer)
        some = any("finetuned" in r["values"] for r in x["runs"])
        tuned = str(x["budget"]["tuned"]) if some else "not run" * ("finetuned" in x["measures"])
        cells = x["claim"], x["data"], epochs, tuned, f"{hours:.2f}", on, at
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_page(path: Path, results: Sequence[dict]) -> None:
    """Put the tables between the two marks of a page."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise UserError(f"{path} lacks the lines {BEGIN} and {END}, between which the tables go")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}")


def figure(width: float, height: float):
    """A figure of matplotlib's, and its axes; UserError without it."""
    Figure, _ = matplotlib()
    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return made, made.subplots()


def plot(results: Sequence[dict], path: str) -> None:
    """Differences in points with 2 standard errors; right of 0 is as the paper has it."""
    rows = [(x["claim"], v) for x in results for v in x["verdicts"]]
    rows = [(name, v) for name, v in rows if v["se"] is not None and v["measure"] != "loss"]
    if not rows:
        raise UserError(f"nothing has {SEEDS} seeds of each arm so far")
    colours = {"seen": "#009e73", "not seen": "#000000", "opposite": "#d55e00"}
    whole, axes = figure(9, 0.8 + 0.19 * len(rows))
    for y, (name, v) in enumerate(rows):
        bar, colour = LIMIT * v["se"], colours[v["verdict"]]
        axes.errorbar(v["difference"], y, xerr=bar, fmt="o", color=colour, capsize=2, markersize=4)
        if y and rows[y - 1][0] != name:
            axes.axhline(y - 0.5, color="#dddddd", linewidth=0.8)  # between claims
    axes.axvline(0, color="#bbbbbb")
    words = [f"{name}: {v['better']} > {v['worse']}, {v['measure']}" for name, v in rows]
    axes.set_yticks(range(len(rows)), words, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axes.set_xlabel("difference in points, with 2 standard errors")
    whole.savefig(path)
    print(f"picture     {path}")


def curves(result: dict, measure: str) -> dict[str, list[tuple[int, float, float]]]:
    """What arms reach that differ in epochs alone: by command (epochs, mean, standard error)."""
    lines: dict[str, list] = {}
    for label, fields in result["arms"].items():
        arm, x = Arm(**fields), values(result["runs"], label, measure)
        if len(x) >= SEEDS and not arm.random and not arm.as_long_as:
            point = statistics.fmean(x), statistics.stdev(x) / math.sqrt(len(x))
            lines.setdefault(arm.train, []).append((arm.part(result["budget"]["epochs"]), *point))
    return {k: sorted(line) for k, line in lines.items() if len({n for n, *_ in line}) > 1}


def plot_curves(results: Sequence[dict], path: str) -> None:
    """Of each claim whose arms differ in epochs its curves, with 2 standard errors as a band."""
    for x in results:
        for measure in x["measures"]:
            if not (lines := curves(x, measure)):
                continue
            whole, axes = figure(6, 3.6)
            for name, line in lines.items():
                epochs, mean, se = zip(*line)
                axes.plot(epochs, mean, marker="o", markersize=4, label=name)
                low, high = ([m + k * LIMIT * s for m, s in zip(mean, se)] for k in (-1, 1))
                axes.fill_between(epochs, low, high, alpha=0.2)
            ticks = sorted({n for line in lines.values() for n, *_ in line})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.set_xlabel(f"epochs of pre-training, {x['data']}")
            axes.set_ylabel(MEASURES[measure].words)
            axes.legend()
            place = Path(path).with_name(f"{Path(path).stem}-{x['claim']}-{measure}.png")
            whole.savefig(place)
            print(f"picture     {place}")
