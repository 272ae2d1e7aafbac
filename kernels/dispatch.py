"""Which operator computes a hot path, plain PyTorch (`reference`) or Triton, and why."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

KERNELS = ("auto", "reference", "triton")
_LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests
_A = {"cpu": "a CPU", "cuda": "one of AMD's"}


@dataclass(frozen=True)
class Choice:
    """The operator of a hot path, `reference` or `triton`, and why, in a few words for the start-up banner."""

    operator: str
    why: str


def check(kernels: str) -> None:
    """Raise ValueError for a setting that is not one of `KERNELS`."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} is not known; choose one of {', '.join(KERNELS)}.")


def interpreted() -> bool:
    """Whether Triton's kernels run in Python, on tensors of any device (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def said(error: Exception) -> str:
    """The kind of an error of a compiler, linker or driver, and its first line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def triton_missing(device: torch.device) -> str | None:
    """What Triton's kernels need and `device` lacks, to stand after "needs"; None where they run."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package triton, which is not installed"
    if interpreted():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"an NVIDIA GPU, and this device is {_A.get(device.type, device.type)}"
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST_CAPABILITY:
        least, here = (".".join(map(str, each)) for each in (_LEAST_CAPABILITY, found))
        return f"a GPU of compute capability {least}, and this one has {here}"
    return None


@torch.compiler.assume_constant_result
def choose_noise(kernels: str, device: torch.device) -> Choice:
    """The operator of keyed noise under a setting `kernels` (auto, reference or triton) on `device`.

    `auto` takes Triton wherever it runs on a GPU. Where the kernel fails, or gives other words than the reference,
    it is the reference. Raises ValueError for an unknown setting, and for `triton` where that cannot be had.
    """
    return _choose_noise(kernels, device)


@functools.cache
def _choose_noise(kernels: str, device: torch.device) -> Choice:
    check(kernels)
    if kernels == "reference":
        return Choice("reference", "as asked")
    if kernels == "auto" and device.type != "cuda":
        return Choice("reference", f"on {_A.get(device.type, device.type)}")
    missing = triton_missing(device)
    if missing is None and kernels == "auto" and interpreted():
        missing = "a compiler, and TRITON_INTERPRET is set"
    if missing is None:
        from .triton_noise import fault  # imports triton

        missing = fault(device)
    if missing is None:
        return Choice("triton", "as asked" if kernels == "triton" else "the same words in one pass")
    if kernels == "triton":
        raise ValueError(f"kernels=triton needs {missing}; use kernels=auto.")
    return Choice("reference", f"triton needs {missing}")


# What was the faster for relative attention on a GPU of a capability (docs/benchmarks/kernels.md), by case.
_MEASURED: dict[tuple[tuple[int, int], str], str] = {}


@torch.compiler.assume_constant_result
def choose_attention(kernels: str, device: torch.device, case: str | None = None) -> Choice:
    """The operator of relative attention under a setting `kernels` on `device`.

    `case` is `one tile`, `two tables` or `several tiles`, what was measured apart; without one, whether Triton may
    compute any. `auto` takes Triton only where it was measured to be the faster, and where its kernels agree with the
    reference. Raises ValueError for an unknown setting, and for `triton` where that cannot be had.
    """
    return _choose_attention(kernels, device, case)


@functools.cache
def _choose_attention(kernels: str, device: torch.device, case: str | None) -> Choice:
    check(kernels)
    if kernels == "reference":
        return Choice("reference", "as asked")
    if kernels == "auto" and (device.type != "cuda" or interpreted()):
        return Choice("reference", f"on {_A.get(device.type, device.type)}")
    missing, why = triton_missing(device), "as asked"
    if missing is None and kernels == "auto" and case is not None:
        faster = _MEASURED.get((torch.cuda.get_device_capability(device), case))
        if faster is None:
            return Choice("reference", f"{case}: not measured on {torch.cuda.get_device_name(device)}")
        why = f"{case}: the faster as measured"
        if faster == "reference":
            return Choice(faster, why)
    if missing is None and device.type == "cuda" and (kernels == "triton" or case is not None):
        from .relative_check import fault  # imports triton

        missing = fault(device)
    if missing is None:
        return Choice("triton", why)
    if kernels == "triton":
        raise ValueError(f"kernels=triton needs {missing}; use kernels=auto.")
    return Choice("reference", f"triton needs {missing}")
