"""The root Config, its bounds beside its fields. Imports no torch: a faulty file is told at once.

Defaults <- YAML file <- key=value. Every fault is found in one pass and reported together, with the
file, the line and the nearest known key.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.files import write_whole
from models.bounds import Fault, bounded, not_negative, one_of, positive
from models.config import ModelConfig
from trainer.checks import data_faults, other_tokens, value_faults, widths_of_data
from trainer.fixed import resume_faults
from trainer.layout import AUTO, Layout, Plan, even_segments
from trainer.run_folder import RunFolder
from trainer.settings import ConfigError, file_path, merge

# fields of a model that its weights do not follow from
NOT_OF_WEIGHTS = ("dropout", "memory_tokens", "window", "rope_base")
LONG = 1e8  # seconds, three years


@dataclass
class RunConfig:
    dir: str = file_path("runs/run")  # everything the run writes goes here
    seed: int = not_negative(0)  # of the initial weights and of the order of sequences
    # stop in good order, as a pre-emption would, so long after the command was given
    max_seconds: float | None = positive(None, most=LONG)


@dataclass
class DataConfig:
    # a folder of data_prep, or a URL that Streaming can read; or several, each with the weight of
    # its sequences: {data/code: 7, data/books: 3}
    path: Any = file_path("data/stdlib", kind=str | dict[str, float])
    cache: str | None = file_path(None)  # local folder for the MDS shard files of a URL
    reset_state: bool = False  # clear states where a document starts
    shift: bool = False  # every epoch cuts its sequences from another token on

    @property
    def sources(self) -> dict[str, float]:
        """Every folder or URL of `path` with its weight."""
        return self.path if isinstance(self.path, dict) else {self.path: 1.0}

    def cache_of(self, source: str) -> str | None:
        """The folder for the files of one of several URLs."""
        if self.cache is None or len(self.sources) == 1:
            return self.cache
        return f"{self.cache}/{list(self.sources).index(source)}"


@dataclass
class ParallelConfig:
    sp: int = positive(1)  # ranks that share one sequence
    # how near two states of a GRU or LSTM pass for the same when they are relayed from rank to
    # rank; 0: equal to the bit (trainer/parallel/README.md)
    relay_tolerance: float = not_negative(0.0, below=1)
    # a collective that takes longer is an error
    timeout_seconds: float = positive(600.0, most=LONG)


@dataclass
class DeepSpeedConfig:
    zero_stage: int = one_of(0, 0, 1, 2, 3)
    # stage 3 keeps smaller parameters on every rank
    persistence_threshold: int = not_negative(100_000)


@dataclass
class TrainConfig:
    steps: int = positive(100)
    seq_len: int = positive(16384)  # tokens per sequence, over all its shards
    # lengths of the sequences that come first, each for curriculum_steps steps; a step has as many
    # tokens of them, in more sequences
    curriculum: list[int] = positive([])
    curriculum_steps: int = positive(100)
    # tokens of a sequence that go through the model at a time, over all shards; the gradient stays
    # that of the whole (trainer/segments.py); null: all of them; auto: all where they fit a
    # worker's memory, else segments that do, and keep_segments with them (trainer/footprint.py)
    segment_len: Any = bounded(None, above=0, kind=int | str | None, word=AUTO)
    # segments, from the last one, whose activations are kept, so that they are run once, not twice
    keep_segments: int = positive(1)
    # the folder of a run of the same model, whose newest weights this one begins with
    init_from: str | None = file_path(None)
    truncate: bool = False  # cut the gradient between segments: truncated back-propagation
    batch_size: int = positive(1)  # sequences per step, over all workers
    micro_batch_size: int = positive(1)  # sequences per forward and backward on one rank
    dtype: str = one_of("fp32", "fp32", "bf16")  # fp32, or bf16 with fp32 master weights
    loss_tile_tokens: int = positive(2048)  # logits exist for this many tokens at a time
    recompute: bool = False  # a block's activations are computed again in its backward, not kept
    compile: bool = False  # fuse elementwise passes by torch.compile; costs 10 to 20 s at the start
    stop_after: int | None = positive(None)  # stop in good order after so many steps of this start

    @property
    def segment_tokens(self) -> int | None:
        """`segment_len` where it is known; None: the whole, or not chosen yet."""
        return self.segment_len if isinstance(self.segment_len, int) else None

    def of_length(self, seq_len: int) -> "TrainConfig":
        """The same with other sequences."""
        segment_len = self.segment_len
        if self.segment_tokens:
            segment_len = min(self.segment_tokens, seq_len)
        return replace(self, seq_len=seq_len, segment_len=segment_len)


@dataclass
class OptimConfig:
    learning_rate: float = positive(1e-3)
    final_ratio: float = not_negative(0.1)  # what the learning rate falls to, over the highest
    warmup_steps: int = not_negative(20)
    weight_decay: float = not_negative(0.1)
    beta1: float = not_negative(0.9, below=1)
    beta2: float = not_negative(0.95, below=1)
    # null: 1e-8, or what the longest memory asks for (`eps_for`)
    eps: float | None = positive(None)
    clip: float = not_negative(1.0)  # largest gradient norm; 0 turns clipping off

    def eps_for(self, memory_tokens: float) -> float:
        """Adam's, of a model whose longest memory that is.

        A gate that remembers m tokens opens by 1 / m, and so small are its gradients; Adam follows
        none below its eps. Where that is not set it lies as far below that memory's: at 1 / m^2.
        """
        return min(1e-8, memory_tokens**-2) if self.eps is None else self.eps


@dataclass
class CheckpointConfig:
    every: int = positive(100)  # steps; the last step is always saved
    # and as soon as so many seconds have passed since the last one
    every_seconds: float | None = positive(None, most=LONG)
    # lost workers per day, of all together: every_seconds is then chosen (trainer/goodput.py)
    failures_per_day: float | None = positive(None)
    # go back to the checkpoint of this step, once, and put later ones aside
    resume_step: int | None = positive(None)
    keep: int = positive(2)  # newest checkpoints that stay on disk
    # a save that fails (a full disk): tell, and try again at the next one; or stop
    on_failure: str = one_of("warn", "warn", "stop")
    # an address (s3://, gs://, file://) where they are kept too
    remote: str | None = file_path(None)


@dataclass
class GuardConfig:
    """What is done about a step or weights that cannot be right."""

    # a loss or gradient that is not finite, or a spike: stop before the update, or leave it out
    on_bad_step: str = one_of("stop", "stop", "skip")
    max_skips: int = positive(10)  # steps left out in a whole run, before it stops
    # a loss so far above the median of the last 50 is a spike; a squared error, by the logarithm
    spike_nats: float = positive(3.0)
    # steps between comparisons of the workers' weights, which are compared before a save too; 0: no
    checksum_every: int = not_negative(100)


@dataclass
class EvaluateConfig:
    every: int = not_negative(0)  # steps between evaluations; 0 evaluates after the last step only
    sequences: int = not_negative(16)  # of the held-out split, at most; 0 turns evaluation off
    # the folder whose held-out split it is, and tokens of its sequences; null: data.path, and as
    # long as in training
    path: str | None = file_path(None)
    seq_len: int | None = positive(None)
    # of a decision model: episodes that it plays after the last step; the return that it is asked
    # for, null: the best of its training data; frames of the past that it sees, null: all
    rollouts: int = not_negative(0)
    rollout_return: float | None = None
    rollout_frames: int | None = positive(None)


@dataclass
class LaunchConfig:
    workers: int = positive(1, most=65536)
    # as few will do where no more are to be had, and all again when they are; null: all or none
    min_workers: int | None = positive(None)
    cpus_per_worker: float = positive(1)
    gpus_per_worker: float = not_negative(0)
    # restarts after lost workers with no new checkpoint between; a fault of the run ends it
    max_failures: int = not_negative(3)
    # for room for all workers, before fewer are taken or none
    wait_seconds: float = positive(120.0, most=LONG)
    # a worker that gives no sign of life for so long is lost: stopped, or cut off
    silence_seconds: float = positive(60.0, most=LONG)


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
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def dp(self) -> int:
        """Sequences trained side by side."""
        return self.launch.workers // self.parallel.sp

    def layout(self, sp_rank: int = 0) -> Layout:
        """Which tokens of a sequence a rank of its SP group holds."""
        train = self.train
        return Layout(train.seq_len, self.parallel.sp, sp_rank, train.segment_tokens)

    @property
    def plan(self) -> Plan:
        """In which order a step runs a sequence's segments."""
        train, segments = self.train, self.layout().segments
        return Plan(segments, min(train.keep_segments, segments), train.truncate)

    def stage(self, step: int) -> int:
        """Lengths of the curriculum that are passed after that many steps."""
        return min(step // self.train.curriculum_steps, len(self.train.curriculum))

    def at(self, step: int) -> "Config":
        """The run after that many steps: with shorter sequences, and more, amid a curriculum."""
        train = self.train
        for length in train.curriculum[self.stage(step) :][:1]:
            more = train.seq_len // length
            # as many at once as memory is there for: what a segment has
            room = max(1, (train.segment_tokens or train.seq_len) // length)
            at_once = max(n for n in range(1, min(more, room) + 1) if more % n == 0)
            shorter = replace(
                train.of_length(length),
                batch_size=train.batch_size * more,
                micro_batch_size=train.micro_batch_size * at_once,
            )
            return replace(self, train=shorter)
        return self

    @property
    def held_out(self) -> "Config":
        """The same run, with the data and the length at which it is evaluated."""
        data, evaluated = self.data, self.evaluate
        if evaluated.path is not None:
            cache = data.cache and f"{data.cache}/held_out"
            data = replace(data, path=evaluated.path, cache=cache)
        train = self.train
        if evaluated.seq_len and evaluated.seq_len > 0:  # else a fault, which is told
            train = train.of_length(evaluated.seq_len)
            if train.segment_tokens or train.seq_len > self.train.seq_len:
                # no more at a time than in training
                most, sp = max(1, self.layout().shard_tokens), self.parallel.sp
                train = replace(train, segment_len=even_segments(train.seq_len, most, sp))
        return replace(self, data=data, train=train)

    @property
    def first_rollout(self) -> int:
        """The seed of the first episode that is played: no two runs begin in the same places."""
        return 1_000_000 + self.run.seed * self.evaluate.rollouts  # nor where their data began

    @property
    def accumulation(self) -> int:
        """Micro-batches per step on each rank."""
        return self.train.batch_size // (self.dp * self.train.micro_batch_size)


def load_config(path: str | Path, overrides: list[str], workers: int | None = None) -> Config:
    """Read, merge and check. `workers` is the number that a launcher has already started.

    Raises ConfigError with every fault found.
    """
    path = Path(path)
    config, places, messages = merge(Config, path, overrides)
    if workers is not None:
        config.launch.workers = workers
    follow_data(config, places)
    folder = RunFolder(config.run.dir)
    unusable = list(folder.faults())
    faults = [*value_faults(config), *data_faults(config), *unusable]
    if not unusable and folder.resumes():
        faults += resume_faults(folder, load_dumped(folder.config), config)
    elif config.train.init_from:
        faults += _init_faults(config, Path(config.train.init_from))
    messages += [f"{places.get(key, f'{path}: {key}')}: {message}" for key, message in faults]
    if messages:
        raise ConfigError(str(path), messages)
    return config


def _init_faults(config: Config, begun: Path) -> Iterator[Fault]:
    """Where the weights of the run in `begun` are not of this model."""
    try:
        theirs = load_dumped(begun / "config.yaml").model
    except ValueError as error:
        yield "train.init_from", str(error)
        return
    for name in (each.name for each in fields(ModelConfig)):
        ours, its = getattr(config.model, name), getattr(theirs, name)
        if name not in NOT_OF_WEIGHTS and ours != its:
            yield f"model.{name}", f"{ours!r} differs from {its!r} of {begun}: keep it"
    yield from other_tokens(config, begun)


def follow_data(config: Config, places: dict[str, str]) -> None:
    """The model has the data's tokens, or frames, where its file does not say which."""
    for name, value in widths_of_data(config).items():
        if f"model.{name}" not in places:
            setattr(config.model, name, value)


def dump_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, whole or not at all."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


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
