"""GPUs and the links between them, in numbers of the makers' data sheets: the one table that all of the stack reads.

Matrix rates are dense (no sparsity). Memory counts a data sheet's gigabytes as 10⁹ bytes, the least that a driver
shows of it (80 GB of an A100 are 85 × 10⁹ there). A link's bandwidth is of one direction, which is half of what data
sheets of NVLink and PCIe say. Latencies stand in no data sheet: they are assumed, microseconds for a step of a ring.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU: the part of its name that a driver shows, bytes of memory, TFLOP/s, and its link within a node."""

    name: str  # as torch.cuda.get_device_name has it, in part
    memory: float
    half: float  # TFLOP/s of matrix products in float16, and in bfloat16 where it has that, summed in float32
    single: float  # TFLOP/s in float32 without TF32, which torch leaves off
    bfloat16: bool
    link: str
    source: str


@dataclass(frozen=True)
class Link:
    """What carries messages: bytes/s in one direction, of a GPU within a node or of a node, and seconds a message."""

    bandwidth: float
    latency: float
    within: bool
    source: str


GPUS = {
    "b200-180g": Gpu("B200", 180e9, 2250, 80, True, "nvlink5", "NVIDIA HGX B200 data sheet, 2025"),
    "h200-141g": Gpu("H200", 141e9, 989, 67, True, "nvlink4", "NVIDIA H200 data sheet (SXM), 2024"),
    "h100-80g": Gpu("H100", 80e9, 989, 67, True, "nvlink4", "NVIDIA H100 data sheet (SXM), 2024"),
    "a100-80g": Gpu("A100", 80e9, 312, 19.5, True, "nvlink3", "NVIDIA A100 data sheet (SXM), 2021"),
    "a100-40g": Gpu("A100", 40e9, 312, 19.5, True, "nvlink3", "NVIDIA A100 data sheet (SXM), 2020"),
    "l40s-48g": Gpu("L40S", 48e9, 362, 91.6, True, "pcie4", "NVIDIA L40S data sheet, 2023"),
    "v100-32g": Gpu("V100", 32e9, 125, 15.7, False, "nvlink2", "NVIDIA V100 data sheet (SXM2), 2020"),
    "a10g-24g": Gpu("A10G", 24e9, 70, 35, True, "pcie4", "NVIDIA A10G data sheet (by AWS), 2021"),
    "rtx4090-24g": Gpu("4090", 24e9, 165.2, 82.6, True, "pcie4", "NVIDIA Ada GPU architecture, appendix A, 2022"),
}

_NVIDIA, _PCI, _IB, _ETHERNET = "NVIDIA data sheet of the GPU", "PCI-SIG", "IBTA roadmap", "IEEE 802.3"
LINKS = {
    "nvlink2": Link(150e9, 2e-6, True, f"{_NVIDIA}: 300 GB/s both ways"),
    "nvlink3": Link(300e9, 2e-6, True, f"{_NVIDIA}: 600 GB/s both ways"),
    "nvlink4": Link(450e9, 2e-6, True, f"{_NVIDIA}: 900 GB/s both ways"),
    "nvlink5": Link(900e9, 2e-6, True, f"{_NVIDIA}: 1,800 GB/s both ways"),
    "pcie3": Link(15.75e9, 5e-6, True, f"{_PCI}: 16 lanes of 8 GT/s"),
    "pcie4": Link(31.5e9, 5e-6, True, f"{_PCI}: 16 lanes of 16 GT/s"),
    "pcie5": Link(63e9, 5e-6, True, f"{_PCI}: 16 lanes of 32 GT/s"),
    "ethernet-10g": Link(1.25e9, 30e-6, False, f"{_ETHERNET}, over TCP"),
    "ethernet-25g": Link(3.125e9, 30e-6, False, f"{_ETHERNET}, over TCP"),
    "ethernet-100g": Link(12.5e9, 30e-6, False, f"{_ETHERNET}, over TCP"),
    "ib-100g": Link(12.5e9, 5e-6, False, f"{_IB}, EDR"),
    "ib-200g": Link(25e9, 5e-6, False, f"{_IB}, HDR"),
    "ib-400g": Link(50e9, 5e-6, False, f"{_IB}, NDR"),
    "8x-ib-400g": Link(400e9, 5e-6, False, f"{_IB}, NDR, a card for each of eight GPUs"),
}


def gpu(name: str) -> Gpu:
    """The GPU of a name; UserError for one that is not in the table."""
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name} is not in the table; {_nearest(name, GPUS)}")
    return found


def link(name: str, within: bool) -> Link:
    """The link of a name, within a node or between nodes; UserError for one that is not in the table."""
    known = {key: value for key, value in LINKS.items() if value.within == within}
    found = known.get(name.lower())
    if found is None:
        option = "--nvlink" if within else "--interconnect"
        raise UserError(f"{option} {name} is not in the table; {_nearest(name, known)}")
    return found


def _nearest(name: str, known: dict) -> str:
    near = difflib.get_close_matches(name.lower(), known, 1, 0.3)
    return (f"did you mean {near[0]}? There are " if near else "there are ") + f"{', '.join(known)}."


def peaks() -> dict[str, float]:
    """Dense TFLOP/s in half precision by the part of a GPU's name that a driver shows."""
    return {one.name: float(one.half) for one in GPUS.values()}
