"""A backward written by hand has no second derivative: asked for one, it says so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a torch.autograd.Function: RuntimeError under create_graph=True.

    torch's own `once_differentiable` speaks up only when the second derivative is taken, and then
    of a tensor that was not used.
    """

    @wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            name = type(ctx).__name__.removesuffix("Backward").lstrip("_")
            raise RuntimeError(
                f"{name} has a gradient but no second derivative: leave out create_graph=True"
            )
        return backward(ctx, *grads)

    return refusing
