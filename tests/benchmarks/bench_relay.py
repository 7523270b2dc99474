"""The relay of GRU and LSTM over shards, beside the plain relay from rank to rank.

    python -m tests.benchmarks.bench_relay [--quick]

Both run the same pieces with the same code on the same trained weights: a byte model of one layer
and its embedding, trained here on the running Python's own library. The plain relay is what one
does without knowing that states fall together: each rank waits for the state of the one before it,
and the gradient of the one behind. Everything must be equal to the bit forward, and to 1e-5
backward, before a figure is reported.

On fewer cores than ranks the ranks of the relay share them, while the plain relay, which only ever
runs one rank, has one for itself; so beside the time measured stands the path: steps that must
follow one another, which is the time on as many machines as ranks.
"""

import argparse
import statistics
import sysconfig
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mixers.gru import GRU
from models.mixers.lstm import LSTM
from tests.benchmarks import results
from tests.distributed import run_distributed
from trainer.memory import keep_freed_memory
from trainer.parallel.relay import RelayExchange
from trainer.parallel.topology import Topology

WIDTH = 128
LAYERS = {"gru": GRU, "lstm": LSTM}


class PlainRelay(RelayExchange):
    """Rank after rank: nobody starts before what enters is known."""

    def settle(self, mine: Any, fixed: Tensor, first: int) -> list[Tensor]:
        ranks = range(self.group.size) if first == 0 else reversed(range(self.group.size))
        arriving, given = fixed, {}
        for rank in ranks:
            if rank == self.group.rank:
                mine.run(arriving)
            own = mine.given() if rank == self.group.rank else torch.zeros_like(fixed)
            arriving = given[rank] = self.group.broadcast(own, rank)
        return [given[rank] for rank in range(self.group.size)]


