"""The kernels of relative attention compiled for GPUs that are not there, as the operator launches them.

Held are upper bounds on registers and on what is kept in local memory, and that products go to the tensor cores.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton

from elsewhere.kernels.relative_attention import relative_attention
from elsewhere.kernels.relative_lookup import make_lookup
from elsewhere.models.relative import bucket_ids, offset_ids
from elsewhere.tests.compiled_kernels import Compiled, Variant, compile_kernels

pytest.importorskip("triton", reason="needs the package triton, which torch brings on Linux")

from elsewhere.kernels import (
    triton_relative,
    triton_relative_backward,
    triton_relative_long,
    triton_relative_table,
)

KERNELS = {
    "forward_kernel": triton_relative,
    "backward_kernel": triton_relative_backward,
    "query_gradient_kernel": triton_relative_long,
    "key_gradient_kernel": triton_relative_long,
    "table_gradient_kernel": triton_relative_table,
}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}


@dataclass(frozen=True)
class Case:
    """A kernel of an attention, and the most that a thread may take of a GPU.

    `attack` is none, `keys` or `tables`, which has two over the offsets; `local` counts loads and stores of local
    memory.
    """

    kernel: str
    side: int  # patches along an edge, and a class token
    depth: int
    attack: str
    capability: int
    registers: int
    local: int
    cheap: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.kernel}-{self.side}x{self.side}-{self.depth}-{self.attack}-{self.dtype}-sm_{self.capability}"


CASES = [
    Case("forward_kernel", 7, 64, "none", 80, 168, 0, cheap=True),
    Case("forward_kernel", 7, 64, "none", 90, 88, 0, cheap=True),
    Case("forward_kernel", 8, 80, "none", 80, 255, 0),
    Case("forward_kernel", 8, 80, "none", 90, 120, 0),
    Case("forward_kernel", 7, 64, "tables", 80, 232, 0),
    Case("forward_kernel", 7, 64, "tables", 90, 224, 0),
    Case("forward_kernel", 8, 80, "tables", 80, 255, 310),
    Case("forward_kernel", 8, 80, "tables", 90, 255, 220),
    Case("forward_kernel", 14, 64, "keys", 80, 255, 0),
    Case("forward_kernel", 14, 64, "keys", 90, 200, 0),
    Case("forward_kernel", 16, 80, "keys", 80, 255, 0),
    Case("forward_kernel", 16, 80, "keys", 90, 232, 0),
    Case("backward_kernel", 7, 64, "none", 80, 255, 0),
    Case("backward_kernel", 7, 64, "none", 90, 184, 0),
    Case("backward_kernel", 8, 80, "none", 80, 255, 120),
    Case("backward_kernel", 8, 80, "none", 90, 255, 50),
    Case("backward_kernel", 7, 64, "tables", 80, 255, 20),
    Case("backward_kernel", 7, 64, "tables", 90, 255, 0),
    Case("backward_kernel", 8, 80, "tables", 80, 255, 920),
    Case("backward_kernel", 8, 80, "tables", 90, 255, 490),
    Case("query_gradient_kernel", 14, 64, "keys", 80, 255, 570),
    Case("query_gradient_kernel", 14, 64, "keys", 90, 248, 0),
    Case("query_gradient_kernel", 16, 80, "keys", 80, 255, 130),
    Case("query_gradient_kernel", 16, 80, "keys", 90, 255, 90),
    Case("key_gradient_kernel", 14, 64, "keys", 80, 255, 300),
    Case("key_gradient_kernel", 14, 64, "keys", 90, 224, 0),
    Case("key_gradient_kernel", 16, 80, "keys", 80, 255, 0),
    Case("key_gradient_kernel", 16, 80, "keys", 90, 255, 170),
    Case("table_gradient_kernel", 7, 64, "none", 80, 136, 0, cheap=True),
    Case("table_gradient_kernel", 7, 64, "none", 90, 80, 0, cheap=True),
    Case("table_gradient_kernel", 8, 80, "tables", 80, 216, 0),
    Case("table_gradient_kernel", 8, 80, "tables", 90, 168, 0),
    Case("table_gradient_kernel", 16, 80, "keys", 80, 255, 10),
    Case("table_gradient_kernel", 16, 80, "keys", 90, 136, 0),
    # Float32 is there for comparisons: it spills, and is held to what it does.
    Case("forward_kernel", 8, 80, "none", 80, 255, 8000, dtype=torch.float32),
    Case("forward_kernel", 8, 80, "none", 90, 255, 600, dtype=torch.float32),
    Case("backward_kernel", 8, 80, "none", 80, 255, 17100, dtype=torch.float32),
    Case("backward_kernel", 8, 80, "none", 90, 255, 2400, dtype=torch.float32),
    Case("forward_kernel", 14, 64, "none", 80, 255, 600, dtype=torch.float32),
    Case("forward_kernel", 14, 64, "none", 90, 255, 300, dtype=torch.float32),
    Case("query_gradient_kernel", 14, 64, "none", 80, 255, 12300, dtype=torch.float32),
    Case("query_gradient_kernel", 14, 64, "none", 90, 255, 900, dtype=torch.float32),
    Case("key_gradient_kernel", 14, 64, "none", 80, 255, 14000, dtype=torch.float32),
    Case("key_gradient_kernel", 14, 64, "none", 90, 255, 400, dtype=torch.float32),
]

# Where triton 3.8 takes more than 3.9: (registers, local).
OF_3_8 = {
    "forward_kernel-8x8-80-none-torch.bfloat16-sm_90": (152, 0),
    "query_gradient_kernel-14x14-64-keys-torch.bfloat16-sm_90": (255, 0),
    "table_gradient_kernel-16x16-80-keys-torch.bfloat16-sm_90": (160, 0),
    "query_gradient_kernel-14x14-64-none-torch.float32-sm_90": (255, 1000),
}


def bounds(case: Case) -> tuple[int, int]:
    """The most registers and local memory that the installed triton may take."""
    if triton.__version__.startswith("3.8."):
        return OF_3_8.get(str(case), (case.registers, case.local))
    return case.registers, case.local


class _Recorder:
    """Stands for a kernel and keeps what it is launched with, by the name of the argument."""

    def __init__(self, kernel):
        self.names, self.launched = kernel.arg_names, {}
        self.constants = [name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)]

    def __getitem__(self, grid):
        return lambda *given, **named: self.launched.update(dict(zip(self.names, given, strict=False)), **named)


def variant(case: Case) -> Variant:
    """What the operator would have compiled for two images and twelve heads; triton takes an argument of 1 as known."""
    grid, offsets = (case.side, case.side), case.attack == "tables"
    index = offset_ids(grid) if offsets else bucket_ids(grid)
    lookup = make_lookup(index, int(index.max()) + 1, grid, 1)
    qkv = torch.zeros(2, len(index), 3, 12, case.depth, dtype=case.dtype, requires_grad=True)
    tables: dict[str, Any] = {"table": torch.zeros(1, case.depth, lookup.columns)}
    if offsets:
        tables["attacked"] = tables["table"]
    if case.attack == "keys":
        tables["added"] = torch.zeros(1, case.depth)
    masked = torch.zeros(2, len(index)) if len(tables) > 1 else None
    with pytest.MonkeyPatch.context() as patch:
        recorders = {name: _Recorder(getattr(module, name)) for name, module in KERNELS.items()}
        for name, module in KERNELS.items():
            patch.setattr(module, name, recorders[name])
        scale = case.depth**-0.5
        out = relative_attention(qkv, lookup=lookup, scale=scale, masked=masked, operator="triton", **tables)
        out.backward(torch.zeros_like(out))
    recorder = recorders[case.kernel]
    launched = {name: recorder.launched[name] for name in recorder.names}
    options = {name: value for name, value in recorder.launched.items() if name not in launched}
    ones = {name: 1 for name, value in launched.items() if type(value) is int and value == 1}
    constants = ones | {name: launched[name] for name in recorder.constants} | {"UPCAST": False}
    arguments = {name: value for name, value in launched.items() if name not in constants}
    signature = {name: _type(value) for name, value in arguments.items()}
    aligned = [name for name, value in arguments.items() if signature[name][0] == "*" or value % 16 == 0]
    where = f"{KERNELS[case.kernel].__name__}:{case.kernel}"
    return Variant(where, signature, constants, aligned, options, case.capability)


def _type(value) -> str:
    """An argument's type as triton has it."""
    if isinstance(value, torch.Tensor):
        return "*" + {torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8"}[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture(scope="module")
def machine_code():
    """What the cheap cases, or all others, compile to, by case; each of the two once."""
    found: dict[Case, Compiled] = {}

    def of(case: Case) -> Compiled:
        if case not in found:
            together = [each for each in CASES if each.cheap == case.cheap]
            compiled = compile_kernels([variant(each) for each in together], seconds=1800)
            found.update(zip(together, compiled, strict=True))
        return found[case]

    return of


def parametrized(test):
    """`test` with every case, all but the cheap ones marked as long."""
    marked = [pytest.param(each, marks=() if each.cheap else pytest.mark.long) for each in CASES]
    return pytest.mark.parametrize("case", marked, ids=str)(test)


@parametrized
def test_products_go_to_the_tensor_cores(machine_code, case):
    assert machine_code(case).tensor_cores == [TENSOR_CORES[case.capability]]


@parametrized
def test_registers_are_bounded(machine_code, case):
    assert machine_code(case).registers <= bounds(case)[0]


@parametrized
def test_local_memory_is_bounded(machine_code, case):
    assert machine_code(case).local <= bounds(case)[1]


@parametrized
def test_a_program_s_shared_memory_is_there(machine_code, case):
    """163 KiB of an A100's multiprocessor, 227 of an H100's."""
    assert machine_code(case).shared <= {80: 163, 90: 227}[case.capability] * 1024
