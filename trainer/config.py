"""The root Config: load, merge, check, dump. Imports no torch, so a faulty file is told at once.

Defaults <- YAML file <- key=value. Every fault is found in one pass and reported together, with the
file, the line and the nearest known key.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.schema import SPLITS, DatasetInfo, file_faults, load_info
from models.config import ModelConfig
from trainer.settings import ConfigError, get, leaves_of, merge


@dataclass
class RunConfig:
    dir: str = "runs/run"  # everything the run writes goes here
    seed: int = 0  # of the initial weights and of the order of sequences


@dataclass
class DataConfig:
    path: str = "data/stdlib"  # a folder of data_prep, or a URL that Streaming can read
    cache: str | None = None  # local folder for the shards of a URL
    reset_state: bool = False  # clear states where a document starts
    shift: bool = False  # every epoch cuts its sequences from another token on


@dataclass
class ParallelConfig:
    sp: int = 1  # ranks that share one sequence
    timeout_seconds: float = 600.0  # a collective that takes longer is an error


@dataclass
class DeepSpeedConfig:
    zero_stage: int = 0
    persistence_threshold: int = 100_000  # stage 3 keeps smaller parameters on every rank


@dataclass
class TrainConfig:
    steps: int = 100
    seq_len: int = 16384  # tokens per sequence, over all its shards
    segment_len: int | None = None  # None: the whole sequence at once
    batch_size: int = 1  # sequences per step, over all workers
    micro_batch_size: int = 1  # sequences per forward and backward on one rank
    dtype: str = "fp32"  # fp32, or bf16 with fp32 master weights
    loss_tile_tokens: int = 2048  # logits exist for this many tokens at a time
    recompute: bool = False  # a block's activations are computed again in its backward, not kept
    compile: bool = False  # fuse elementwise passes by torch.compile; costs 10 to 20 s at the start
    stop_after: int | None = None  # stop in good order after this many steps of this start


@dataclass
class OptimConfig:
    learning_rate: float = 1e-3
    final_ratio: float = 0.1  # the last step's learning rate over the highest
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest gradient norm; 0 turns clipping off


@dataclass
class CheckpointConfig:
    every: int = 100  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints that stay on disk


@dataclass
class EvaluateConfig:
    every: int = 0  # steps between evaluations; 0 evaluates after the last step only
    sequences: int = 16  # of the held-out split, at most; 0 turns evaluation off


@dataclass
class LaunchConfig:
    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    max_failures: int = 3  # restarts after a worker is lost; a fault of the run itself ends it


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def dp(self) -> int:
        """Sequences trained side by side."""
        return self.launch.workers // self.parallel.sp

    @property
    def shard_tokens(self) -> int:
        """T, the tokens of one rank's shard."""
        return self.train.seq_len // self.parallel.sp

    @property
    def accumulation(self) -> int:
        """Micro-batches per step on each rank."""
        return self.train.batch_size // (self.dp * self.train.micro_batch_size)


# What a run may not change between two starts: the numbers would no longer be one run's.
FIXED_KEYS = (
    "model",
    "run.seed",
    "data.reset_state",
    "data.shift",
    "deepspeed.zero_stage",
    "train.dtype",
    "train.seq_len",
)


def load_config(path: str | Path, overrides: list[str], workers: int | None = None) -> Config:
    """Read, merge and check. `workers` is the number that a launcher has already started.

    Raises ConfigError with every fault found.
    """
    path = Path(path)
    config, places, found = merge(Config, path, overrides)
    if workers is not None:
        config.launch.workers = workers
    for key, message in chain(
        value_faults(config), data_faults(config), _run_folder_faults(config)
    ):
        place = places.get(key, f"{path}: {key}")
        found.append(f"{place}: {message}")
    if found:
        raise ConfigError(str(path), found)
    return config


def dump_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, whole or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    partial.replace(path)


def load_dumped(path: Path) -> Config:
    """The configuration of a run's folder. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {path.parent} is not the folder of a run")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a configuration of this version: {reason}") from None
    assert isinstance(config, Config)
    return config


def value_faults(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong and what to do) for every value that cannot work, whatever the data."""
    for name, message in config.model.faults():
        yield f"model.{name}", message
    yield from _number_faults(config)
    train, parallel = config.train, config.parallel
    if train.dtype not in ("fp32", "bf16"):
        yield "train.dtype", f"{train.dtype!r} is not fp32 or bf16"
    if config.deepspeed.zero_stage not in (0, 1, 2, 3):
        yield "deepspeed.zero_stage", f"{config.deepspeed.zero_stage} is not 0, 1, 2 or 3"
    if train.segment_len not in (None, train.seq_len):
        yield (
            "train.segment_len",
            f"{train.segment_len} is not train.seq_len: streamed segments are not built yet, "
            f"leave it null",
        )
    if min(parallel.sp, config.launch.workers, train.seq_len, train.micro_batch_size) > 0:
        yield from _sharding_faults(config)