def library_bytes(count: int) -> Tensor:
    """The first bytes of the running Python's library, [count] int64."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/*.py"))
    text = b"".join(file.read_bytes() for file in files if file.parent.name != "test")
    assert len(text) >= count
    return torch.frombuffer(bytearray(text[:count]), dtype=torch.uint8).long()


def train(name: str, steps: int, memory: float) -> tuple[nn.Embedding, GRU | LSTM, float]:
    """A byte model, its memories spread to `memory` tokens at first; and its last loss, nats."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a step's products are too small to be shared
    embed, layer, head = nn.Embedding(256, WIDTH), LAYERS[name](WIDTH, WIDTH), nn.Linear(WIDTH, 256)
    spread = 2 * (memory / 2) ** ((torch.arange(WIDTH) + 0.5) / WIDTH)
    with torch.no_grad():
        layer.bias_ih_l0.view(-1, WIDTH)[1] = torch.log(spread - 1)
    parameters = [*embed.parameters(), *layer.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    text, length, batch = library_bytes(4_000_000), 256, 16
    loss = torch.zeros(())
    for _ in range(steps):
        starts = torch.randint(len(text) - length - 1, (batch,)).tolist()
        rows = torch.stack([text[s : s + length + 1] for s in starts])
        zero = torch.zeros(batch, WIDTH)
        state = (zero,) if name == "gru" else (zero, zero)
        y, _ = layer.run(embed(rows[:, :-1]), state)
        loss = F.cross_entropy(head(y).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return embed, layer, loss.item()


def _run(exchange: RelayExchange, layer: GRU | LSTM, u: Tensor, grad: Tensor) -> tuple[Any, ...]:
    """Seconds forward and backward, what relays cost both ways, and the results."""
    states = 1 if isinstance(layer, GRU) else 2
    zero = tuple(torch.zeros(1, WIDTH) for _ in range(states))
    u = u.detach().requires_grad_()
    torch.distributed.barrier()
    start = time.perf_counter()
    y, _ = exchange.relay(layer, u, zero, None)
    torch.distributed.barrier()
    middle = time.perf_counter()
    forward = exchange.group.relays.take()
    found = torch.autograd.grad(y, [u, *layer.parameters()], grad)
    torch.distributed.barrier()
    end = time.perf_counter()
    return middle - start, end - middle, forward, exchange.group.relays.take(), (y, *found)


def _measure(name: str, trained: Any, shard: int, repeats: int) -> dict[str, Any]:
    """On every rank: medians of both relays, turn about, once they have been found equal."""
    keep_freed_memory()
    group = Topology(sp_size=torch.distributed.get_world_size()).sequence
    embed, layer, _ = trained
    text = library_bytes(4_000_000 + shard * group.size)[4_000_000:]
    mine = slice(group.rank * shard, (group.rank + 1) * shard)
    with torch.no_grad():
        u = embed(text[mine].unsqueeze(0))
    grad = torch.randn(1, shard, WIDTH, generator=torch.Generator().manual_seed(group.rank))
    relay, plain = RelayExchange(group), PlainRelay(group)
    times: dict[str, list[float]] = {"relay": [], "plain": []}
    for _ in range(repeats):
        ours, theirs = _run(relay, layer, u, grad), _run(plain, layer, u, grad)
        assert torch.equal(ours[4][0], theirs[4][0]), "outputs differ"
        for got, want in zip(ours[4][1:], theirs[4][1:], strict=True):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), "gradients differ"
        times["relay"].append(ours[0] + ours[1])
        times["plain"].append(theirs[0] + theirs[1])
        forward, backward = ours[2], ours[3]
    return {
        "seconds": {kind: statistics.median(each) for kind, each in times.items()},
        "ratios": sorted(p / r for p, r in zip(times["plain"], times["relay"], strict=True)),
        "rounds": (forward.rounds, backward.rounds),
        "rerun": (forward.rerun_tokens, backward.rerun_tokens),
        "residual": backward.residual,
    }


def measured(
    shard: int, steps: int, repeats: int, memories: list[float], worlds: list[int]
) -> list[dict[str, Any]]:
    """A row for each layer, its memories at first, and number of ranks."""
    rows = []
    for name, memory in product(LAYERS, memories):
        trained = train(name, steps, memory)
        for ranks in worlds:
            figures = run_distributed(_measure, ranks, name, trained, shard, repeats, timeout=3000)[
                0
            ]
            rerun = figures["rerun"]
            rows.append(
                {
                    "layer": name,
                    "trained steps": steps,
                    "nats": round(trained[2], 2),
                    "memories to": round(memory),
                    "ranks": ranks,
                    "rounds": "{} + {}".format(*figures["rounds"]),
                    "run again": "{:,} + {:,}".format(*rerun),
                    "residual": f"{figures['residual']:.0e}",
                    "plain, s": round(figures["seconds"]["plain"], 2),
                    "relay, s": round(figures["seconds"]["relay"], 2),
                    "faster, measured": round(statistics.median(figures["ratios"]), 2),
                    "by path": _by_path(ranks, shard, rerun),
                }
            )
            print(rows[-1], flush=True)
    return rows


def _by_path(ranks: int, shard: int, rerun: tuple[int, int]) -> float:
    """Steps one after another, plain over relay; a backward's step counts as three forward."""
    plain = ranks * shard * (1 + 3)
    return round(plain / (shard * (1 + 3) + rerun[0] + 3 * rerun[1]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    options = parser.parse_args()
    if options.quick:
        rows = measured(512, 2, 1, [2.01], [2])
    else:
        rows = measured(16384, 200, 3, [2.01, 1024.0], [2, 4])
    text = "# The relay of GRU and LSTM over shards\n\n" + results.circumstances()
    text += (
        f"\nOne layer, H = {WIDTH}, fp32, one thread a rank, shards of 16,384 tokens, forward and "
        "backward; outputs equal to the bit, gradients within 1e-5.\nRounds and tokens run again: "
        "forward + backward, all rounds together. By path: steps that follow one another, plain "
        "over relay.\n\n"
    )
    text += results.table(rows)
    print(text)
    if not options.quick:
        results.result_path("relay", ".md").write_text(text)


if __name__ == "__main__":
    main()
