"""Checkpoints: whole or absent on disk, harmless to read, and refused where they do not fit."""

import io
import os
import pickle
import re
import shutil
from types import SimpleNamespace

import data
import engine
import numpy as np
import pytest
import tiny_run
import torch
from engine import UserError
from engine.folder import open_data
from engine.ranks import World
from torch import nn

WHOLE = {"format": engine.FORMAT, "method": "cfmae", "step": 3, "config": {}, "model": {},
         "optimizer": {}, "window": {}}  # fmt: skip


@pytest.mark.parametrize("crash", ["torch.save", "os.fsync", "os.replace"])
def test_save__a_crash_leaves_the_old_file_whole(tmp_path, monkeypatch, crash):
    path = tmp_path / "last.pt"
    engine.save(path, WHOLE)

    def fail(*args, **kwargs):
        if crash == "torch.save":
            args[1].write(b"half of a new file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(crash, fail)
        with pytest.raises(UserError, match=f"cannot write {path}"):
            engine.save(path, WHOLE | {"step": 4})
    assert engine.load(path, "cfmae")["step"] == 3
    (tmp_path / "last.pt.tmp").write_bytes(b"left by the crash")
    assert engine.load(path, "cfmae")["step"] == 3
    engine.save(path, WHOLE | {"step": 5})
    assert engine.load(path, "cfmae")["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("container", ["pickle", "zip"])
def test_load__executes_nothing(tmp_path, container):
    target, path = tmp_path / "executed", tmp_path / "last.pt"
    bad = WHOLE | {"config": Bomb(target)}
    path.write_bytes(pickle.dumps(bad)) if container == "pickle" else torch.save(bad, path)
    with pytest.raises(UserError, match="cannot be read safely|can be read safely"):
        engine.load(path, "cfmae")
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # it would have
    assert target.exists()


def whole_bytes():
    buffer = io.BytesIO()
    torch.save(WHOLE | {"model": {"w": torch.randn(999)}}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read safely"),
        (np.random.default_rng(0).bytes(4096), "cannot be read safely"),
        (whole_bytes()[:-700], "cannot be read safely"),
        ([1, 2], "not a checkpoint of this project"),
        ({"model": {}}, "not a checkpoint of this project"),
        (WHOLE | {"method": "mcmae"}, re.escape("('mcmae', 1); wanted ('cfmae', 1)")),
        (WHOLE | {"format": 99}, re.escape("('cfmae', 99); wanted ('cfmae', 1)")),
    ],
)
def test_load__refuses_what_is_not_ours(tmp_path, content, message):
    path = tmp_path / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message):
        engine.load(path, "cfmae")
    with pytest.raises(UserError, match="no such file"):
        engine.load(tmp_path / "other.pt", "cfmae")
    with pytest.raises(UserError, match="is a folder, not a file; .* last.pt in it"):
        engine.load(tmp_path, "cfmae")


def test_load_weights__all_or_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    bias = state.pop("1.bias")
    state |= {"2.bias": bias, "1.weight": torch.zeros(5, 5), "0.bias": "text"}
    with pytest.raises(UserError, match="nothing was loaded") as error:
        engine.load_weights(model, state, "x.pt")
    parts = "x.pt", "missing 1.bias", "unexpected 2.bias", "0.bias", "1.weight has shape (5, 5)"
    for part in parts:
        assert part in str(error.value)
    assert tiny_run.same_bits(dict(model.state_dict()), before)
    engine.load_weights(model, {k: v + 1 for k, v in before.items()}, "x.pt")
    assert all((v == before[k] + 1).all() for k, v in model.state_dict().items())


def test_load_weights__reports_what_stays_and_what_is_fresh():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 1)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {"weight": torch.ones(2, 3), "encoder.bias": torch.ones(2), "fc.x": None, "fc.y": 0}
    with pytest.raises(UserError, match="missing head.weight; missing head.bias; unexpected fc.x"):
        engine.load_weights(model, state, "x.pt")
    heads = dict(may_miss=lambda k: k.startswith("head"), may_stay=lambda k: k.startswith("fc"))
    report = engine.load_weights(model, state, "x.pt", **heads)
    wanted = "x.pt: 2 tensors loaded; left out: fc (2); missing, so fresh: head (2)"
    assert report == wanted and model["encoder"].weight.eq(1).all()
    assert model["encoder"].bias.eq(1).all()
    assert tiny_run.same_bits(dict(model["head"].state_dict()), {
        k.removeprefix("head."): v for k, v in before.items() if k.startswith("head.")
    })  # fmt: skip


