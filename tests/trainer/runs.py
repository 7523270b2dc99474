"""Runs through the whole trainer, for tests, and the definition they must match."""

from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from models.build import build_model
from tests.distributed import run_distributed
from trainer.config import Config, load_config
from trainer.data import MicroBatch, SequenceReader, TokenStream
from trainer.events import Event, Started, Stepped, Stop, Warned
from trainer.layout import Layout
from trainer.optim import build_optimizer, learning_rate
from trainer.train import train

Figures = list[tuple[float, float]]  # (loss, gradient norm) per step


E = TypeVar("E", bound=Event)


def train_here(config_file: Path, overrides: list[str]) -> list[Event]:
    """Run the trainer in this rank; the events that rank 0 reported."""
    config = load_config(config_file, overrides, workers=dist.get_world_size())
    events: list[Event] = []

    def report(event: Event) -> Stop:
        events.append(event)
        return Stop.NO

    train(config, report)
    return events


def of_kind(events: list[Event], kind: type[E]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def figures(events: list[Event]) -> Figures:
    steps = of_kind(events, Stepped)
    return [(step.metrics["loss"], step.metrics["grad_norm"]) for step in steps]


def started_at(events: list[Event]) -> int:
    """The step from which the run went on."""
    return of_kind(events, Started)[0].step


def warnings(events: list[Event]) -> list[str]:
    return [event.message for event in of_kind(events, Warned)]


def run(config_file: Path, ranks: int, *overrides: str) -> list[Event]:
    """The events of a run on `ranks` workers."""
    return run_distributed(train_here, ranks, config_file, list(overrides))[0]


def refused(config_file: Path, ranks: int, *overrides: str) -> str:
    """What the workers say of a run that they do not begin."""
    return run_distributed(_refused, ranks, config_file, list(overrides))[0]


def _refused(config_file: Path, overrides: list[str]) -> str:
    try:
        train_here(config_file, overrides)
    except ValueError as error:
        return str(error)
    raise AssertionError("trained")


def plain_training(config_file: Path, *overrides: str) -> Figures:
    """The same run as a dozen lines of torch on whole sequences: the definition of correct."""
    config = load_config(config_file, list(overrides))
    stream = TokenStream(config.data, "train")
    reader = SequenceReader(stream, Layout(config.train.seq_len), config.data.reset_state)
    order = reader.order(config.run.seed, shift=False)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim, config.model.memory_tokens)
    result = []
    for step in range(config.train.steps):
        first = step * config.train.batch_size
        batch = reader.micro_batch([order[first + i] for i in range(config.train.batch_size)])
        result.append(plain_step(model, optimizer, batch, config, step))
    return result


def plain_step(
    model: nn.Module, optimizer: Optimizer, batch: MicroBatch, config: Config, step: int
) -> tuple[float, float]:
    """Loss and gradient norm of one update, after `step` others."""
    answers, _ = model(batch.inputs, reset=batch.reset)
    if batch.labels.is_floating_point():
        loss = F.mse_loss(answers, batch.labels)
    else:
        loss = F.cross_entropy(answers.flatten(0, 1), batch.labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config.train.steps, config.optim)
    optimizer.step()
    return float(loss.detach()), float(norm)
