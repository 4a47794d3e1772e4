"""The papers' claims, tried small: run what a claim needs, keep every number, judge.

    python -m tools.claims --list                      # what there is, and what it would cost here
    python -m tools.claims scratch-mae mcmae-parts     # run; again: goes on where it was
    python -m tools.claims scratch-mae --epochs 5 --tuned 5      # a smaller budget
    python -m tools.claims --write       # tables of docs/results.md from docs/results/
    python -m tools.claims --plot docs/results.png         # as pictures (matplotlib), curves beside

A claim (claims_table.py) is a sentence of a paper, arms that differ in one switch, measures, seeds
and a budget. Its runs are the project's own commands in processes of their own; the numbers, each
with arm, seed, command, cost and machine, go to docs/results/NAME.json as they come, and what is
there is skipped. A run that was killed is continued from its checkpoint. Where a preset has changed
since, a run is made again.

A cost is CPU seconds of a command and all below it, on CUDA its wall time: a machine that does
other things too costs no more. Arms "as long as" another get the epochs that cost as much, whole
ones, by rates measured here (in the folder of the runs, rates.json).
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from shlex import quote

import engine  # before torch: it sets how threads wait

from engine import UserError
from files import replacing
from tools import claims_report as report
from tools.claims_lab import ROOT, Lab
from tools.claims_table import CLAIMS, DATA, Arm, Claim

PROGRAMS = {  # measure: what finds it out; `tuned`: epochs of fine-tuning
    "linear": "downstream.probe --protocol linear",
    "knn": "downstream.probe --protocol knn",
    "finetuned": "downstream.finetune --epochs {tuned} --warmup-epochs {warmup}",
    "segmentation": "downstream.segment --protocol linear",
}


class Trial:
    """A claim on this machine.

    Args:
        budget: epochs, tuned, seeds; None: the claim's. What its JSON was begun with must agree.
        wanted: measures to run, of the claim's; None: all. The others are left for another time.
    """

    def __init__(
        self, name: str, claim: Claim, lab: Lab, budget: dict, results: Path,
        wanted: list[str] | None = None,
    ):  # fmt: skip
        self.name, self.claim, self.lab, self.path = name, claim, lab, results / f"{name}.json"
        self.wanted = [m for m in claim.measures if wanted is None or m in wanted]
        self.content = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.known = self.content.get("budget") or {
            "epochs": budget["epochs"] or claim.epochs, "tuned": budget["tuned"] or claim.tuned,
            "seeds": budget["seeds"] or 3, "most": budget["most"], "epochs_of": {}, "tries": {},
        }  # fmt: skip
        for key in ("epochs", "tuned", "most"):
            if budget[key] not in (None, self.known[key]):
                raise UserError(f"{self.path} has {key} {self.known[key]}; move it, or take that")
        self.known["seeds"] = budget["seeds"] or self.known["seeds"]
        self.runs = {(r["arm"], r["seed"]): r for r in self.content.get("runs", ())}

    def key(self, arm: Arm, kind: str) -> str:
        return f"{kind} {arm.train if kind == 'pretrain' else arm.encoder} on {self.claim.data}"

    def tiny(self, program: str) -> str:
        """A command on the claim's data."""
        return f"{program} --model tiny --data {DATA[self.claim.data][0]}"

    def train_line(self, label: str, seed: int) -> str:
        """The command of an arm's pre-training; one from scratch has its partner's."""
        arm = self.claim.arms[label]
        epochs = self.known["epochs"] if arm.random else self.epochs(label)
        line = f"{self.tiny(arm.train)} --epochs {epochs} --warmup-epochs {epochs / 10:g}"
        return f"{line} --seed {seed}" + " --steps 1" * arm.random

    def stamp(self, label: str, seed: int) -> str:
        """What an arm's row depends on: its settings, and those of `--model tiny` downstream."""
        place = self.lab.folder(self.train_line(label, seed))
        known = self.lab.folder(f"downstream.finetune {place.name}").name
        if "segmentation" in self.claim.measures:
            known += self.lab.folder(f"downstream.segment {place.name}").name
        return known

    def epochs(self, label: str) -> int:
        """An arm's epochs: a share of the claim's, or what costs as much as another arm."""
        arm, known = self.claim.arms[label], self.known
        if not arm.as_long_as:
            return arm.part(known["tuned" if arm.random else "epochs"])
        if label not in known["epochs_of"]:
            other, rate = self.claim.arms[arm.as_long_as], self.rate
            cost = self.epochs(arm.as_long_as) * rate(other, "pretrain")
            if arm.random:
                cost += known["tuned"] * rate(other, "finetuned")
            each = rate(arm, "finetuned" if arm.random else "pretrain")
            known["epochs_of"][label] = max(1, round(cost / each))
        return known["epochs_of"][label]

    def rate(self, arm: Arm, kind: str) -> float:
        """Seconds an epoch, as full runs cost, or measured in 40 steps less 10."""
        if (key := self.key(arm, kind)) in self.lab.rates:
            return self.lab.rates[key]
        costs = []
        for steps in (10, 40):
            few = f"--val-samples 64 --steps {steps}"  # less to evaluate before and after
            line = f"{self.tiny(arm.train)} --epochs 1 --warmup-epochs 0"
            out, record = self.lab.run(f"{line} {few}")
            if kind == "finetuned":
                line = self.tiny(PROGRAMS[kind].format(tuned=1, warmup=0))
                out, record = self.lab.run(f"{line} --checkpoint {quote(f'{out}/last.pt')} {few}")
            costs.append(self.lab.cost(record))
        last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        per_epoch = last["step"] / last["epoch"]
        self.lab.learn(**{key: max(costs[1] - costs[0], 0.01) / 30 * per_epoch})
        return self.lab.rates[key]

    def measures(self, label: str) -> list[str]:
        """Programs that an arm needs; labels alone are learned by fine-tuning alone."""
        needed = [report.MEASURES[m].program for m in self.wanted]
        random = self.claim.arms[label].random
        return [p for p in dict.fromkeys(needed) if p and (not random or p == "finetuned")]

    def run_arm(self, label: str, seed: int) -> dict:
        """All runs of an arm at a seed; its row of the JSON."""
        arm, lab, records, values = self.claim.arms[label], self.lab, {}, {}
        out, records["pretrain"] = lab.run(self.train_line(label, seed))
        if not arm.random:
            cost = lab.cost(records["pretrain"]) / self.epochs(label)
            lab.learn(**{self.key(arm, "pretrain"): cost})
            values |= report.logged(out)
        for kind in self.measures(label):
            for words in self.tries(label, seed) if kind == "finetuned" else [""]:
                place, record = lab.run(self.transfer_line(label, seed, kind, out, words))
                found = report.found(kind, json.loads((place / "result.json").read_text()))
                cost = lab.cost(record)
                if kind == "finetuned":
                    cost /= self.tuned(label)
                    values.setdefault("tries", {})[words] = found["finetuned"]
                lab.learn(**{self.key(arm, kind): cost})
                records[f"{kind} {words}".strip()] = record
                values |= found
        if "tries" in values:
            best = max(values["tries"], key=values["tries"].get)
            self.known["tries"].setdefault(label, best)
            values["finetuned"] = values["tries"][self.known["tries"][label]]
        row = {"arm": label, "seed": seed, "key": self.stamp(label, seed)}
        old = self.runs.get((label, seed), {})
        if old.get("key") == row["key"]:  # other measures, made before
            values, records = old["values"] | values, old["commands"] | records
        return row | {"values": values, "commands": records}

    def tuned(self, label: str) -> int:
        return self.epochs(label) if self.claim.arms[label].random else self.known["tuned"]

    def tries(self, label: str, seed: int) -> list[str]:
        """Flags of fine-tuning: all on the first seed, the best of these on the others."""
        chosen = self.known["tries"].get(label)
        tries = [*self.claim.arms[label].tries][: self.known["most"]]
        return tries if seed == 0 or chosen is None else [chosen]

    def transfer_line(self, label: str, seed: int, kind: str, out: Path, words: str) -> str:
        """The command that finds a measure out; `out`, pre-training's folder; `words`, flags."""
        epochs = self.tuned(label)
        line = self.tiny(PROGRAMS[kind].format(tuned=epochs, warmup=f"{epochs / 10:g}"))
        line += f" --checkpoint {quote(f'{out}/last.pt')}"
        line += f" --cache {quote(f'{out}/features')}" if "probe" in line else ""  # for both
        more = "--random" * self.claim.arms[label].random, words, f"--seed {seed}"
        return " ".join(filter(None, [line, *more]))

    def current(self, label: str, seed: int) -> bool:
        """Whether a row is there of the presets as they are now."""
        row = self.runs.get((label, seed))
        there = row is not None and label in self.claim.arms
        return there and row["key"] == self.stamp(label, seed)

    def whole(self, label: str, seed: int) -> bool:
        """Whether that row has every measure that is wanted, by the commands of today."""
        if not self.current(label, seed):
            return False
        out = self.lab.folder(self.train_line(label, seed))
        commands = self.runs[label, seed]["commands"].values()
        ran = {c["command"].partition(" --output ")[0] for c in commands}
        for kind in self.measures(label):
            words = self.known["tries"].get(label, "") if kind == "finetuned" else ""
            if self.lab.shown(self.transfer_line(label, seed, kind, out, words)) not in ran:
                return False
        return True

    def left(self) -> list[tuple[str, int]]:
        """(arm, seed) that are to be run, all arms of a seed before the next one."""
        pairs = [(a, s) for s in range(self.known["seeds"]) for a in self.order()]
        return [p for p in pairs if not self.whole(*p)]

    def order(self) -> list[str]:
        """Arms whose epochs depend on others' cost come last."""
        return sorted(self.claim.arms, key=lambda a: bool(self.claim.arms[a].as_long_as))

    def finish(self, page: Path) -> None:
        """Run what is left; write the JSON, and the page's tables, after each row."""
        now = {pair: row for pair, row in self.runs.items() if self.current(*pair)}
        gone = {a for a, _ in self.runs} - {a for a, _ in now}  # and what was found by their cost
        gone |= {k for k, a in self.claim.arms.items() if a.as_long_as in gone}
        self.runs = {pair: row for pair, row in now.items() if pair[0] not in gone}
        for name in ("epochs_of", "tries"):
            self.known[name] = {k: v for k, v in self.known[name].items() if k not in gone}
        for label, seed in self.left():
            self.runs[label, seed] = self.run_arm(label, seed)
            self.write()
            report.write_page(page, report.read_results(self.path.parent))

    def write(self) -> None:
        claim, rows = self.claim, [self.runs[k] for k in sorted(self.runs, key=lambda k: (k[1],))]
        content = {"claim": self.name, "source": claim.source, "sentence": claim.sentence}
        content |= {"data": DATA[claim.data][1], "measures": list(claim.measures)}
        content |= {"arms": {k: a._asdict() for k, a in claim.arms.items()}}
        content |= {"budget": self.known, "runs": rows}
        content["verdicts"] = report.verdicts(claim, rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(str(self.path)) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")

    def hours(self) -> float:
        """CPU hours that are left, from rates that are measured now where they are not known."""
        total = 0.0
        for label, seed in self.left():
            arm = self.claim.arms[label]
            total += 0.0 if arm.random else self.epochs(label) * self.rate(arm, "pretrain")
            for kind in self.measures(label):
                if kind == "finetuned":
                    share = len(self.tries(label, seed)) if seed == 0 else 1
                    total += share * self.tuned(label) * self.rate(arm, kind)
                else:  # a probe costs about what an epoch of fine-tuning does
                    known = self.lab.rates.get(self.key(arm, kind))
                    total += known or self.rate(arm, "finetuned")
        return total / 3600


def options() -> argparse.ArgumentParser:
    parser = engine.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims; default: all")
    parser.add_argument("--list", action="store_true", help="claims, what is left, its cost here")
    parser.add_argument("--write", action="store_true", help="tables of docs/results.md alone")
    parser.add_argument("--plot", metavar="PNG", help="as pictures, curves too")
    for name, (default, what) in DATA.items():
        if name != "shapes":
            flag = "--data" if name == "images" else f"--{name}"
            parser.add_argument(flag, dest=name, default=default, help=f"{what} (%(default)s)")
    parser.set_defaults(shapes="shapes")
    parser.add_argument("--measures", help="some of a claim's, with commas; default: all")
    budget = {"epochs": "of pre-training", "tuned": "epochs of fine-tuning", "seeds": "at least 3"}
    budget |= {"most": "rates of fine-tuning that are tried"}
    for name, what in budget.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what}; default: the claim's")
    parser.add_argument("--runs", default="runs/claims", help="where runs go (%(default)s)")
    parser.add_argument("--results", default=str(ROOT / "docs" / "results"))
    parser.add_argument("--page", default=str(ROOT / "docs" / "results.md"))
    parser.add_argument("--threads", type=int, default=1, help="of a run (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="loaders of a run (%(default)s)")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    return parser


def show(trials: list[Trial]) -> None:
    """The list: claims, rows there and wanted, hours left."""
    print("claim                        rows     CPU hours left")
    for trial in trials:
        try:
            hours = f"{trial.hours():.2f}"
        except UserError as error:
            hours = "status " + str(error).rpartition(" ended with status ")[2]
        wanted = trial.known["seeds"] * len(trial.claim.arms)
        print(f"{trial.name:<28} {wanted - len(trial.left()):>2} / {wanted:<4} {hours}", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = options().parse_args(argv)
    if unknown := [n for n in args.names if n not in CLAIMS]:
        raise UserError(f"{', '.join(unknown)}: choose from {', '.join(CLAIMS)}")
    results = Path(args.results)
    if args.plot:
        found = report.read_results(results)
        report.plot(found, args.plot)
        return report.plot_curves(found, args.plot)
    if not args.write:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the run below, too
        lab, budget = Lab(args), {k: getattr(args, k) for k in ("epochs", "tuned", "seeds", "most")}
        names = args.names or CLAIMS
        wanted = args.measures and args.measures.split(",")
        if unknown := [m for m in wanted or () if m not in report.MEASURES]:
            raise UserError(f"--measures {','.join(unknown)}: of {', '.join(report.MEASURES)}")
        trials = [Trial(name, CLAIMS[name], lab, budget, results, wanted) for name in names]
        if args.list:
            return show(trials)
        failed = []
        for trial in trials:
            try:
                trial.finish(Path(args.page))
            except UserError as error:  # no data for this one, say; on with the others
                failed.append(f"{trial.name}: {error}")
        if failed:
            raise UserError("\n".join(failed))
    report.write_page(Path(args.page), report.read_results(results))


if __name__ == "__main__":
    engine.command("claims", main)
