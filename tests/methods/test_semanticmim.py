"""SemanticMIM: both stacks against the public code, what flows where, masks, encoder, bad input."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import common
import engine
import semanticmim

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = str(GOLDEN / "dalle_encoder.pt")
SMALL = ["--model", "tiny", "--image-size", "64", "--patch-size", "8", "--embed-dim", "32",
         "--depth", "3", "--num-heads", "4"]  # fmt: skip
DVAE = ["--target", "dvae", "--drop-path", "0"]


def config(*flags):
    return engine.parse(semanticmim.Config, semanticmim.PRESETS, "", [*SMALL, *map(str, flags)])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The golden encoder's state dict as a file."""
    path = tmp_path_factory.mktemp("tokenizer") / "dalle_encoder.pth"
    torch.save(torch.load(TOKENIZER, weights_only=True)["state_dict"], path)
    return path


def make(*flags):
    torch.manual_seed(0)
    model = semanticmim.SemanticMIM(config(*flags))
    with torch.no_grad():  # no zero hides a wiring mistake
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def make_batch(B=4, size=64):
    rgb = torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(1))  # fmt: skip
    return {"rgb": rgb, "seed": torch.arange(B) * 7919 + 3}


# -------------------------------------------------------------------------------- the public code


def rename(state, P):
    """Public names to ours; proxies carry a slice of the position embedding there."""
    D = state["mask_token"].shape[-1]
    prefix = "reg" if any(k.startswith("extra_layers") for k in state) else "cls"
    new = {
        f"encoder.{prefix}_token": state["cls_token"] + state["pos_embed"][:, :P],
        "encoder.pos_embed": state["pos_embed"][:, P:],
        "mask_token": state["mask_token"],
    }
    for w in ("weight", "bias"):
        new[f"encoder.patch_embed.proj.{w}"] = state[f"patch_embed.projection.{w}"]
        new[f"decoder_norm.{w}"] = state[f"ln1.{w}"]
    parts = {"ln1": "norm1", "ln2": "norm2", "attn.proj": "attn.proj", "ffn.layers.0.0": "mlp.fc1",
             "ffn.layers.1": "mlp.fc2", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}  # fmt: skip
    for layer in sorted({k.rsplit(".ln1")[0] for k in state if ".ln1." in k}):
        stack, i = layer.split(".")
        own = f"{'encoder.blocks' if stack == 'layers' else 'decoder_blocks'}.{i}"
        s = {k[len(layer) + 1 :]: v for k, v in state.items() if k.startswith(f"{layer}.")}
        for k, v in s.items():
            part = next((p for p in parts if k == p or k.startswith(f"{p}.")), None)
            if part:
                new[f"{own}.{parts[part]}{k[len(part) :]}"] = v
        if "attn.q_bias" in s:  # BEiT: no bias of keys
            q, kv = s["attn.q_proj.weight"], s["attn.kv_proj.weight"]
            q_bias, kv_bias = s["attn.q_bias"], torch.cat([torch.zeros(D), s["attn.v_bias"]])
        else:
            q, q_bias = s["attn.q.weight"], s["attn.q.bias"]
            kv, kv_bias = s["attn.kv.weight"], s["attn.kv.bias"]
        if stack == "layers":
            new |= {f"{own}.attn.qkv.weight": torch.cat([q, kv])}
            new |= {f"{own}.attn.qkv.bias": torch.cat([q_bias, kv_bias])}
        else:
            new |= {f"{own}.attn.q.weight": q, f"{own}.attn.q.bias": q_bias}
            new |= {f"{own}.attn.kv.weight": kv, f"{own}.attn.kv.bias": kv_bias}
    return new


