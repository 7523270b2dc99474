"""The door to DeepSpeed: the only file that imports it, and where its traps are closed.

Each setting below that departs from DeepSpeed's default says why; the parity tests hold all of them
(tests/trainer/test_parity.py).
"""

import argparse
import contextlib
import importlib
import io
import logging
import platform
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.flops import parameters
from trainer.checkpoint import WEIGHTS, Manifest
from trainer.config import Config
from trainer.optim import build_optimizer
from trainer.parallel.topology import Topology

TAG = "deepspeed"  # the folder of DeepSpeed's files inside a checkpoint


@cache
def _deepspeed() -> Any:
    """DeepSpeed, imported once, quiet, and without its build step.

    Its CPU backend compiles a shared-memory all-reduce at first use (35 s, and a race between
    workers) that only its inference engine calls.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    return deepspeed


def versions() -> dict[str, str]:
    """What a checkpoint was written by."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": _deepspeed().__version__,
    }


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own dictionary, derived from ours and never written by hand."""
    stage = config.deepspeed.zero_stage
    # The default allocates 2 GB for gradients on their way, however small the model.
    bucket = min(500_000_000, parameters(config.model))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage == 3:
        # The default reduces into shards by dividing by dp * sp, sp times too much for sequences.
        zero["reduce_scatter"] = False
        # The default replaces torch.nn.functional.linear in the whole process, for good.
        zero["memory_efficient_linear"] = False
        zero["stage3_param_persistence_threshold"] = config.deepspeed.persistence_threshold
    derived: dict[str, Any] = {
        # counted over dp alone: the ranks of one sequence share its samples
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.clip,  # DeepSpeed's default is 1.0, so always said
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if config.train.dtype == "bf16":
        derived["bf16"] = {"enabled": True}
        if stage >= 2:
            # gradients are summed and sent in fp32; stages 0 and 1 only do so in bf16
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
            derived["communication_data_type"] = "fp32"
            derived["seq_parallel_communication_data_type"] = "fp32"
    return derived


class Engine:
    """A model wrapped by DeepSpeed: forward, backward, step, save; loaded where there is a resume.

    Call it like the model. Every rank must make every call, in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        topology: Topology,
        device: torch.device,
        resume: tuple[Path, Manifest] | None = None,
    ) -> None:
        deepspeed = _deepspeed()
        if not deepspeed.comm.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            deepspeed.init_distributed(
                dist_backend=backend, dist_init_required=False, auto_mpi_discovery=False
            )
        derived = deepspeed_config(config)
        universal = resume is not None and _needs_conversion(resume[1], topology)
        if universal:
            derived["checkpoint"] = {"load_universal": True}
        model = model.to(device)
        optimizer = build_optimizer(model, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # bf16 at stage 0 takes a step while it is set up
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, mpu=topology, config=derived, dist_init_required=False
        )
        self._topology = topology
        self._stage = config.deepspeed.zero_stage
        if self._stage == 0 and config.train.dtype == "bf16":
            self._engine.optimizer.optimizer.state.clear()  # the traces of that step
        self._step = 0
        if resume:
            self._load(*resume, universal)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; the mean over a step's micro-batches is taken."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch, changes nothing else

    def step(self, learning_rate: float) -> float:
        """Update the weights after a step's last backward; the gradient's norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self._stage == 0:  # every rank holds all gradients; DeepSpeed keeps no norm in fp32
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        self._engine.step()
        self._step += 1
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def save(self, folder: Path) -> None:
        """DeepSpeed's files into folder/deepspeed, the weights into folder/model.safetensors."""
        self._engine.save_checkpoint(
            str(folder), tag=TAG, client_state={"step": self._step}, save_latest=False
        )
        weights = self.weights()
        if self._topology.rank == 0:
            save_file(weights, folder / WEIGHTS)

    def weights(self) -> dict[str, Tensor]:
        """All weights on rank 0's CPU, in the model's dtype; empty on the other ranks."""
        gathered = {}
        for name, parameter in self._engine.module.named_parameters():
            sharded = hasattr(parameter, "ds_id")
            with _deepspeed().zero.GatheredParameters([parameter], enabled=sharded):
                if self._topology.rank == 0:
                    gathered[name] = parameter.detach().cpu().clone().contiguous()
        return gathered

    def destroy(self) -> None:
        """Free what DeepSpeed holds; for a process that builds several engines."""
        self._engine.destroy()

    def _load(self, folder: Path, manifest: Manifest, universal: bool) -> None:
        if not universal:
            _, client = self._engine.load_checkpoint(str(folder), tag=TAG)
        else:
            client = self._load_universal(folder)
        loaded = (client or {}).get("step")
        if loaded != manifest.step:
            raise ValueError(f"{folder} loaded as step {loaded}, its manifest says {manifest.step}")
        self._step = manifest.step

    def _load_universal(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint of another number of workers, by DeepSpeed's universal format."""
        converted = folder.with_suffix(".universal")
        fault = None
        if self._topology.rank == 0:
            shutil.rmtree(converted, ignore_errors=True)
            try:
                _convert(folder / TAG, converted / TAG)
            except Exception as error:  # the other ranks wait: they must be told
                fault = (
                    f"{folder} cannot be converted for {self._topology.world_size} workers: {error}"
                )
        fault = self._topology.gather_objects(fault)[0]
        if fault:
            raise ValueError(fault)
        optimizer = self._engine.optimizer
        # At stage 3 the universal load gives every group the first group's settings, ...
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        _, client = self._engine.load_checkpoint(str(converted), tag=TAG)
        for group, kept in zip(optimizer.param_groups, settings, strict=True):
            group.update(kept)
        # ... and all groups one shared step counter, which then advances once per group.
        for state in optimizer.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        self._topology.gather_objects(None)
        if self._topology.rank == 0:
            shutil.rmtree(converted, ignore_errors=True)
        return client


def _needs_conversion(manifest: Manifest, topology: Topology) -> bool:
    """ZeRO's shards are cut for a number of workers; without ZeRO every worker has all."""
    return manifest.zero_stage > 0 and manifest.world_size != topology.world_size


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
