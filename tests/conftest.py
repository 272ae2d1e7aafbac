"""Golden cases for tests: every case of a pattern that stands in the folder named by ELSEWHERE_GOLDEN."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(os.environ.get("ELSEWHERE_GOLDEN", Path(__file__).parent / "golden"))
torch.set_num_threads(1)


@dataclass
class Golden:
    """One recorded case: its JSON description and its tensors by name."""

    name: str
    about: dict
    tensors: dict[str, torch.Tensor]

    @property
    def config(self) -> dict:
        return self.about["config"]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name starts with `prefix.`, without it."""
        return {k.removeprefix(prefix + "."): v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def replay(self, prefix: str) -> list[torch.Tensor]:
        """Tensors `prefix.0`, `prefix.1`, … in order."""
        part = self.part(prefix)
        return [part[str(i)] for i in range(len(part))]


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("golden")
    if marker:
        paths = sorted(GOLDEN.glob(marker.args[0] + ".json"))
        assert paths, f"no golden case {marker.args[0]} in {GOLDEN}"
        metafunc.parametrize("golden", paths, ids=[p.stem for p in paths], indirect=True)


@pytest.fixture
def golden(request) -> Golden:
    path = request.param
    return Golden(path.stem, json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))


@pytest.fixture
def close():
    """Assert max|found - expected| <= 1e-5 · max(1, max|expected|), naming the tensor."""

    def check(found, expected, name=""):
        assert found.shape == expected.shape, f"{name}: {tuple(found.shape)} is not {tuple(expected.shape)}"
        if expected.numel():
            expected = expected.double()
            bound = 1e-5 * max(1.0, expected.abs().max().item())
            worst = (found.detach().double() - expected).abs().max().item()
            assert worst <= bound, f"{name}: off by {worst:.2e}, allowed {bound:.2e}"

    return check
