"""A comparison as data: which models, at which lengths, in which cells and trainings.

The file has a section `compare` beside those of a run, which all cells and trainings share.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from models.bounds import Fault, bound_faults, bounded, not_negative, one_of, positive
from models.config import ModelConfig
from models.mixers import MIXERS
from trainer.checks import data_faults, data_fingerprint, value_faults, widths_of_data
from trainer.config import Config
from trainer.settings import ConfigError, file_path, merge

OF_NO_RESULT = (
    "run.max_seconds",
    "data.cache",
    "parallel.timeout_seconds",
    "train.stop_after",
    *(f"launch.{name}" for name in ("max_failures", "wait_seconds", "silence_seconds")),
)


@dataclass
class CompareConfig:
    # results.json, report.md, plots, and the runs of tasks go here
    dir: str = file_path("runs/compare")
    mixers: list[Any] = bounded(["attention", "mingru"], kind=list[str | list[str]])
    lengths: list[int] = positive([1024, 4096, 16384])
    # of every model; None: as many as the first mixer's at model.*
    parameters: int | None = positive(None)
    # what is solved for that; none: nothing, models are as model.* says
    match: str = one_of("width", "width", "layers", "none")
    # train.batch_size follows: so many tokens, or one sequence
    tokens_per_step: int = positive(32768)
    # train.micro_batch_size follows: one sequence at least
    micro_batch_tokens: int = positive(8192)
    repetitions: int = positive(3)  # of every cell, interleaved
    # timed steps of a cell's repetition, at most; one before them is not timed
    steps: int = positive(5)
    seconds: float = not_negative(3.0)  # a repetition times no further step after this long
    cell_timeout_seconds: float = positive(120.0)  # a repetition that takes longer is "out of time"
    memory_gib_per_worker: float | None = positive(None)  # without GPUs: more is "out of memory"
    decode_tokens: int = positive(64)
    prefill_segment: int = positive(32768)  # a prompt is read in segments of this many tokens
    # Trainings to compare the losses of: name -> what is set for it, as on a command line.
    tasks: dict[str, list[str]] = field(default_factory=dict)
    # A task is trained at each of these rates, and a mixer's best counts, by right answers held out
    # where the task asks questions, else by loss; empty: as the run's own.
    learning_rates: list[float] = positive([])
    # so many rates more, one after another, while a mixer's best lies at an edge of those tried
    more_rates: int = not_negative(0, most=20)
    seeds: list[int] = not_negative([])  # the others at the best rate alone; empty: run.seed
    # slower mixers are trained once more, in as many steps as take the fastest one's time
    equal_time: bool = False
    # trainings side by side, where there is room; their times are then of machines so shared
    at_once: int = positive(1, most=1000)
    baselines: list[str] = field(default_factory=lambda: ["attention"])  # the others' figures over
    # To stand beside ours: task -> mixer or another's name -> held-out loss, nats per token.
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    published_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)  # from 0 to 1
    published_score: dict[str, dict[str, float]] = field(default_factory=dict)  # of rollouts
    notes: list[str] = field(default_factory=list)  # for the report: what differs, and why


@dataclass
class ComparisonFile(Config):
    compare: CompareConfig = field(default_factory=CompareConfig)


@dataclass(frozen=True)
class Comparison:
    """What is to be measured. Models go by a label, `mingru+mingru+window` for a list."""

    settings: CompareConfig
    config: Config
    target: int  # parameters
    models: dict[str, ModelConfig]
    cells: dict[tuple[str, int], Config]  # (label, length)
    tasks: dict[str, dict[str, "Trainings"]]  # name -> label


@dataclass(frozen=True)
class Trainings:
    """A mixer's runs of a task."""

    config: Config  # of any of them, but for what `at` sets
    folder: Path
    label: str
    rates: list[float]
    seeds: list[int]

    def at(self, rate: float, seed: int, steps: int | None = None) -> Config:
        """The run of a learning rate, seed and number of steps, in a folder of its own."""
        run = deepcopy(self.config)
        run.run.seed, run.optim.learning_rate = seed, rate
        if steps is not None:
            run = _shortened(run, steps)
        # A run of other settings or data is another: it neither resumes this one nor passes for it.
        fingerprints = [data_fingerprint(run), data_fingerprint(run.held_out)]
        described = {**of_results(run), "fingerprints": fingerprints}
        del described["run"]["dir"], described["checkpoint"]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:8]
        run.run.dir = str(self.folder / f"{self.label}-{digest}")
        if run.checkpoint.remote:  # nobody goes on with what another run keeps there
            own = f"{self.folder.parents[1].name}/{self.folder.name}/{self.label}-{digest}"
            run.checkpoint.remote = f"{run.checkpoint.remote.rstrip('/')}/{own}"
        return run

    @property
    def first(self) -> Config:
        return self.at(self.rates[0], self.seeds[0])


