"""The kernels of relative attention in the models: when they are chosen, and the released code's recorded values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from elsewhere.kernels import dispatch, relative_attention, relative_check
from elsewhere.kernels.dispatch import Choice, choose_attention
from elsewhere.models.attention import RelativeAttention
from elsewhere.models.relative import Relative, RelativeAttack
from elsewhere.models.zoo import from_released_mae
from elsewhere.tests.test_mae_golden import load, visible_of
from elsewhere.tests.test_relative_golden import (
    attack_of,
    compare,
    expected_gradients,
    from_released_relative,
    gradients,
)

pytest.importorskip("triton", reason="needs the package triton, which torch brings on Linux")

ON_GPU = torch.cuda.is_available()
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICE = GPU if ON_GPU else CPU


@pytest.fixture(autouse=True)
def forget():
    """Choices are kept, and some are made here in circumstances that pass."""
    dispatch._choose_attention.cache_clear()
    yield
    dispatch._choose_attention.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU without TRITON_INTERPRET, whose kernels have a fault or None."""

    def pretend(capability=(9, 0), fault=None):
        monkeypatch.setattr(dispatch, "interpreted", lambda: False)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a new one")
        monkeypatch.setattr(relative_check, "fault", lambda device: fault)

    return pretend


def layer(kernels="triton", heads=2, depth=32, **relative) -> RelativeAttention:
    torch.manual_seed(0)
    found = RelativeAttention(heads * depth, heads, Relative(**relative))
    if found.relative_k is not None and relative.get("method") != "cross":
        torch.nn.init.normal_(found.relative_k.table, std=0.3)
    found.kernels = kernels
    return found.to(DEVICE)


def tokens(grid, width=64):
    generator = torch.Generator().manual_seed(1)
    length = 1 + grid[0] * grid[1]
    masked = (torch.rand(2, length, generator=generator) < 0.6).float()
    masked[:, 0] = 0
    return torch.randn(2, length, width, generator=generator).to(DEVICE), masked.to(DEVICE)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match=r"kernels='fast' is not known; choose one of auto, reference, triton\."):
        choose_attention("fast", CPU)


@pytest.mark.parametrize("case", [None, "one tile"])
def test_auto_on_a_cpu_is_the_reference(case):
    """Also where kernels run there in Python, which is for tests."""
    assert choose_attention("auto", CPU, case) == Choice("reference", "on a CPU")


@pytest.mark.parametrize("case", [None, "several tiles"])
def test_the_reference_can_be_had_everywhere(case):
    assert choose_attention("reference", GPU, case) == Choice("reference", "as asked")


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="kernels=triton needs an NVIDIA GPU, and this device is a CPU; use kernels="):
        choose_attention("triton", CPU)


def test_auto_on_an_old_gpu_is_the_reference(gpu):
    gpu((7, 5))
    expected = "triton needs a GPU of compute capability 8.0, and this one has 7.5"
    assert choose_attention("auto", GPU) == Choice("reference", expected)


