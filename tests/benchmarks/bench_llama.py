"""Is the Transformer baseline a straw man? Its speed beside transformers' Llama of the same shape.

    python -m tests.benchmarks.bench_llama [--quick]

Both hold the same weights and see the same tokens; the losses must agree before anything is timed.
transformers 4.57 gives torch's kernel a mask of the whole square, where the kernel's own causal
form would do half the products; so theirs is run a second time without the mask, which is its best.
One repetition runs all three one after the other; a ratio is the median of theirs over ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from models.config import ModelConfig
from models.flops import parameters, training_flops_per_token
from models.lm import LanguageModel
from tests.benchmarks import results
from tests.models.test_llama import copy_weights, llama_of
from trainer.loss import summed_cross_entropy
from trainer.memory import keep_freed_memory

LEAST = 0.9  # of their best speed, or the comparison's baseline is too slow to compare with
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (dtype, tokens, {"width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads})
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, width, layers, heads, kv_heads in (
        (2048, 256, 4, 8, 8),
        (2048, 256, 4, 8, 2),
        (8192, 256, 4, 8, 8),
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case, nothing written")
    quick = parser.parse_args().quick
    keep_freed_memory()
    if quick:
        print(results.table([_row(torch.float32, 128, {"width": 32, "layers": 1}, repeats=2)]))
        return
    rows = []
    for dtype, tokens, shape in CASES:
        rows.append(_row(dtype, tokens, shape, repeats=5))
        print(rows[-1], flush=True)
    text = "# The Transformer baseline beside transformers' LlamaForCausalLM\n\n"
    text += results.circumstances() + "\nForward, loss and backward of one sequence; medians.\n\n"
    text += results.table(rows)
    results.result_path("llama", ".md").write_text(text)
    print(text)
    if slow := [row for row in rows if float(row["over Llama without mask"]) < LEAST]:
        raise SystemExit(f"the baseline is a straw man, below {LEAST} of Llama's best: {slow}")


def _row(
    dtype: torch.dtype, tokens: int, shape: dict[str, Any], repeats: int
) -> dict[str, str | int]:
    config = ModelConfig(mixer="attention", vocab_size=256, **shape)
    torch.manual_seed(0)
    model, llama = LanguageModel(config), llama_of(config)
    copy_weights(model, llama)
    model, llama = model.to(DEVICE, dtype), llama.to(DEVICE, dtype)
    text = torch.randint(256, (1, tokens + 1), device=DEVICE)
    steps = (
        partial(_ours, model, text),
        partial(_theirs, llama, text),
        partial(_theirs_unmasked, llama, text),
    )
    losses = [float(step().detach()) for step in steps]
    if max(losses) - min(losses) > (1e-4 if dtype == torch.float32 else 3e-2):
        raise SystemExit(f"the losses differ, {losses}: these are not the same models")
    for step in steps:
        _seconds(step)
    runs = [[_seconds(step) for step in steps] for _ in range(repeats)]
    ours, theirs, unmasked = (statistics.median(column) for column in zip(*runs, strict=True))
    shipped, best = ([run[i] / run[0] for run in runs] for i in (1, 2))
    flops = training_flops_per_token(config, tokens) * tokens
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "width x layers": f"{config.width} x {config.layers}",
        "heads / kv heads": f"{config.heads} / {config.shared_kv_heads}",
        "parameters": f"{parameters(config):,}",
        "ours, s": f"{ours:.3f}",
        "Llama, s": f"{theirs:.3f}",
        "without mask, s": f"{unmasked:.3f}",
        "ours GFLOP/s": f"{flops / ours / 1e9:.0f}",
        "speed over Llama": f"{statistics.median(shipped):.2f}",
        "over Llama without mask": f"{statistics.median(best):.2f}",
        "spread": f"{min(best):.2f}-{max(best):.2f}",
    }


def _ours(model: LanguageModel, text: Tensor) -> Tensor:
    readout = partial(summed_cross_entropy, labels=text[:, 1:], tile=2048)
    loss, _ = model(text[:, :-1], readout=readout, last=True)
    return loss / (text.shape[1] - 1)


def _theirs(llama: Any, text: Tensor) -> Tensor:
    return llama(text[:, :-1], labels=text[:, 1:], shift_labels=text[:, 1:], use_cache=False).loss


def _theirs_unmasked(llama: Any, text: Tensor) -> Tensor:
    with patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None):
        return _theirs(llama, text)


def _seconds(step: Callable[[], Tensor]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
