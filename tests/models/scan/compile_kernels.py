"""Compile the GPU kernels for a compute capability, and print what each uses, as JSON.

    python tests/models/scan/compile_kernels.py 90

Needs Triton and no GPU. spilled_bytes counts local memory, of which the kernels should have none;
narrowest_load is in bits per lane.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[3]))

from models.scan import RECURRENCES, triton_states
from models.scan import triton as gpu
from models.scan.kernels import loops

CONSTANTS = {"HAS_RESET": False, "RAW": True}
# Of a scan of inputs in bf16; of one of maps, everything is fp64.
POINTERS = dict.fromkeys(("in_ptr", "out_ptr", "last_ptr", "din_ptr"), "fp32")
POINTERS |= dict.fromkeys(("maps_ptr", "ends_ptr"), "fp64")
DTYPES = {"bf16": torch.bfloat16, "fp64": torch.float64}


def usage(
    kernel: triton.JITFunction, recurrence: str, capability: int, dtype: str, **constants: Any
) -> dict:
    """Registers of a thread, bytes of local memory, bits of the narrowest load."""
    gates = gpu.gates_of(RECURRENCES[recurrence])
    constants = {**CONSTANTS, **gpu.constants(kernel, gates, DTYPES[dtype]), **constants}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    pointers = {"reset_ptr": "u8"} | (POINTERS if dtype == "bf16" else {})
    return compiled_usage(kernel, constants, pointers, capability, dtype)


def compiled_usage(
    kernel: triton.JITFunction,
    constants: dict[str, Any],
    pointers: dict[str, str],
    capability: int,
    dtype: str,
) -> dict:
    """Of a kernel with these constants, and pointers to other types than `dtype`."""
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{pointers.get(name, dtype)}"
        else:
            signature[name] = "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name in ("T", "H", "D", "N", "chunk")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 1})
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    loads = [(vector, bits) for vector, bits in loads if bits != "8"]  # a reset is one byte
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", shown)
    assert found, shown
    return {
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]) + int(found[3]),
        "narrowest_load": min(int(vector or 1) * int(bits) for vector, bits in loads),
    }


def states_usage(kernel: triton.JITFunction, recurrence: str, capability: int) -> dict:
    """The same of a loop over states, as many as published."""
    states = {"mamba": 16, "s4d": 32}[recurrence]
    constants = {"FLOW": True, "REVERSE": True, "TILE": 64, "HAS_RESET": True}
    constants |= {"BLOCK": triton_states.block_of(states, recurrence == "s4d"), "NP": states}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    wide = "fp64" if recurrence == "s4d" else "fp32"
    pointers = dict.fromkeys(("rate_ptr", "bias_ptr", "weight_ptr"), wide)
    pointers |= dict.fromkeys(("drate_ptr", "dbias_ptr", "dweight_ptr"), wide)
    pointers |= dict.fromkeys(("kept_ptr", "scratch_ptr", "db_ptr", "dc_ptr"), "fp32")
    states64 = ("state_ptr", "log_ptr", "enter_ptr", "ends_ptr", "last_ptr", "decay_ptr")
    pointers |= dict.fromkeys(states64, "fp64") | {"reset_ptr": "u8"}
    return compiled_usage(kernel, constants, pointers, capability, "bf16")


def main() -> None:
    capability, result = int(sys.argv[1]), {}
    for name in (name for name, recurrence in RECURRENCES.items() if recurrence.triton_gates):
        for kernel, flags in (
            (loops.summarize_kernel, {"FLOW": False, "REVERSE": False}),
            (loops.forward_kernel, {"REVERSE": False}),
            (loops.backward_kernel, {}),
        ):
            label = f"{kernel.__name__} {name}"
            result[label] = usage(kernel, name, capability, "bf16", **flags)
        for kernel in (loops.forward_kernel, loops.backward_kernel):
            flags = {"HAS_RESET": True, "REVERSE": False}
            label = f"{kernel.__name__} {name}, resets"
            result[label] = usage(kernel, name, capability, "bf16", **flags)
    result["forward_kernel, carry"] = usage(
        loops.forward_kernel, "linear", capability, "fp64", REVERSE=True
    )
    flow = {"FLOW": True, "REVERSE": True}
    result["summarize_kernel mingru, backward"] = usage(
        loops.summarize_kernel, "mingru", capability, "bf16", **flow
    )
    for name in (name for name, recurrence in RECURRENCES.items() if recurrence.triton_states):
        module = resolve_name(RECURRENCES[name].triton_states)
        for kernel in ("summarize_kernel", "carry_kernel", "forward_kernel", "backward_kernel"):
            label = f"{kernel} {name}, states"
            result[label] = states_usage(getattr(module, kernel), name, capability)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
