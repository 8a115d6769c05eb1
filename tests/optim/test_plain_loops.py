"""The loops that the README shows, run as they stand there."""

from __future__ import annotations

import torch
from torch import nn


def test_plain_pytorch_loop():
    # README: plain loop
    from smezo_pl import SparseMeZO

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2)).eval()
    inputs = torch.randn(256, 8)
    labels = (inputs[:, 0] + inputs[:, 1] > 0).long()

    optimizer = SparseMeZO(model.named_parameters(), lr=2e-2, eps=1e-3, sparsity=0.5)
    optimizer.attach(model)
    losses = []
    for step in range(300):
        rows = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(step))
        loss = optimizer.step(lambda rows=rows: nn.functional.cross_entropy(model(inputs[rows]), labels[rows]))
        losses.append(loss.item())
    accuracy = (model(inputs).argmax(-1) == labels).float().mean().item()
    # end
    assert accuracy > 0.85 and losses[-1] < losses[0]


def test_fabric_loop():
    # README: Fabric
    from lightning.fabric import Fabric

    from smezo_pl import SparseMeZO

    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2)).eval()
    inputs = torch.randn(256, 8)
    labels = (inputs[:, 0] + inputs[:, 1] > 0).long()

    optimizer = SparseMeZO(network.named_parameters(), lr=2e-2, eps=1e-3, sparsity=0.5)
    optimizer.attach(network)
    model, wrapped = fabric.setup(network, optimizer)
    for step in range(300):
        rows = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(step))
        loss = wrapped.step(lambda rows=rows: nn.functional.cross_entropy(model(inputs[rows]), labels[rows]))
    accuracy = (model(inputs).argmax(-1) == labels).float().mean().item()
    # end
    assert accuracy > 0.85 and loss < 0.6
