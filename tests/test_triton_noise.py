"""The noise kernel against the reference: the same words, the same numbers, all of them written; and its machine code.

Without a GPU it runs in Python (TRITON_INTERPRET, set in conftest.py), and is compiled for GPUs that are not there.
"""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from elsewhere.data.batch import Batch
from elsewhere.kernels import dispatch
from elsewhere.kernels.stochastic_positions import _triton_noise, position_noise, position_words
from elsewhere.models.jepa import Jepa, Predictor, Stop
from elsewhere.models.vit import Encoder, Size
from elsewhere.tests.compiled_kernels import Variant, compile_kernels

triton = pytest.importorskip("triton", reason="needs the package triton, which torch brings on Linux")
tl = triton.language

from elsewhere.kernels import triton_noise  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SEED = 2**32 - 5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Odd ones: below and above a program's tokens and quads, and columns that end in each of the four lanes.
SHAPES = [(1, 1, 1), (2, 3, 2), (3, 1, 5), (5, 7, 42), (3, 11, 130), (2, 9, 257), (4, 5, 24), (1, 3, 7)]


def counters(rows, patches, seed=0):
    """Epochs, sample ids, blocks `[rows]` and patches `[rows, patches]` from all over their ranges."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 1 << bits, (rows,), generator=generator) for bits in (20, 44, 16)]
    return [each.to(DEVICE) for each in (*drawn, torch.randint(0, 4096, (rows, patches), generator=generator))]


def words(seed, keys, columns):
    """The kernel's words as int64."""
    found = torch.full((*keys[3].shape, columns), -7, dtype=torch.int32, device=DEVICE)
    return triton_noise.draw(found, *keys, seed).long() & 0xFFFFFFFF


def expected_words(seed, keys, columns):
    return torch.cat(position_words(seed, *keys, columns), dim=-1)[..., :columns]


def drawn(keys, columns=42, kernels="triton", **options):
    return position_noise(SEED, *keys, columns, kernels=kernels, **options)


