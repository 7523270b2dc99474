"""A finished or stopped run's model, as those who use it find it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from models.build import build_model
from trainer.checkpoint import find_weights
from trainer.config import load_dumped
from trainer.run_folder import RunFolder


def load_trained(folder: Path, device: torch.device) -> tuple[Any, int]:
    """The model of a run's newest intact checkpoint, in fp32, and the step that it is of.

    Raises ValueError where the folder holds no run, or no such checkpoint.
    """
    model = build_model(load_dumped(RunFolder(folder).config).model)
    step = take_weights(model, folder)
    return model.to(device).float().eval(), step


def take_weights(model: nn.Module, folder: Path) -> int:
    """Give a model the newest weights of a run of the same shape; the step that they are of.

    Raises ValueError where there are none, or they do not fit.
    """
    weights, manifest = find_weights(RunFolder(folder))
    try:
        load_model(model, weights)  # knows of a matrix that embedding and head share
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights} does not fit the model: {error}") from None
    return manifest.step
