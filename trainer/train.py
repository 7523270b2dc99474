"""The run, top to bottom: every worker calls `train` with the same configuration."""

import json
import math
import shutil
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.schema import TOKENIZER_NAME
from models.flops import parameters
from models.lm import LanguageModel
from models.scan import choose_backend
from trainer import checkpoint
from trainer.config import Config, dump_config, info_faults
from trainer.data import (
    DataError,
    MicroBatch,
    Position,
    SequenceReader,
    TokenStream,
    training_batches,
)
from trainer.engine import Engine, versions
from trainer.evaluate import Evaluation, bits_per_byte, evaluate, ngram_losses
from trainer.memory import keep_freed_memory, peak_memory_bytes
from trainer.metrics import (
    MetricsWriter,
    step_metrics,
    truncate_after,
)
from trainer.optim import learning_rate
from trainer.parallel.topology import Topology, initialize_distributed
from trainer.step import accumulate_gradients, prepare_model, seed_dropout

# Rank 0 tells what happens: {"event": ..., ...}. The answer True asks to stop in good order.
Report = Callable[[dict[str, Any]], bool]


class RunError(RuntimeError):
    """The run itself cannot go on (a loss that is not finite): starting again would not help."""


def train(config: Config, report: Report) -> None:
    """Train from the newest intact checkpoint of config.run.dir, or from the start, to the end.

    Every rank of the world calls this. Raises ValueError for what a user got wrong, DataError for
    damaged data, RunError where training itself fails; the last checkpoint stays good.
    """
    keep_freed_memory()
    use_gpu = config.launch.gpus_per_worker > 0
    device = initialize_distributed(config.parallel.timeout_seconds, use_gpu)
    topology = Topology(config.parallel.sp, config.parallel.timeout_seconds)
    stream = topology.together(partial(_open_stream, config, "train"))
    reader = _reader(stream, config, topology, config.data.shift)
    held_out = None
    if config.evaluate.sequences:
        held_stream = topology.together(partial(_open_stream, config, "held_out"))
        held_out = _reader(held_stream, config, topology, shift=False)
    run = _open_run_folder(config, topology, stream)

    torch.manual_seed(config.run.seed)
    model = LanguageModel(config.model)
    prepare_model(model, config, topology)
    warn = partial(_warn, report)
    found = checkpoint.find(run, topology, warn)
    engine = Engine(model, config, topology, device, resume=found)
    step, consumed = 0, 0
    if found:
        step, consumed = found[1].step, found[1].sequences_consumed
        _check_resume(found[1], stream, config)
    if topology.rank == 0:
        _describe_start(report, config, device, step)

    writer = MetricsWriter(run, step) if topology.rank == 0 else None
    if topology.rank == 0:
        truncate_after(run / "evaluations.jsonl", step)
    batches = training_batches(reader, config, topology.dp_rank, consumed)
    recent: deque[float] = deque(maxlen=20)
    last_step = config.train.steps
    if config.train.stop_after is not None:
        last_step = min(last_step, step + config.train.stop_after)
    evaluated = None
    stop = asked_to_stop = False
    while step < last_step and not stop:
        started = time.perf_counter()
        micro_batches = _next_step(batches, device, topology)
        data_seconds = time.perf_counter() - started
        seed_dropout(config, step, topology.rank)
        topology.sequence.meter.take()
        loss_sum = accumulate_gradients(engine, micro_batches, config, device)
        exchange_seconds, _ = topology.sequence.meter.take()
        loss, memory, stop = _agree(loss_sum, asked_to_stop, device, topology, step)
        rate = learning_rate(step, config.train.steps, config.optim)
        grad_norm = engine.step(rate)
        if not math.isfinite(grad_norm):
            raise RunError(_not_finite("gradient norm", grad_norm, step + 1))
        step += 1
        consumed += config.train.batch_size
        step_seconds = time.perf_counter() - started
        recent.append(step_seconds)
        if writer:
            metrics = step_metrics(
                config,
                device,
                step,
                consumed,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=rate,
                step_seconds=step_seconds,
                data_seconds=data_seconds,
                exchange_seconds=exchange_seconds,
                peak_memory_bytes=memory,
                eta_seconds=statistics.median(recent) * (config.train.steps - step),
            )
            writer.write(metrics)
            # taken up in the next step's exchange, so that all workers stop at the same one
            asked_to_stop = report({"event": "step", "steps": config.train.steps, **metrics})
        if step % config.checkpoint.every == 0 or step == last_step or stop:
            _save(run, engine, config, topology, stream, step, consumed, reader.sequences)
        evaluated = None
        if held_out and config.evaluate.every and step % config.evaluate.every == 0:
            evaluated = _evaluate(run, engine, held_out, config, topology, device, step, report)
    if writer:
        writer.close()
    if step == config.train.steps and not topology.gather_objects(_has_result(run, step))[0]:
        if held_out and evaluated is None:
            evaluated = _evaluate(run, engine, held_out, config, topology, device, step, report)
        if held_out and evaluated and topology.rank == 0:
            _write_result(run, evaluated, stream, held_out.stream, step)
    if topology.rank == 0:
        report({"event": "end", "step": step, "steps": config.train.steps})
    engine.destroy()


