"""One reader of encoder files: ours, a transfer's of today and before, public ones; read once."""

import json

import pytest
import torch
from test_encoders import our_checkpoint

import engine
from downstream import encoders, public
from downstream.source import open_source
from engine import reader


@pytest.fixture(autouse=True)
def afresh():
    reader.forget()


def test_open_source__a_transfers_facts_and_those_of_before(tmp_path):
    our_checkpoint(tmp_path / "a.pt", "mae")
    description = encoders.describe(checkpoint=tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True) | {"method": "classify"}
    facts = {"description": description, "classes": ["cat", "dog"]}
    config = {"image_size": 96}
    engine.save(tmp_path / "new.pt", content | {"config": config, "facts": facts})
    old = {k: json.dumps(v) for k, v in facts.items()}
    engine.save(tmp_path / "old.pt", content | {"config": config | old})
    for name in ("new.pt", "old.pt"):
        source = open_source(tmp_path / name)
        assert source.facts["classes"] == ["cat", "dog"]
        assert source.description["config"]["image_size"] == 96
        assert source.description["method"] == "mae"
        source.description["config"]["depth"] = 99  # the caller's own copy
        assert open_source(tmp_path / name).facts["description"] == description
    for kept in ({}, {"classes": "[]"}):
        engine.save(tmp_path / "none.pt", content | {"config": config | kept, "facts": {}})
        with pytest.raises(engine.UserError, match="describes no encoder"):
            open_source(tmp_path / "none.pt")


@pytest.mark.slow
def test_open_source__reads_a_file_once(tmp_path, monkeypatch):
    our_checkpoint(tmp_path / "a.pt", "cfmae")
    reads, load = [], torch.load

    def counted(*args, **kwargs):
        reads.append(kwargs["mmap"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", counted)
    state = open_source(tmp_path / "a.pt").state
    encoders.open_encoder(checkpoint=tmp_path / "a.pt")
    assert reads == [True]
    changed = torch.zeros_like(state["norm.bias"])
    content = load(tmp_path / "a.pt", weights_only=True)
    content["model"]["encoder.norm.bias"] = changed
    engine.save(tmp_path / "a.pt", content)
    assert torch.equal(open_source(tmp_path / "a.pt").state["norm.bias"], changed)
    torch.save(content, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    open_source(tmp_path / "b.pt")  # a format that cannot be mapped
    assert reads == [True, True, False]


def test_open_source__of_a_public_file(tmp_path):
    our_checkpoint(tmp_path / "a.pt", "mae")
    encoder, _, _ = encoders.open_encoder(checkpoint=tmp_path / "a.pt")
    state = {**encoder.state_dict(), "pos_embed": torch.rand(1, 65, 128), "fc.bias": torch.ones(2)}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].reshape(128, 3, 8, 8)
    torch.save({"model": state}, tmp_path / "public.pth")
    source = open_source(init=tmp_path / "public.pth", num_heads=4)
    assert source.description["method"] == "vit" and source.description["options"] == {}
    assert source.state["pos_embed"].shape == (1, 64, 128)
    found = public.open_public(tmp_path / "public.pth")
    assert source.state.keys() == found.state.keys() and not source.facts.get("classes")
