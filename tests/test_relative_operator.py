"""The kernels of relative attention against the reference in float64: output and every gradient, for every mode.

Without a GPU they run in Python (TRITON_INTERPRET, set in conftest.py).
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from elsewhere.kernels import relative_attention as operators
from elsewhere.kernels.relative_attention import relative_attention
from elsewhere.kernels.relative_lookup import Lookup, make_lookup
from elsewhere.models.relative import bucket_ids, offset_ids

pytest.importorskip("triton", reason="needs the package triton, which torch brings on Linux")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@dataclass(frozen=True)
class Case:
    """Attention of random tokens; `offsets` has a table over all offsets, not over buckets.

    `attacked` gives masked rows a table of their own, `added` is the attack on keys; `share` of the patches is masked.
    """

    grid: tuple[int, int] = (7, 7)
    depth: int = 32
    prefix: int = 1
    batch: int = 2
    heads: int = 2
    groups: int = 1
    offsets: bool = False
    attacked: bool = False
    added: bool = False
    share: float = 0.6


CASES = {
    "50": Case(depth=64),
    "65": Case((8, 8), 80),
    "16": Case((3, 5), 24),
    "82": Case((9, 9), 24, batch=1, groups=2),
    "197": Case((14, 14), 64, batch=1, heads=1),
    "49_patches": Case((7, 7), 80, prefix=0),
    "64_patches": Case((8, 8), 32, prefix=0),
    "82_of_80": Case((9, 9), 80, batch=1, heads=1),
    "196_patches": Case((14, 14), 24, prefix=0, batch=1, heads=1),
    "one_image_one_head": Case((8, 8), 64, batch=1, heads=1),
    "offsets": Case((8, 8), 24, offsets=True),
    "keys_50": Case((7, 7), 24, groups=2, added=True),
    "keys_65": Case((8, 8), 32, added=True),
    "keys_64_patches": Case((8, 8), 64, prefix=0, added=True),
    "keys_82": Case((9, 9), 24, batch=1, added=True),
    "keys_197": Case((14, 14), 32, batch=1, heads=1, added=True),
    "all_keys_masked": Case((8, 8), 32, added=True, share=1.0),
    "no_keys_masked": Case((9, 9), 32, added=True, share=0.0),
    "two_tables_50": Case((7, 7), 64, offsets=True, attacked=True),
    "two_tables_65": Case((8, 8), 80, groups=2, offsets=True, attacked=True),
    "two_tables_64_patches": Case((8, 8), 24, prefix=0, offsets=True, attacked=True),
    "two_tables_of_buckets": Case((7, 7), 32, attacked=True),
    "two_tables_all_masked": Case((8, 8), 32, attacked=True, share=1.0),
    "two_tables_none_masked": Case((7, 7), 32, offsets=True, attacked=True, share=0.0),
    "two_tables_and_keys_16": Case((3, 5), 24, groups=2, attacked=True, added=True),
    "two_tables_and_keys": Case((8, 8), 32, groups=2, attacked=True, added=True),
}
# One for each way through the kernels.
KINDS = ["50", "keys_65", "keys_82", "two_tables_65"]


@pytest.fixture(scope="module", autouse=True)
def rounding():
    """Let triton's interpreter round to bfloat16 as a GPU does; it cuts the last bits off, twice the error."""
    if ON_GPU:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, given, wanted, mode):
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(x, given, wanted, mode)
        return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


@functools.cache
def lookup_of(grid: tuple[int, int], prefix: int, offsets: bool) -> Lookup:
    index = (offset_ids if offsets else bucket_ids)(grid, prefix)
    columns = (2 * grid[0] - 1) * (2 * grid[1] - 1) if offsets else 49
    return make_lookup(index.to(DEVICE), columns + prefix, grid, prefix)


