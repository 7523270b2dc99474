"""What a person wants to know of a cluster before a week's run: each finding as it is made.

A process on each machine answers by trainer.probe; then the run itself takes its first steps.
"""

import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.gang import LaunchError, Place, Placed, connect, environments, gang, rooms
from launch.placement import plan, shown
from launch.ray_job import run_job
from trainer.config import Config
from trainer.events import Event, Started, Stepped, Warned
from trainer.run_folder import RunFolder

ANSWER_SECONDS = 180
CLOCK_SECONDS = 1.0  # apart at most, or times in logs and goodput mislead
STEPS = 2  # of the run: the first one is a warming up
SHOWN_LINKS = 6


@dataclass(frozen=True)
class Finding:
    """What was found of one subject; `level` is ok, warning or fault."""

    subject: str
    said: str
    level: str = "ok"


def examine(config: Config) -> Iterator[Finding]:
    """The machines that could take workers, each alone and together. Raises LaunchError."""
    connect(config)
    import ray

    try:
        room = rooms(config)
        alive = sum(node["Alive"] for node in ray.nodes())
        planned = plan(config, room)
        if not planned:
            launch = config.launch
            least = launch.min_workers or launch.workers
            said = f"{alive} machines, whose room is {shown(room)}: {launch.workers} workers "
            said += f"(at least {least}) do not fit, or do not spread evenly"
            yield Finding("cluster", said, "fault")
            return
        on = len(set(planned.nodes))
        said = f"{alive} machines, {len(room)} with room; {planned.workers} workers, "
        said += f"dp={planned.workers // planned.sp} x sp={planned.sp}, would run on {on}"
        yield Finding("cluster", f"{said} (Ray {ray.__version__})")
        asked = replace(config.launch, cpus_per_worker=0)
        asked.gpus_per_worker = min(1, asked.gpus_per_worker)
        nodes = tuple(sorted(room))
        with gang(replace(config, launch=asked), _Probe, nodes) as (probes, places):
            patients = _Patients(config, probes, places)
            for examination in EXAMINATIONS:
                yield from examination(patients)
    except ray.exceptions.RayError as error:
        raise LaunchError(
            f"a machine was lost meanwhile ({type(error).__name__}): try again"
        ) from error
    finally:
        ray.shutdown()


def try_run(config: Config, should_stop: Callable[[], bool]) -> Iterator[Finding]:
    """The first steps of the run, with a checkpoint, in a folder of their own. LaunchError."""
    steps = min(STEPS, config.train.steps)
    trial = replace(
        config,
        run=replace(config.run, dir=_folder(config), max_seconds=None),
        train=replace(config.train, stop_after=steps),
        checkpoint=replace(config.checkpoint, remote=None, resume_step=None),
        launch=replace(config.launch, max_failures=0),
    )
    shutil.rmtree(_folder(config), ignore_errors=True)  # what a doctor that was killed has left
    events: list[Event] = []
    began = time.monotonic()
    run_job(trial, events.append, should_stop)
    took = time.monotonic() - began
    yield from (
        Finding("trial", event.message, "warning") for event in events if isinstance(event, Warned)
    )
    started = [event for event in events if isinstance(event, Started)]
    stepped = [event.metrics for event in events if isinstance(event, Stepped)]
    if not stepped:
        yield Finding("trial", "it was stopped before its first step", "fault")
        return
    last: dict[str, Any] = stepped[-1]
    whole = timedelta(seconds=round(last["step_seconds"] * config.train.steps))
    said = f"{len(stepped)} steps with dp={started[0].dp} x sp={started[0].sp}, {started[0].scan} "
    said += f"scan, in {took:.0f} s with start and save; the last took {last['step_seconds']:.3f} "
    said += f"s and {last['peak_memory_bytes'] / 2**30:.2f} GiB a worker: at that speed "
    yield Finding("trial", f"{said}{config.train.steps:,} steps take {whole}")
    yield from _room_for_checkpoints(config)


def clear(config: Config) -> None:
    """Remove what was written; where this machine does not see it, the person is told."""
    folder = _folder(config)
    if Path(folder).exists():
        shutil.rmtree(folder, ignore_errors=True)
    elif os.environ.get("RAY_ADDRESS"):
        print(f"this machine does not see {folder}, which may be removed now")


def _folder(config: Config) -> str:
    return f"{config.run.dir.rstrip('/')}.doctor"


