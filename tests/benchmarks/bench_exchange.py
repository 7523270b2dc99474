"""What the exchange costs: measured over processes here, predicted over GPUs at scale.

    python -m tests.benchmarks.bench_exchange [--quick]

Measured: the two-level scan over 1, 2 and 4 gloo processes of one thread, each with the same
tokens, forward and backward, beside a scan of each shard for itself in the same processes at once;
time inside the exchange, and bytes, which must equal the formula.

Predicted: a layer's efficiency, local time / (local time + exposed exchange), from latency and
bandwidth alone. Every assumption is a field of `Device` or `Network` below and is printed with the
result. The local times are predicted too, from the figures of an H200; where a GPU was at hand,
bench_scan has the scan's own.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from models.scan import RECURRENCES, scan
from tests.benchmarks import results
from tests.distributed import run_distributed
from trainer.memory import keep_freed_memory
from trainer.parallel.carry import CarryExchange
from trainer.parallel.topology import Topology

FP64, BF16 = 8, 2  # bytes


def _measure(steps: int, width: int, repeats: int) -> dict[str, Any]:
    """On every rank: medians over repeats of one forward and backward."""
    keep_freed_memory()
    torch.set_num_threads(1)
    group = Topology(sp_size=torch.distributed.get_world_size()).sequence
    recurrence = RECURRENCES["mingru"]
    kv = torch.randn(1, steps, 2 * width, requires_grad=True)
    grad = torch.randn(1, steps, width)
    seconds, exchange, alone, sent = [], [], [], 0
    for repeat in range(repeats + 2):
        torch.distributed.barrier()
        start = time.perf_counter()
        h, _ = scan(recurrence, (kv,))  # this shard alone: what the machine gives all at once
        torch.autograd.grad(h, kv, grad)
        alone.append(time.perf_counter() - start)
        torch.distributed.barrier()
        group.meter.take()
        start = time.perf_counter()
        h, _ = scan(recurrence, (kv,), exchange=CarryExchange(group))
        torch.autograd.grad(h, kv, grad)
        if repeat >= 2:
            seconds.append(time.perf_counter() - start)
            inside, sent = group.meter.take()
            exchange.append(inside)
    tiny = torch.zeros(1, width)
    latencies = []
    for _ in range(50):
        torch.distributed.barrier()
        start = time.perf_counter()
        group.all_gather(tiny)
        latencies.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "exchange": statistics.median(exchange),
        "alone": statistics.median(alone[2:]),
        "sent": sent,
        "latency": statistics.median(latencies),
    }


def measured(steps: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """A row per number of processes; raises AssertionError where bytes differ from the formula."""
    rows = []
    for ranks in (1, 2, 4):
        figures = run_distributed(_measure, ranks, steps, width, repeats)
        formula = (2 + 1) * width * FP64  # forward and backward, B = 1
        assert all(f["sent"] == formula for f in figures), (figures, formula)
        slowest = max(f["seconds"] for f in figures)
        rows.append(
            {
                "processes": ranks,
                "tokens each": steps,
                "H": width,
                "shards alone, ms": round(max(f["alone"] for f in figures) * 1e3, 2),
                "two-level scan, ms": round(slowest * 1e3, 2),
                "of it in the exchange, ms": round(max(f["exchange"] for f in figures) * 1e3, 2),
                "bytes sent by each": figures[0]["sent"],
                "formula": formula,
                "an empty exchange, ms": round(max(f["latency"] for f in figures) * 1e3, 3),
                "million tokens/s": round(ranks * steps / slowest / 1e6, 2),
            }
        )
    return rows


@dataclass(frozen=True)
class Device:
    """An H200 in bf16, as far as a layer's local time goes."""

    flops: float = 989e12 * 0.5  # matrix products reach half of the peak
    bytes_per_second: float = 4.3e12  # measured copy rate of an H200
    attention_flops: float = 989e12 * 0.4  # fused attention


