"""Which operator is chosen for a hot path: by setting, device and what runs there, and where a user is told."""

import json
import subprocess
import sys
import types

import pytest
import torch

from elsewhere.kernels import dispatch
from elsewhere.kernels.dispatch import Choice, choose_noise, triton_missing
from elsewhere.launch.build import build_method
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NOISE = "elsewhere.kernels.triton_noise"


@pytest.fixture(autouse=True)
def forget():
    """Choices are kept, and here made in circumstances that pass."""
    dispatch._choose_noise.cache_clear()
    yield
    dispatch._choose_noise.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """As without TRITON_INTERPRET."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)


@pytest.fixture
def gpu(monkeypatch, compiled):
    """As on a GPU of a capability, with a noise kernel that has a fault or None."""
    pytest.importorskip("triton")

    def pretend(capability=(9, 0), fault=None):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setitem(sys.modules, NOISE, types.SimpleNamespace(fault=lambda device: fault))

    return pretend


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match=r"kernels='fast' is not known; choose one of auto, reference, triton\."):
        choose_noise("fast", CPU)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_the_reference_can_be_had_everywhere(device):
    assert choose_noise("reference", device).operator == "reference"


def test_auto_on_a_cpu_is_the_reference():
    """Also where kernels run there in Python, which is for tests."""
    assert choose_noise("auto", CPU) == Choice("reference", "on a CPU")


def test_auto_on_a_gpu_is_triton(gpu):
    gpu()
    assert choose_noise("auto", GPU).operator == "triton"


def test_auto_leaves_interpreted_kernels_alone(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    found = choose_noise("auto", GPU)
    assert found.operator == "reference" and "TRITON_INTERPRET" in found.why


def test_triton_on_a_cpu_is_refused(compiled):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="kernels=triton needs an NVIDIA GPU, and this device is a CPU; use kernels="):
        choose_noise("triton", CPU)


def test_triton_on_another_maker_s_gpu_is_refused(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="an NVIDIA GPU, and this device is one of AMD's"):
        choose_noise("triton", GPU)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((10, 0), True)], ids=str)
def test_compute_capability_8_is_enough(gpu, capability, runs):
    gpu(capability)
    found = choose_noise("auto", GPU)
    assert found.operator == ("triton" if runs else "reference")
    assert runs or found.why == "triton needs a GPU of compute capability 8.0, and this one has 7.5"


def test_without_the_package_auto_is_the_reference(gpu, monkeypatch):
    gpu()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choose_noise("auto", GPU) == Choice("reference", "triton needs the package triton, which is not installed")


def test_interpreted_kernels_run_on_a_cpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    assert triton_missing(CPU) is None


def test_a_kernel_that_cannot_be_trusted_is_left_out_and_said(gpu):
    gpu(fault="a kernel that gives the words of the reference, and here it gives others")
    found = choose_noise("auto", GPU)
    assert found.operator == "reference" and "here it gives others" in found.why


def test_a_kernel_that_cannot_be_trusted_is_refused_where_it_was_asked_for(gpu):
    gpu(fault="a kernel that gives the words of the reference, and here it gives others")
    with pytest.raises(ValueError, match="here it gives others; use kernels=auto"):
        choose_noise("triton", GPU)


def test_the_kernel_is_tried_once_on_a_device(gpu, monkeypatch):
    gpu()
    tried = []
    monkeypatch.setitem(sys.modules, NOISE, types.SimpleNamespace(fault=tried.append))
    for _ in range(3):
        choose_noise("auto", GPU)
    assert len(tried) == 1


def test_a_choice_is_a_constant_of_a_compiled_function():
    def scaled(x):
        return x * (3 if choose_noise("auto", x.device).operator == "reference" else 5)

    assert torch.compile(scaled, fullgraph=True, backend="eager")(torch.ones(1)).item() == 3


@pytest.mark.long
def test_noise_is_drawn_without_the_package():
    """In a process of its own, since packages that were imported before may have asked for it."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from elsewhere.models.jepa import position_noise as draw\n"
        "one = torch.ones(1, dtype=torch.int64); print(draw(0, one, one, one, one[:, None], 3, kernels='auto').shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "torch.Size([1, 1, 3])\n"), done.stderr


@pytest.mark.parametrize("recipe", ["demo", "demo_adpe"])
def test_the_setting_reaches_every_module_that_chooses(recipe):
    method = build_method(load_config(recipe, ["kernels=reference"]))
    assert {module.kernels for module in method.modules() if hasattr(module, "kernels")} <= {"reference"}


@pytest.mark.parametrize(("where", "choices"), [("none", []), ("targets", ["noise"]), ("context", ["noise"])])
def test_a_method_without_noise_chooses_none(where, choices):
    method = build_method(load_config("demo", [f"method.stop.where={where}"]))
    assert list(method.kernel_choices(CPU)) == choices


@pytest.fixture
def started(tiny, capsys):
    """Status, output and errors of a short `elsewhere pretrain demo` with more settings."""

    def run(*settings):
        given = {**tiny, "engine.device": "cpu", "optim.batch_size": 718, "monitor.pictures_every": 0}
        status = main(["pretrain", "demo", *(f"{key}={json.dumps(value)}" for key, value in given.items()), *settings])
        return status, *capsys.readouterr()

    return run


def test_triton_without_a_gpu_ends_a_run_in_one_sentence(started, compiled):
    pytest.importorskip("triton")
    status, _, errors = started("kernels=triton")
    expected = "elsewhere: kernels=triton needs an NVIDIA GPU, and this device is a CPU; use kernels=auto.\n"
    assert (status, errors) == (2, expected)


def test_the_banner_says_what_draws_the_noise_and_why(started):
    _, out, _ = started()
    assert "kernels    noise: reference (on a CPU)\n" in out


def test_the_banner_is_silent_where_nothing_is_chosen(started):
    _, out, _ = started("method.stop.where=none")
    assert "start      fresh weights" in out and "kernels " not in out
