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
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[3]))

from models.scan import RECURRENCES
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
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "reset_ptr":
            signature[name] = "*u8"
        elif name.endswith("_ptr"):
            signature[name] = f"*{POINTERS.get(name, dtype) if dtype == 'bf16' else dtype}"
        else:
            signature[name] = "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name in ("T", "H", "chunk")
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
    print(json.dumps(result))


if __name__ == "__main__":
    main()
