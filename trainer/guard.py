"""Judges every step before its update, and now and then whether all workers hold the same weights.

A loss or a gradient that is not finite, or a loss that jumps up, is a bad step: it stops the run,
or is left out, a few times. A bit that flips in one worker's memory shows in no loss for a long
time: weights that are replicated are summed up on each worker, and the sums compared.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.config import Config
from trainer.run_folder import RunFolder
from trainer.storage import place_of

RECENT, FEWEST = 50, 20  # steps that a spike is measured against


class RunError(RuntimeError):
    """The run itself cannot go on (a loss that is not finite): starting again would not help."""


class ReplicaError(RuntimeError):
    """Workers no longer hold the same weights: the last checkpoint is good, this memory is not."""


class Guard:
    """The same verdict on every worker, from figures that all of them have."""

    def __init__(self, config: Config, losses: Iterable[float | None], skipped: int) -> None:
        """`losses` of the steps before, oldest first; `skipped` of them were left out."""
        self.config, self.skipped = config, skipped
        self.bad_since: int | None = None  # the first of the bad steps that follow each other now
        self._recent = deque((x for x in losses if x is not None), maxlen=RECENT)

    def takes_loss(self, shares: Tensor, step: int, begins: list[int]) -> bool:
        """Whether a step whose loss the ranks share as `shares` [dp * sp] may go on to its update.

        `begins` are the tokens at which its sequences begin. Raises RunError where it may not.
        """
        dp = self.config.dp
        loss = float(shares.sum()) / dp
        bad = [rank for rank, share in enumerate(shares.tolist()) if not math.isfinite(share)]
        if bad or not math.isfinite(loss):
            return self._leave_out("loss", loss, step, self._told(bad, begins))
        if len(self._recent) >= FEWEST:
            usual = statistics.median(self._recent)
            if self._far_above(loss, usual):
                # the share of each sequence of the step; the highest is worth a look
                by_row = shares.reshape(dp, -1).sum(1)
                first = int(by_row.argmax()) * self.config.parallel.sp
                ranks = list(range(first, first + self.config.parallel.sp))
                why = f", where the last {len(self._recent)} steps had {usual:.3f} in the middle"
                return self._leave_out("loss", loss, step, self._told(ranks, begins) + why)
        self._recent.append(loss)
        return True

    def _far_above(self, loss: float, usual: float) -> bool:
        """Of squared errors, which are no nats, by their logarithms."""
        far = self.config.guard.spike_nats
        return loss > usual * math.exp(far) if self.config.model.of_frames else loss > usual + far

    def takes_norm(self, norm: float, step: int, begins: list[int]) -> bool:
        """Whether the gradient was finite: the engine makes no update of one that is not."""
        if math.isfinite(norm):
            self.bad_since = None
            return True
        if self._recent:
            self._recent.pop()  # it holds losses of steps that are taken
        return self._leave_out("gradient norm", norm, step, self._told([], begins))

    def _told(self, ranks: list[int], begins: list[int]) -> str:
        """Where it came from: the workers, and the sequences that they had."""
        rows = {rank // self.config.parallel.sp for rank in ranks} or range(self.config.dp)
        micro, dp = self.config.train.micro_batch_size, self.config.dp
        theirs = [b for i, b in enumerate(begins) if i // micro % dp in rows]
        shown = ", ".join(map(str, theirs[:8])) + (", ..." if len(theirs) > 8 else "")
        of = f" of worker {', '.join(map(str, ranks))}" if ranks else ""
        return f"{of}, in the sequences from token {shown}"

    def _way_back(self) -> str:
        """Where the next start goes on from: before the checkpoint that led here."""
        saved = RunFolder(self.config.run.dir).saved()
        if len(saved) < 2:
            return "; if it comes again, start anew in another run.dir"
        (newest, runs), (before, _) = (place_of(path.name) or (0, 0) for path in saved[:2])
        back = f"; that goes back to step {before}, for step {newest} led here "
        if runs:  # amid the bad step, which would only come again
            return back.rstrip()
        return f"{back}(checkpoint.resume_step={newest} goes on from it all the same)"

    def _leave_out(self, figure: str, value: float, step: int, where: str) -> bool:
        guard = self.config.guard
        self.bad_since = self.bad_since or step
        bad = f"the {figure} is {value} at step {step}{where}"
        if guard.on_bad_step == "stop":
            raise RunError(
                f"{bad}: the step was not taken, the last checkpoint stands; lower "
                f"optim.learning_rate or optim.clip, lengthen optim.warmup_steps, leave such steps "
                f"out by guard.on_bad_step=skip, and start again{self._way_back()}"
            )
        self.skipped += 1
        if self.skipped > guard.max_skips:
            raise RunError(
                f"{bad}, and guard.max_skips {guard.max_skips} steps were left out before it: "
                f"lower optim.learning_rate, or look at the data"
            )
        return False


def weights_checksum(parameters: Iterable[Tensor]) -> int:
    """A sum over all bits of the weights that this worker holds whole; any one flip changes it.

    Those of ZeRO's stage 3 that are sharded have no replica to be compared with.
    """
    total = torch.zeros((), dtype=torch.int64)
    for parameter in parameters:
        data = parameter.detach()
        if data.numel() == 0 or not data.is_contiguous():  # sharded elsewhere
            continue
        bits = torch.int32 if data.element_size() == 4 else torch.int16
        total = total.to(data.device) + data.flatten().view(bits).sum(dtype=torch.int64)
    return int(total)


def compare_replicas(sums: list[int], hosts: list[str], step: int) -> None:
    """Raises ReplicaError, the same on all workers, where one's weights differ from the others'."""
    counts = Counter(sums)
    if len(counts) == 1:
        return
    usual, votes = counts.most_common(1)[0]
    odd = [rank for rank, total in enumerate(sums) if total != usual]
    if votes * 2 <= len(sums):  # no majority
        odd = list(range(len(sums)))
    shown = ", ".join(f"{rank} on {hosts[rank]}" for rank in odd)
    raise ReplicaError(
        f"the weights of worker {shown} differ from the other workers' after step {step}: "
        f"memory or a device has changed a bit"
    )