@dataclass(frozen=True)
class Network:
    """Ranks are GPUs, eight to a machine. Collectives are rings: latency grows with length."""

    name: str
    launch: float = 10e-6  # seconds to start a collective
    hop_inside: float = 1e-6  # seconds from GPU to GPU of a machine
    hop_between: float = 4e-6  # seconds from machine to machine
    inside: float = 450e9  # bytes per second and GPU, NVLink 4, one direction
    between: float = 50e9  # bytes per second and GPU, InfiniBand NDR
    gpus: int = 8  # to a machine

    def ring(self, ranks: int, received: float) -> float:
        """Seconds of a ring collective by which every rank receives so many bytes."""
        machines = -(-ranks // self.gpus)
        hops = (ranks - machines) * self.hop_inside + (machines - 1) * self.hop_between
        return self.launch + hops + received / (self.inside if machines == 1 else self.between)

    def all_to_all(self, ranks: int, received: float) -> float:
        """Seconds of an all-to-all by which every rank receives so many bytes from all others."""
        machines = -(-ranks // self.gpus)
        far = (ranks - self.gpus) / ranks if machines > 1 else 0.0
        hop = self.hop_inside if machines == 1 else self.hop_between
        return self.launch + hop + received * max((1 - far) / self.inside, far / self.between)


NETWORKS = (
    Network("NVLink within 8, InfiniBand beyond"),
    Network("NVLink everywhere (one NVLink domain)", gpus=1 << 20),
)


@dataclass(frozen=True)
class Layer:
    """One layer of width D on T tokens of each rank, B = 1; bf16, forward and backward."""

    tokens: int
    width: int = 4096
    kv_width: int = 1024  # eight key-value heads of 128
    heads: int = 32
    mlp_ratio: float = 8 / 3

    def _matrix_seconds(self, widths: float, device: Device) -> float:
        """Forward and backward of `widths` * D^2 weights."""
        return 6 * self.tokens * widths * self.width**2 / device.flops

    def recurrent(self, ranks: int, network: Network, device: Device) -> tuple[float, float]:
        """(local, exposed exchange) of minGRU with H = D: gate, candidate, output gate, output."""
        scan = self.tokens * self.width * (10.1 + 16.1) / device.bytes_per_second
        local = self._matrix_seconds(4 + 3 * self.mlp_ratio, device) + scan
        span = self.width * FP64
        exchange = network.ring(ranks, (ranks - 1) * 2 * span)
        exchange += network.ring(ranks, (ranks - 1) * span)
        halo = 2 * (network.launch + network.hop_between + 3 * self.width * BF16 / network.between)
        return local, exchange + halo

    def _attention(self, ranks: int, device: Device) -> tuple[float, float]:
        """Seconds of the matrix products, and of causal attention over the tokens of all ranks."""
        matrices = 2 + 2 * self.kv_width / self.width + 3 * self.mlp_ratio
        # two products, causal, and two and a half times as much backward
        attention = 2 * self.tokens * (ranks * self.tokens) * self.width * 3.5
        return self._matrix_seconds(matrices, device), attention / device.attention_flops

    def ulysses(self, ranks: int, network: Network, device: Device) -> tuple[float, float] | None:
        """All-to-all of q, k, v and the output; None where there are fewer heads than ranks."""
        if ranks > self.heads:
            return None
        received = (ranks - 1) / ranks * self.tokens * 2 * (self.width + self.kv_width) * BF16
        copies = max(1.0, ranks * 128 / self.kv_width)  # key-value heads repeated to one per rank
        received *= (self.width + self.kv_width * copies) / (self.width + self.kv_width)
        return sum(self._attention(ranks, device)), 2 * network.all_to_all(ranks, received)

    def ring(self, ranks: int, network: Network, device: Device) -> tuple[float, float]:
        """Keys and values go round, overlapped with the attention on those at hand."""
        matrices, attention = self._attention(ranks, device)
        block = self.tokens * 2 * self.kv_width * BF16
        hop = network.hop_inside if ranks <= network.gpus else network.hop_between
        rate = network.inside if ranks <= network.gpus else network.between
        # forward: keys and values; backward: them and their gradients
        sends = (ranks - 1) * (2 * (network.launch + hop) + 3 * block / rate)
        return matrices + attention, max(0.0, sends - attention)


def predicted() -> list[dict[str, Any]]:
    """Efficiency and time of a layer, for the recurrence and both kinds of attention."""
    rows, device = [], Device()
    for network in NETWORKS:
        for tokens in (4096, 65536):
            layer = Layer(tokens)
            for ranks in (8, 32, 128, 1024):
                row: dict[str, Any] = {
                    "network": network.name,
                    "tokens a rank": tokens,
                    "ranks": ranks,
                    "sequence": f"{ranks * tokens / 2**20:g}M",
                }
                for name, times in (
                    ("minGRU", layer.recurrent(ranks, network, device)),
                    ("Ulysses", layer.ulysses(ranks, network, device)),
                    ("ring", layer.ring(ranks, network, device)),
                ):
                    local, exposed = times or (0.0, 0.0)
                    row[f"{name}: efficiency"] = (
                        f"{local / (local + exposed):.1%}" if times else "-"
                    )
                    row[f"{name}: ms"] = round((local + exposed) * 1e3, 2) if times else "-"
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    options = parser.parse_args()
    size = (1024, 32, 3) if options.quick else (65536, 256, 15)
    rows, table = measured(*size), predicted()
    text = "# What the exchange costs\n\n" + results.circumstances()
    text += "\n## Measured: gloo processes of one thread, forward and backward of a minGRU scan\n\n"
    text += f"{results.table(rows)}\nOn two cores four processes share what two have.\n"
    text += f"\n## Predicted: a layer of width {Layer(0).width}, bf16, forward and backward\n\n"
    text += (
        "Efficiency is local time over local time plus exposed exchange, at equal tokens a rank.\n"
    )
    text += "Attention's local time grows with the sequence, which flatters its efficiency:\n"
    text += "compare times. A dash: more ranks than heads. The ring is striped, so that causal\n"
    text += "work is even. Assumed, not measured:\n\n"
    text += "".join(f"- {x}\n" for x in (Device(), *NETWORKS, Layer(65536)))
    text += f"\n{results.table(table)}"
    print(text)
    if not options.quick:
        results.write_csv("exchange", table)
        results.result_path("exchange", ".md").write_text(text)


if __name__ == "__main__":
    main()