def inputs(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random qkv and tables, `masked`, and `weight` to sum the output with; all of them numbers of `dtype`."""
    generator = torch.Generator().manual_seed(7)
    lookup = lookup_of(case.grid, case.prefix, case.offsets)
    length = len(lookup.index)

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator)).to(dtype)

    found = {
        "qkv": normal(case.batch, length, 3, case.heads, case.depth),
        "weight": normal(case.batch, length, case.heads, case.depth),
        "table": normal(case.groups, case.depth, lookup.columns, std=0.3).float(),
    }
    if case.attacked:
        found["attacked"] = normal(case.groups, case.depth, lookup.columns, std=0.3).float()
    if case.added:
        found["added"] = normal(case.groups, case.depth, std=0.5).float()
    if case.attacked or case.added:
        masked = torch.rand(case.batch, length, generator=generator) < case.share
        masked[:, : case.prefix] = False
        found["masked"] = masked.float()
    return {name: tensor.to(DEVICE) for name, tensor in found.items()}


def attention_of(case: Case, given: dict[str, torch.Tensor], operator: str = "triton", **options) -> torch.Tensor:
    tensors = {name: tensor for name, tensor in given.items() if name != "weight"}
    lookup = lookup_of(case.grid, case.prefix, case.offsets)
    return relative_attention(**tensors, lookup=lookup, scale=case.depth**-0.5, operator=operator, **options)


def gradients(leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, x in leaves.items():
        assert x.grad is not None, f"{name} got no gradient"
        found[name] = x.grad
    return found


def computed(case: Case, given: dict[str, torch.Tensor], operator: str = "triton") -> dict[str, torch.Tensor]:
    """The output, and the gradients of all inputs that have one by their names."""
    constant = ("weight", "masked")
    given = {name: x if name in constant else x.detach().requires_grad_() for name, x in given.items()}
    out = attention_of(case, given, operator)
    out.backward(given["weight"])
    return {"out": out.detach()} | gradients({name: x for name, x in given.items() if name not in constant})


@functools.cache
def exact(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the reference gives in float64 for inputs of `dtype`."""
    doubles = {key: x.double() for key, x in inputs(CASES[name], dtype).items()}
    return computed(CASES[name], doubles, "reference")


@functools.cache
def of_kernels(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return computed(CASES[name], inputs(CASES[name], dtype))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative norm of the difference; the norm itself where softmax leaves nothing, or rounding, of a gradient."""
    assert found.shape == expected.shape
    size = expected.norm().item()
    return (found.double() - expected).norm().item() / (size if size > 1e-9 else 1.0)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("name", [name for name in CASES if name != "82_of_80"])  # too wide for float32
def test_output_and_gradients_in_float32(name):
    found, expected = of_kernels(name, torch.float32), exact(name, torch.float32)
    errors = {key: error(found[key], expected[key]) for key in expected}
    assert errors.pop("out") <= 1e-5
    assert {key: each for key, each in errors.items() if not each <= 2e-5} == {}


@pytest.mark.parametrize("name", KINDS)
def test_output_and_gradients_in_float16(name):
    found, expected = of_kernels(name, torch.float16), exact(name, torch.float16)
    errors = {key: error(found[key], expected[key]) for key in expected}
    assert {key: each for key, each in errors.items() if not each <= 1e-3} == {}


MANY = [pytest.param(name, marks=() if name in KINDS else pytest.mark.long) for name in CASES]


@pytest.mark.parametrize("name", MANY)
def test_output_and_gradients_in_bfloat16(name):
    """But what is added to keys, whose gradient is a sum of rounded numbers that nearly cancel."""
    found, expected = of_kernels(name, torch.bfloat16), exact(name, torch.bfloat16)
    errors = {key: error(found[key], expected[key]) for key in expected if key != "added"}
    assert {key: each for key, each in errors.items() if not each <= 6e-3} == {}


@pytest.mark.parametrize("name", KINDS)
def test_float16_is_as_exact_as_the_reference(name):
    assert_as_exact(name, torch.float16)


@pytest.mark.parametrize("name", MANY)
def test_bfloat16_is_as_exact_as_the_reference(name):
    assert_as_exact(name, torch.bfloat16)


def assert_as_exact(name, dtype):
    """Twice the error that the reference has in the same type would be too much."""
    found, expected = of_kernels(name, dtype), exact(name, dtype)
    eager = computed(CASES[name], inputs(CASES[name], dtype), "reference")
    errors = {key: (error(found[key], expected[key]), error(eager[key], expected[key])) for key in expected}
    assert {key: (ours, theirs) for key, (ours, theirs) in errors.items() if not ours <= 2 * theirs} == {}


def strided(x: torch.Tensor) -> torch.Tensor:
    """`x` as every other number of a larger tensor."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("name", KINDS)
def test_tensors_that_are_not_contiguous(name):
    given = inputs(CASES[name], torch.float32)
    views = {key: strided(x) for key, x in given.items()}
    assert not any(x.is_contiguous() for x in views.values())
    assert_equal(computed(CASES[name], views), of_kernels(name, torch.float32))


@pytest.mark.parametrize("name", ["keys_65", "keys_82"])
def test_a_gradient_that_is_one_number(name):
    """As that of a sum, expanded."""
    given = inputs(CASES[name], torch.float32)
    ones = torch.ones((), device=DEVICE).expand_as(given["weight"])
    found, expected = (computed(CASES[name], given | {"weight": each}) for each in (ones, ones.contiguous()))
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16], ids=str)
def test_masks_of_any_type(kind):
    case = CASES["keys_50"]
    given = inputs(case, torch.float32)
    assert_equal(computed(case, given | {"masked": given["masked"].to(kind)}), of_kernels("keys_50", torch.float32))