def _open_stream(config: Config, split: str) -> TokenStream:
    """A split of the data, checked here too: the submitting machine may not have seen it."""
    stream = TokenStream(config.data, split)
    if faults := [f"{key}: {message}" for key, message in info_faults(config, stream.info)]:
        raise ValueError("\n".join(faults))
    return stream


def _next_step(
    batches: Iterator[list[MicroBatch]], device: torch.device, topology: Topology
) -> list[MicroBatch]:
    """This rank's micro-batches; all workers raise the same DataError where one cannot read."""
    batch, fault = None, None
    try:
        batch = next(batches)
    except DataError as error:
        fault = str(error)
    failed = torch.tensor([int(batch is None)], device=device)
    if topology.gather(failed).any():
        faults = sorted({f for f in topology.gather_objects(fault) if f})
        raise DataError("\n".join(faults))
    assert batch is not None
    return batch


def _open_run_folder(config: Config, topology: Topology, stream: TokenStream) -> Path:
    """Make the folder and what a reader of the run needs besides its checkpoints."""
    run = Path(config.run.dir)

    def write() -> None:
        try:
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            dump_config(config, run / "config.yaml")
            if stream.info.tokenizer != "bytes":
                shutil.copyfile(stream.folder / TOKENIZER_NAME, run / TOKENIZER_NAME)
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}"
            raise ValueError(f"run.dir {run} cannot be written: {reason}") from None

    def check() -> None:
        if not run.is_dir():
            raise ValueError(
                f"run.dir {run} is not visible to worker {topology.rank}: "
                f"use a folder that all workers share"
            )

    topology.together(write if topology.rank == 0 else lambda: None)
    topology.together(check)
    return run


def _reader(stream: TokenStream, config: Config, topology: Topology, shift: bool) -> SequenceReader:
    return SequenceReader(
        stream,
        config.train.seq_len,
        topology.sp_rank,
        topology.sp_size,
        config.data.reset_state,
        shift,
    )


def _agree(
    loss_sum: Tensor, stop: bool, device: torch.device, topology: Topology, step: int
) -> tuple[float, int, bool]:
    """The global mean loss, the highest memory of any worker, and whether any was asked to stop.

    Every worker raises RunError together where the loss is not finite.
    """
    mine = [float(loss_sum), float(peak_memory_bytes(device)), float(stop)]
    everyone = topology.gather(torch.tensor(mine, dtype=torch.float64, device=device))
    losses, memories, stops = everyone.unbind(1)
    loss = float(losses.sum()) / topology.dp_size
    if not math.isfinite(loss):
        raise RunError(_not_finite("loss", loss, step + 1))
    return loss, int(memories.max()), bool(stops.any())