def load_comparison(path: str | Path, overrides: list[str]) -> Comparison:
    """Read, solve the shapes, and check every cell and training. Raises ConfigError."""
    path = Path(path)
    config, places, messages = merge(ComparisonFile, path, overrides)
    messages += [
        f"{places.get(key, f'{path}: {key}')}: {message}" for key, message in _faults(config)
    ]
    if messages:
        raise ConfigError(str(path), messages)
    settings = config.compare
    own = {name: _task_config(path, name, [*t, *overrides]) for name, t in settings.tasks.items()}
    _follow_data(config, places, list(own.values()))
    models, target = _solve(config, str(path))
    cells = {
        (label, length): _cell(config, model, length)
        for length in settings.lengths
        for label, model in models.items()
    }
    tasks = {
        name: {label: _trainings(task, name, label, model) for label, model in models.items()}
        for name, task in own.items()
    }
    for (label, length), cell in cells.items():
        messages += [f"{label} at {length}: {key}: {text}" for key, text in value_faults(cell)]
    for name, runs in tasks.items():
        for label, each in runs.items():
            faults = value_faults(each.first)
            messages += [f"task {name}, {label}: {key}: {text}" for key, text in faults]
        data = data_faults(next(iter(runs.values())).first)
        evaluated = _evaluation_faults(next(iter(runs.values())).config)
        messages += [f"task {name}: {key}: {text}" for key, text in [*data, *evaluated]]
    if messages:
        raise ConfigError(str(path), messages)
    return Comparison(settings, _run_of(config, config.model), target, models, cells, tasks)


def file_name(task: str) -> str:
    """With which the names of a task's files begin: a link to one has no spaces."""
    return task.replace(" ", "_")


def of_results(config: Config) -> dict[str, Any]:
    """The configuration, with all that changes no result as it is by default."""
    described, usual = asdict(config), asdict(Config())
    for key in OF_NO_RESULT:
        section, name = key.split(".")
        described[section][name] = usual[section][name]
    described["optim"]["eps"] = config.optim.eps_for(config.model.memory_tokens)
    return described


def label_of(mixer: str | list[str]) -> str:
    """The name by which a report speaks of a mixer."""
    return mixer if isinstance(mixer, str) else "+".join(mixer)


def _faults(config: ComparisonFile) -> Iterator[Fault]:
    """What is wrong with the section itself, and with each mixer's model."""
    compare = config.compare
    for name in ("mixers", "lengths"):
        if not getattr(compare, name):
            yield f"compare.{name}", "the list is empty"
    yield from bound_faults(compare, "compare.")
    yield from bound_faults(config.parallel, "parallel.")
    yield from bound_faults(config.launch, "launch.")
    yield from _task_faults(config)
    for name in ("learning_rates", "seeds"):
        numbers = getattr(compare, name)
        for number in sorted({n for n in numbers if numbers.count(n) > 1}):
            yield (
                f"compare.{name}",
                f"{number:g} is there twice: its runs are one run, name it once",
            )
    labels = {*map(str, map(label_of, compare.mixers)), *MIXERS}
    for name in (name for name in compare.baselines if name not in labels):
        yield "compare.baselines", f"{name!r} is not one of {', '.join(sorted(labels))}"
    for mixer in compare.mixers:
        model = deepcopy(config.model)
        model.mixer = mixer
        for name, message in model.faults():
            yield ("compare.mixers" if name == "mixer" else f"model.{name}"), message


def _task_faults(config: ComparisonFile) -> Iterator[Fault]:
    compare = config.compare
    own = ["model.", "compare.", "run.dir", "launch.", "parallel."]
    own += ["optim.learning_rate="] if compare.learning_rates else []
    own += ["run.seed="] if compare.seeds else []
    files: dict[str, str] = {}
    for name, task in compare.tasks.items():
        if set("/*?[]") & set(name) or not name.strip(". "):
            yield "compare.tasks", f"{name!r} is to name folders and files, and cannot"
        if (other := files.setdefault(file_name(name), name)) != name:
            yield "compare.tasks", f"{name!r} would name the same files as {other!r}"
        for setting in task:
            if setting.startswith(tuple(own)):
                yield "compare.tasks", f"{name} sets {setting}, which is the comparison's own"
    for key in ("published", "published_accuracy", "published_score"):
        for name in getattr(compare, key):
            if compare.tasks and name not in compare.tasks:
                known = ", ".join(compare.tasks)
                yield f"compare.{key}", f"{name!r} is not one of the tasks {known}"


