"""Small networks whose weights are used in the ways that real models use them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedLanguageModel(nn.Module):
    """Embedding and head are one parameter in two modules."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.hidden(self.embedding(ids)))))


class FunctionalHead(nn.Module):
    """The embedding's weight is used by its module and, beside that, by the parent's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.hidden(self.emb(ids))), self.emb.weight)


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads ``out_proj.weight`` without running ``out_proj``."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        return self.head(h + self.attention(h, h, h, need_weights=False)[0])


class Experts(nn.Module):
    """Experts as one three-dimensional parameter, and a router that leaves some of them unused."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.router = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8) * 0.3)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        expert = self.router(h).argmax(-1)
        return self.head(torch.einsum("btd,btde->bte", h, self.experts[expert]))


class ReturnsItsWeight(nn.Module):
    """A module that hands out a view of its parameter, kept by the caller until after the module's forward."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8))

        def forward(self, length: int) -> Tensor:
            return self.weight[:length]

    def __init__(self) -> None:
        super().__init__()
        self.positions = self.Positions()
        self.emb = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.positions(ids.shape[1])
        return self.head(self.emb(ids) + positions)


class SharedTwice(nn.Module):
    """One module called several times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        for _ in range(3):
            h = torch.tanh(self.block(h))
        return self.head(h)


NETWORKS = [TiedLanguageModel, FunctionalHead, Attention, Experts, ReturnsItsWeight, SharedTwice]


def loss_closure(model: nn.Module, seed: int = 0, rows: int = 3, length: int = 5):
    """A closure over one fixed batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (rows, length), generator=generator)
    targets = torch.randint(0, 11, (rows, length), generator=generator)

    def closure() -> Tensor:
        return F.cross_entropy(model(ids).float().flatten(0, 1), targets.flatten())

    return closure


def build(kind: type[nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().to(dtype).eval()
