"""What scores frozen features: linear heads, LARS that trains them as MAE does, neighbours."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.scores import tally


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled to the size of each weight matrix (arXiv 1708.03888).

    As MAE has it: the update of a matrix is trust x |p| / |g + decay p| times itself before it
    enters the momentum; biases take neither that factor nor the decay.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=0.9, trust=0.001))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    size, change = p.norm(), update.norm()
                    ratio = group["trust"] * size / change
                    update = update * ratio.where((size > 0) & (change > 0), 1.0)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(update)
                p.add_(momentum, alpha=-group["lr"])


class Heads(nn.Module):
    """Linear classifiers that share their input, normalised without trained parameters.

    Args:
        n: classifiers. dim: their input's width. std: of their first weights, the same for all.
        kind: "lars", MAE's BatchNorm, or "adamw", the LayerNorm of SemanticMIM's public code.
    """

    def __init__(self, n: int, dim: int, classes: int, kind: str = "lars", std: float = 0.01):
        super().__init__()
        if kind == "lars":  # frozen features do not drift: a plain average of statistics
            self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6, momentum=None)
        else:
            self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        start = torch.empty(dim, classes)
        nn.init.trunc_normal_(start, std=std)
        self.weights = nn.ParameterList(start.clone() for _ in range(n))
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (n, B, C)."""
        weights, biases = torch.stack([*self.weights]), torch.stack([*self.biases])
        return torch.einsum("bd,ndc->nbc", self.norm(x.float()), weights) + biases[:, None]


@torch.no_grad()
def score_heads(heads: Heads, rows: np.ndarray, labels: np.ndarray, device: torch.device) -> Tensor:
    """Counts of every head, (n, C, 3)."""
    counts = 0.0
    for start in range(0, len(rows), 4096):
        x = np.ascontiguousarray(rows[start : start + 4096])
        logits = heads(torch.from_numpy(x).to(device))
        y = torch.from_numpy(labels[start : start + 4096]).to(device)
        counts = counts + torch.stack([tally(x, y) for x in logits])
    return counts.cpu()


@torch.no_grad()
def knn(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 16384,
    device: torch.device = torch.device("cpu"),
) -> Tensor:
    """Votes of the k most similar of the bank, weighted by exp(cosine / temperature).

    The bank passes once, `block` rows at a time; each query keeps its best k so far. So memory
    holds a block, the queries and their votes, whatever the size of the bank.

    Args:
        bank: (N, D); labels (N,) int64, -1 is left out; queries (Q, D).
    Returns: (Q, classes) float32 on the CPU.
    """
    usable = np.flatnonzero(labels >= 0)
    k = min(k, len(usable))
    best = torch.full((len(queries), k), -torch.inf)
    voters = torch.zeros(len(queries), k, dtype=torch.int64)
    for start in range(0, len(usable), block):
        picks = usable[start : start + block]
        keys = F.normalize(torch.from_numpy(bank[picks]).to(device).float(), dim=1)
        classes_of = torch.from_numpy(labels[picks]).to(device)
        for q in range(0, len(queries), 1024):
            at = slice(q, q + 1024)
            x = torch.from_numpy(np.ascontiguousarray(queries[at])).to(device).float()
            cosine = F.normalize(x, dim=1) @ keys.T  # (q, block)
            both = torch.cat([best[at].to(device), cosine], dim=1)
            names = torch.cat([voters[at].to(device), classes_of.expand(len(x), -1)], dim=1)
            top, ids = both.topk(k, dim=1)
            best[at], voters[at] = top.cpu(), names.gather(1, ids).cpu()
    return torch.zeros(len(queries), classes).scatter_add_(1, voters, (best / temperature).exp())