def _evaluation_faults(config: Config) -> Iterator[Fault]:
    for key, number in (("every", config.evaluate.every), ("sequences", config.evaluate.sequences)):
        if number == 0:
            yield f"evaluate.{key}", "0: tasks are compared by held-out losses, also on the way"


def _follow_data(config: Config, places: dict[str, str], tasks: Sequence[Config]) -> None:
    """Models have as many tokens, or frames as wide, as the tasks' data where no file says.

    Rows of an embedding that no token reaches would be of other weight in each mixer's count.
    """
    found = [widths_of_data(task) for task in tasks]
    for name in {name for widths in found for name in widths}:
        if f"model.{name}" not in places:
            least = 0 if all(found) else getattr(config.model, name)  # some lie elsewhere
            setattr(config.model, name, max(least, *(widths.get(name, 0) for widths in found)))


def _solve(config: ComparisonFile, path: str) -> tuple[dict[str, ModelConfig], int]:
    """A model for each mixer, all of one number of parameters."""
    from models.flops import parameters  # imports torch: only when the file is good
    from models.match import match_parameters

    compare = config.compare
    first = deepcopy(config.model)
    first.mixer = compare.mixers[0]
    target = compare.parameters or parameters(first)
    models = {}
    for mixer in compare.mixers:
        model = deepcopy(config.model)
        model.mixer = mixer
        if compare.match == "none":
            models[label_of(mixer)] = model
            continue
        try:
            models[label_of(mixer)] = match_parameters(model, target, compare.match)
        except ValueError as error:
            raise ConfigError(path, [f"compare.parameters: {error}"]) from None
    return models, target


def _cell(config: ComparisonFile, model: ModelConfig, length: int) -> Config:
    """One cell's configuration: as many tokens a step as at any other length, if there is room."""
    cell = _run_of(config, model)
    train = cell.train = replace(cell.train.of_length(length), curriculum=[])
    dp = cell.dp
    train.micro_batch_size = max(1, config.compare.micro_batch_tokens // length)
    per_worker = max(1, config.compare.tokens_per_step // length // max(1, dp))
    train.micro_batch_size = min(train.micro_batch_size, per_worker)
    train.batch_size = max(1, per_worker // train.micro_batch_size) * train.micro_batch_size
    train.batch_size *= max(1, dp)
    return cell


def _task_config(path: Path, name: str, overrides: list[str]) -> ComparisonFile:
    """The file with what a task sets, and what the command line sets after all."""
    config, _, faults = merge(ComparisonFile, path, overrides)
    if faults:
        raise ConfigError(str(path), [f"task {name}: {fault}" for fault in faults])
    return config


def _trainings(config: ComparisonFile, name: str, label: str, model: ModelConfig) -> Trainings:
    """A mixer's runs of a task: every rate that is to be tried, and every seed."""
    settings, run = config.compare, _run_of(config, model)
    rates = settings.learning_rates or [config.optim.learning_rate]
    folder = Path(settings.dir) / "runs" / name
    return Trainings(run, folder, label, rates, settings.seeds or [config.run.seed])


def _run_of(config: ComparisonFile, model: ModelConfig) -> Config:
    """The run's own sections, with another model.

    A comparison is of all its workers, or its times compare nothing.
    """
    shared = {name: deepcopy(getattr(config, name)) for name in Config.__dataclass_fields__}
    run = Config(**{**shared, "model": deepcopy(model)})
    run.launch.min_workers = None
    return run


def _shortened(run: Config, steps: int) -> Config:
    """The same schedule in fewer steps: warm-up and curriculum keep their share of them."""
    share = steps / run.train.steps
    warmup = round(run.optim.warmup_steps * share)
    stage = max(1, round(run.train.curriculum_steps * share))
    return replace(
        run,
        train=replace(run.train, steps=steps, curriculum_steps=stage),
        optim=replace(run.optim, warmup_steps=warmup),
    )