def _room_for_checkpoints(config: Config) -> Iterator[Finding]:
    saved = RunFolder(_folder(config)).saved()
    if not saved:  # on storage that this machine does not see
        return
    each = sum(path.stat().st_size for path in saved[0].rglob("*") if path.is_file())
    needed = (config.checkpoint.keep + 1) * each  # an old one goes when a new one is complete
    free = shutil.disk_usage(_folder(config)).free
    said = f"{each / 2**20:,.1f} MiB each; checkpoint.keep {config.checkpoint.keep} and one on its "
    said += f"way need {needed / 2**20:,.1f} MiB, {free / 2**20:,.0f} MiB are free"
    yield Finding("checkpoints", said, "ok" if needed < free else "fault")


class _Probe(Placed):
    """A process on a machine that answers."""

    def __init__(self) -> None:
        self._door: Any = None

    def clock(self) -> float:
        return time.time()

    def open_door(self, address: str) -> tuple[str, int]:
        from trainer.probe import Door

        self._door = Door(address)
        return self._door.address

    def ask(self, name: str, *args: Any, **environment: str) -> tuple[Any, str]:
        """What a function of trainer.probe returns, or why it does not."""
        os.environ.update(environment)
        from trainer import probe

        try:
            return getattr(probe, name)(*args), ""
        except (ValueError, OSError, RuntimeError) as error:
            return None, str(error)