def _number_faults(config: Config) -> Iterator[tuple[str, str]]:
    positive = (
        "parallel.sp parallel.timeout_seconds train.steps train.seq_len train.batch_size "
        "train.micro_batch_size train.loss_tile_tokens optim.learning_rate optim.eps "
        "checkpoint.every checkpoint.keep launch.workers launch.cpus_per_worker"
    )
    not_negative = (
        "optim.final_ratio optim.warmup_steps optim.weight_decay optim.beta1 optim.beta2 "
        "optim.clip evaluate.every evaluate.sequences "
        "launch.gpus_per_worker launch.max_failures run.seed deepspeed.persistence_threshold"
    )
    for key in positive.split():
        if not get(config, key) > 0:
            yield key, f"{get(config, key)} is not positive"
    for key in not_negative.split():
        if not get(config, key) >= 0:
            yield key, f"{get(config, key)} is negative"
    for key in ("optim.beta1", "optim.beta2"):
        if get(config, key) >= 1:
            yield key, f"{get(config, key)} is not below 1"
    if config.train.stop_after is not None and config.train.stop_after < 1:
        yield "train.stop_after", f"{config.train.stop_after} is not positive"


def _sharding_faults(config: Config) -> Iterator[tuple[str, str]]:
    train, sp, workers = config.train, config.parallel.sp, config.launch.workers
    model = None if config.model.faults() else config.model
    if train.seq_len % sp:
        nearest = train.seq_len // sp * sp or sp
        yield (
            "train.seq_len",
            f"{train.seq_len} is not divisible by parallel.sp {sp}: use {nearest}",
        )
    elif model and sp > 1 and config.shard_tokens < model.halo_width:
        yield (
            "train.seq_len",
            f"{train.seq_len} gives shards of {config.shard_tokens} tokens, fewer than the "
            f"{model.halo_width} before it that a convolution or window sees: lengthen it or "
            f"lower parallel.sp",
        )
    if model and "attention" in model.layer_mixers() and model.heads % sp:
        yield (
            "model.heads",
            f"{model.heads} heads of attention cannot be dealt to parallel.sp {sp} ranks: "
            f"use a multiple of {sp} heads, or an sp that divides them",
        )
    if workers % sp:
        yield (
            "parallel.sp",
            f"{sp} does not divide launch.workers {workers}: "
            f"use {workers // sp * sp or sp} workers",
        )
        return
    parts = config.dp * train.micro_batch_size
    if train.batch_size % parts:
        nearest = max(1, round(train.batch_size / parts)) * parts
        yield (
            "train.batch_size",
            f"{train.batch_size} is not divisible by dp {config.dp} * train.micro_batch_size "
            f"{train.micro_batch_size}: use {nearest}",
        )


def data_faults(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) with the data that the run asks for."""
    data = config.data
    if "://" in data.path:
        if not data.cache:
            yield "data.cache", "a URL in data.path needs a local folder here for its shards"
        return  # the workers read it; nothing is known on this machine
    try:
        info = load_info(data.path)
    except ValueError as error:
        yield "data.path", str(error)
        return
    for split in SPLITS:
        for fault in file_faults(data.path, split):
            yield "data.path", fault
    yield from info_faults(config, info)


def info_faults(config: Config, info: DatasetInfo) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) where the run does not fit the data; workers ask it for a URL's."""
    data = config.data
    if info.vocab_size > config.model.vocab_size:
        yield (
            "model.vocab_size",
            f"{config.model.vocab_size} is below the {info.vocab_size} tokens of {data.path}",
        )
    if info.synthetic and info.synthetic.sequence_tokens != config.train.seq_len:
        yield (
            "train.seq_len",
            f"{config.train.seq_len} is not the {info.synthetic.sequence_tokens} tokens that every "
            f"sequence of {data.path} has: use that",
        )
    if info.synthetic and data.shift:
        yield "data.shift", f"every sequence of {data.path} is a document of its own: leave it off"
    needed = config.train.seq_len + 1
    training = needed + (config.train.seq_len - 1 if data.shift else 0)
    if info.splits["train"].tokens < training:
        yield (
            "train.seq_len",
            f"{config.train.seq_len} needs {training} tokens, {data.path} has "
            f"{info.splits['train'].tokens}: shorten it or prepare more text",
        )
    if config.evaluate.sequences and info.splits["held_out"].tokens < needed:
        yield (
            "evaluate.sequences",
            f"the held-out split of {data.path} has {info.splits['held_out'].tokens} tokens, one "
            f"sequence needs {needed}: use 0 for no evaluation, or prepare the data with a larger "
            f"--held-out",
        )


def _run_folder_faults(config: Config) -> Iterator[tuple[str, str]]:
    folder = Path(config.run.dir)
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not existing.is_dir():
        yield "run.dir", f"{folder} cannot be made: {existing} is not a folder"
    elif not os.access(existing, os.W_OK):
        yield "run.dir", f"{folder} cannot be written: no permission in {existing}"
    if not (folder / "config.yaml").is_file() or not any(folder.glob("checkpoints/step-*")):
        return  # nothing to resume
    before = load_dumped(folder / "config.yaml")
    for name, _ in leaves_of(Config):
        fixed = name in FIXED_KEYS or name.partition(".")[0] in FIXED_KEYS
        old, new = get(before, name), get(config, name)
        if fixed and old != new:
            yield (
                name,
                f"{new!r} differs from {old!r} of the run in {folder}, which would resume: "
                f"keep it, or choose another run.dir",
            )