@pytest.mark.parametrize("name", ["keys_50", "keys_65", "keys_82", "two_tables_65"])
def test_a_mark_is_not_0_and_on_no_class_token(name):
    given = inputs(CASES[name], torch.float32)
    marks = given["masked"] * 0.5
    marks[:, 0] = 1
    assert_equal(computed(CASES[name], given | {"masked": marks}), of_kernels(name, torch.float32))


@pytest.fixture
def poison():
    """Memory that is handed out holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", KINDS)
def test_every_number_is_written(name, poison):
    assert_equal(computed(CASES[name], inputs(CASES[name], torch.float32)), of_kernels(name, torch.float32))


@pytest.mark.parametrize("name", KINDS)
def test_nothing_beside_the_inputs_is_read(name):
    surrounded = {}
    for key, x in inputs(CASES[name], torch.float32).items():
        memory = torch.full((x.numel() + 2 * 16384,), torch.nan, device=DEVICE)
        surrounded[key] = memory[16384:-16384].view_as(x).copy_(x)
    assert_equal(computed(CASES[name], surrounded), of_kernels(name, torch.float32))


@pytest.mark.parametrize("name", KINDS)
def test_the_same_twice(name):
    assert_equal(computed(CASES[name], inputs(CASES[name], torch.float32)), of_kernels(name, torch.float32))


@pytest.mark.parametrize("name", ["50", "65", "two_tables_65"])
def test_an_image_does_not_depend_on_others(name):
    case, given, together = CASES[name], inputs(CASES[name], torch.float32), of_kernels(name, torch.float32)
    for image in range(case.batch):
        own = {key: x[image : image + 1] if key in ("qkv", "weight", "masked") else x for key, x in given.items()}
        alone = computed(case, own)
        for key in ("out", "qkv"):
            assert torch.equal(alone[key], together[key][image : image + 1]), f"{key} of image {image}"


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    """Those of the registered forward."""
    case = CASES[name]
    given, lookup = inputs(case, dtype), lookup_of(case.grid, case.prefix, case.offsets)
    marks = given["masked"].to(torch.uint8) if "masked" in given else None
    tables = [given[key].requires_grad_() if key in given else None for key in ("table", "attacked", "added")]
    shape, scale = [lookup.prefix, lookup.first], case.depth**-0.5
    return given["qkv"].requires_grad_(), tables[0], lookup.pairs, lookup.sums, marks, *tables[1:], shape, scale


@pytest.mark.parametrize("name", ["keys_82", "two_tables_and_keys_16"])
def test_the_operator_is_sound(name):
    """Its schema, its fake tensors, its gradients' registration, and that it is traced as it runs."""
    torch.library.opcheck(operators._forward, arguments(name))


