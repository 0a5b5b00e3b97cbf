"""Compile Triton kernels for GPUs that are not there, as their launchers would start them.

A test module names its calls in `LAUNCHES`: functions without arguments that start kernels on
tensors of the meta device, through the library's own launchers. `report("its_name", 80, 90)` runs
them in one process without Triton's interpreter, where starting a kernel only notes it, and
compiles each noted start for each compute capability. What comes back is a `Compiled` each.

Compiling takes 2 to 4 seconds a kernel, so that a file names only the calls that matter.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

SHARED_MEMORY = {80: 166_912, 90: 232_448}
"""What one program can have, in bytes: Triton does not check it without the GPU."""


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one GPU."""

    name: str  # of the launch
    kernel: str
    capability: int
    warps: int
    shared: int  # bytes of shared memory
    stack: int  # bytes a thread keeps in slow memory: registers that spilled
    registers: int
    tensor_cores: int  # instructions that use them
    async_copies: int  # instructions that load ahead

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_MEMORY[self.capability]


def report(module: str, *capabilities: int) -> list[Compiled]:
    """Every kernel that the launches of tests/`module`.py start, for every capability."""
    code = f"import triton_compile; triton_compile.main({module!r}, {capabilities!r})"
    tests = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**found) for found in json.loads(done.stdout.splitlines()[-1])]


# --- in the process without the interpreter -------------------------------------------------------


def main(module: str, capabilities: tuple[int, ...]) -> None:
    """Print what `report` reads."""
    launches = importlib.import_module(module).LAUNCHES
    found = [
        asdict(compiled(name, capability, *start))
        for capability in capabilities
        for name, launch in launches.items()
        for start in starts(launch, capability)
    ]
    print(json.dumps(found))


def starts(launch, capability: int) -> list[tuple]:
    """The kernels that a launch starts, with their arguments; none is run."""
    from triton.runtime.jit import JITFunction

    from course_lib.ops import triton_runtime

    noted, run = [], JITFunction.run
    triton_runtime.capability = lambda device: capability
    JITFunction.run = lambda self, *args, grid, warmup, **options: noted.append(
        (self, args, options)
    )
    try:
        launch()
    finally:
        JITFunction.run = run
    return noted


def compiled(name: str, capability: int, kernel, args: tuple, options: dict) -> Compiled:
    """Compile a kernel for such arguments as Triton would, and look at the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    given = {key: given.pop(key) for key in kernel.arg_names} | {"": given}
    settings = given.pop("")  # num_warps, num_stages
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        kind, multiple = specialised(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(number,)] = value
        elif multiple:
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)
    stack, registers = resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    return Compiled(
        name, kernel.__name__, capability, settings["num_warps"], built.metadata.shared,
        stack, registers,
        tensor_cores=len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
    )  # fmt: skip


def specialised(value, parameter) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to be a multiple of 16."""
    import torch

    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        names = {
            torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
            torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1", torch.int32: "i32",
            torch.int64: "i64",
        }  # fmt: skip
        return "*" + names[value.dtype], True  # torch's memory starts at multiples of 64
    if isinstance(value, float):
        return "fp32", False
    wide = "i32" if -(2**31) <= value < 2**31 else "i64"
    if parameter.do_not_specialize:
        return wide, False
    return ("constexpr", False) if value == 1 else (wide, value % 16 == 0)


def resources(cubin: bytes) -> tuple[int, int]:
    """Bytes of stack and number of registers of a compiled kernel, by cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("STACK", "REG"))