@dataclass
class _Patients:
    """The machines under examination: asked all at once, each answers for itself."""

    config: Config
    probes: list[Any]
    places: list[Place]
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        same = Counter(place.host for place in self.places)
        self.names = [
            place.host if same[place.host] == 1 else f"{place.host}/{place.node[:6]}"
            for place in self.places
        ]

    def ask(self, name: str, *args: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """(answers, faults), each by machine."""
        return self.collect([probe.ask.remote(name, *args) for probe in self.probes])

    def collect(self, waiting: list[Any]) -> tuple[dict[str, Any], dict[str, str]]:
        import ray

        _, late = ray.wait(waiting, num_returns=len(waiting), timeout=ANSWER_SECONDS)
        answers, faults = {}, {}
        for name, reference in zip(self.names, waiting, strict=True):
            if reference in late:
                faults[name] = f"no answer within {ANSWER_SECONDS} s"
                continue
            value, fault = ray.get(reference)
            if fault:
                faults[name] = fault
            else:
                answers[name] = value
        return answers, faults


def _machines(patients: _Patients) -> Iterator[Finding]:
    """What each one is, and whether all have the same software."""
    machines, faults = patients.ask("describe")
    yield from _faults("machine", faults)
    for name, place in zip(patients.names, patients.places, strict=True):
        if machine := machines.get(name):
            gpus = ", ".join(f"{n} x {gpu}" for gpu, n in Counter(machine.gpus).items())
            said = f"{name} at {place.address} ({place.interface or 'no interface found'}): "
            said += f"{machine.processor}, {machine.cpus} cores, {gpus or 'no GPU'}, "
            yield Finding("machine", f"{said}{machine.memory_bytes / 2**30:.0f} GiB")
    if machines:
        software = {k: ", ".join(map(" ".join, m.versions.items())) for k, m in machines.items()}
        yield same("software", software)
    if lacking := sorted(name for name, machine in machines.items() if not machine.compiler):
        said = f"no g++ on {', '.join(lacking)}: a CPU scans in plain torch there, far slower"
        yield Finding("compiler", said, "warning")


def _clocks(patients: _Patients) -> Iterator[Finding]:
    """How far each machine's clock is from this one's, by the quickest of some answers."""
    import ray

    offsets = {}
    for name, probe in zip(patients.names, patients.probes, strict=True):
        asked = []
        for _ in range(8):
            before = time.time()
            theirs = ray.get(probe.clock.remote(), timeout=ANSWER_SECONDS)
            after = time.time()
            asked.append((after - before, theirs - (before + after) / 2))
        offsets[name] = min(asked)[1]
    first, last = min(offsets, key=offsets.__getitem__), max(offsets, key=offsets.__getitem__)
    apart = offsets[last] - offsets[first]
    fine = apart <= CLOCK_SECONDS
    said = f"at most {apart * 1e3:.1f} ms apart" + ("" if fine else f" ({first} and {last})")
    yield Finding("clocks", said, "ok" if fine else "warning")


def _ports(patients: _Patients) -> Iterator[Finding]:
    """Whether every machine reaches a free port of every other."""
    import ray

    opened = [
        probe.open_door.remote(place.address)
        for probe, place in zip(patients.probes, patients.places, strict=True)
    ]
    doors = ray.get(opened, timeout=ANSWER_SECONDS)
    found, faults = patients.ask("unreachable", doors)
    for name, closed in found.items():
        for index, fault in closed.items():
            faults[name] = f"does not reach {patients.names[index]} at {doors[index][0]}, {fault}: "
            faults[name] += "open the ports of net.ipv4.ip_local_port_range between the machines"
    yield from _faults("ports", faults)
    if not faults:
        yield Finding("ports", "every machine reaches a free port of every other")


def _storage(patients: _Patients) -> Iterator[Finding]:
    """Whether all see what each writes where the run will write."""
    folder = _folder(patients.config)
    marks = [f"{number}.mark" for number in range(len(patients.probes))]
    waiting = [
        probe.ask.remote("leave_mark", folder, mark)
        for probe, mark in zip(patients.probes, marks, strict=True)
    ]
    speeds, faults = patients.collect(waiting)
    yield from _faults("run.dir", faults)
    if faults:
        return
    missing, faults = patients.ask("missing_marks", folder, marks)
    for name, lacks in missing.items():
        if lacks:
            of = ", ".join(patients.names[int(mark.removesuffix(".mark"))] for mark in lacks)
            faults[name] = f"does not see in {folder} what {of} wrote: use storage that all share"
    yield from _faults("run.dir", faults)
    if not faults:
        slowest = min(speeds, key=speeds.__getitem__)
        said = f"all see what each writes in {folder}, {speeds[slowest] / 2**20:,.0f} MiB/s "
        yield Finding("run.dir", f"{said}or more to the disk (least: {slowest})")


def _data(patients: _Patients) -> Iterator[Finding]:
    """Whether all see the same prepared data. A URL is fetched by the trial."""
    for path in (path for path in patients.config.data.sources if "://" not in path):
        identities, faults = patients.ask("data_identity", path)
        yield from _faults("data.path", faults)
        if identities:
            yield same("data.path", identities, f"{path} is ")


def _remote(patients: _Patients) -> Iterator[Finding]:
    """Whether all can write, read and remove at checkpoint.remote."""
    address = patients.config.checkpoint.remote
    if not address:
        return
    waiting = [
        probe.ask.remote("remote_seconds", address, f"doctor-{number}")
        for number, probe in enumerate(patients.probes)
    ]
    seconds, faults = patients.collect(waiting)
    yield from _faults("checkpoint.remote", faults)
    if not faults:
        said = f"a small object there and back in {max(seconds.values()):.2f} s at most"
        yield Finding("checkpoint.remote", said)


def _network(patients: _Patients) -> Iterator[Finding]:
    """Latency and bandwidth of every pair, the slowest told one by one, and of all together."""
    if len(patients.probes) == 1:
        yield Finding("network", "one machine: nothing goes between machines")
        return
    waiting = [
        probe.ask.remote("measure", patients.config, **environment)
        for probe, environment in zip(
            patients.probes, environments(patients.places, 1), strict=True
        )
    ]
    measured, faults = patients.collect(waiting)
    yield from _faults("network", faults)
    if faults:
        return
    links = [link for found, _ in measured.values() for link in found]
    links = list({link.ranks: link for link in links}.values())
    typical = statistics.median(link.bytes_per_second for link in links)
    for link in sorted(links, key=lambda link: link.bytes_per_second)[:SHOWN_LINKS]:
        first, second = (patients.names[rank] for rank in link.ranks)
        said = f"{first} - {second}: {link.latency_seconds * 1e6:,.0f} µs, "
        said += f"{link.bytes_per_second / 1e9:.2f} GB/s"
        slow = link.bytes_per_second < typical / 2
        said += f", less than half of the median {typical / 1e9:.2f}" if slow else ""
        yield Finding("network", said, "warning" if slow else "ok")
    together = [collectives for _, collectives in measured.values()]
    gather = max(found.gather_seconds for found in together)
    reduce = min(found.reduce_bytes_per_second for found in together)
    said = f"all {len(patients.probes)} together: a carry of 4 KiB from each gathered in "
    said += f"{gather * 1e6:,.0f} µs, gradients summed at {reduce / 1e9:.2f} GB/s"
    yield Finding("network", f"{said} ({len(links)} pairs measured)")


EXAMINATIONS = (_machines, _clocks, _ports, _storage, _data, _remote, _network)


def same(subject: str, values: dict[str, str], before: str = "") -> Finding:
    """Whether all machines say the same; the ones that are alone with theirs are named."""
    usual, count = Counter(values.values()).most_common(1)[0]
    if count == len(values):
        return Finding(subject, f"{before}the same on all machines: {usual}")
    others = "; ".join(f"{name} has {value}" for name, value in values.items() if value != usual)
    said = f"{before}not the same on all machines: {others}; {count} of {len(values)} have {usual}"
    return Finding(subject, said, "fault")


def _faults(subject: str, faults: dict[str, str]) -> Iterator[Finding]:
    for name, fault in faults.items():
        yield Finding(subject, f"{name}: {fault}", "fault")
