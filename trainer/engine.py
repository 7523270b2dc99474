"""The door to DeepSpeed: the only file that imports it, and where its traps are closed.

Each setting below that departs from DeepSpeed's default says why; the parity tests hold all of them
(tests/trainer/test_parity.py).
"""

import importlib
import json
import logging
import math
import os
import pickle
import platform
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from models.scan import Recurrence
from trainer import accumulated as gradients
from trainer.accumulated import Share
from trainer.checkpoint import WEIGHTS, Files, Saved
from trainer.deepspeed_settings import deepspeed_config
from trainer.guard import weights_checksum
from trainer.optim import build_optimizer
from trainer.reshape import load_reshaped, needs_reshaping
from trainer.worker import Worker

OBEYED = ("betas", "eps", "weight_decay")  # settings of an optimizer's groups
TAG = "deepspeed"  # the folder of DeepSpeed's files inside a checkpoint
MANY = 16  # backwards of a step, beyond which a sum in bf16 is not to be relied on


@cache
def _deepspeed() -> Any:
    """DeepSpeed, imported once, quiet, and without what it builds for others.

    Its CPU backend compiles a shared-memory all-reduce at first use (35 s, and a race between
    workers) that only its inference engine calls. And where ZeRO asks whether an optimizer is Muon,
    Muon is handed to torch.compile, for whose sake every worker imports the compiler (5 s).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compiles, compiler.compile = compiler.compile, lambda: lambda function: function
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    compiler.compile = compiles
    return deepspeed


def versions() -> dict[str, str]:
    """What a checkpoint was written by."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": _deepspeed().__version__,
    }