@pytest.mark.parametrize("kind", ["maskfeat", "beit"])
@pytest.mark.parametrize("proxies", ["proxy", "plain"])
def test_tokens__match_the_public_code(kind, proxies):
    g = torch.load(GOLDEN / f"semanticmim_{kind}_{proxies}.pt", weights_only=True)
    P = g["config"]["num_cls_tokens"]
    model = make("--proxies", P if proxies == "proxy" else 0, "--patch-size", 16,
                 "--mask-ratio", 0.6, "--layer-scale", 0.1 if kind == "beit" else 0)  # fmt: skip
    missing, unexpected = model.load_state_dict(rename(g["state_dict"], P), strict=False)
    assert not unexpected and all(k.startswith(("decoder_pred", "encoder.norm")) for k in missing)
    tokens = model.tokens(model.normalize(g["rgb"]), g["mask"])
    torch.testing.assert_close(tokens, g["mask_tokens_out"], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------- what flows


class Frozen(nn.Module):
    """An encoder block whose proxies come out as constants, whatever goes in."""

    def __init__(self, block, P):
        super().__init__()
        self.block, self.P = block, P

    def forward(self, x, drop=None):
        y = self.block(x, drop)
        return torch.cat([torch.ones_like(y[:, : self.P]), y[:, self.P :]], dim=1)


def pixel_gradient(model):
    batch = make_batch()
    imgs = model.normalize(batch["rgb"]).requires_grad_()
    mask = semanticmim.make_mask(model.cfg, batch, None)
    # the constant keeps a graph where nothing flows
    total = model.tokens(imgs, mask)[..., 0].square().sum() + 0 * imgs.sum()
    return torch.autograd.grad(total, imgs)[0].abs().sum()


def test_flow__from_img_to_mask_goes_through_proxies_alone():
    model = make("--no-skip-last")
    assert pixel_gradient(model) > 0
    model.encoder.blocks = nn.ModuleList(Frozen(b, 4) for b in model.encoder.blocks)
    assert pixel_gradient(model) == 0
    plain = make("--proxies", 0)
    plain.encoder.blocks = nn.ModuleList(Frozen(b, 1) for b in plain.encoder.blocks)
    assert pixel_gradient(plain) > 0  # Eq. 2: straight to [MASK]


@pytest.mark.parametrize("proxies", [4, 0])
def test_flow__from_mask_to_img_and_proxy_there_is_none(proxies):
    model, batch, seen = make("--proxies", proxies, "--no-skip-last"), make_batch(), []
    P, V = model.encoder.num_prefix, model.cfg.num_visible
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _, x, y: seen.append(y[:, : P + V]))
    model.tokens(model.normalize(batch["rgb"]), semanticmim.make_mask(model.cfg, batch, None))
    assert len(seen) == 3
    for y in seen:
        (g,) = torch.autograd.grad(
            y.square().sum(), model.mask_token, retain_graph=True, allow_unused=True
        )
        assert (g is None) if proxies else g.abs().sum() > 0


def test_flow__hidden_pixels_are_not_read():
    model, batch = make(), make_batch()
    mask, imgs = semanticmim.make_mask(model.cfg, batch, None), model.normalize(batch["rgb"])
    hidden = common.unpatchify(mask[..., None].expand(-1, -1, 192).float(), 8, (8, 8)).bool()
    tokens = model.tokens(imgs, mask)
    assert torch.equal(tokens, model.tokens(imgs.masked_fill(hidden, 9.0), mask))
    assert not torch.equal(tokens, model.tokens(imgs.masked_fill(~hidden, 9.0), mask))


