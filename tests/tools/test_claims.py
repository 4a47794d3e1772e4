"""The claims' runner and judge; only the last test trains."""

import fcntl
import json
import math
import multiprocessing
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import engine  # noqa: F401  first: it sets how threads wait

import pytest
import torch

import mae
from downstream import recipes, segment_recipes
from engine import UserError
from tools import claims, claims_lab, claims_report, claims_table
from tools.claims_table import Arm, Claim

pytestmark = pytest.mark.slow

CLAIM = Claim(
    "T. 1", "a beats b", {"a": Arm("mae"), "b": Arm("mae --mask-ratio 0.6")}, [("a", "b")],
    ("linear", "linear CLS", "finetuned", "loss"),
)  # fmt: skip


PAGE = Path("results.md")  # in the folder of a test


class FakeLab(claims_lab.Lab):
    """A lab whose commands write what the real ones would, from a seed and the arm's flags."""

    def spawn(self, command, log):
        out = Path(command[command.index("--output") + 1])
        self.commands = [*getattr(self, "commands", ()), command]
        value = lambda flag: command[command.index(flag) + 1] if flag in command else None  # noqa: E731
        seed, plain = int(value("--seed") or 0), "--mask-ratio" not in command
        epochs = float(value("--epochs") or 1)
        if "downstream.probe" in command:
            sweep = [("1/patch", 20), ("2/patch", 30), ("2/prefix", 40 + seed), ("norm/prefix", 5)]
            sweep = [{"features": k, "top1": v} for k, v in sweep]
            (out / "result.json").write_text(json.dumps({"sweep": sweep}))
        elif "downstream.finetune" in command:
            rate = float(value("--base-lr") or 8e-3)
            top = 50 + seed - 1000 * abs(rate - 4e-3) - 10 * ("--random" in command)
            (out / "result.json").write_text(json.dumps({"top1": top}))
            steps = int(value("--steps") or 100)
            line = {"step": steps, "epoch": steps / 20}
            (out / "log.jsonl").write_text(json.dumps(line) + "\n")
        else:
            steps = int(value("--steps") or epochs * 10)
            line = {"step": steps, "epoch": steps / 10, "val": {"loss": 1.0 if plain else 2 + seed}}
            (out / "log.jsonl").write_text(json.dumps(line) + "\n")
            config = {"epochs": epochs, "steps": None}
            torch.save({"step": steps, "config": config}, out / "last.pt")
        share = int(value("--steps")) / 10 if value("--steps") else epochs
        each = 4.0 if "downstream.finetune" in command else 2.0 if plain else 6.0
        return each * share, 0.5


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """(make, lab): `make(claim)` is a trial of two seeds' budget unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    PAGE.write_text(f"before\n{claims_report.BEGIN}\nold\n{claims_report.END}\nafter\n")
    args = claims.options().parse_args(["--runs", "runs", "--data", "elsewhere"])
    lab = FakeLab(args)

    def make(claim=CLAIM, wanted=None, **budget):
        budget = {"epochs": 2, "tuned": 1, "seeds": 3, "most": None} | budget
        return claims.Trial("x", claim, lab, budget, tmp_path / "results", wanted)

    return make, lab


def rows(tmp_path):
    return json.loads((tmp_path / "results" / "x.json").read_text())


# ------------------------------------------------------------------------------------------ judge


@pytest.mark.parametrize(
    "a, b, verdict",
    [
        ([3, 4, 5], [0, 1, 2], "seen"),  # difference 3, error sqrt(2/3)
        ([0, 1, 2], [3, 4, 5], "opposite"),
        ([1.5, 2.5, 3.5], [0, 1, 2], "not seen"),  # difference 1.5 < 2 x 0.816
        ([3, 4], [0, 1, 2], "unfinished"),
        ([2, 2, 2], [2, 2, 2], "not seen"),
    ],
)
def test_judge__verdict_is_by_two_standard_errors(a, b, verdict):
    assert claims_report.judge(a, b)["verdict"] == verdict
    turned = {"seen": "opposite", "opposite": "seen"}.get(verdict, verdict)
    assert claims_report.judge(a, b, lower=True)["verdict"] == turned


def test_judge__error_is_that_of_two_samples():
    a, b = [3.0, 4.0, 9.0], [0.0, 1.0, 2.0, 7.0]
    found = claims_report.judge(a, b)
    by_hand = math.sqrt(statistics.stdev(a) ** 2 / 3 + statistics.stdev(b) ** 2 / 4)
    assert found["se"] == pytest.approx(by_hand, abs=1e-4)
    assert found["difference"] == pytest.approx(16 / 3 - 2.5, abs=1e-4)


# ------------------------------------------------------------------------------------------ table


def test_claims__compare_arms_that_are_there_by_measures_that_are_known():
    for name, claim in claims_table.CLAIMS.items():
        named = {x for pair in claim.better for x in pair}
        named |= {a.as_long_as for a in claim.arms.values() if a.as_long_as}
        assert named <= claim.arms.keys(), name
        assert set(claim.measures) <= claims_report.MEASURES.keys(), name
        assert claim.data in claims_table.DATA
        programs = {claims_report.MEASURES[m].program for m in claim.measures} - {""}
        assert programs <= claims.PROGRAMS.keys()


@pytest.mark.parametrize("name", claims_table.CLAIMS)
def test_claims__every_arm_is_a_command_its_script_takes(name, bench):
    make, lab = bench
    trial = make(claims_table.CLAIMS[name], epochs=8)
    for label, arm in trial.claim.arms.items():
        if not arm.as_long_as or arm.random:
            line = trial.train_line(label, 0)
            assert lab.folder(line).name.startswith(line.split()[0])  # parsed, and no UserError


def test_claims__arms_differ(bench):
    make, lab = bench
    for claim in claims_table.CLAIMS.values():
        trial = make(claim, epochs=8)
        plain = [k for k, a in claim.arms.items() if not a.as_long_as and not a.random]
        places = {lab.folder(trial.train_line(k, 0)) for k in plain}
        assert len(places) == len(plain), claim.sentence


# ------------------------------------------------------------------------------------------- runs


def test_finish__json_holds_every_seed_arm_value_and_command(bench, tmp_path):
    make, lab = bench
    make().finish(PAGE)
    content = rows(tmp_path)
    assert [(r["arm"], r["seed"]) for r in content["runs"]] == [
        (a, s) for s in range(3) for a in "ab"
    ]
    first = content["runs"][0]
    assert first["values"]["linear"] == 40 and first["values"]["linear patch"] == 30
    assert first["values"]["loss"] == 1.0
    command = first["commands"]["pretrain"]["command"]
    assert command.startswith("python mae.py --model tiny --data data/tiny_imagenet_40 --epochs 2 ")
    assert "elsewhere" not in json.dumps(content)  # where the data lies here is nobody's business
    assert all("elsewhere" in c for c in lab.commands)
    assert "--output runs/claims/mae-" in command  # nor where the runs do
    by_measure = {v["measure"]: v for v in content["verdicts"]}
    assert by_measure["loss"]["difference"] == pytest.approx((2 + 3 + 4) / 3 - 1)  # lower is better
    assert by_measure["loss"]["verdict"] == "seen" and by_measure["linear"]["verdict"] == "not seen"


def test_finish__what_is_there_is_skipped_even_without_the_runs(bench, tmp_path):
    make, lab = bench
    make().finish(PAGE)
    before = rows(tmp_path)
    for place in (tmp_path / "runs").glob("*"):
        place.rename(tmp_path / place.name)
    lab.commands = []
    make().finish(PAGE)
    assert not lab.commands and rows(tmp_path) == before
    make(seeds=4).finish(PAGE)
    assert {c[c.index("--seed") + 1] for c in lab.commands} == {"3"}
    assert len(rows(tmp_path)["runs"]) == 8


def test_finish__a_changed_preset_is_run_again(bench, tmp_path, monkeypatch):
    make, lab = bench
    make().finish(PAGE)
    lab.commands = []
    monkeypatch.setitem(mae.PRESETS, "tiny", mae.PRESETS["tiny"] | {"base_lr": 1e-3})
    make().finish(PAGE)
    assert sum(c[1] == "mae.py" for c in lab.commands) == 6
    assert len(rows(tmp_path)["runs"]) == 6
    lab.commands = []
    tiny = recipes.TINY | {"linear": {}}
    monkeypatch.setattr(recipes, "TINY", tiny)  # the one of fine-tuning and probes
    make().finish(PAGE)
    assert {c[2] for c in lab.commands} == {"downstream.probe", "downstream.finetune"}
    lab.commands = []
    monkeypatch.setitem(claims.PROGRAMS, "linear", "downstream.probe --protocol linear --layers 1")
    make().finish(PAGE)  # how one measure is found out, and no setting
    assert {c[2] for c in lab.commands} == {"downstream.probe"} and len(lab.commands) == 6
    lab.commands = []
    make().finish(PAGE)
    assert not lab.commands


def test_finish__a_row_of_an_older_preset_is_not_judged(bench, monkeypatch):
    """One script's preset changed, the other arm's rows are current: of the first none stays."""
    arms = {"a": Arm("mae"), "b": Arm("mcmae"), "c": Arm("mcmae", as_long_as="a")}
    claim = Claim("x", "y", arms, [("a", "b")], ("loss",))
    make, _ = bench
    make(claim, seeds=4).finish(PAGE)
    monkeypatch.setitem(mae.PRESETS, "tiny", mae.PRESETS["tiny"] | {"base_lr": 1e-3})
    found = make(claim)
    monkeypatch.setattr(found, "run_arm", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        found.finish(PAGE)
    assert {a for a, _ in found.runs} == {"b"} and found.known["epochs_of"] == {}


@pytest.mark.parametrize("name, value", [("LINEAR", {"lr": 1.0}), ("TINY", {"linear": {}})])
def test_stamp__segmentation_has_its_own_settings(bench, monkeypatch, name, value):
    make, _ = bench
    seg = CLAIM._replace(measures=("segmentation",))
    before = [make(claim).stamp("a", 0) for claim in (CLAIM, seg)]
    monkeypatch.setattr(segment_recipes, name, getattr(segment_recipes, name) | value)
    after = [make(claim).stamp("a", 0) for claim in (CLAIM, seg)]
    assert after[0] == before[0] and after[1] != before[1]


def test_finish__some_measures_now_and_others_later(bench, tmp_path):
    make, lab = bench
    make(wanted=["loss"]).finish(PAGE)
    assert all(c[1] == "mae.py" for c in lab.commands)
    page = PAGE.read_text()
    assert "| not run |" in page and "linear" not in page.partition("Means")[0]
    kinds = {v["measure"]: v["verdict"] for v in rows(tmp_path)["verdicts"]}
    assert kinds["linear"] == kinds["finetuned"] == "unfinished" and kinds["loss"] == "seen"
    for measure, program in ("finetuned", "downstream.finetune"), ("linear", "downstream.probe"):
        lab.commands = []
        make(wanted=[measure]).finish(PAGE)
        assert {c[2] for c in lab.commands} == {program}
    row = rows(tmp_path)["runs"][0]
    assert {"linear", "loss", "finetuned"} <= row["values"].keys()
    assert {"pretrain", "linear", "finetuned"} <= {k.partition(" ")[0] for k in row["commands"]}
    kinds = {v["measure"]: v["verdict"] for v in rows(tmp_path)["verdicts"]}
    assert "unfinished" not in kinds.values() and "not run" not in PAGE.read_text()


def test_verdicts__losses_on_other_patches_or_leaking_ones_are_not_judged():
    table = claims_report.verdicts(claims_table.CLAIMS["mcmae-parts"], [])
    pairs = {kind: [(v["better"], v["worse"]) for v in table if v["measure"] == kind]
             for kind in ("linear", "loss")}  # fmt: skip
    assert pairs["linear"] == [("block", "token"), ("block", "unmasked"), ("multi scale", "block")]
    assert pairs["loss"] == [("multi scale", "block")]


def test_finish__another_budget_is_refused(bench):
    make, _ = bench
    make().finish(PAGE)
    with pytest.raises(UserError, match="has epochs 2"):
        make(epochs=3)


SCRATCH = Claim(
    "all", "pre-training helps",
    {"pre-trained": Arm("mae", tries=("--base-lr 8e-3", "--base-lr 4e-3")),
     "from scratch": Arm("mae", as_long_as="pre-trained", random=True, tries=("--base-lr 4e-3",))},
    [("pre-trained", "from scratch")], ("finetuned",),
)  # fmt: skip


def test_epochs__from_scratch_costs_as_much_as_its_partner_in_all(bench, tmp_path):
    make, lab = bench
    make(SCRATCH, epochs=6, tuned=5).finish(PAGE)
    # 6 epochs of pre-training at 2 s and 5 of fine-tuning at 4 s, in epochs of 4 s
    assert rows(tmp_path)["budget"]["epochs_of"] == {"from scratch": 8}
    last = [c for c in lab.commands if "--random" in c]
    assert all(c[c.index("--epochs") + 1] == "8" for c in last) and len(last) == 3


def test_epochs__are_found_again_once_a_preset_has_changed(bench, tmp_path, monkeypatch):
    make, _ = bench
    make(SCRATCH, epochs=6, tuned=5).finish(PAGE)
    content = rows(tmp_path)
    content["budget"] |= {"epochs_of": {"from scratch": 3}, "tries": {"pre-trained": "--base-lr 1"}}
    (tmp_path / "results" / "x.json").write_text(json.dumps(content))
    monkeypatch.setitem(mae.PRESETS, "tiny", mae.PRESETS["tiny"] | {"base_lr": 1e-3})
    make(SCRATCH, epochs=6, tuned=5).finish(PAGE)
    assert rows(tmp_path)["budget"]["epochs_of"] == {"from scratch": 8}
    assert rows(tmp_path)["budget"]["tries"]["pre-trained"] == "--base-lr 4e-3"


def test_epochs__a_share_of_the_claim_s_or_what_costs_as_much(bench):
    make, _ = bench
    curve = make(claims_table.CLAIMS["mcmae-mae"], epochs=40)
    assert [curve.epochs(k) for k in curve.claim.arms if k.startswith("mae")] == [5, 10, 20, 40]
    longer = {"a": Arm("mae --mask-ratio 0.6"), "b": Arm("mae", as_long_as="a")}
    trial = make(CLAIM._replace(arms=longer), epochs=4)
    assert trial.epochs("b") == 12  # 4 epochs at 6 s, in epochs of 2 s
    assert trial.order() == ["a", "b"] and trial.known["epochs_of"] == {"b": 12}


def test_tries__all_on_the_first_seed_the_best_on_the_others(bench, tmp_path):
    make, lab = bench
    make(SCRATCH, epochs=6, tuned=5).finish(PAGE)
    content = rows(tmp_path)
    assert content["budget"]["tries"]["pre-trained"] == "--base-lr 4e-3"
    tuned = [c for c in lab.commands if "downstream.finetune" in c and "--random" not in c]
    assert [c[c.index("--base-lr") + 1] for c in tuned] == ["8e-3", "4e-3", "4e-3", "4e-3"]
    assert content["runs"][0]["values"]["finetuned"] == pytest.approx(50)


def test_tries__no_more_than_asked_for(bench):
    make, lab = bench
    make(SCRATCH, epochs=6, tuned=5, most=1).finish(PAGE)
    tuned = [c for c in lab.commands if "downstream.finetune" in c and "--random" not in c]
    assert {c[c.index("--base-lr") + 1] for c in tuned} == {"8e-3"}


def test_rate__is_of_forty_steps_less_ten(bench):
    make, lab = bench
    trial = make()
    assert trial.rate(CLAIM.arms["b"], "pretrain") == pytest.approx(6.0)  # seconds an epoch
    assert trial.rate(CLAIM.arms["b"], "finetuned") == pytest.approx(2.0 * 4)  # 20 steps an epoch
    count = len(lab.commands)
    trial.rate(CLAIM.arms["b"], "pretrain")
    assert len(lab.commands) == count  # kept
    assert json.loads((lab.runs / "rates.json").read_text()) == lab.rates


def test_learn__others_never_read_half_a_file(bench, monkeypatch):
    """Two processes side by side are the usual way to run claims."""
    _, lab = bench
    lab.runs.mkdir()
    lab.learn(a=1.0)
    write = Path.write_text

    def torn(path, text):
        write(path, "")
        FakeLab(lab.args)  # reads in the middle of it
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", torn)
    lab.learn(b=2.0)
    assert FakeLab(lab.args).rates == {"a": 1.0, "b": 2.0}
    assert [p.name for p in lab.runs.glob("rates*")] == ["rates.json"]


def test_rate__arms_of_one_encoder_share_that_of_fine_tuning(bench):
    """Decoders, masks and targets differ in pre-training alone; a listing measures one of them."""
    make, lab = bench
    trial = make()
    trial.rate(CLAIM.arms["a"], "finetuned")
    count = len(lab.commands)
    assert trial.rate(CLAIM.arms["b"], "finetuned") == trial.rate(CLAIM.arms["a"], "finetuned")
    assert len(lab.commands) == count
    assert all(c[c.index("--val-samples") + 1] == "64" for c in lab.commands)
    encoders = {a.encoder for c in claims_table.CLAIMS.values() for a in c.arms.values()}
    patches = "semanticmim --patch-size 8"
    proxies = {f"{patches} --proxies {n}" for n in (0, 1, 4, 8, 16)}
    own = {"mae", "cfmae", "semanticmim", patches, "mcmae", "coma_dyvit"}
    assert encoders == proxies | own | {"coma_dyvit --dims 24-48-96-192"}


def test_run__a_second_process_waits_for_the_first(bench, tmp_path):
    _, lab = bench
    lab.run("mae --model tiny --data shapes")
    (out,) = (p for p in (tmp_path / "runs").glob("mae-*") if p.is_dir())
    (out / "done.json").unlink()
    begun = threading.Event()

    def other():
        begun.set()
        lab.run("mae --model tiny --data shapes")

    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=other)
        thread.start()
        begun.wait()
        thread.join(0.3)
        assert thread.is_alive() and len(lab.commands) == 1
        (out / "done.json").write_text("{}")  # the first one ends
    thread.join(30)
    assert len(lab.commands) == 1


def test_hours__are_of_what_is_left(bench):
    make, lab = bench
    trial = make(CLAIM._replace(measures=("finetuned",)), seeds=3)
    lab.rates |= {trial.key(a, "pretrain"): 100.0 for a in CLAIM.arms.values()}
    lab.rates |= {trial.key(a, "finetuned"): 60.0 for a in CLAIM.arms.values()}
    assert trial.hours() == pytest.approx(3 * 2 * (2 * 100 + 1 * 60) / 3600)


def test_main__list_says_what_a_claim_lacks(bench, tmp_path, monkeypatch, capsys):
    def refuse(self, line):
        raise UserError("mae ended with status 2: there is no folder elsewhere/train")

    monkeypatch.setattr(claims_lab.Lab, "run", refuse)
    claims.main(["--list", "scratch-mae", "--results", str(tmp_path), "--runs", "runs"])
    out = capsys.readouterr().out
    assert "scratch-mae" in out and "0 / 6" in out and "no folder elsewhere/train" in out


def test_main__goes_on_where_a_claim_has_no_data_and_says_so_at_the_end(tmp_path, monkeypatch):
    done = []

    def finish(self, page):
        if self.claim.data == "regions":
            raise UserError("no folder")
        done.append(self.name)

    monkeypatch.setattr(claims.Trial, "finish", finish)
    names = ["cfmae-modalities", "scratch-mae"]
    with pytest.raises(UserError, match="^cfmae-modalities: no folder$"):
        claims.main([*names, "--results", str(tmp_path), "--runs", str(tmp_path)])
    assert done == ["scratch-mae"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["no-such"], "choose from scratch-mae"),
        (["scratch-mae", "--measures", "taste"], "--measures taste: of linear"),
        (["--write", "--results", "nowhere"], "no results in nowhere"),
    ],
)
def test_main__refuses_in_words(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        claims.main(argv)


# ----------------------------------------------------------------------------------------- report


def test_write_page__tables_replace_what_stood_between_the_marks(bench, tmp_path):
    make, _ = bench
    make().finish(PAGE)
    found = claims_report.read_results(tmp_path / "results")
    assert claims_report.tables(found) in PAGE.read_text()  # kept up while it runs
    claims_report.write_page(PAGE, found)
    text = PAGE.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| a | b | fine-tuned, top-1 % |") == 1 and "**not seen**" in text
    # Two epochs of 2 s, a probe of 2, one of 4; 40, 41, 42: deviation 1, over sqrt(3)
    means = "linear probe 41.0 ± 0.6; linear probe on class or proxy tokens 41.0 ± 0.6; fine-tuned "
    assert f"| x | a | 3 | 10 | {means}" in text
    none = found[0] | {"runs": []}
    assert "not run" in claims_report.costs([none])[2]
    assert "not run" not in claims_report.costs([none | {"measures": ["linear"]}])[2]
    PAGE.write_text("no marks")
    with pytest.raises(UserError, match="lacks the lines"):
        claims_report.write_page(PAGE, found)


def test_plot__needs_three_seeds(bench, tmp_path):
    pytest.importorskip("matplotlib")
    make, _ = bench
    make(seeds=2).finish(PAGE)
    with pytest.raises(UserError, match="3 seeds"):
        claims_report.plot(claims_report.read_results(tmp_path / "results"), tmp_path / "x.png")
    make(seeds=3).finish(PAGE)
    claims_report.plot(claims_report.read_results(tmp_path / "results"), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_curves__mean_and_error_by_epochs_of_arms_that_differ_in_them_alone():
    arms = {"a": Arm("mae"), "a, half": Arm("mae", share=0.5), "b": Arm("mcmae"),
            "b, half": Arm("mcmae", share=0.5), "c": Arm("cfmae"), "n": Arm("mae", random=True),
            "l": Arm("mae", as_long_as="b")}  # fmt: skip
    runs = [{"arm": a, "seed": s, "values": {"finetuned": 10 * n + 3 * s}}
            for n, a in enumerate(arms) for s in range(3) if (a, s) != ("b, half", 2)]  # fmt: skip
    arms = {k: a._asdict() for k, a in arms.items()}
    found = claims_report.curves({"arms": arms, "runs": runs, "budget": {"epochs": 8}}, "finetuned")
    se = pytest.approx(3 / math.sqrt(3))
    assert found == {"mae": [(4, 13, se), (8, 3, se)]}  # b's half lacks a seed, c has one length


def test_plot_curves__a_picture_of_each_claim_that_has_some(tmp_path, bench, capsys):
    pytest.importorskip("matplotlib")
    make, _ = bench
    arms = {f"{n}": Arm("mae", share=n) for n in (0.5, 1.0)}
    make(CLAIM._replace(arms=arms, better=(), measures=("finetuned",))).finish(PAGE)
    claims_report.plot_curves(claims_report.read_results(tmp_path / "results"), tmp_path / "r.png")
    made = tmp_path / "r-x-finetuned.png"
    assert made.stat().st_size > 5000 and str(made) in capsys.readouterr().out


def test_finish__a_folder_with_a_space_in_its_name(bench, tmp_path):
    make, lab = bench
    lab.runs = tmp_path / "my runs"
    make().finish(PAGE)
    for c in lab.commands:
        given = [Path(c[c.index(k) + 1]) for k in ("--checkpoint", "--cache") if k in c]
        assert all(p.parent.is_dir() and p.parent.parent == lab.runs for p in given), c
    assert not make().left()  # found again by their commands


def test_page__of_the_project_is_what_its_json_says():
    """The tables of docs/results.md are those that the JSON files beside it make."""
    docs = Path(claims.__file__).parents[1] / "docs"
    if not list((docs / "results").glob("*.json")):
        pytest.skip("no results so far")
    text = (docs / "results.md").read_text()
    inner = text.partition(claims_report.BEGIN)[2].partition(claims_report.END)[0]
    assert inner.strip() == claims_report.tables(claims_report.read_results(docs / "results"))


# ------------------------------------------------------------------------------ real processes


def test_spawn__cost_is_the_child_s_and_its_children_s_cpu_time(tmp_path):
    lab = claims_lab.Lab(claims.options().parse_args(["--runs", str(tmp_path)]))
    work = "import time\nwhile time.process_time() < 0.3: pass"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    cpu, wall = lab.spawn([sys.executable, "-c", nested], tmp_path / "log")
    assert cpu >= 0.3 and wall >= 0.3
    sleep = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    more, longer = lab.spawn(sleep, tmp_path / "log")  # it is continued
    assert 0 < more - cpu < 0.3 and longer >= wall + 0.5


@pytest.mark.parametrize("known, cpu", [([], 40.0), ([9.0, 9.0, 0.7], 22.2)])
def test_execute__a_share_of_unknown_cost_costs_as_much_as_the_rest(bench, tmp_path, known, cpu):
    """Stopped at 0.8 of its way; the rest takes 4 CPU seconds, and 20 is what `spawn` says."""
    lab, out = bench[1], tmp_path / "runs/mae-x"
    out.mkdir(parents=True)
    torch.save({"step": 8, "config": {"epochs": 1, "steps": None}}, out / "last.pt")
    (out / "log.jsonl").write_text('{"step": 10, "epoch": 1.0}\n')
    if known:
        (out / "spent.json").write_text(json.dumps(known))
    spent = 20.0 if known else 8.0
    with mock.patch.object(lab, "spawn", lambda command, log: (spent, 1.0)):
        record = lab.execute("mae --model tiny", out)
    assert record["cpu_seconds"] == cpu and record["continued_from"] == 0.8


def test_execute__begins_again_where_almost_all_of_a_cost_is_unknown(bench, tmp_path):
    out = tmp_path / "runs/mae-x"
    out.mkdir(parents=True)
    torch.save({"step": 95, "config": {"epochs": 10, "steps": None}}, out / "last.pt")
    (out / "log.jsonl").write_text('{"step": 10, "epoch": 1.0}\n')
    record = bench[1].execute("mae --model tiny", out)
    assert record["cpu_seconds"] == 2.0 and record["continued_from"] == 0


def test_spawn__a_failed_command_is_told_by_its_own_words(tmp_path):
    lab = claims_lab.Lab(claims.options().parse_args(["--runs", str(tmp_path)]))
    command = [sys.executable, "-c", "print('much'); print('no such folder'); exit(2)"]
    with pytest.raises(UserError, match="ended with status 2: no such folder"):
        lab.spawn(command, tmp_path / "log")
    command[-1] = "print('mae: error: no such folder'); print('Expected: ...'); exit(2)"
    with pytest.raises(UserError, match="ended with status 2: no such folder"):
        lab.spawn(command, tmp_path / "log")


def test_run__killed_in_the_middle_goes_on_at_its_checkpoint(tmp_path, capsys):
    """SIGTERM ends the tool and the run below, which saves; the next call takes it up there."""
    flags = "--model tiny --data shapes --image-size 32 --embed-dim 32 --depth 1 "
    flags += "--steps 60 --batch-size 16 --epochs 1 --num-heads 2 --log-every 5 --val-samples 8"

    def work() -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as claims.main
        claims_lab.Lab(claims.options().parse_args(["--runs", str(tmp_path)])).run(f"mae {flags}")

    first = multiprocessing.get_context("fork").Process(target=work)
    first.start()
    end = time.monotonic() + 60
    while not any('"step": 5,' in p.read_text() for p in tmp_path.glob("*/log.jsonl")):
        assert first.is_alive() and time.monotonic() < end
        time.sleep(0.02)
    first.terminate()
    first.join()
    (out,) = (p for p in tmp_path.glob("mae-*") if p.is_dir())
    assert first.exitcode == 143 and (out / "last.pt").exists()
    assert not (out / "done.json").exists()
    first_cost = claims_lab.spent(out)[0]
    assert first_cost > 0
    lab = claims_lab.Lab(claims.options().parse_args(["--runs", str(tmp_path)]))
    share = lab.run(f"mae {flags}")[1]["continued_from"]
    assert 0 < share < 1 and f"from {share:.0%} on" in capsys.readouterr().err
    assert "resumed" in (out / "output.txt").read_text()
    done = json.loads((out / "done.json").read_text())
    assert done["continued_from"] == share and done["cpu_seconds"] > first_cost