def test_auto_is_the_reference_where_nothing_was_measured(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(dispatch, "_MEASURED", {})
    expected = Choice("reference", "two tables: not measured on a new one")
    assert choose_attention("auto", GPU, "two tables") == expected


@pytest.mark.parametrize("faster", ["reference", "triton"])
def test_auto_takes_what_was_measured_to_be_the_faster(gpu, monkeypatch, faster):
    gpu()
    monkeypatch.setattr(dispatch, "_MEASURED", {((9, 0), "one tile"): faster})
    assert choose_attention("auto", GPU, "one tile") == Choice(faster, "one tile: the faster as measured")


def test_auto_leaves_out_a_faster_kernel_that_is_wrong(gpu, monkeypatch):
    gpu(fault="kernels that agree with the reference, and on this GPU they do not")
    monkeypatch.setattr(dispatch, "_MEASURED", {((9, 0), "one tile"): "triton"})
    expected = "triton needs kernels that agree with the reference, and on this GPU they do not"
    assert choose_attention("auto", GPU, "one tile") == Choice("reference", expected)


def test_triton_is_had_where_it_was_asked_for(gpu):
    gpu()
    assert choose_attention("triton", GPU, "several tiles") == Choice("triton", "as asked")


def test_triton_is_refused_where_its_kernels_are_wrong(gpu):
    gpu(fault="kernels that agree with the reference, and on this GPU they do not")
    with pytest.raises(ValueError, match="kernels=triton needs kernels that agree with the reference, and on this GPU"):
        choose_attention("triton", GPU)


def test_the_kernels_agree_with_the_reference_here():
    """Also where the first choice is made under fake tensors, as by a plan of memory; the answer is kept."""
    with FakeTensorMode():
        assert relative_check.fault.__wrapped__(DEVICE) is None


def test_a_wrong_kernel_is_found_out(monkeypatch):
    right = relative_check.relative_attention

    def wrong(*given, operator, **attack):
        return right(*given, operator=operator, **attack) * (1.01 if operator == "triton" else 1)

    monkeypatch.setattr(relative_check, "relative_attention", wrong)
    expected = "kernels that agree with the reference, and on this GPU they do not"
    assert relative_check.fault.__wrapped__(DEVICE) == expected


def test_a_kernel_that_fails_is_found_out(monkeypatch):
    right = relative_check.relative_attention

    def fail(*given, operator, **attack):
        if operator == "triton":
            raise RuntimeError("no compiler\nat all")
        return right(*given, operator=operator, **attack)

    monkeypatch.setattr(relative_check, "relative_attention", fail)
    assert relative_check.fault.__wrapped__(DEVICE) == "kernels that run here (RuntimeError: no compiler)"


TAKEN = [
    ((7, 7), {}, "none"),
    ((8, 8), {"shared": False}, "keys"),
    ((14, 14), {"scaled_queries": False}, "queries"),
    ((7, 7), {"lookup": "interpolated"}, "shift"),
    ((8, 8), {"lookup": "published"}, "none"),
]
NOT_TAKEN = [
    ((7, 7), {"terms": "qk"}, "none", "terms qk of mode contextual"),
    ((7, 7), {"terms": "q"}, "none", "terms q of mode contextual"),
    ((7, 7), {"terms": "kv"}, "none", "terms kv of mode contextual"),
    ((7, 7), {"mode": "bias"}, "none", "terms k of mode bias"),
    ((7, 7), {}, "bucket", "an embedding for each bucket"),
    ((9, 9), {"lookup": "interpolated"}, "none", "290 columns for 82 tokens, the kernels hold 64, or 256 for one tile"),
    ((7, 7), {"method": "euclidean"}, "none", "columns whose keys are not a range of rows by a range of columns"),
    ((16, 4), {}, "none", "16 grid rows in 64 keys, the kernels know 8"),
    ((9, 9), {"depth": 80}, "none", "float32 heads of 80 for more than 64 patches, which no GPU's shared memory holds"),
    ((7, 7), {"depth": 48}, "none", "heads of 48, the kernels know 24, 32, 64, 80"),
]


def attack_of_mode(mode, attention, masked) -> RelativeAttack | None:
    if mode == "none":
        return None
    if mode == "shift":
        return RelativeAttack(masked, shift=torch.tensor([0.3, -0.2], device=DEVICE, requires_grad=True))
    table = attention.relative_k.table
    numbers = table.numel() if mode == "bucket" else table.shape[0] * table.shape[1]
    embedding = torch.randn(numbers, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    if mode == "bucket":
        return RelativeAttack(masked, embedding=embedding, per="bucket")
    return RelativeAttack(masked, embedding=embedding, where=mode)


def outcome(attention, grid, mode, autocast=False) -> dict[str, torch.Tensor]:
    """The output of a layer, and the gradients of its tokens, table and attack."""
    x, masked = tokens(grid, attention.qkv.in_features)
    attack = attack_of_mode(mode, attention, masked)
    assert (attack.mode if attack is not None else "none") == mode
    attention.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        out = attention(x.requires_grad_(), grid, attack)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    (out.float() * weight).sum().backward()
    found = {"out": out.detach().float(), "x": x.grad, "weight": attention.qkv.weight.grad.clone()}
    if attention.relative_k is not None:
        found["table"] = attention.relative_k.table.grad.clone()
    for name in ("shift", "embedding"):
        if attack is not None and getattr(attack, name) is not None:
            found[name] = getattr(attack, name).grad
    return found


def assert_near(found, expected, tolerance):
    errors = {name: ((found[name] - x).norm() / x.norm()).item() for name, x in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


@pytest.mark.parametrize(("grid", "relative", "mode"), TAKEN, ids=str)
def test_layers_that_the_kernels_take(grid, relative, mode):
    assert layer(**relative).choose(grid, DEVICE, torch.float32, mode) == Choice("triton", "as asked")


@pytest.mark.parametrize(("grid", "relative", "mode", "why"), NOT_TAKEN, ids=str)
def test_layers_that_are_left_to_the_reference(grid, relative, mode, why):
    assert layer(**relative).choose(grid, DEVICE, torch.float32, mode) == Choice("reference", why)


def test_float64_is_left_to_the_reference():
    assert layer().choose((7, 7), DEVICE, torch.float64, "none") == Choice("reference", "float64 tokens")


@pytest.mark.parametrize(
    ("grid", "relative", "mode", "case"),
    [
        ((7, 7), {}, "keys", "one tile"),
        ((8, 8), {"lookup": "interpolated"}, "none", "one tile"),
        ((8, 8), {"lookup": "interpolated"}, "shift", "two tables"),
        ((9, 9), {}, "none", "several tiles"),
    ],
    ids=str,
)
def test_auto_asks_for_what_was_measured_of_its_case(gpu, monkeypatch, grid, relative, mode, case):
    gpu()
    monkeypatch.setattr(dispatch, "_MEASURED", {((9, 0), case): "triton"})
    attention = layer("auto", **relative)
    table = attention.relative_k
    assert table is not None
    monkeypatch.setattr(table, "lookup", lambda grid, device, of=table.lookup: of(grid, DEVICE))
    found = attention.choose(grid, GPU, torch.bfloat16, mode)
    assert found == Choice("triton", f"{case}: the faster as measured")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("grid", "relative", "mode"), [each for each in TAKEN if each[2] != "queries"], ids=str)
def test_layers_give_what_the_reference_gives(grid, relative, mode, compiled):
    expected = outcome(layer("reference", **relative), grid, mode)
    attention = layer(**relative)
    if compiled:
        torch._dynamo.reset()
        attention.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    assert_near(outcome(attention, grid, mode), expected, 2e-5)


@pytest.mark.parametrize(("grid", "relative", "mode"), [TAKEN[1], TAKEN[3]], ids=str)
def test_layers_give_what_the_reference_gives_under_autocast(grid, relative, mode):
    """To the rounding of bfloat16, 2⁻⁸, of what is on either side; the interpreter cuts off, twice as much."""
    found, expected = (outcome(layer(kernels, **relative), grid, mode, True) for kernels in ("triton", "reference"))
    assert_near(found, expected, 4 * 2**-8)


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (9, 9)], ids=str)
def test_the_published_attack_does_nothing_at_all(grid):
    """On queries and per table: softmax cancels it, and here it is left out."""
    attention = layer()
    found, plain = (outcome(attention, grid, mode) for mode in ("queries", "none"))
    assert found.pop("embedding") is None
    assert [name for name, x in plain.items() if not torch.equal(found[name], x)] == []


