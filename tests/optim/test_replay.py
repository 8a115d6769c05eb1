from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from smezo_pl.optim import SparseMeZO, StepRecord


def parameters(dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (70, 40), "b": (33,), "c": (300, 7), "d": (1,)}
    return [(n, nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype))) for n, s in shapes.items()]


def optimizer(dtype: torch.dtype, kernel: Any = "numba", **settings: Any) -> SparseMeZO:
    first, second = parameters(dtype)[:2], parameters(dtype)[2:]
    groups = [{"params": first}, {"params": second, "eps": 5e-4, "mask": "large", "maximize": True}]
    return SparseMeZO(groups, kernel=kernel, seed=3, **settings)


def steps(samples: int, count: int = 9) -> list[StepRecord]:
    """Changing rates; one group still for a while, a step that was skipped, one that moves nothing."""
    recorded = []
    for step in range(count):
        lr = (1e-2 / (1 + step), 0.0 if step in (2, 3) else 3e-3)
        gradients = (
            () if step == 4 else tuple(0.0 if step == 6 else (-1.0) ** (step + q) * (q + 1) for q in range(samples))
        )
        decay = (0.1 if step % 2 else 0.0, 0.0)
        recorded.append(StepRecord(step, (), gradients, lr, decay, (1e-3, 5e-4), (0.8, 0.8), skipped=step == 4))
    return recorded


def weights(of: SparseMeZO) -> list[torch.Tensor]:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [p.detach().view(kinds[p.element_size()]) for group in of.param_groups for p in group["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_samples": 3},
        {"noise": "rademacher"},
        {"mask": "dense"},
        {"mask_update": "constant"},
        {"mask": "random"},
        {"mask": "random", "mask_update": "constant"},
        {"kernel": "torch"},
    ],
    ids=str,
)
def test_many_steps_at_once_are_the_steps_one_by_one(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    together, apart = optimizer(dtype, **settings), optimizer(dtype, **settings)
    before = [w.clone() for w in weights(together)]
    recorded = steps(settings.get("num_samples", 1))
    together.replay_steps(recorded[:2])
    together.replay_steps(recorded[2:])
    for each in recorded:
        apart.replay_step(each.step, each.projected_gradients, each.lr, each.weight_decay, each.skipped)
    assert all(torch.equal(a, b) for a, b in zip(weights(together), weights(apart), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(together), before, strict=True))
    assert together.state_dict()["smezo"]["steps_done"] == 9
    assert together.skipped_steps == 1


def test_steps_in_another_order_are_refused_before_anything_is_written() -> None:
    own = optimizer(torch.float32)
    before = [w.clone() for w in weights(own)]
    recorded = steps(1)
    with pytest.raises(ValueError, match="step 3 cannot be made now: the next step is 1"):
        own.replay_steps([recorded[0], recorded[3]])
    with pytest.raises(ValueError, match="step 1 has 2 projected gradients, expected 1"):
        own.replay_steps([recorded[0], replace(recorded[1], projected_gradients=(1.0, 2.0))])
    with pytest.raises(ValueError, match="one number for each of the 2 groups"):
        own.replay_steps([replace(recorded[0], lr=(1e-3,))])
    assert all(torch.equal(a, b) for a, b in zip(weights(own), before, strict=True))
    assert own.steps_done == 0
