"""A streamed step that is under way: how far it is, kept in a checkpoint, and taken up again.

A step of thousands of segments can take hours. Its checkpoint is that of the step before, with what
each rank has of the one under way in midstep/: the micro-batch, the segments' carries, the flow,
the gradients so far.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import Files, Saved
from trainer.engine import Engine
from trainer.events import Stop, Streamed
from trainer.segments import Position
from trainer.worker import Worker

TELL_SECONDS = 2.0  # at least, between two reports of how far a streamed step is
FOLDER = "midstep"


@dataclass
class Midstep:
    """Where one rank is in a step, and whether that is to be saved, or the step given up."""

    worker: Worker
    step: int  # taken before it
    asked: Stop = Stop.NO
    due: Callable[[], bool] = lambda: False  # by any rank's clock
    save: Callable[["Midstep"], None] = lambda _: None  # every rank does
    show: Callable[[Streamed], None] = lambda _: None  # rank 0 does
    micro_batch: int = 0  # of the step's, under way
    here: Position = field(default_factory=Position)  # in it
    # this rank's loss, of the micro-batches before
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    began: float = field(default_factory=time.monotonic)  # in this start, saves left out
    before: float = 0.0  # seconds of it, in earlier starts
    held_up: float = 0.0  # seconds that saves amid it took, in all
    told: float = field(default_factory=time.monotonic)

    @property
    def runs(self) -> int:
        """Of a segment, done."""
        return self.micro_batch * len(self.worker.config.plan.reads) + self.here.reads

    @property
    def done(self) -> tuple[int, int]:
        """Micro-batches, and what is read of the one after."""
        return self.micro_batch, self.here.reads

    @property
    def seconds(self) -> float:
        """Since the step began, but for the time when nobody was at it."""
        return time.monotonic() - self.began + self.before

    def hold_up(self, seconds: float) -> None:
        """It waited for a save."""
        self.began, self.held_up = self.began + seconds, self.held_up + seconds

    def tell(self) -> None:
        """Rank 0 reports now and then, and hears what is asked."""
        now, config = time.monotonic(), self.worker.config
        if self.runs and now - self.told > TELL_SECONDS:
            plan, self.told = config.plan, now
            of, whole = len(plan.reads), plan.work(len(plan.reads))
            work = self.micro_batch * whole + plan.work(self.here.reads)
            share = work / (whole * config.accumulation)
            amid = self.step + 1, self.runs, of * config.accumulation
            event = Streamed(*amid, self.seconds, share)
            self.asked = self.worker.tell(event)
            self.show(event)

    def next_micro_batch(self, loss: Tensor) -> None:
        """This one had that loss."""
        self.total = self.total.to(loss.device) + loss
        self.micro_batch += 1
        self.here = Position()

    def files(self, engine: Engine) -> Files:
        """What this rank adds to a checkpoint, if something is done: written while it goes on.

        Large carries are not copied, for they stay as they are. Small ones and losses are, each
        once, however many segments it passes through: the memory that they share is still written
        to. The flow is, for more is added to the gradient of what passes through.
        """
        if not any(self.done):
            return {}
        here, own = self.here, _Own()
        state = {
            "micro_batch": self.micro_batch,
            "total": self.total,
            "seconds": self.seconds,
            "held_up": self.held_up,
            "reads": here.reads,
            "entering": [x and [tuple(map(own.of, c)) for c in x] for x in here.entering],
            "flow": here.flow and [[x if x is None else x.clone() for x in f] for f in here.flow],
            "losses": [own.of(x) for x in here.losses],
            "gradients": engine.accumulated(),
        }
        return {_name(self.worker.topology.rank): partial(torch.save, state)}

    def take_up(self, saved: Saved, engine: Engine) -> None:
        """Go on where the checkpoint stands."""
        device = self.worker.device
        path = saved.folder / _name(self.worker.topology.rank)
        anywhere = {f"cuda:{index}": str(device) for index in range(64)}
        state: dict[str, Any] = torch.load(path, map_location=anywhere, weights_only=True)
        engine.give_back(state["gradients"])
        self.micro_batch, self.total = state["micro_batch"], state["total"]
        self.here = Position(state["reads"], state["entering"], state["flow"], state["losses"])
        self.before, self.held_up = state["seconds"], state.get("held_up", 0.0)


class _Own(dict[int, Tensor]):
    """Tensors without the memory that they share with others; one object stays one object."""

    def of(self, x: Tensor) -> Tensor:
        if id(x) not in self:
            self[id(x)] = x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
        return self[id(x)]


def _name(rank: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}.pt"


def resume(worker: Worker, saved: Saved | None, engine: Engine) -> Midstep | None:
    """The step that was under way at a checkpoint, if one was, and can be gone on with."""
    if saved is None or not saved.manifest.runs:
        return None
    manifest, topology = saved.manifest, worker.topology
    there = manifest.way, manifest.world_size, manifest.sp
    if there != (way(worker), topology.world_size, topology.sp_size):
        worker.warn(
            f"{saved.folder} was saved amid step {manifest.step + 1}, which went through other "
            f"segments or workers: that step is begun anew"
        )
        return None
    midstep = Midstep(worker, manifest.step)
    worker.topology.together(lambda: midstep.take_up(saved, engine))
    return midstep


def way(worker: Worker) -> dict[str, Any]:
    """How a step goes through its segments: a start that goes another way begins the step anew."""
    names = ("batch_size", "micro_batch_size", "segment_len")
    sizes = {name: getattr(worker.config.train, name) for name in names}
    return {"device": worker.device.type, "carries": 2, **sizes, **asdict(worker.config.plan)}