@pytest.fixture
def recorded(monkeypatch, golden):
    """A recording where kernels run; its heads are 8 and 12 wide, which they can compute and no recipe has."""
    monkeypatch.setattr(relative_attention, "HEAD_DIMS", (8, 12))
    golden.tensors = {name: tensor.to(DEVICE) for name, tensor in golden.tensors.items()}
    return golden


@pytest.mark.golden("B3_attn_*_k")
def test_recorded_layers(recorded, close):
    compare_layer(recorded, close, None)


@pytest.mark.golden("B3_attn_pretrain_k_adv*")
def test_recorded_layers_under_attack(recorded, close):
    compare_layer(recorded, close, attack_of(recorded, "rpe_k."))


def compare_layer(golden, close, attack):
    config = golden.config
    lookup = "published" if attack is not None and attack.shift is not None else "hard"
    spec = Relative(lookup=lookup, scaled_queries=config["kind"] == "pretrain")
    attention = RelativeAttention(config["dim"], config["heads"], spec)
    attention.load_state_dict(from_released_relative(golden.part("state")))
    attention.to(DEVICE).kernels = "triton"
    x, grid = golden.tensors["in.x"].requires_grad_(), (config["grid"],) * 2
    assert attention.choose(grid, DEVICE, x.dtype, "none" if attack is None else attack.mode).operator == "triton"
    out = attention(x, grid, attack)
    close(out, golden.tensors["out.attn"], "attn")
    (out * golden.tensors["in.loss_weight"]).sum().backward()
    close(x.grad, golden.tensors["grad_in.x"], "x")
    found, expected = gradients(attention, attack), expected_gradients(golden, "rpe_k.")
    if "embedding" in found:
        assert found.pop("embedding") is None, "nothing is left of this attack"
        expected.pop("embedding")
    compare(close, found, expected)


@pytest.mark.golden("B2_*")
def test_recorded_models(recorded, close, compare_named):
    method, adversary = load(recorded)
    method.to(DEVICE)
    layers = [module for module in method.modules() if isinstance(module, RelativeAttention)]
    mode = {"none": "none", "embedding": "queries", "coordinate": "shift"}[method.attack.mode]
    for each in layers:
        each.kernels = "triton"
        assert each.choose(method.encoder.grid, DEVICE, torch.float32, mode).operator == "triton"
    images = recorded.tensors["in.imgs"]
    predictions, masked = method.predict(images, visible_of(recorded), adversary)
    close(predictions, recorded.tensors["out.pred"], "predictions")
    loss = method.loss(images, predictions, masked)
    close(loss.reshape(1), recorded.tensors["out.loss"], "loss")
    loss.backward()
    expected, attacked = from_released_mae(recorded.part("grad"))
    compare_named({name: p.grad for name, p in method.named_parameters() if p.grad is not None}, expected)
    for name, gradient in attacked.items():
        if mode == "shift":
            close(adversary[name].grad, gradient, name)
        else:
            assert adversary[name].grad is None, "nothing is left of this attack"