@pytest.mark.parametrize("name", ["keys_82", "two_tables_and_keys_16"])
def test_the_operator_of_gradients_is_sound(name):
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(name)]
    out, lse = operators._forward(*given)
    torch.library.opcheck(operators._backward, (torch.ones_like(out), *given[:7], out, lse, *given[7:]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"] if ON_GPU else ["aot_eager"])
@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_function_gives_the_same(name, backend):
    case, expected = CASES[name], of_kernels(name, torch.float32)
    given = inputs(case, torch.float32)
    weight, lookup = given.pop("weight"), lookup_of(case.grid, case.prefix, case.offsets)
    leaves = {key: x.requires_grad_() for key, x in given.items() if key in expected}

    def weighted(given):
        out = relative_attention(**given, lookup=lookup, scale=case.depth**-0.5, operator="triton")
        return (out * weight).sum()

    torch._dynamo.reset()
    torch.compile(weighted, fullgraph=True, backend=backend)(given).backward()
    assert_equal(gradients(leaves), {key: expected[key] for key in leaves})


def test_recomputed_activations_give_the_same():
    case, expected = CASES["keys_65"], of_kernels("keys_65", torch.float32)
    given = inputs(case, torch.float32)
    leaves = {key: x.requires_grad_() for key, x in given.items() if key in expected}
    checkpoint(attention_of, case, given, use_reentrant=False).backward(given["weight"])
    assert_equal(gradients(leaves), {key: expected[key] for key in leaves})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_autocast_changes_nothing(name, dtype):
    """Tokens have their type by then, tables stay float32; in the backward as well."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = computed(CASES[name], inputs(CASES[name], dtype))
    assert_equal(found, of_kernels(name, dtype))


def test_a_second_derivative_is_refused():
    given = inputs(CASES["16"], torch.float32)
    out = attention_of(CASES["16"], given | {"qkv": given["qkv"].requires_grad_()})
    (gradient,) = torch.autograd.grad(out.square().sum(), given["qkv"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize("form", ["gather", "dense"])
@pytest.mark.parametrize("both", [False, True], ids=["plain", "attacked"])
def test_gradients_of_the_reference(form, both):
    """Against finite differences."""
    case = Case((2, 2), depth=3, batch=2, groups=2, attacked=both, added=both)
    given = {key: x.double() for key, x in inputs(case, torch.float64).items() if key != "weight"}
    leaves = [key for key in given if key != "masked"]

    def attention(*tensors):
        return attention_of(case, given | dict(zip(leaves, tensors, strict=True)), "reference", form=form)

    assert torch.autograd.gradcheck(attention, [given[key].requires_grad_() for key in leaves])


# The shapes of KERNELS.md, and longer ones.
FULL = {
    "50": Case((7, 7), 64, batch=512, heads=12),
    "50_decoder": Case((7, 7), 32, batch=512, heads=16),
    "50_keys": Case((7, 7), 64, batch=512, heads=12, added=True),
    "50_two_tables": Case((7, 7), 64, batch=512, heads=12, offsets=True, attacked=True),
    "65": Case((8, 8), 80, batch=256, heads=16),
    "65_two_tables": Case((8, 8), 80, batch=256, heads=16, offsets=True, attacked=True),
    "197": Case((14, 14), 64, batch=128, heads=12),
    "257": Case((16, 16), 80, batch=128, heads=16),
    "257_keys": Case((16, 16), 80, batch=128, heads=16, added=True),
    "785": Case((28, 28), 64, batch=64, heads=16),
    "1025": Case((32, 32), 64, batch=32, heads=16),
}


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", FULL)
def test_full_size_on_a_gpu(name):
    """In bfloat16, of the last eight images, against the reference in float32 on the same numbers."""
    case, given = FULL[name], inputs(FULL[name], torch.bfloat16)
    some = {key: x[-8:] if key in ("qkv", "weight", "masked") else x for key, x in given.items()}
    expected = computed(case, {key: x.float() for key, x in some.items()}, "reference")
    together = computed(case, given)
    found = computed(case, some) | {key: together[key][-8:] for key in ("out", "qkv")}
    errors = {key: error(found[key], expected[key].double()) for key in expected if key != "added"}
    assert {key: each for key, each in errors.items() if not each <= 6e-3} == {}


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", FULL)
def test_full_size_is_the_same_three_times_on_a_gpu(name):
    given = inputs(FULL[name], torch.bfloat16)
    first = computed(FULL[name], given)
    for _ in range(2):
        assert_equal(computed(FULL[name], given), first)
