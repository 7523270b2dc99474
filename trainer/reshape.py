"""A checkpoint brought to another number of workers, by DeepSpeed's universal format, unasked."""

import argparse
import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from trainer.checkpoint import Manifest
from trainer.parallel.topology import Topology


def needs_reshaping(manifest: Manifest, topology: Topology) -> bool:
    """ZeRO's shards are cut for a number of workers; without ZeRO every worker has all."""
    return manifest.zero_stage > 0 and manifest.world_size != topology.world_size


def load_reshaped(
    source: Path, topology: Topology, optimizer: Any, load: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Convert the checkpoint `source`, `load` what came of it, and mend what the load breaks.

    `source` is DeepSpeed's folder in a checkpoint, `optimizer` DeepSpeed's, around torch's own.
    Raises ValueError on every worker where the checkpoint cannot be converted.
    """
    checkpoint = source.parent
    converted = checkpoint.with_suffix(".universal")
    fault = None
    if topology.first:
        shutil.rmtree(converted, ignore_errors=True)
        try:
            _convert(source, converted / source.name)
        except Exception as error:  # the other ranks wait: they must be told
            workers = f"{topology.world_size} workers"
            fault = f"{checkpoint} cannot be converted for {workers}: {error}"
    if fault := topology.gather_objects(fault)[0]:
        raise ValueError(fault)
    # At stage 3 the universal load gives every group the first group's settings, ...
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    client = load(converted)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    # ... and all groups one shared step counter, which then advances once per group.
    inner: Optimizer = optimizer.optimizer
    for state in inner.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()
    topology.gather_objects(None)
    if topology.first:
        shutil.rmtree(converted, ignore_errors=True)
    return client


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        main(
            argparse.Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
