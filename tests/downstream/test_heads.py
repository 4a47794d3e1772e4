"""Linear heads and neighbours on frozen features: LARS and knn against their formulas."""

import numpy as np
import pytest
import torch

from downstream import heads


def naive_knn(bank, labels, queries, classes, k, temperature):
    votes = np.zeros((len(queries), classes))
    for q, x in enumerate(queries.astype(np.float64)):
        cosine = [(x @ b / np.linalg.norm(x) / np.linalg.norm(b), y)
                  for b, y in zip(bank.astype(np.float64), labels) if y >= 0]  # fmt: skip
        for c, y in sorted(cosine, reverse=True)[:k]:
            votes[q, y] += np.exp(c / temperature)
    return votes


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_knn__equals_brute_force(block):
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(150, 12)), rng.normal(size=(31, 12))
    bank, queries = bank.astype(np.float16), queries.astype(np.float16)
    labels = rng.integers(-1, 9, 150)
    votes = heads.knn(bank, labels, queries, 9, 20, 0.07, block)
    assert np.allclose(votes, naive_knn(bank, labels, queries, 9, 20, 0.07), rtol=1e-3)


def test_knn__a_bank_smaller_than_k():
    bank = np.eye(3, dtype=np.float32)
    votes = heads.knn(bank, np.array([0, 1, 1]), bank[:1], 2, 20, 0.5)
    assert votes[0].tolist() == pytest.approx([np.exp(2), 2])


def test_lars__equals_its_formula():
    torch.manual_seed(0)
    w, b = torch.randn(4, 3), torch.randn(3)
    params = [torch.nn.Parameter(x.clone()) for x in (w, b)]
    optimizer = heads.LARS(params, lr=0.5, weight_decay=0.2)
    mw, mb = torch.zeros(4, 3), torch.zeros(3)
    for _ in range(3):
        gw, gb = torch.randn(4, 3), torch.randn(3)
        params[0].grad, params[1].grad = gw.clone(), gb.clone()
        optimizer.step()
        gw = gw + 0.2 * w
        mw = 0.9 * mw + gw * 0.001 * w.norm() / gw.norm()
        mb = 0.9 * mb + gb
        w, b = w - 0.5 * mw, b - 0.5 * mb
    assert torch.allclose(params[0], w, atol=1e-6) and torch.allclose(params[1], b, atol=1e-6)
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    heads.LARS([zero], lr=1.0).step()
    assert torch.equal(zero, -torch.ones(2, 2))  # no size yet: plain SGD


def test_Heads__running_statistics_are_the_means_over_all_batches():
    torch.manual_seed(0)
    linear, batches = heads.Heads(1, 3, 2).train(), 5 + 2 * torch.randn(6, 8, 3)
    for x in batches:
        linear(x)
    assert torch.allclose(linear.norm.running_mean, batches.mean((0, 1)), atol=1e-5)
    assert torch.allclose(linear.norm.running_var, batches.var(1).mean(0), atol=1e-5)