def box_muller(radius, angle):
    """Pairs of normal numbers in float64, of 32-bit words as int64 arrays."""
    first, turn = ((np.asarray(word) // 2**9 + 0.5) / 2**23 for word in (radius, angle))
    length = np.sqrt(-2 * np.log(first))
    return length * np.cos(2 * np.pi * turn), length * np.sin(2 * np.pi * turn)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_words_are_those_of_the_reference(shape):
    rows, patches, columns = shape
    keys = counters(rows, patches)
    assert torch.equal(words(SEED, keys, columns), expected_words(SEED, keys, columns))


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_words_at_the_ends_of_every_counter(seed):
    ends = [torch.tensor(pair, device=DEVICE) for pair in ([0, 2**20 - 1], [0, 2**44 - 1], [0, 2**16 - 1])]
    keys = [torch.cartesian_prod(*ends)[:, i].contiguous() for i in range(3)]
    keys.append(torch.tensor([0, 1, 2**31 - 1, 2**32 - 1], device=DEVICE).expand(8, -1))
    assert torch.equal(words(seed, keys, 6), expected_words(seed, keys, 6))


def test_numbers_are_box_muller_of_the_words():
    """Held to float64, 1e-5: what the kernel may differ by from the reference."""
    keys = counters(3, 8)
    a, b, c, d = (word.cpu().numpy() for word in position_words(SEED, *keys, 64))
    expected = np.concatenate([*box_muller(a, b), *box_muller(c, d)], axis=-1)
    assert np.abs(drawn(keys, 64).cpu().numpy() - expected).max() < 1e-5


@triton.jit
def pairs_kernel(radius, angle, one, other, HARDWARE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first, second = triton_noise._pair(tl.load(radius + at).to(tl.uint32), tl.load(angle + at).to(tl.uint32), HARDWARE)
    tl.store(one + at, first)
    tl.store(other + at, second)


def test_numbers_where_the_logarithm_is_near_zero():
    """Words that random draws hardly ever give: uniforms next to 1, next to 0, and where the series begins."""
    near = np.arange(1024)
    radius = np.concatenate([2**23 - 1 - near, near, 2**23 - 2**17 - 512 + near, 2**22 - 512 + near]) * 2**9
    angle = np.random.default_rng(0).integers(0, 2**32, radius.size)
    given = [torch.from_numpy(each).to(DEVICE) for each in (radius, angle)]
    found = [torch.full((radius.size,), torch.nan, device=DEVICE) for _ in range(2)]
    pairs_kernel[(radius.size // 256,)](*given, *found, HARDWARE=triton_noise._HARDWARE, SIZE=256)
    errors = [
        np.abs(each.cpu().numpy() - exact).max() for each, exact in zip(found, box_muller(radius, angle), strict=True)
    ]
    assert max(errors) < 1e-5  # and no NaN, which is not below


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_once_to_the_type(dtype):
    keys = counters(3, 5)
    found, expected = drawn(keys, scale=0.25, dtype=dtype), (drawn(keys) * 0.25).to(dtype)
    cut = dtype == torch.bfloat16 and not ON_GPU  # triton's interpreter cuts bfloat16 off and does not round
    torch.testing.assert_close(found, expected, rtol=2**-7 if cut else 0, atol=0)


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_scale_is_the_standard_deviation(scale):
    keys = counters(3, 5)
    torch.testing.assert_close(drawn(keys, scale=scale), drawn(keys, kernels="reference") * scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_is_written_and_no_other(shape, dtype):
    rows, patches, columns = shape
    poison = -7 if dtype == torch.int32 else torch.nan
    memory = torch.full((rows * patches * columns + 128,), poison, dtype=dtype, device=DEVICE)
    out = memory[64:-64].view(*shape)
    triton_noise.draw(out, *counters(rows, patches), SEED)
    around = torch.cat([memory[:64], memory[-64:]])
    left = (lambda x: x == -7) if dtype == torch.int32 else torch.isnan
    assert left(around).all() and not left(out).any()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32], ids=str)
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_integers_of_any_type(dtype, kernels):
    keys = [torch.tensor(each, device=DEVICE) for each in ([3, 200], [255, 1], [17, 90], [[1, 2, 3], [0, 255, 7]])]
    if dtype == torch.int16:
        keys[2] = torch.tensor([2**15 - 1, 0], device=DEVICE)  # shifted by 16, which int16 could not hold
    assert torch.equal(drawn([each.to(dtype) for each in keys], kernels=kernels), drawn(keys, kernels=kernels))


def test_expanded_and_strided_counters():
    epochs, ids, blocks, patches = counters(6, 10)
    keys = [epochs[:1].expand(3), ids[::2], blocks[:1].expand(3), patches.T[1:8, ::2].T]
    assert torch.equal(drawn(keys), drawn([each.contiguous() for each in keys]))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_no_rows_or_no_patches(shape, kernels):
    assert drawn(counters(*shape), kernels=kernels).shape == (*shape, 42)


def test_rows_drawn_apart_are_those_drawn_together():
    keys = counters(5, 7)
    alone = [drawn([each[i : i + 1] for each in keys]) for i in range(5)]
    assert torch.equal(torch.cat(alone), drawn(keys))


def test_patches_drawn_apart_are_those_drawn_together():
    *keys, patches = counters(5, 7)
    parts = [drawn([*keys, part]) for part in (patches[:, :2], patches[:, 2:])]
    assert torch.equal(torch.cat(parts, dim=1), drawn([*keys, patches]))


def test_more_tokens_than_the_kernel_counts_are_refused():
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rows = one.expand(2**16)
    with pytest.raises(ValueError, match="patches has 2,147,483,648 tokens, and the kernel counts to 2,147,483,640"):
        drawn([rows, rows, rows, one[:, None].expand(2**16, 2**15)], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_is_sound(dtype):
    """Its schema, its fake tensors, and that it is traced as it runs."""
    torch.library.opcheck(_triton_noise, (*counters(3, 5), SEED, 10, 0.25, dtype))


def embed(weight, *keys):
    noise = drawn(keys, weight.shape[1], scale=0.25, dtype=weight.dtype)
    return torch.nn.functional.linear(noise, weight)


def test_a_compiled_function_draws_the_same():
    keys, weight = counters(3, 5), torch.randn(4, 10, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    dispatch._choose_noise.cache_clear()  # the choice is made, and the kernel tried, while the function is traced
    found = torch.compile(embed, fullgraph=True, backend="aot_eager")(weight, *keys)
    assert torch.equal(found, embed(weight, *keys))


def test_recomputed_activations_see_the_same_noise():
    keys, gradients = counters(3, 5), []
    for again in (False, True):
        weight = torch.ones(4, 10, device=DEVICE, requires_grad=True)
        out = checkpoint(embed, weight, *keys, use_reentrant=False) if again else embed(weight, *keys)
        out.square().sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def loss_and_gradients(kernels, where):
    """Of a small I-JEPA whose batch has two context blocks, by the name of the parameter."""
    torch.manual_seed(0)
    encoder = Encoder((8, 8), 2, 3, Size(24, 1, 2))
    predictor = Predictor(24, encoder.grid, Size(16, 1, 2), Stop(where, 0.25))
    method = Jepa(encoder, predictor, seed=SEED, kernels=kernels).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    batch = Batch(
        images=torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=generator),
        sample_ids=torch.tensor([1, 2**40, 5]), labels=torch.zeros(3), epochs=torch.tensor([0, 1, 2**19]), step=0,
        context=torch.randint(16, (2, 3, 5), generator=generator),
        targets=torch.randint(16, (2, 3, 4), generator=generator),
    ).to(DEVICE)  # fmt: skip
    loss, _ = method(batch)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("where", ["targets", "context", "both"])
def test_a_method_trains_alike_with_either(where):
    """Numbers that differ by up to 1e-5 differ by less after a projection of small weights."""
    found, expected = (loss_and_gradients(kernels, where) for kernels in ("triton", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_kernel_is_trusted_where_its_words_are_right():
    assert triton_noise.fault(DEVICE) is None


def test_words_that_are_others_are_found_out(monkeypatch):
    monkeypatch.setattr(triton_noise, "KEY", triton_noise.KEY + 1)
    assert triton_noise.fault(DEVICE) == "a kernel that gives the words of the reference, and here it gives others"


def test_a_kernel_that_fails_is_found_out(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(triton_noise, "draw", fail)
    assert triton_noise.fault(DEVICE) == "a kernel that runs here (RuntimeError: no compiler)"


def test_the_first_choice_under_fake_tensors_is_a_real_one():
    """A plan of memory would otherwise compare words that are not there, and the answer is kept."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    dispatch._choose_noise.cache_clear()
    with FakeTensorMode():
        assert dispatch.choose_noise("triton", DEVICE).operator == "triton"


_ARGUMENTS = {
    "epochs": "*i64", "ids": "*i64", "blocks": "*i64", "patches": "*i64", "key": "i64", "scale": "fp32",
    "tokens": "i32", "N": "i32", "columns": "i32", "quads": "i32",
}  # fmt: skip
# A GPU, what is written, and whether columns are a multiple of 64, which makes stores wide.
MACHINE_CODE = [
    (capability, out, wide)
    for capability in (80, 90)
    for out, wide in (("bf16", True), ("fp32", True), ("fp16", False))
]


@pytest.fixture(scope="module")
def machine_code():
    """What the kernel compiles to, by `MACHINE_CODE`."""
    variants = [
        Variant(
            "elsewhere.kernels.triton_noise:noise_kernel", {"out": f"*{out}", **_ARGUMENTS},
            {"WORDS": False, "HARDWARE": True, "TOKENS": triton_noise.TOKENS, "QUADS": triton_noise.QUADS},
            ["out", "epochs", "ids", "blocks", "patches", *(["columns", "quads"] if wide else [])],
            {"num_warps": triton_noise.WARPS}, capability,
        )
        for capability, out, wide in MACHINE_CODE
    ]  # fmt: skip
    return dict(zip(MACHINE_CODE, compile_kernels(variants), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("variant", MACHINE_CODE, ids=str)
def test_registers_leave_room_for_full_occupancy(machine_code, variant):
    """65,536 registers over 1,536 threads (2,048 take 32)."""
    assert machine_code[variant].registers <= 40


@pytest.mark.slow
@pytest.mark.parametrize("variant", MACHINE_CODE, ids=str)
def test_nothing_is_kept_in_local_memory(machine_code, variant):
    assert (machine_code[variant].stack, machine_code[variant].local) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", MACHINE_CODE, ids=str)
def test_numbers_take_few_instructions(machine_code, variant):
    """Of a thread's 16 numbers, 8 pairs: a logarithm, a root, a sine and a cosine of the hardware's each; no call.

    A polynomial for the logarithm, or a 64-bit division, would show.
    """
    found = machine_code[variant].instructions
    assert "CALL" not in found and sum(found.values()) <= 50 * 16 and found["MUFU"] <= 4 * 8 + 1


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("columns", [1280, 1022])
def test_full_size_on_a_gpu(columns):
    """32k tokens: words, numbers, and the same again."""
    keys = counters(512, 64)
    numbers = drawn(keys, columns)
    for rows in range(0, 512, 64):  # the reference takes some gigabytes for this much
        part = [each[rows : rows + 64] for each in keys]
        assert torch.equal(words(SEED, part, columns), expected_words(SEED, part, columns))
        expected = drawn(part, columns, kernels="reference")
        assert (numbers[rows : rows + 64] - expected).abs().max() < 1e-5
    assert torch.equal(drawn(keys, columns), numbers)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_at_full_size_on_a_gpu(dtype):
    keys = counters(512, 64)
    assert torch.equal(drawn(keys, 1280, scale=0.25, dtype=dtype), (drawn(keys, 1280) * 0.25).to(dtype))