def test_load_optimizer__refuses_the_state_of_other_parameters():
    def stepped(*sizes):
        model = nn.Sequential(*(nn.Linear(3, n, bias=False) for n in sizes))
        optimizer = torch.optim.AdamW(model.parameters())
        sum(m(torch.ones(3)).sum() for m in model).backward()
        optimizer.step()
        return optimizer

    optimizer, good = stepped(1, 2), stepped(1, 2).state_dict()
    odd = good | {"state": good["state"] | {0: {"exp_avg": "text"}}}
    for state in (stepped(1, 2, 3).state_dict(), stepped(2, 1).state_dict(), odd, {}, {"state": 1}):
        with pytest.raises(UserError, match="optimizer state in x.pt does not fit"):
            engine.load_optimizer(optimizer, state, "x.pt")
    good["state"][0]["exp_avg"] += 1
    engine.load_optimizer(optimizer, good, "x.pt")
    assert tiny_run.same_bits(optimizer.state_dict()["state"], good["state"])


def test_save__a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    path = tmp_path / "last.pt"
    engine.save(path, {"x": torch.zeros(1000)})
    whole = path.read_bytes()
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"cannot write {path}: .*--resume") as error:
        engine.save(path, {"x": torch.zeros(1000000)})
    assert "\n" not in str(error.value)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_train__a_full_disk_is_one_line_for_every_file(tmp_path, monkeypatch):
    (tmp_path / "log").mkdir(), (tmp_path / "bad").mkdir()
    (tmp_path / "log" / "config.json").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*config.json: No space left"):
        tiny_run.train(tmp_path / "log", "--steps", 1, "--resume")
    meter = object.__new__(engine.Meter)
    meter.world, meter.out = World("cpu", "fp32"), tmp_path / "bad"
    (tmp_path / "bad" / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*log.jsonl: No space left"):
        meter.write({"step": 1})
    files = data.FileList(np.array([b"a"]), np.zeros(1, np.int32), {"rgb": "x"}, [])
    monkeypatch.setattr(data, "scan", lambda *a: files)
    monkeypatch.setattr(data, "check", lambda *a: "")
    cfg = tiny_run.config(tmp_path, "--data", tmp_path, "--granularities", "R")
    (tmp_path / "out").mkdir(), (tmp_path / "out" / "files-train").mkdir()
    (tmp_path / "out" / "files-train" / "files.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*files-train: No space left"):
        open_data(cfg, meter.world, tmp_path / "out", "train")


def test_warn_of_space__where_a_checkpoint_does_not_fit(tmp_path, monkeypatch, capsys):
    model = torch.nn.Linear(1024, 1024, bias=False)  # 4 MiB, 12 with AdamW's moments
    for free, kept, warned in ((23, False, True), (25, False, False), (11, True, True),
                               (13, True, False)):  # fmt: skip
        (tmp_path / "last.pt").touch() if kept else (tmp_path / "last.pt").unlink(missing_ok=True)
        usage = SimpleNamespace(free=free * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        engine.warn_of_space(model, tmp_path)
        assert ("warning" in capsys.readouterr().out) == warned


@pytest.mark.slow
def test_resume__names_what_changed_and_lets_free_fields_change(tmp_path, capsys):
    assert tiny_run.train(tmp_path, "--steps", 2) == 0
    with pytest.raises(UserError) as error:
        flags = ("--seed", 1, "--alpha", 0.6, "--epochs", 13, "--precision", "bf16")
        tiny_run.train(tmp_path, "--resume", *flags)
    for part in ("--seed was 0, is 1", "--alpha was 0.75, is 0.6", "--epochs was 12, is 13",
                 "--precision was fp32, is bf16"):  # fmt: skip
        assert part in str(error.value)
    before = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    assert tiny_run.train(tmp_path, "--resume", "--steps", 2) == 0  # a cluster's restart
    assert capsys.readouterr().out == f"finished already: {tmp_path} is at step 2 of 60\n"
    assert (tmp_path / "last.pt").read_bytes() == before
    free = "--micro-batch 4 --save-minutes 9 --save-epochs 1 --val-samples 4 --workers 1 --compile"
    free += " --val-epochs 3 --preview-epochs 2 --log tensorboard --log-every 9 --device auto"
    cfg = tiny_run.config(tmp_path, "--resume", *free.split())
    engine.refuse_changes(cfg, tiny_run.checkpoint(tmp_path)["config"], tmp_path)
    free = "--steps 5 --micro-batch 4 --log-every 1 --save-epochs 1 --val-samples 4".split()
    assert tiny_run.train(tmp_path, "--resume", *free) == 0
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["epoch-0001.pt", "last.pt"]


def test_load_encoder__refuses_a_config_with_unknown_fields(tmp_path):
    path = tmp_path / "last.pt"
    engine.save(path, WHOLE | {"config": {"seed": 3, "colour": "blue"}})
    with pytest.raises(UserError, match="unknown here: colour$"):
        engine.load_encoder(path, "cfmae", engine.Config)
    engine.save(path, WHOLE | {"config": {"seed": 3}, "model": {"encoder.x": torch.ones(1)}})
    cfg, state = engine.load_encoder(path, "cfmae", engine.Config)
    assert cfg.seed == 3 and list(state) == ["x"]
