"""The run's parts: command line, batch, schedule, folder; and what a run says that goes wrong."""

import contextlib
import functools
import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import data
import engine
import numpy as np
import pytest
import tiny_run
import torch
import torch.distributed as dist
from cfmae import CFMAE
from engine import Meter, Run, UserError, World, arg
from engine.folder import most_unreadable
from engine.loop import end_of_epoch
from engine.ranks import peak_memory
from engine.validate import validate
from PIL import Image
from torch import nn


@dataclass
class Config(engine.Config):
    epochs: int = arg(400, "Table 7")
    warmup_epochs: float = arg(40, "Appendix E.1 (5 % of it)")
    colour: str = arg("red", "ours", choices=["red", "green"])


PRESETS = {"base": {}, "tiny": dict(epochs=3, batch_size=64, warmup_epochs=0.1)}


def parse(argv):
    return engine.parse(Config, PRESETS, "About.", argv.split())


# ----------------------------------------------------------------------------------- command line


def test_command__says_names_that_are_no_utf_8(capsys):
    with pytest.raises(SystemExit) as e:
        engine.command("name", lambda: print("bad\udcff.png"))
    assert e.value.code == 0 and "bad\\udcff.png" in capsys.readouterr().out


def test_parse__command_line_before_preset_before_class():
    assert (parse("").epochs, parse("").batch_size) == (400, 2048)
    assert (parse("--model tiny").epochs, parse("--model tiny").batch_size) == (3, 64)
    cfg = parse("--model tiny --epochs 7 --no-compile --resume --output x --steps 9")
    assert (cfg.epochs, cfg.batch_size, cfg.steps) == (7, 64, 9)
    assert (cfg.compile, cfg.resume) == (False, True)


def test_parse__help_has_defaults_and_sources(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "About." in text
    assert " --data ... --model ... --output ... --epochs ... --steps ..." in text[:200]
    assert "--epochs int Table 7 (default: 400)" in text
    assert "Appendix E.1 (5 % of it) (default: 40)" in text
    assert "--colour {red,green}" in text and "tiny: --epochs 3 --batch-size 64" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--epoch 3", "--epoch"),  # no abbreviations: a new flag would change what they mean
        ("--nonsense 3", "--nonsense"),
        ("--model huge", "'base', 'tiny'"),
        ("--colour blue", "'red', 'green'"),
        ("--precision fp16", "'auto', 'fp32', 'bf16'"),
        ("--epochs many", "--epochs"),
        ("--epochs 0", "--epochs 0 must be above 0"),
        ("--image-size 230", "--image-size 230 is not divisible by --patch-size 16; .* 224 or 240"),
        ("--image-size 10", "nearest that work: 16$"),
        ("--patch-size 0", "--patch-size 0 must be above 0"),
        ("--crop-scale-min 1.5", "--crop-scale-min 1.5"),
        ("--base-lr nan", "--base-lr"),
        ("--weight-decay -1", "--weight-decay"),
        ("--beta2 1", "--beta2"),
        ("--workers -1", "--workers"),
        ("--resume", "--resume needs --output"),
        ("--epochs 40", "--warmup-epochs 40 leaves nothing of --epochs 40; a tenth"),
        ("--batch_size 3", "unrecognized arguments: --batch_size 3; did you mean --batch-size?"),
        ("--micro-bach=3 --see 1", "mean --micro-batch, --seed\\?"),
        ("--qqqq 3", r"unrecognized arguments: --qqqq 3 \(--help"),
        ("--device tpu", r"choice: 'tpu' \(choose from .*\) \(--help"),
        ("--device mps", "'mps'.*: a Mac trains on its CPU here"),
        ("--image-size 224x320", "invalid int value: '224x320': images are square here"),
    ],
)
def test_parse__refuses_and_names_the_field(argv, message):
    with pytest.raises(UserError, match=message):
        parse(argv)


