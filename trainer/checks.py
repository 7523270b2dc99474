"""What is wrong with a configuration beyond the bounds of its fields. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.mixture import Mixture
from data_prep.schema import SPLITS, DatasetInfo, file_faults, load_info
from models.bounds import Fault, bound_faults
from trainer.layout import AUTO
from trainer.storage import address_fault

if TYPE_CHECKING:
    from trainer.config import Config

FRAME_WIDTHS = ("observation_width", "action_width")


def value_faults(config: Config) -> Iterator[Fault]:
    """(key, what is wrong and what to do) for every value that cannot work, whatever the data."""
    model = ((f"model.{name}", message) for name, message in config.model.faults())
    yield from dict.fromkeys([*model, *bound_faults(config)])
    train, parallel = config.train, config.parallel
    if config.evaluate.rollouts and not config.model.of_frames:
        yield (
            "evaluate.rollouts",
            "only a decision model acts: leave it 0, or set model.observation_width and "
            "model.action_width where the data lie at an address",
        )
    if config.evaluate.rollouts and not config.evaluate.sequences:
        yield "evaluate.rollouts", "they are played with an evaluation: raise evaluate.sequences"
    if config.evaluate.rollouts and not find_spec("gymnasium"):
        yield "evaluate.rollouts", "gymnasium is not installed: pip install 'longhaul[rl]'"
    if train.keep_segments > 1 and config.deepspeed.zero_stage == 3:
        yield (
            "train.keep_segments",
            f"{train.keep_segments} loses gradients at ZeRO stage 3, where DeepSpeed takes a "
            f"forward's before the next: leave it 1",
        )
    if train.truncate and train.segment_len == AUTO:
        yield (
            "train.segment_len",
            "auto goes by memory, and train.truncate learns by the segments: say their length",
        )
    launch = config.launch
    if launch.min_workers is not None and launch.min_workers > launch.workers:
        yield (
            "launch.min_workers",
            f"{launch.min_workers} is above launch.workers {launch.workers}: lower it",
        )
    checkpoint = config.checkpoint
    if checkpoint.remote and (fault := address_fault(checkpoint.remote)):
        yield "checkpoint.remote", fault
    if checkpoint.failures_per_day is not None and checkpoint.every_seconds is not None:
        yield (
            "checkpoint.failures_per_day",
            "it chooses checkpoint.every_seconds, which is set too: leave one of them null",
        )
    sizes = parallel.sp, config.launch.workers, train.seq_len, train.micro_batch_size
    lengths = train.curriculum_steps, train.segment_tokens or 1, config.evaluate.seq_len or 1
    if min(*sizes, *lengths) > 0:  # else they are faults already, and nothing is divided by them
        yield from layout_faults(config)


def layout_faults(config: Config) -> Iterator[Fault]:
    """Where sequences of any length that the run has do not fit its workers."""
    yield from _sharding_faults(config)
    yield from _curriculum_faults(config)
    if config.evaluate.seq_len is not None:
        yield from _of_evaluation(length_faults(config.held_out), config)


def _curriculum_faults(config: Config) -> Iterator[Fault]:
    """Where its lengths do not fit a step, or the ranks."""
    train = config.train
    for stage, length in enumerate(train.curriculum):
        if length < 1:
            continue  # below its bound
        if train.seq_len % length:
            yield (
                "train.curriculum",
                f"{length} does not divide train.seq_len {train.seq_len}, so that no step of its "
                f"sequences has as many tokens: use a length that does",
            )
            continue
        for _, message in length_faults(config.at(stage * train.curriculum_steps)):
            yield "train.curriculum", message


def length_faults(config: Config) -> Iterator[Fault]:
    """Where sequences do not fit the ranks that share one."""
    train, sp = config.train, config.parallel.sp
    model = None if config.model.faults() else config.model
    segment_len = train.segment_tokens
    if segment_len is not None and segment_len > train.seq_len:
        yield (
            "train.segment_len",
            f"{segment_len} is above train.seq_len {train.seq_len}: lower it, or leave it null",
        )
    elif segment_len and segment_len % sp:
        nearest = segment_len // sp * sp or sp
        yield (
            "train.segment_len",
            f"{segment_len} is not divisible by parallel.sp {sp}: use {nearest}",
        )
    elif train.seq_len % sp:
        nearest = train.seq_len // sp * sp or sp
        yield (
            "train.seq_len",
            f"{train.seq_len} is not divisible by parallel.sp {sp}: use {nearest}",
        )
    elif model and sp > 1:
        layout, least = config.layout(), -(-model.halo_width // model.tokens_of_input)
        shortest = len(layout.held(layout.segments - 1))
        if shortest < least:
            yield (
                "train.segment_len" if layout.segments > 1 else "train.seq_len",
                f"{segment_len or train.seq_len} gives shards of {shortest} tokens, fewer "
                f"than the {least} before it that a convolution or window sees: lengthen it or "
                f"lower parallel.sp",
            )


def _sharding_faults(config: Config) -> Iterator[Fault]:
    train, sp, workers = config.train, config.parallel.sp, config.launch.workers
    model = None if config.model.faults() else config.model
    yield from length_faults(config)
    if model:
        for name, message in model.sp_faults(sp):
            yield f"model.{name}", message
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


def data_faults(config: Config) -> Iterator[Fault]:
    """(key, what is wrong) with the data that the run asks for."""
    apart = _evaluated_apart(config)
    splits = SPLITS[:1] if apart else SPLITS
    infos, faults = _folder_faults(config, splits)
    yield from faults
    if not apart:
        return
    others, faults = _folder_faults(config.held_out, SPLITS[1:])
    yield from _of_evaluation(faults, config)
    for (path, info), (other, evaluated) in product([*infos.items()][:1], others.items()):
        if path != other:
            yield from (
                ("evaluate.path", fault)
                for fault in tokenizer_faults([path, other], [info, evaluated])
            )


def _evaluated_apart(config: Config) -> bool:
    """Whether held-out data or their length are others than in training."""
    return config.evaluate.path is not None or config.evaluate.seq_len is not None


def _of_evaluation(faults: Iterable[Fault], config: Config) -> Iterator[Fault]:
    """The faults of `config.held_out` by the keys that say what it is."""
    keys = {}
    if config.evaluate.seq_len is not None:
        keys["train.seq_len"] = "evaluate.seq_len"
    if config.evaluate.path is not None:
        keys["data.path"] = "evaluate.path"
    for key, message in faults:
        yield keys.get(key, key), message


def _folder_faults(
    config: Config, splits: Sequence[str]
) -> tuple[dict[str, DatasetInfo], list[Fault]]:
    """What is known of the folders of `data.path`, and what is wrong with these splits of them."""
    data, faults = config.data, list[Fault]()
    try:
        Mixture.of(data.sources)
    except ValueError as error:
        faults.append(("data.path", str(error)))
    if data.cache and "://" in data.cache:
        faults.append(("data.cache", f"{data.cache} is an address: name a folder of this machine"))
    known: dict[str, DatasetInfo] = {}
    places: dict[Path, str] = {}
    for path in data.sources:
        if "://" not in path and (first := places.setdefault(Path(path).resolve(), path)) != path:
            message = f"{first} and {path} are one folder: name it once, with the weight of both"
            faults.append(("data.path", message))
        if "://" in path:
            if fault := address_fault(path):
                faults.append(("data.path", fault))
            if not data.cache:
                message = "a URL in data.path needs a local folder here for its files"
                faults.append(("data.cache", message))
            continue  # the workers read it; nothing is known on this machine
        try:
            info = known[path] = load_info(path)
        except ValueError as error:
            faults.append(("data.path", str(error)))
            continue
        wrong = [fault for split in splits for fault in file_faults(path, split, info)]
        faults += [("data.path", fault) for fault in wrong]
        faults += info_faults(config, path, info, splits)
    mixed = mixing_faults(list(known), list(known.values()))
    return known, [*faults, *(("data.path", fault) for fault in mixed)]


def mixing_faults(paths: list[str], infos: list[DatasetInfo]) -> Iterator[str]:
    """What keeps datasets from being trained on together."""
    yield from tokenizer_faults(paths, infos)
    for path, info in zip(paths, infos, strict=True):
        if info.synthetic and len(paths) > 1:
            yield f"{path} is a task with a sequence length of its own: it cannot be mixed"


def tokenizer_faults(paths: list[str], infos: list[DatasetInfo]) -> Iterator[str]:
    """Where data are not of one tokenizer, or frames not scaled alike."""
    for path, info in zip(paths[1:], infos[1:], strict=True):
        for name in ("tokenizer", "tokenizer_sha256", "vocab_size", "end_of_document"):
            ours, first = getattr(info, name), getattr(infos[0], name)
            if ours != first:
                yield (
                    f"{path} and {paths[0]} are not of one tokenizer ({name} is {ours!r} and "
                    f"{first!r}): prepare both with the same"
                )
                break
        if info.trajectories and infos[0].trajectories and _scale(info) != _scale(infos[0]):
            yield (
                f"{path} and {paths[0]} are frames scaled otherwise, or of other environments: "
                f"take one of them"
            )


def other_tokens(config: Config, begun: Path) -> Iterator[Fault]:
    """Where the run in `begun` learned other tokens, or frames, than the data, if both are here."""
    try:
        infos = [load_info(path) for path in [str(begun), *config.data.sources]]
    except ValueError:
        return
    for message in tokenizer_faults([str(begun), *config.data.sources], infos):
        yield "train.init_from", message


def _scale(info: DatasetInfo) -> tuple[object, ...]:
    """What two datasets of frames share where numbers mean the same in both."""
    frames = info.trajectories
    assert frames
    scales = frames.return_scale, frames.observation_mean, frames.observation_deviation
    return frames.environment, frames.action_width, *scales


def data_fingerprint(config: Config) -> str | None:
    """Of the data, where it lies on this machine; that it does not is told as a fault."""
    sources = config.data.sources
    try:
        return Mixture.of(sources).fingerprint([load_info(path).fingerprint for path in sources])
    except ValueError:
        return None


def widths_of_data(config: Config) -> dict[str, int]:
    """What the data ask of a model, field by field, where they lie on this machine."""
    try:
        infos = [load_info(path) for path in config.data.sources]
    except ValueError:
        return {}
    widths = {"vocab_size": max((info.vocab_size for info in infos), default=1)}
    for frames in [info.trajectories for info in infos if info.trajectories][:1]:
        widths |= {name: getattr(frames, name) for name in FRAME_WIDTHS}
    return widths


def asks_questions(paths: Iterable[str | Path]) -> bool:
    """Whether only answers count in data of this machine, or where a run keeps word of its data."""
    try:
        return any(load_info(path).synthetic for path in paths)
    except ValueError:
        return False


def info_faults(
    config: Config, path: str, info: DatasetInfo, splits: Sequence[str]
) -> Iterator[Fault]:
    """(key, what is wrong) where the run does not fit these splits; workers ask it for a URL's."""
    for name in FRAME_WIDTHS:
        theirs = getattr(info.trajectories, name) if info.trajectories else 0
        if (ours := getattr(config.model, name)) != theirs:
            yield f"model.{name}", f"{ours} is not the {theirs} of {path}: use that"
    if info.trajectories and not config.data.reset_state:
        yield "data.reset_state", f"false: an episode of {path} begins anew, set it to true"
    if info.vocab_size > config.model.vocab_size:
        yield (
            "model.vocab_size",
            f"{config.model.vocab_size} is below the {info.vocab_size} tokens of {path}",
        )
    if info.synthetic and info.synthetic.sequence_tokens != config.train.seq_len:
        yield (
            "train.seq_len",
            f"{config.train.seq_len} is not the {info.synthetic.sequence_tokens} tokens that every "
            f"sequence of {path} has: use that",
        )
    if info.synthetic and config.train.curriculum:
        yield (
            "train.curriculum",
            f"every sequence of {path} has one length: leave it empty, and begin a run on longer "
            f"ones with train.init_from",
        )
    if info.synthetic and config.data.shift:
        yield "data.shift", f"every sequence of {path} is a document of its own: leave it off"
    needed = config.train.seq_len + 1
    training = needed + (config.train.seq_len - 1 if config.data.shift else 0)
    if "train" in splits and info.splits["train"].tokens < training:
        yield (
            "train.seq_len",
            f"{config.train.seq_len} needs {training} tokens, {path} has "
            f"{info.splits['train'].tokens}: shorten it or prepare more text",
        )
    counted = "held_out" in splits and config.evaluate.sequences
    if counted and info.splits["held_out"].tokens < needed:
        yield (
            "evaluate.sequences",
            f"the held-out split of {path} has {info.splits['held_out'].tokens} tokens, one "
            f"sequence needs {needed}: use 0 for no evaluation, or prepare the data with a larger "
            f"--held-out",
        )