def _not_finite(what: str, value: float, step: int) -> str:
    return (
        f"the {what} is {value} at step {step}: nothing was saved since the last checkpoint; "
        f"lower optim.learning_rate or optim.clip, or lengthen optim.warmup_steps, and start again"
    )


def _save(
    run: Path,
    engine: Engine,
    config: Config,
    topology: Topology,
    stream: TokenStream,
    step: int,
    consumed: int,
    sequences: int,
) -> None:
    position = Position(consumed, sequences)
    manifest = checkpoint.Manifest(
        step=step,
        world_size=topology.world_size,
        dp=topology.dp_size,
        sp=topology.sp_size,
        zero_stage=config.deepspeed.zero_stage,
        epoch=position.epoch,
        consumed_in_epoch=position.consumed_in_epoch,
        sequences_consumed=consumed,
        data_fingerprint=stream.info.fingerprint,
        versions=versions(),
    )
    checkpoint.save(run, manifest, engine.save, config.checkpoint.keep, topology)


def _check_resume(manifest: checkpoint.Manifest, stream: TokenStream, config: Config) -> None:
    if manifest.step > config.train.steps:
        raise ValueError(
            f"train.steps {config.train.steps} is below step {manifest.step}, which the run in "
            f"{config.run.dir} has reached: raise it, or choose another run.dir"
        )
    if manifest.data_fingerprint != stream.info.fingerprint:
        raise ValueError(
            f"data.path {stream.folder} is not the data that the run was trained on: its order "
            f"would be another; give back the same data, or choose another run.dir"
        )


def _evaluate(
    run: Path,
    engine: Engine,
    held_out: SequenceReader,
    config: Config,
    topology: Topology,
    device: torch.device,
    step: int,
    report: Report,
) -> Evaluation:
    engine.eval()
    result = evaluate(
        engine,
        held_out,
        config.evaluate.sequences,
        config.train.loss_tile_tokens,
        topology,
        device,
    )
    engine.train()
    if topology.rank == 0:
        with (run / "evaluations.jsonl").open("a") as f:
            f.write(json.dumps({"step": step, **asdict(result)}) + "\n")
        report(
            {
                "event": "evaluation",
                "step": step,
                "loss": result.loss,
                "bits_per_byte": result.bits_per_byte,
            }
        )
    return result


def _has_result(run: Path, step: int) -> bool:
    """Whether an earlier start has finished the run already."""
    path = run / "evaluation.json"
    return path.exists() and json.loads(path.read_text())["step"] == step


def _write_result(
    run: Path, evaluated: Evaluation, train: TokenStream, held_out: TokenStream, step: int
) -> None:
    """evaluation.json: the final held-out loss beside the n-gram models' on the same tokens."""
    # of random tokens n-grams would tell nothing
    losses = {} if train.info.synthetic else ngram_losses(train, held_out, evaluated.tokens)
    baselines = {
        name: {"loss": loss, "bits_per_byte": bits_per_byte(loss, held_out.split)}
        for name, loss in losses.items()
    }
    result = {"step": step, **asdict(evaluated), "baselines": baselines}
    partial_path = run / "evaluation.tmp"
    partial_path.write_text(json.dumps(result, indent=1) + "\n")
    partial_path.replace(run / "evaluation.json")


def _describe_start(report: Report, config: Config, device: torch.device, step: int) -> None:
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    with warnings.catch_warnings(record=True) as caught:
        backend = choose_backend("auto", (torch.empty(0, dtype=dtype, device=device),))
    for warning in caught:
        _warn(report, str(warning.message))
    report(
        {
            "event": "start",
            "step": step,
            "steps": config.train.steps,
            "parameters": parameters(config.model),
            "workers": config.launch.workers,
            "dp": config.dp,
            "sp": config.parallel.sp,
            "shard_tokens": config.shard_tokens,
            "scan": backend,
        }
    )


def _warn(report: Report, message: str) -> None:
    report({"event": "warning", "message": message})