def test_command__errors_of_the_file_system_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        engine.command("x", (tmp_path / "no" / "file").read_text)
    line = f"x: error: [Errno 2] No such file or directory: '{tmp_path}/no/file'\n"
    assert end.value.code == 2 and capsys.readouterr().err == line


def test_command__an_error_of_one_rank_alone_is_said(monkeypatch, capsys):
    """Rank 0 waits for it then, and says nothing."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as end:
        engine.command("x", mock.Mock(side_effect=UserError("no such device")))
    assert end.value.code == 2 and capsys.readouterr().err == "x: error: no such device\n"


def test_split_batch__fewest_equal_micro_batches():
    def split(batch, micro, ranks):
        return World.split_batch(SimpleNamespace(size=ranks), batch, micro)

    assert split(2048, 128, 8) == (2, 128)  # the equation that a run prints
    assert split(2048, 128, 1) == (16, 128)
    assert split(8, 128, 1) == (1, 8)
    assert split(12, 5, 1) == (3, 4)
    assert split(7, 5, 1) == (7, 1)
    with pytest.raises(UserError, match="--batch-size 8 .* 3 ranks; nearest that work: 6 or 9"):
        split(8, 128, 3)
    with pytest.raises(UserError, match="nearest that work: 4$"):
        split(2, 128, 4)


def test_workers__a_nodes_ranks_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24), raising=False)
    shares = (World.workers(SimpleNamespace(size=32, local_size=n), None) for n in (1, 4, 32))
    assert [*shares] == [16, 6, 1]


# --------------------------------------------------------------------------------------- schedule


def cosine(cfg, step):
    return engine.cosine(cfg, SimpleNamespace(number=step, per_epoch=10))


def test_cosine__corners():
    cfg = Config(base_lr=1e-3, batch_size=512, warmup_epochs=2, epochs=10, min_lr=1e-5)
    lr = [cosine(cfg, step) for step in range(101)]
    assert lr[0] == pytest.approx(2e-3 / 20)  # 2e-3 = 1e-3 x 512 / 256, twenty steps of warm-up
    assert lr[9] == pytest.approx(1e-3)
    assert lr[19] == lr[20] == pytest.approx(2e-3)
    assert lr[40] == pytest.approx(1e-5 + (2e-3 - 1e-5) * (1 + math.sqrt(0.5)) / 2)  # a quarter
    assert lr[60] == pytest.approx((2e-3 + 1e-5) / 2)  # half-way down
    assert lr[100] == pytest.approx(1e-5)
    assert all(a < b for a, b in zip(lr[:20], lr[1:20]))
    assert all(a > b for a, b in zip(lr[20:], lr[21:]))


@pytest.mark.parametrize("warmup, expected", [(0, [1, 1]), (0.25, [1 / 3, 2 / 3, 1])])
def test_cosine__warm_up_of_no_or_part_of_a_step(warmup, expected):
    cfg = Config(base_lr=1.0, batch_size=256, warmup_epochs=warmup, epochs=10_000)
    lr = [cosine(cfg, step) for step in range(len(expected))]
    assert lr == pytest.approx(expected, abs=1e-6)


def test_decay_groups__no_decay_on_biases_norms_tokens_embeddings():
    model = CFMAE(tiny_run.config("unused"))
    frozen = model.encoder.blocks[0].mlp.fc1.weight.requires_grad_(False)
    decay, plain = engine.decay_groups(model, 0.05)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {p: n for n, p in model.named_parameters() if p is not frozen}
    assert len(decay["params"]) + len(plain["params"]) == len(names)
    assert {*decay["params"], *plain["params"]} == set(names)
    linear = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))} - {frozen}
    labels = {model.encoder.instance_embed.weight, model.encoder.semantic_embed.weight}
    assert set(decay["params"]) == linear | labels  # a label's rows are a linear layer's weight
    assert {"mask_token", "task_embed", "encoder.cls_token"} <= {names[p] for p in plain["params"]}


@pytest.mark.parametrize("clip, norm", [(None, 5), (2.5, 2.5), (10, 5)])
def test_update__clips_the_norm_and_scales_the_rate_of_a_group(clip, norm):
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    groups = [{"params": [model[0]]}, {"params": [model[1]], "lr_scale": 0.25}]
    run = SimpleNamespace(
        number=4, total=9, stop=5, per_epoch=2, accum=1, device="cpu", model=model,
        meter=mock.Mock(), optimizer=torch.optim.SGD(groups, lr=0.0),
        cfg=SimpleNamespace(log_every=99, clip_grad=clip),
    )  # fmt: skip
    for p, grad in zip(model, (3.0, 4.0)):
        p.grad = torch.full((1,), grad)
    step = engine.Step(run)
    step.update(0.1)
    assert [p.item() for p in model] == pytest.approx([-0.06 * norm, -0.02 * norm])
    assert step.record == {"step": 5, "epoch": 2.5, "lr": 0.1, "grad_norm": pytest.approx(5)}


# ------------------------------------------------------------------------------------- the folder


@pytest.mark.slow
def test_open_folder__a_run_is_not_touched_without_resume(tmp_path):
    assert tiny_run.train(tmp_path, "--resume", "--steps", 1) == 0  # nothing there yet: it starts
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match="holds a run: continue it with --resume"):
        tiny_run.train(tmp_path, "--steps", 2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_open_folder__a_new_one_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {engine.open_folder(Config(), "coma_dyvit")[0] for _ in range(3)}
    assert len(paths) == 3 and all("coma_dyvit-" in p for p in paths)


# ------------------------------------------------------------------------------ runs that go wrong


@pytest.mark.parametrize("save_minutes", [0, 60])
@pytest.mark.slow
def test_nonfinite_loss__is_named_and_not_saved(tmp_path, save_minutes):
    sampler = data.BatchSampler(tiny_run.SCENES, 8, 0)
    samples = str([index for _, index in sampler.indices(14)])  # of step 15; a line comes at 16
    with pytest.raises(UserError) as error:
        tiny_run.train(tmp_path, "--save-minutes", save_minutes, build=tiny_run.Diverging)
    text = str(error.value)
    assert "the loss of step 15 is not finite (loss inf, loss_rgb inf, fine 1)" in text
    assert samples in text
    assert ("no checkpoint" if save_minutes else f"last good checkpoint {tmp_path}") in text
    assert save_minutes or tiny_run.checkpoint(tmp_path)["step"] == 14
    assert all(v.isfinite().all() for p in tmp_path.glob("*.pt") for v in
               torch.load(p, weights_only=True)["model"].values())  # fmt: skip
    assert [r["step"] for r in tiny_run.lines(tmp_path)] == [4, 8, 12]


class Spoiled(tiny_run.Diverging):
    """A model whose loss stays finite; at step 7 its gradient does not."""

    def forward(self, batch, progress):
        if self.training and 6.5 / tiny_run.STEPS < progress < 7.5 / tiny_run.STEPS:
            self.encoder.weight.register_hook(lambda grad: grad * torch.nan)
        return super().forward(batch, progress * 0)


def test_weights_that_are_not_finite__are_named_and_not_saved(tmp_path):
    with pytest.raises(UserError, match="not finite after step 8: encoder.weight; "):
        tiny_run.train(tmp_path, "--save-minutes", 0, "--steps", 8, build=Spoiled)
    kept = tiny_run.checkpoint(tmp_path)
    assert kept["step"] == 7 and all(x.isfinite().all() for x in kept["model"].values())


@pytest.mark.slow
def test_save__comes_after_save_minutes_and_a_resumed_run_is_not_evaluated_first(
    tmp_path, monkeypatch
):
    clock, saved, whole = [0.0], [], engine.checkpoint.save

    class Slow(tiny_run.Diverging):
        def forward(self, batch, progress):
            clock[0] += 25 * self.training  # seconds
            return super().forward(batch, progress)

    for module in ("run", "step", "loop"):
        fake = SimpleNamespace(monotonic=lambda: clock[0])
        monkeypatch.setattr(f"engine.{module}.time", fake, raising=False)
    monkeypatch.setattr(
        engine.checkpoint, "save", lambda p, c: saved.append(c["step"]) or whole(p, c)
    )
    tiny_run.train(tmp_path, "--save-minutes", 1, "--steps", 9, build=Slow)
    assert saved == [3, 6, 9]
    saved.clear()  # snapshots, every 125 seconds, do not put off what --resume looks for
    flags = "--save-epochs", 1, "--save-minutes", 3, "--steps", 9
    tiny_run.train(tmp_path / "b", *flags, build=Slow)
    assert saved == [5, 8, 9]
    tiny_run.train(tmp_path, "--steps", 10, "--resume", build=Slow)
    records = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "val" in r] == [0, 9, 10]


@pytest.mark.slow
def test_save__of_a_stopped_run_outlives_a_second_signal(tmp_path, monkeypatch):
    whole = engine.checkpoint.save

    def save(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        whole(*args)

    monkeypatch.setattr(engine.checkpoint, "save", save)
    build = functools.partial(tiny_run.Interrupted, step=3, micro=0)
    assert tiny_run.train(tmp_path, build=build) == 128 + signal.SIGTERM
    assert tiny_run.checkpoint(tmp_path)["step"] == 4


def test_end_of_epoch__saves_looks_and_draws_every_so_many(monkeypatch):
    done, cfg = [], SimpleNamespace(save_epochs=2, val_epochs=3, preview_epochs=4)
    meter = SimpleNamespace(bad=0, restart=lambda: None)
    run = SimpleNamespace(cfg=cfg, meter=meter, per_epoch=5, stop=60, save=done.append)
    monkeypatch.setattr(
        "engine.loop.validate", lambda run, _, preview: done.append((run.number / 5, preview))
    )
    for run.number in range(1, 61):
        end_of_epoch(run, None, "drawn")
    saved = [f"epoch-{n:04d}.pt" for n in (2, 4, 6, 8, 10, 12)]
    assert [x for x in done if x in saved] == saved and len(done) == 11
    looks = [(3, None), (4, "drawn"), (6, None), (8, "drawn"), (9, None)]  # 12 is the end's
    assert [x for x in done if x not in saved] == looks


def test_log__rate_is_of_training_alone(tmp_path, monkeypatch):
    """Not of the look at val that falls between two steps of a line."""
    clock = [0.0]

    class Slow(tiny_run.Diverging):
        def forward(self, batch, progress):
            clock[0] += 25 if self.training else 1000  # seconds
            return super().forward(batch, progress)

    fake = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("engine.log.time", fake)
    tiny_run.train(tmp_path, "--val-epochs", 1, "--steps", 8, build=Slow)
    rates = [r["images_per_s"] for r in tiny_run.lines(tmp_path, times=True)]
    assert rates == pytest.approx([8 / 25, 8 / 25])


def test_meter__a_loss_that_is_not_finite_on_another_rank(tmp_path, monkeypatch):
    def all_reduce(x, op=dist.ReduceOp.SUM):  # the other one's: step 15, its terms
        x.copy_(x.clamp(max=14.0) if op == dist.ReduceOp.MIN else x + torch.tensor([1, torch.inf]))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    world = SimpleNamespace(rank=0, size=2, device="cpu")
    meter = Meter(tmp_path, world, None, None)
    meter.add(14, torch.ones(()), {}, torch.tensor([-1]))
    with pytest.raises(UserError, match=r"the loss of step 15 is not finite \(loss inf\)"):
        meter.check(data.BatchSampler(40, 8, 0))


def test_meter__unreadable_files_are_those_of_all_ranks(tmp_path):
    """Rank 0 alone goes on from those of the epoch so far."""
    content, bad = {"step": 3, "window": {"bad": 7, "names": [], "sum": [], "count": 0}}, []
    for rank in range(4):
        world = SimpleNamespace(rank=rank, size=4, device="cpu", mean=lambda x: x)
        meter = Meter(tmp_path, world, None, content)
        bad.append(meter.bad)
        meter.bad = 2  # the mean over the ranks
        assert meter.window()["bad"] == 8
    assert bad == [7, 0, 0, 0]
    assert [most_unreadable(n) for n in (40, 10_999, 1_281_167)] == [10, 10, 1281]


def make_folder(root, images, broken):
    """A data folder of small JPEGs, the first `broken` of them cut off."""
    (root / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(images):
        path = root / "train" / f"{i:03d}.jpg"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
        if i < broken:
            path.write_bytes(path.read_bytes()[:100])


@pytest.mark.slow
def test_unreadable_images__are_counted_named_and_limited(tmp_path, capsys):
    flags = ["--granularities", "R", "--log-every", "1", "--epochs", 2, "--micro-batch", 4]
    make_folder(tmp_path / "few", 40, 3)
    os.rename(tmp_path / "few/train/002.jpg", tmp_path / "few/train/2\udcff.jpg")  # no UTF-8
    sys.stdout.reconfigure(errors="backslashreplace")  # as engine.command does
    assert tiny_run.train(tmp_path / "a", *flags, "--data", tmp_path / "few") == 0
    counts = [r["unreadable_files"] for r in tiny_run.lines(tmp_path / "a")]
    assert counts[4] == counts[9] == 3 and counts[:5] == sorted(counts[:5])  # by epoch
    names = os.fsdecode((tmp_path / "a" / "bad_files.txt").read_bytes()).split()
    assert sorted(names) == sorted(["000.jpg", "001.jpg", "2\udcff.jpg"] * 2)

    said = capsys.readouterr().out  # before the first step
    assert "warning train: 40 of 40 samples checked, 3 unreadable" in " ".join(said.split())
    assert said.index("001.jpg") < said.index("more than 10 in an epoch") < said.index("method ")

    make_folder(tmp_path / "many", 40, 15)
    with pytest.raises(UserError, match=r"1\d unreadable images.*more than 10.*bad_files.txt"):
        tiny_run.train(tmp_path / "b", *flags, "--data", tmp_path / "many")
    assert len(tiny_run.lines(tmp_path / "b")) < 6  # within the first epoch
    tiny_run.train(tmp_path / "c", *flags, "--data", tmp_path / "many", "--steps", 1)
    with pytest.raises(UserError, match="unreadable images"):  # a resumed run goes on counting
        tiny_run.train(tmp_path / "c", *flags, "--data", tmp_path / "many", "--resume")
    assert tiny_run.lines(tmp_path / "c") == tiny_run.lines(tmp_path / "b")


@pytest.mark.slow
def test_file_list__is_frozen_with_the_first_checkpoint(tmp_path):
    flags = ["--granularities", "R", "--data", tmp_path / "data", "--epochs", 4]
    make_folder(tmp_path / "data", 20, 0)
    with pytest.raises(UserError, match="stub"):  # the list is written, then the start fails
        tiny_run.train(tmp_path / "a", *flags, build=mock.Mock(side_effect=UserError("stub")))
    (tmp_path / "data/train/0.jpg").write_bytes((tmp_path / "data/train/019.jpg").read_bytes())
    for out in "ab":
        assert tiny_run.train(tmp_path / out, *flags, *(["--steps", 3] if out == "a" else [])) == 0
    (tmp_path / "data/train/00.jpg").write_bytes((tmp_path / "data/train/019.jpg").read_bytes())
    assert tiny_run.train(tmp_path / "a", *flags, "--resume") == 0
    assert tiny_run.same_result(tmp_path / "a", tmp_path / "b")


def test_deterministic__is_asked_of_torch_and_cublas(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for flags in ((), ("--deterministic",)):
        with pytest.raises(UserError, match="stub"):
            tiny_run.train(tmp_path, *flags, build=mock.Mock(side_effect=UserError("stub")))
    assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# --------------------------------------------------------------------------------- what a run says


def test_tensorboard__has_the_logs_numbers_and_forgets_what_is_done_again(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--log", "tensorboard", "--log-every", 1]
    assert tiny_run.train(tmp_path, *flags, "--steps", 3) == 0
    content = tiny_run.checkpoint(tmp_path)
    meter = Meter(tmp_path, World("cpu", "fp32"), None, content | {"step": 2}, "tensorboard")
    meter.write({"step": 3, "loss": 7.0})
    board = reading.EventAccumulator(str(tmp_path)).Reload()
    found = {e.step: e.value for e in board.Scalars("loss")}
    logged = {r["step"]: r["loss"] for r in tiny_run.lines(tmp_path) if "loss" in r}
    assert found == pytest.approx(logged) and found[3] == 7.0 and len(found) == 3
    assert "val/loss" in board.Tags()["scalars"]


def test_tensorboard__absent_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match="--log tensorboard: pip install tensorboard"):
        tiny_run.train(tmp_path, "--log", "tensorboard")
    assert not any((tmp_path / name).exists() for name in tiny_run.RUN_FILES)  # it can be run again


def test_peak_memory__without_the_unix_module(monkeypatch):
    assert peak_memory(torch.device("cpu")) > 100  # MiB: torch is loaded
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) == 0


# -------------------------------------------------------------------------------------- validation


def test_validation__evenly_spaced_over_the_split_and_the_ranks():
    seen, records = [], []

    class Counting(torch.utils.data.Dataset):
        def __len__(self):
            return 103

        def __getitem__(self, key):
            seen.append(key)
            return {"seed": torch.tensor(key[1]), "label": torch.tensor(key[1])}

    def mean_label(model, batch):
        return {"label": batch["label"].float().mean()}

    for rank in (0, 1):
        world = SimpleNamespace(
            rank=rank, size=2, mean=lambda x: x / 2, raise_error=lambda x: x, to_device=lambda x: x,
            workers=lambda wanted: 0, maximum=lambda x: [x],
        )  # fmt: skip
        run = object.__new__(Run)
        vars(run).update(
            cfg=Config(val_samples=20), world=world, val_set=Counting(), model=torch.nn.Identity(),
            micro=4, lead=False, number=0, per_epoch=1, autocast=contextlib.nullcontext,
            meter=SimpleNamespace(write=records.append),
        )  # fmt: skip
        validate(run, mean_label)
    assert seen == [(0, i * 103 // 20) for i in range(20)]
    assert seen[-1][1] > 90  # not the first folders alone
    means = [r["val"]["label"] for r in records]  # over 10 samples each, in batches of 4, 4, 2
    assert means == pytest.approx([sum(i for _, i in seen[a : a + 10]) / 20 for a in (0, 10)])


@pytest.mark.slow
def test_train__pictures_are_of_evenly_spaced_images(tmp_path):
    seen = []

    def reconstruct(model, batch):
        seen.extend(batch["seed"].tolist())
        return {"rgb": (batch["rgb"], None, batch["rgb"])}

    assert tiny_run.train(tmp_path, "--steps", 1, reconstruct=reconstruct) == 0
    assert seen == [data.sample_seed(0, 0, i) for i in (0, 10, 20, 30)]


@pytest.mark.parametrize("amx, avx512, bf16", [(1, 0, True), (0, 1, True), (0, 0, False)])
def test_has_bf16__on_cpus_with_units_for_it(monkeypatch, amx, avx512, bf16):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512), raising=False)
    assert engine.has_bf16(torch.device("cpu")) is bf16
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # a private name may go
    assert engine.has_bf16(torch.device("cpu")) is bool(amx)
