"""Triton kernels compiled for GPUs that are not there, and what the machine code says of them.

The compiler runs in a process of its own, because kernels that triton has defined under TRITON_INTERPRET do not
compile; starting it takes seconds, so that all variants of a test module go there together.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

_TENSOR_CORES = re.compile(r"^(HMMA|IMMA|DMMA|HGMMA|IGMMA|QGMMA|WGMMA|UTC\w*MMA)$")  # HFMA2.MMA is none


@dataclass
class Variant:
    """A kernel to compile: `kernel` as `module:name`, the types of its arguments, and how it is launched.

    `signature` has triton's types by argument (`*bf16`, `i32`, `fp32`) without the constants of `constants`; the
    arguments named in `aligned` (pointers, strides) are multiples of 16. `options` are the launch's (`num_warps`).
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)
    capability: int = 90


@dataclass
class Compiled:
    """What a variant came to; `local` counts loads and stores of local memory, `instructions` all by name."""

    registers: int
    stack: int  # bytes of a thread
    shared: int  # bytes of a block
    local: int
    tensor_cores: list[str]
    instructions: dict[str, int]


def compile_kernels(variants: Sequence[Variant], seconds: float = 300.0) -> list[Compiled]:
    """Compile all variants in one process; fails the test with the compiler's message, skips without `cuobjdump`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the very package that is tested
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())], input=json.dumps([asdict(one) for one in variants]),
        capture_output=True, text=True, env=environment, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    if "skip" in answer:
        pytest.skip(answer["skip"])
    return [Compiled(**one) for one in answer["compiled"]]


def _compile(variant: Variant, cuobjdump: Path, folder: Path) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    named = {**variant.signature, **dict.fromkeys(variant.constants, "constexpr")}
    signature = {argument: named[argument] for argument in kernel.arg_names}
    assert len(signature) == len(named), f"{variant.kernel} has no argument {set(named) - set(signature)}"
    attributes = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in variant.aligned}
    built = triton.compile(
        ASTSource(kernel, signature, variant.constants, attributes),
        target=GPUTarget("cuda", variant.capability, 32),
        options={"enable_fp_fusion": True, **variant.options},
    )
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    usage, code = (
        subprocess.run([cuobjdump, flag, path], capture_output=True, text=True, check=True).stdout
        for flag in ("-res-usage", "-sass")
    )
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))
    # A line is `/*0070*/  @!P0 FFMA.FTZ R1, … ; /* 0x… */`; NOPs fill the end.
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", code, re.MULTILINE))
    del opcodes["NOP"]
    assert opcodes["EXIT"], "the listing of the machine code was not understood"
    return Compiled(
        registers=registers, stack=stack, shared=built.metadata.shared, local=opcodes["LDL"] + opcodes["STL"],
        tensor_cores=sorted(filter(_TENSOR_CORES.match, opcodes)), instructions=dict(opcodes),
    )  # fmt: skip


def _answer() -> dict[str, Any]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        return {"skip": "this triton brings no cuobjdump, which reads the machine code"}
    with tempfile.TemporaryDirectory() as folder:
        variants = [Variant(**one) for one in json.load(sys.stdin)]
        return {"compiled": [asdict(_compile(one, cuobjdump, Path(folder))) for one in variants]}


if __name__ == "__main__":
    print(json.dumps(_answer()))