class Engine:
    """A model wrapped by DeepSpeed: forward, backward, step, save; loaded where there is a resume.

    Call it like the model. Every rank must make every call, in the same order.
    """

    def __init__(self, model: nn.Module, worker: Worker, resume: Saved | None = None) -> None:
        config, topology, deepspeed = worker.config, worker.topology, _deepspeed()
        if not deepspeed.comm.is_initialized():
            backend = "nccl" if worker.device.type == "cuda" else "gloo"
            deepspeed.init_distributed(
                dist_backend=backend, dist_init_required=False, auto_mpi_discovery=False
            )
        derived = deepspeed_config(config)
        reshaped = resume is not None and needs_reshaping(resume.manifest, topology)
        if reshaped:
            derived["checkpoint"] = {"load_universal": True}
        model = model.to(worker.device)
        optimizer = build_optimizer(model, config.optim, config.model.memory_tokens)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # bf16 at stage 0 takes a step while it is set up
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, mpu=topology, config=derived, dist_init_required=False
        )
        if config.deepspeed.zero_stage == 0 and config.train.dtype == "bf16":
            for parameter in self._engine.module.parameters():
                parameter.grad_dtype = torch.float32  # to which thousands of segments may add
        backwards = config.accumulation * config.plan.segments
        if config.deepspeed.zero_stage == 1 and config.train.dtype == "bf16" and backwards > MANY:
            worker.warn(
                f"deepspeed.zero_stage 1 adds the gradients of {backwards} backwards of a step in "
                f"bf16, which is off by a percent at a hundred: set 2, which adds them in fp32"
            )
        if config.deepspeed.zero_stage == 3:
            offload = self._engine.optimizer.parameter_offload
            _unrecorded(offload.get_param_coordinator())
        self._leave_out = False  # the gradients of this step
        inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        inner.register_step_pre_hook(self._drop_gradients)
        self._engine._copy_recovery_script = lambda _: None  # writes; the weights lie beside
        self._topology = topology
        self._stage = config.deepspeed.zero_stage
        self._described = json.dumps(asdict(config.model))  # for readers of the weights alone
        if self._stage == 0 and config.train.dtype == "bf16":
            self._engine.optimizer.optimizer.state.clear()  # the traces of that step
        self._step = 0
        if resume:
            # a checkpoint brings its own along; what is configured now is obeyed
            asked = [{name: group[name] for name in OBEYED} for group in inner.param_groups]
            with _weights_only():
                self._load(resume, reshaped)
            for group, values in zip(inner.param_groups, asked, strict=True):
                group.update(values)
            if hasattr(self._engine.optimizer, "clip_grad"):  # at stages 1 and 2 it is loaded too
                self._engine.optimizer.clip_grad = config.optim.clip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def recurrences(self) -> list[Recurrence]:
        """Those that the model's mixers scan."""
        named = (getattr(module, "recurrence", None) for module in self._engine.module.modules())
        return [recurrence for recurrence in named if isinstance(recurrence, Recurrence)]

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss` to the step's; with the `last` they are summed over ranks.

        A step may have any number of backwards, the same on every rank, each of a graph of its own.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, *, leave_out: bool = False) -> float:
        """Update the weights after a step's last backward; the gradient's norm before clipping.

        Nothing is updated where that is not finite, or the step is to be left out.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self._stage == 0:  # every rank holds all gradients; DeepSpeed keeps no norm in fp32
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        self._leave_out = leave_out or (norm is not None and not math.isfinite(norm))
        self._engine.step()
        self._leave_out = False
        self._step += 1
        if getattr(self._engine.optimizer, "overflow", False):
            return math.inf  # DeepSpeed made no update, and at stage 3 still tells the norm before
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _drop_gradients(self, optimizer: Optimizer, *_: Any) -> None:
        """Before every update; torch's optimizers pass over what has no gradient."""
        if self._leave_out:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def snapshot(self) -> Files:
        """A copy of this rank's share of a checkpoint, and what writes it.

        DeepSpeed's files in deepspeed/, the weights in model.safetensors.
        """
        copied = _Copies()
        engine = self._engine
        kept, engine.checkpoint_engine = engine.checkpoint_engine, copied
        try:
            engine.save_checkpoint(
                "snapshot", tag=TAG, client_state={"step": self._step}, save_latest=False
            )
        finally:
            engine.checkpoint_engine = kept
        files: Files = {
            str(Path(path).relative_to("snapshot")): partial(torch.save, state)
            for path, state in copied.files.items()
        }
        weights = self.weights()
        if self._topology.first:
            described = {"format": "pt", "step": str(self._step), "model": self._described}
            files[WEIGHTS] = partial(save_file, weights, metadata=described)
        return files

    def weights(self) -> dict[str, Tensor]:
        """All weights in fp32, the optimizer's own, on rank 0's CPU; empty on the other ranks."""
        masters = _deepspeed().utils.safe_get_full_fp32_param
        kept: dict[
            int, Tensor
        ] = {}  # at stage 0 in bf16 they are of another optimizer of DeepSpeed's
        if self._stage == 0 and hasattr(self._engine.optimizer, "fp32_groups"):
            optimizer = self._engine.optimizer
            for halves, wholes in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                kept |= {id(half): whole for half, whole in zip(halves, wholes, strict=True)}
        gathered = {}
        for name, parameter in self._engine.module.named_parameters():
            whole = masters(parameter)  # of every rank's share
            if self._topology.first:
                if whole is None:
                    whole = kept.get(id(parameter), parameter).detach()
                gathered[name] = whole.float().cpu().clone().contiguous()
        return gathered

    def accumulated(self) -> Share:
        """A copy of what this rank has of the gradients since the last step."""
        return gradients.read(self._engine, self._stage)

    def give_back(self, share: Share) -> None:
        """What was read of an engine like this one: go on from there."""
        gradients.put(self._engine, self._stage, share)

    def weights_checksum(self) -> int:
        """Of the weights that every worker holds whole."""
        return weights_checksum(self._engine.module.parameters())

    def destroy(self) -> None:
        """Free what DeepSpeed holds; for a process that builds several engines."""
        self._engine.destroy()

    def _load(self, saved: Saved, reshaped: bool) -> None:
        def load(folder: Path) -> dict[str, Any]:
            try:
                _, client = self._engine.load_checkpoint(str(folder), tag=TAG)
            except pickle.UnpicklingError as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"{folder} holds more than tensors and plain values, which this run has not "
                    f"written ({reason}): restore it from a copy"
                ) from None
            return client or {}

        if reshaped:
            source = saved.folder / TAG
            client = load_reshaped(source, self._topology, self._engine.optimizer, load)
        else:
            client = load(saved.folder)
        step = saved.manifest.step
        if client.get("step") != step:
            raise ValueError(
                f"{saved.folder} loaded as step {client.get('step')}, its manifest says {step}"
            )
        self._step = step


def _unrecorded(coordinator: Any) -> None:
    """Gather and free weights out of sight of whoever records what a block computes.

    Whether they are there already differs from one run of a block to the next, and the record that
    parallel/recompute.py keeps counts operators.
    """

    def apart(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return method(*args, **kwargs)

    for name in ("fetch_sub_module", "release_sub_module"):
        setattr(coordinator, name, partial(apart, getattr(coordinator, name)))


@contextmanager
def _weights_only() -> Iterator[None]:
    """DeepSpeed's files read as tensors and plain values: nothing that they hold is run.

    Three classes of its own stand in them, which do nothing when they are made.
    """
    names = ("zero.config.ZeroStageEnum", "fp16.loss_scaler.LossScaler")
    own = [f"deepspeed.runtime.{name}" for name in names]
    own.append("deepspeed.utils.tensor_fragment.fragment_address")
    classes = []
    for path in own:
        module, _, name = path.rpartition(".")
        classes.append(getattr(importlib.import_module(module), name))
    force = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # DeepSpeed asks torch for the opposite
    before = os.environ.get(force)
    os.environ[force] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        os.environ.pop(force) if before is None else os.environ.update({force: before})


class _Copies:
    """In the place of DeepSpeed's checkpoint engine: copies to the CPU what it would write."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[path] = _copy(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    create = commit = lambda *_: None

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return False  # a copy of a view is not a view


def _copy(state: Any) -> Any:
    """Nested containers with every tensor copied; what else they hold does not change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = ((key, _copy(value)) for key, value in state.items())
        return OrderedDict(copied) if isinstance(state, OrderedDict) else dict(copied)
    if type(state) in (list, tuple):
        return type(state)(_copy(value) for value in state)
    return state