@pytest.mark.parametrize("layer_scale", [0, 0.1])
def test_first_rows__equal_the_whole_block(layer_scale):
    torch.manual_seed(0)
    block, x = common.Block(32, 4, init_values=layer_scale), torch.randn(3, 9, 32)
    drop = torch.tensor([[0.0, 1.0, 1.3], [1.3, 0.0, 1.0]])[..., None, None]  # (2, B, 1, 1)
    grads = []
    for y in (block(x, drop)[:, :4], semanticmim.first_rows(block, x, 4, drop)):
        grads.append([y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rate", [0, 0.7])
def test_skip_last__changes_neither_loss_nor_gradients(rate):
    batch, results = make_batch(), []
    for flag in ("--skip-last", "--no-skip-last"):
        model = make(flag, "--drop-path", rate)
        loss, _ = model(batch, torch.tensor(0.5))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("proxies", [0, 1, 4, 40])
@pytest.mark.parametrize("target", ["hog", "dvae"])
def test_gradients__reach_every_parameter(target, proxies, tokenizer):
    flags = [*DVAE, "--tokenizer", tokenizer] if target == "dvae" else []
    model = make("--proxies", proxies, *flags)
    loss, logs = model(make_batch(), torch.tensor(0.0))
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    fresh = {"encoder.norm.weight", "encoder.norm.bias"}  # for transfer
    assert {n for n, p in model.named_parameters() if n not in trained} == fresh
    assert loss.isfinite() and set(logs) == ({"accuracy"} if target == "dvae" else set())


# ----------------------------------------------------------------------------- samples and training


@pytest.mark.slow
@pytest.mark.parametrize("proxies", [4, 0])
def test_drop_path__drops_in_both_stacks_and_not_alike(proxies):
    model = make("--proxies", proxies, "--drop-path", 0.4, "--no-skip-last")
    stacks = model.encoder.blocks, model.decoder_blocks
    drops = [[], []]
    for found, stack in zip(drops, stacks):
        for block in stack:
            block.register_forward_pre_hook(lambda _, args, found=found: found.append(args[-1]))
    seed = torch.arange(500)
    imgs, mask = torch.zeros(500, 3, 64, 64), semanticmim.make_mask(model.cfg, {"seed": seed}, None)
    model.tokens(imgs, mask, seed)
    assert [len(d) for d in drops] == ([3, 3] if proxies else [3, 0])
    drops = torch.cat([torch.stack(d) for d in drops if d])[..., 0, 0]  # (layers, 2, B)
    rates = torch.tensor([0, 0.2, 0.4] * (2 if proxies else 1))
    share = (drops == 0).float().mean((1, 2))  # 5 standard deviations of a binomial
    assert ((share - rates).abs() <= 5 * (rates * (1 - rates) / 1000).sqrt()).all()
    varied = (drops[rates > 0] == 0).float().flatten(0, 1)
    others = torch.cat([varied, varied[:, seed ^ 1]])  # and the neighbour's, whose seed is close
    alike = others.corrcoef() - torch.eye(len(others))
    assert alike.abs().max() < 5 / 500**0.5  # no branch, layer, stack or sample drops with another


def test_forward__target_and_input_are_of_the_jittered_image(monkeypatch):
    model = make("--target", "dvae", "--tokenizer", "random", "--color-jitter", 0.4)
    batch, seen = make_batch(), []
    target = model.make_target
    monkeypatch.setattr(model, "make_target", lambda x: seen.append(x) or target(x))
    model.normalize.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(batch, torch.tensor(0.0))
    expected = semanticmim.color_jitter(batch["rgb"], batch["seed"], 0.4)
    assert len(seen) == 2 and not torch.equal(expected, batch["rgb"])
    assert all(torch.equal(x, expected) for x in seen)


@pytest.mark.parametrize("flags", [
    ["--first-weights", "mae"], ["--first-weights", "public"],
    ["--first-weights", "public", "--target", "dvae"],
    ["--first-weights", "public", "--target", "dvae", "--proxies", 0],
])  # fmt: skip
def test_init__is_the_public_codes_or_maes(flags):
    extra = ["--tokenizer", "random", "--embed-dim", 64] if "dvae" in flags else ["--embed-dim", 64]
    torch.manual_seed(0)
    model, public = semanticmim.SemanticMIM(config(*flags, *extra)), "public" in flags
    for name, p in model.named_parameters():
        if name.endswith(("_token", "decoder_pred.weight")):
            std = 0.02
        elif name == "encoder.pos_embed":
            assert public or torch.equal(p[0], common.sincos_2d(64, 8, 8))
            std = 0.02 if public else p.std().item()
        elif p.ndim == 1:
            scale = 0.1 if "dvae" in flags else 0
            value = scale if ".ls" in name else float("norm" in name and "weight" in name)
            assert (p == value).all(), name
            continue
        elif public:
            parts, std = name.split("."), 0.02
            if "dvae" in flags and name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                layer = int(parts[parts.index("weight") - 3]) + 1
                std = 0.02 / (2 * layer) ** 0.5
        else:
            n_out, n_in = p.flatten(1).shape
            std = (2 / (n_in + n_out)) ** 0.5  # Xavier
            assert p.abs().max() <= std * 3**0.5 + 1e-6
        assert p.std().item() == pytest.approx(std, rel=0.25 if p.numel() < 500 else 0.06), name
    token = getattr(model.encoder, "reg_token", model.mask_token)[0]
    assert len(token.unique(dim=0)) == len(token)  # alike at first, proxies stay alike for ever


def test_model__passes_the_tokenizers_precision_on(tokenizer):
    for file in ("random", tokenizer):
        flags = ("--target", "dvae", "--tokenizer", file, "--tokenizer-precision")
        assert [make(*flags, p).tokenizer.precision for p in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_presets__first_weights_are_public_but_in_the_short_run():
    names = {n: v.get("first_weights", semanticmim.Config.first_weights)
             for n, v in semanticmim.PRESETS.items()}  # fmt: skip
    assert names == {"tiny": "mae", "small": "public", "base": "public", "base-beit": "public"}


@pytest.mark.parametrize("target, spared", [
    ("hog", {"mask_token"}), ("dvae", {"encoder.reg_token", "encoder.pos_embed"}),
])  # fmt: skip
def test_no_decay__spares_what_the_public_code_spares(target, spared):
    flags = ["--target", "dvae", "--tokenizer", "random"] if target == "dvae" else []
    for proxies in (4, 0):
        model = make(*flags, "--proxies", proxies)
        names = {id(p): n for n, p in model.named_parameters()}
        groups = engine.decay_groups(model, 0.05, partial(semanticmim.no_decay, target))
        decay, plain = ({names[id(p)] for p in g["params"]} for g in groups)
        assert [g["weight_decay"] for g in groups] == [0.05, 0]
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert decay | plain == set(trained) and not decay & plain
        expected = spared if proxies else {n.replace("reg", "cls") for n in spared}
        assert {n for n in plain if trained[n].ndim > 1} == expected
        assert not {n for n in decay if trained[n].ndim == 1}


def test_main__decays_as_its_target_wants(tmp_path, monkeypatch):
    class Made(Exception):
        pass

    def made(groups, **_):
        raise Made(*(p.shape for g in groups if not g["weight_decay"] for p in g["params"]))

    monkeypatch.setattr(torch.optim, "AdamW", made)
    flags = ["--target", "dvae", "--tokenizer", "random", "--device", "cpu", "--workers", "0"]
    with pytest.raises(Made) as e:
        semanticmim.main([*SMALL, *flags, "--output", str(tmp_path / "run")])
    # proxies and positions, not [MASK]
    assert sorted(s for s in e.value.args if len(s) > 1) == [(1, 4, 32), (1, 64, 32)]


def test_loss__of_a_batch_is_the_mean_over_its_parts(tokenizer):
    """Masks, jitter and drop path come from each sample's seed alone."""
    batch = make_batch()
    model = make("--target", "dvae", "--tokenizer", tokenizer, "--drop-path", 0.5)
    whole, _ = model(batch, torch.tensor(0.0))
    each = ({k: v[i : i + 1] for k, v in batch.items()} for i in range(4))
    parts = [model(one, torch.tensor(0.0))[0] for one in each]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)
    evaluated, _ = model.eval()(batch, torch.tensor(0.0))
    assert not torch.isclose(evaluated, whole, rtol=1e-4)
    model.cfg.drop_path = model.cfg.color_jitter = 0.0  # what evaluation is without
    assert torch.equal(model.train()(batch, torch.tensor(0.0))[0], evaluated)


def test_loss__l1_l2_and_cross_entropy_match_a_loop(tokenizer):
    B, M, batch = 2, 39, make_batch(2)
    for flags in ([], ["--loss", "l1"], [*DVAE, "--tokenizer", tokenizer]):
        model = make(*flags)
        mask = semanticmim.make_mask(model.cfg, batch, None)
        target = model.make_target(batch["rgb"])
        hidden = [target[b, n] for b in range(B) for n in range(64) if mask[b, n]]
        pred = torch.randn(B, M, model.decoder_pred.out_features)
        errors = []
        for p, t in zip(pred.flatten(0, 1), hidden):
            if "dvae" in flags:
                errors.append(-p.log_softmax(0)[t.item()])
            else:
                errors.append(sum(abs(d) ** (1 if flags else 2) for d in (p - t).tolist()) / 108)
        loss, _ = model.loss(pred, torch.stack(hidden).view(B, M, -1))
        assert loss.item() == pytest.approx(float(sum(errors)) / (B * M), rel=1e-4)
    codes = torch.stack(hidden).view(B, M, 1)  # the dVAE's, all but the first two right
    sure = torch.zeros_like(pred).scatter_(2, codes, 1.0)
    sure[0, :2] *= -1
    assert model.loss(sure, codes)[1]["accuracy"].item() == pytest.approx(1 - 2 / (B * M))


@pytest.mark.parametrize("flags", [[], ["--proxies", 0], ["--target", "dvae"]])
@pytest.mark.slow
def test_training__lowers_the_loss(flags, tokenizer):
    codes = ["--tokenizer", tokenizer, "--color-jitter", 0] if "dvae" in flags else []
    model = make(*flags, *codes)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(20):
        loss, _ = model(make_batch(), torch.tensor(0.0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
