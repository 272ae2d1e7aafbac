"""`elsewhere bench kernels`: its variants compute what they say, its columns are what they say, and what it refuses."""

import contextlib
import io
import json
import re
from datetime import date

import pytest
import torch

from elsewhere.kernels import dispatch
from elsewhere.kernels.relative_attention import unsupported
from elsewhere.kernels.relative_lookup import make_lookup
from elsewhere.launch import bench_cases, bench_clock, bench_kernels
from elsewhere.launch.bench_cases import (
    SETTINGS,
    Case,
    Floor,
    Inputs,
    attention_case,
    attention_floors,
    looked_up,
    noise_case,
    noise_floors,
    plain,
    position_floors,
    positions_case,
    sequence,
)
from elsewhere.launch.bench_clock import Clock
from elsewhere.launch.bench_forms import bench_relative, print_relative_table
from elsewhere.launch.bench_kernels import compare, measure_case, relative_norm
from elsewhere.launch.cli import main
from elsewhere.models.relative import bucket_ids, offset_ids

CPU = torch.device("cpu")
SHAPE = (2, 2, 26, 24)  # a class token and 5 x 5 patches
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about what a CPU does")


def eager(qkv, table, masked=None, attacked=None, added=None, *, two):
    """Attention with a shared table, every pair's column taken out of it, in float64."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    index = offset_ids((5, 5)) if two else bucket_ids((5, 5))
    if added is not None:
        k = k + (masked.double()[:, :, None] * added.double()[0])[:, None]

    def term(columns):
        return torch.einsum("bhid,dij->bhij", q, columns.double()[0][:, index])

    bias = term(table)
    if attacked is not None:
        bias = torch.where(masked.bool()[:, None, :, None], term(attacked), bias)
    logits = q @ k.transpose(2, 3) / qkv.shape[-1] ** 0.5 + bias
    return (logits.softmax(-1) @ v).transpose(1, 2)


@pytest.fixture(params=SETTINGS)
def attention(request):
    """A case on a CPU, its inputs, and output and gradients of `eager`."""
    torch.manual_seed(3)
    case = attention_case(SHAPE, request.param, torch.float32, CPU)
    inputs = case.draw(True)
    out = eager(**inputs.given, two=request.param == "two tables")
    return case, inputs, [out, *torch.autograd.grad(out, inputs.leaves, inputs.gradient.double())]


@pytest.mark.parametrize("name", ["dense", "gather", "triton"])
def test_a_variant_and_its_gradients_are_attention_with_a_table(attention, name):
    if name == "triton":
        pytest.importorskip("triton")
        if not dispatch.interpreted():
            pytest.skip("needs TRITON_INTERPRET or inputs on a GPU")
    case, inputs, expected = attention
    errors = compare(case, name, inputs, expected)
    assert errors["forward"] < 1e-5 and errors["backward"] < 2e-5


def test_what_variants_are_compared_with_is_attention_with_a_table(attention):
    case, inputs, expected = attention
    found = bench_kernels._run(case.expected, inputs.exact())
    assert len(found) == len(expected)
    assert max(map(relative_norm, found, expected)) < 1e-5


@needs_cpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # it is not compiled here
def test_flex_attention_is_attention_with_a_table(attention):
    case, inputs, expected = attention
    given = {name: each.detach() for name, each in inputs.given.items()}
    assert relative_norm(case.variants["flex"](**given), expected[0]) < 1e-5


def test_the_gradient_that_reaches_the_captured_products_is_that_of_a_lookup():
    """FlexAttention has no backward on a CPU, so that its score_mod is given all pairs at once."""
    torch.manual_seed(0)
    index = bucket_ids((3, 3))
    products = torch.randn(2, 3, 10, 50, requires_grad=True)
    weight = torch.randn(2, 3, 10, 10)
    at = torch.meshgrid(*map(torch.arange, weight.shape), indexing="ij")
    moved = looked_up(products, index)(torch.ones_like(weight), *at)
    (found,) = torch.autograd.grad((moved * weight).sum(), products)
    one_hot = torch.nn.functional.one_hot(index, 50).float()
    torch.testing.assert_close(moved, 1 + torch.einsum("bhic,ijc->bhij", products, one_hot))
    torch.testing.assert_close(found, torch.einsum("bhij,ijc->bhic", weight, one_hot))


def test_the_ceiling_is_attention_without_a_table(attention):
    case, inputs, _ = attention
    qkv = inputs.given["qkv"]
    nothing = torch.zeros(1, SHAPE[3], 50)
    for found in (case.variants["sdpa"](**inputs.given), plain(qkv, SHAPE[3] ** -0.5)):
        assert relative_norm(found, eager(qkv, nothing, two=False)) < 1e-5


def test_three_quarters_of_the_patches_are_masked_and_not_the_class_token():
    masked = attention_case((400, 1, 26, 24), "key attack", torch.float32, CPU).draw(False).given["masked"]
    assert masked[:, 0].sum() == 0 and abs(masked[:, 1:].mean() - 0.75) < 0.02


@pytest.mark.parametrize(
    "length, expected", [(50, (7, 1)), (65, (8, 1)), (196, (14, 0)), (197, (14, 1)), (785, (28, 1))]
)
def test_a_length_is_a_grid_with_or_without_a_class_token(length, expected):
    assert sequence(length) == expected


def test_a_length_that_is_no_grid_is_refused():
    with pytest.raises(ValueError, match="51 tokens are not a square grid"):
        sequence(51)


def test_two_tables_are_measured_where_the_kernels_take_them():
    taken = {
        shape[2]: attention_case((1, *shape[1:]), "two tables", torch.bfloat16, CPU) is not None
        for shape in bench_cases.ATTENTION
    }
    assert taken == {50: True, 65: True, 197: False, 257: False, 785: False, 196: False}


@pytest.mark.parametrize("shape", bench_cases.ATTENTION, ids=str)
def test_the_kernels_take_the_hard_table_at_every_shape(shape):
    side, prefix = sequence(shape[2])
    lookup = make_lookup(bucket_ids((side, side), prefix), 49 + prefix, (side, side), prefix)
    assert unsupported(lookup, shape[3], torch.bfloat16) is None


def test_the_floor_of_attention_counted_by_hand():
    """512 images, 12 heads, 50 tokens, 64 columns of two bytes: 39,321,600 bytes a tensor of all heads."""
    floors = attention_floors((512, 12, 50, 64), 2)
    assert floors["forward"] == Floor(4 * 39_321_600, 3_932_160_000)
    assert floors["backward"] == Floor(7 * 39_321_600, 7_864_320_000)


def test_the_floors_of_noise_and_positions_counted_by_hand():
    assert noise_floors(32768, 1280, 2) == {"forward": Floor(83_886_080)}
    floor = Floor(25_165_824, 32_212_254_720)
    assert position_floors(32768, 1280, 384, 2) == {"forward": floor, "backward": floor}


def test_a_floor_is_the_longer_of_moving_and_multiplying():
    assert Floor(100, 30).seconds(10.0, 10.0) == 10.0
    assert Floor(10, 30).seconds(10.0, 10.0) == 3.0


def test_noise_is_drawn_in_the_type_asked_for_with_the_same_numbers():
    case = noise_case((128, 40), torch.bfloat16, CPU)
    inputs = case.draw(True)
    assert {name: draw(**inputs.given).dtype for name, draw in case.variants.items() if name != "triton"} == {
        "reference": torch.bfloat16, "randn": torch.bfloat16
    }  # fmt: skip
    assert 0 < compare(case, "reference", inputs, [case.expected(**inputs.given)])["forward"] < 4e-3


def test_the_library_s_noise_has_the_same_spread():
    case = noise_case((64 * 64, 64), torch.float32, CPU)
    given = case.draw(False).given
    spreads = [case.variants[name](**given).std().item() for name in ("reference", "randn")]
    assert spreads == pytest.approx([0.25, 0.25], rel=0.01)


def test_positions_are_the_table_s_with_projected_noise():
    torch.manual_seed(5)
    inputs = positions_case((128, 16, 8), torch.float32, CPU).draw(True)
    noise = noise_case((128, 16), torch.float32, CPU).expected(
        **{name: inputs.given[name] for name in ("epochs", "sample_ids", "blocks", "patches")}
    )
    table, weight, bias, patches = (inputs.given[name] for name in ("table", "weight", "bias", "patches"))
    expected = table.double()[patches] + noise.double() @ weight.double().T + bias.double()
    expected = [expected, *torch.autograd.grad(expected, inputs.leaves, inputs.gradient.double())]
    case = positions_case((128, 16, 8), torch.float32, CPU)
    errors = compare(case, "reference", inputs, expected)
    assert errors["forward"] < 1e-5 and errors["backward"] < 1e-5


class Fake(Clock):
    """A clock for which a step takes the milliseconds that its output holds, as if on a GPU with a cache."""

    def __init__(self, cache=0, gpu=False):
        super().__init__(CPU)
        self.cache, self.gpu, self.forgotten = cache, gpu, 0

    def milliseconds(self, step):
        found = step()
        return (found if isinstance(found, torch.Tensor) else found[0]).flatten()[0].item()

    def peak(self, step):
        step()
        return 1 << 20

    def forget(self):
        self.forgotten += 1


def made_up(**variants):
    """A case with one number as its input, drawn as 1.0; what is expected is the input itself."""
    drawn = []

    def draw(small):
        drawn.append(Inputs({"x": torch.ones(16, requires_grad=True)}, torch.ones(16)))
        return drawn[-1]

    floors = {"forward": Floor(100), "backward": Floor(200)}
    case = Case("attention", (1,), "-", draw, variants, lambda x: x * 1.0, floors, ("ceiling",))
    return case, drawn


def rows_of(case, clock=None):
    rows = measure_case(case, list(case.variants), clock or Fake(), torch.float32, 0.0, bandwidth=1e5, rate=1.0)
    return {(row["variant"], row["pass"]): row for row in rows}


def test_figures_of_a_row():
    case, _ = made_up(gather=lambda x: x * 1.0, ceiling=lambda x: x * 4.0)
    rows = rows_of(case)
    assert len(rows) == 4
    for which, floor in (("forward", 1.0), ("backward", 2.0)):  # 100 and 200 bytes at 1e5 bytes per second
        row = rows["ceiling", which]
        assert (row["milliseconds"], row["floor_milliseconds"], row["ratio"]) == (4.0, floor, 4.0)
        assert row["floor_percent"] == 100 * floor / 4 and row["peak_bytes"] == 1 << 20
        assert row["runs"] == 5 and row["error"] is None and row["failure"] is None
        assert rows["gather", which]["ratio"] == 1.0 and rows["gather", which]["error"] == 0.0


def test_a_median_does_not_follow_a_slow_round():
    calls = []

    def uneven(x):
        calls.append(1)
        return x * (1.0 if len(calls) != 10 else 100.0)

    case, _ = made_up(gather=lambda x: x * 1.0, ceiling=uneven)
    assert rows_of(case)["ceiling", "forward"]["milliseconds"] == 1.0 and len(calls) > 10


def test_inputs_are_rotated_over_twice_the_cache():
    seen = set()

    def look(x):
        seen.add(id(x))
        return x * 1.0

    case, drawn = made_up(gather=look)
    rows_of(case, Fake(cache=256))  # a draw is 2 · 64 bytes; the first is the small one
    assert len(drawn) == 1 + 4 and seen == {id(each.given["x"]) for each in drawn}


def refuse(x):
    raise RuntimeError("no such instruction\nand a long trace")


def full_only(x):
    full_only.calls += 1
    if full_only.calls > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return x * 1.0


@pytest.mark.parametrize(
    "variant, reason",
    [
        (refuse, "RuntimeError: no such instruction"),
        (full_only, "OutOfMemoryError: CUDA out of memory."),
        (lambda x: x * 1.1, "wrong backward: off by 0.1 of the reference's norm"),
        (lambda x: x * float("nan"), "wrong backward: off by nan of the reference's norm"),
        (lambda x: x.detach().requires_grad_(), "RuntimeError: "),
    ],
    ids=["raises", "out of memory when timed", "wrong", "not a number", "no gradient"],
)
def test_a_variant_that_fails_is_a_row_with_its_reason(variant, reason):
    full_only.calls = 0
    case, _ = made_up(bad=variant, gather=lambda x: x * 1.0)
    clock = Fake()
    rows = rows_of(case, clock)
    for which in ("forward", "backward"):
        bad, good = rows["bad", which], rows["gather", which]
        assert bad["failure"].startswith(reason) and "\n" not in bad["failure"]
        assert bad["milliseconds"] is None and bad["ratio"] is None
        assert good["milliseconds"] == 1.0 and good["failure"] is None
    assert clock.forgotten == 1


def test_inputs_that_do_not_fit_are_reasons_for_all():
    case, _ = made_up(gather=lambda x: x * 1.0)
    object.__setattr__(case, "draw", lambda small: refuse(small))
    assert {row["failure"] for row in rows_of(case).values()} == {"RuntimeError: no such instruction"}


def test_what_is_interpreted_is_never_timed(monkeypatch):
    monkeypatch.setattr(bench_kernels, "interpreted", lambda: True)
    case, _ = made_up(triton=lambda x: pytest.fail("was run"), gather=lambda x: x * 1.0)
    row = rows_of(case, Fake(gpu=True))["triton", "forward"]
    assert row["failure"] == "TRITON_INTERPRET is set, and an interpreter is not timed"


def test_ratios_on_a_gpu_are_to_triton(monkeypatch):
    monkeypatch.setattr(bench_kernels, "interpreted", lambda: False)
    monkeypatch.setattr(bench_kernels, "triton_missing", lambda device: None)
    case, _ = made_up(triton=lambda x: x * 1.0, gather=lambda x: x * 1.0, ceiling=lambda x: x * 0.5)
    rows = rows_of(case, Fake(gpu=True))
    assert [rows[name, "forward"]["ratio"] for name in ("triton", "gather", "ceiling")] == [1.0, 1.0, 0.5]


def test_without_a_time_of_triton_there_are_no_ratios(monkeypatch):
    monkeypatch.setattr(bench_kernels, "interpreted", lambda: True)
    case, _ = made_up(triton=refuse, gather=lambda x: x * 1.0)
    assert rows_of(case, Fake(gpu=True))["gather", "forward"]["ratio"] is None


def test_a_copy_is_read_and_written_and_a_product_multiplies_and_adds(monkeypatch):
    monkeypatch.setattr(Clock, "_typical", lambda self, step: 0.5)
    assert Clock(CPU).bandwidth() == 2 * (1 << 26) / 0.5
    assert Clock(CPU).rate(torch.float32) == 2 * 512**3 / 0.5


def test_a_step_is_timed_once_and_by_the_processor(monkeypatch):
    readings = iter([10.0, 10.25])
    monkeypatch.setattr(bench_clock.time, "process_time", lambda: next(readings))
    calls = []
    assert Clock(CPU).milliseconds(lambda: calls.append(1)) == 250.0
    assert calls == [1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command printed at three small shapes, and the files that it wrote."""
    folder, printed = tmp_path_factory.mktemp("bench"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_cases, "ATTENTION_CPU", ((1, 2, 50, 24), (1, 1, 197, 24)))
        patch.setattr(bench_cases, "NOISE_CPU", ((128, 8),))
        patch.setattr(bench_cases, "POSITIONS_CPU", ((128, 8, 4),))
        arguments = ["--seconds", "0", "--save", str(folder), "--json", str(folder / "own.json")]
        with contextlib.redirect_stdout(printed):
            assert main(["bench", "kernels", *arguments]) == 0
    return printed.getvalue().splitlines(), folder


def found(measured):
    return json.loads((measured[1] / "own.json").read_text())


@needs_cpu
def test_every_case_has_its_variants_and_passes(measured):
    keys = [
        (row["path"], row["shape"][-2], row["setting"], row["pass"], row["variant"]) for row in found(measured)["rows"]
    ]
    attention = [
        ("attention", length, setting, which, name)
        for length, settings in ((50, SETTINGS), (197, SETTINGS[:2]))
        for setting in settings
        for which in ("forward", "backward")
        for name in ("dense", "gather", "sdpa")
    ]
    noise = [("noise", 128, "-", "forward", name) for name in ("reference", "randn")]
    positions = [("positions", 8, "-", w, name) for w in ("forward", "backward") for name in ("reference", "randn")]
    assert [(path, length, *rest) for path, length, *rest in keys] == attention + noise + positions


@needs_cpu
def test_the_result_says_where_and_when_it_was_measured(measured):
    result = found(measured)
    assert result["torch"] == torch.__version__ and result["date"] == date.today().isoformat()
    assert result["gpu"] is None and result["driver"] is None and result["dtype"] == "float32"
    assert {"machine", "python", "triton", "cuda"} <= result.keys()
    assert 1e8 < result["bandwidth"] < 1e13 and 1e8 < result["rate"] < 1e15


@needs_cpu
def test_a_cpu_says_that_it_is_one(measured):
    (line,) = [line for line in measured[0] if "This is a CPU" in line]
    assert "Triton's kernels are not timed here" in line and "FlexAttention has no CPU backward" in line


def figures(line):
    """The words of a printed line and its figures, of which a dash is None."""
    left = re.split(r" {2,}", line.strip(" |"))
    return left[:5], [None if cell == "-" else float(cell) for cell in left[5:]]


@needs_cpu
def test_the_table_prints_what_the_json_has(measured):
    rows = found(measured)["rows"]
    start = next(i for i, line in enumerate(measured[0]) if line.startswith("path"))
    assert len(measured[0]) == start + 1 + len(rows)
    for line, row in zip(measured[0][start + 1 :], rows, strict=True):
        words, numbers = figures(line)
        shape = ",".join(map(str, row["shape"]))
        assert words == [row["path"], shape, row["setting"], row["pass"], row["variant"]]
        time, percent, ratio, peak, error = numbers
        assert time == pytest.approx(row["milliseconds"], abs=6e-4) and peak is None
        assert percent == pytest.approx(row["floor_percent"], abs=0.06)
        assert ratio == pytest.approx(row["ratio"], abs=6e-3)
        assert error == (None if row["error"] is None else pytest.approx(row["error"], rel=0.5))


@needs_cpu
def test_the_page_has_the_rows_of_the_table(measured):
    (path,) = measured[1].glob("kernels_cpu_*.md")
    text = path.read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    start = next(i for i, line in enumerate(measured[0]) if line.startswith("path"))
    printed = [re.split(r" {2,}", line) for line in measured[0][start + 1 :]]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == printed
    assert all(line in text for line in measured[0][:start])


@needs_cpu
def test_the_saved_json_is_the_one_asked_for(measured):
    (path,) = measured[1].glob("kernels_cpu_*.json")
    assert path.stem == f"kernels_cpu_{date.today().isoformat()}"
    assert json.loads(path.read_text()) == found(measured)


@pytest.fixture
def refused(capsys, monkeypatch):
    """The sentence that `elsewhere bench kernels` ends with, status 2, before it measures anything."""
    monkeypatch.setattr(Clock, "bandwidth", lambda self: pytest.fail("measured"))

    def run(*arguments):
        assert main(["bench", "kernels", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("elsewhere: ") and err.count("\n") == 1
        return err.removeprefix("elsewhere: ").strip()

    return run


@needs_cpu
@pytest.mark.parametrize("end", [".md", ".json"])
def test_a_page_that_is_there_is_not_overwritten(refused, tmp_path, end):
    path = tmp_path / f"kernels_cpu_{date.today().isoformat()}{end}"
    path.write_text("mine")
    assert refused("--save", tmp_path) == (
        f"{path} is there already and is not overwritten; move it or choose another folder."
    )
    assert path.read_text() == "mine"


def test_a_page_is_named_after_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200 (80GB)")
    page, _ = bench_kernels.new_pages(tmp_path)
    assert page.name == f"kernels_nvidia_h200_80gb_{date.today().isoformat()}.md"


def test_a_folder_that_is_not_there_is_refused(refused, tmp_path):
    assert refused("--save", tmp_path / "x") == f"--save {tmp_path / 'x'} is not there or not writable; " + (
        "choose another folder."
    )


def test_what_is_not_measured_is_refused(refused):
    assert refused("--only", "50,51") == (
        "--only 51 is not measured; choose some of 50, 65, 197, 257, 785, 196, noise, positions."
    )


def test_an_unknown_variant_cannot_be_left_out(refused):
    assert refused("--without", "eager") == (
        "--without eager is not measured; choose some of triton, dense, gather, flex, sdpa, reference, randn."
    )


@needs_cpu
def test_a_variant_that_is_left_out_has_no_row(monkeypatch):
    monkeypatch.setattr(bench_cases, "NOISE_CPU", ((128, 8),))
    lines = []
    rows = bench_kernels.bench_kernels(seconds=0, only=["noise"], without=["randn"], show=lines.append)["rows"]
    assert [row["variant"] for row in rows] == ["reference"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_operator_has_figures():
    options = {"only": ["50", "noise", "positions"], "without": ["flex"], "show": lambda line: None}
    rows = bench_kernels.bench_kernels(seconds=0, **options)["rows"]
    assert {row["failure"] for row in rows} == {None}
    assert all(row["milliseconds"] > 0 and row["peak_bytes"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize(
    "option", [("--save", "."), ("--dtype", "float16"), ("--only", "50"), ("--without", "flex")], ids=str
)
def test_the_table_of_forms_has_no_other_settings(refused, option):
    assert refused("--forms", *option) == (
        f"{option[0]} does not go with --forms, whose table has fixed settings; leave one out."
    )


@pytest.mark.parametrize("given", ["-1", "nan", "x"])
def test_seconds_that_are_none_end_with_the_usage(capsys, given):
    with pytest.raises(SystemExit) as end:
        main(["bench", "kernels", "--seconds", given])
    assert end.value.code == 2 and "`elsewhere bench kernels --help`" in capsys.readouterr().err


def test_forms_are_compared_in_every_setting(capsys):
    result = bench_relative([(1, 2, 3, 16)], seconds=0)
    assert len({row["setting"] for row in result["rows"]}) == len(result["rows"]) == 7
    assert all(row["milliseconds"].keys() == {"gather", "dense"} for row in result["rows"])
    print_relative_table(result)
    assert capsys.readouterr().out.count("1,2,10,16 ") == 7


@pytest.mark.slow
def test_a_step_whose_kernels_cannot_be_had_is_a_row_that_says_why(capfd, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of the measured process
    small = ["model.width=24", "model.depth=1", "model.heads=2", "method.decoder.depth=1", "engine.device=cpu"]
    vary = ["--vary", "kernels=triton,reference", "--batch", "2", "--steps", "1", "--rounds", "1"]
    assert main(["bench", "step", "demo_adpe", *small, *vary]) == 0
    found = " ".join(capfd.readouterr().out.split())
    why = "kernels=triton needs an NVIDIA GPU, and this device is a CPU; use kernels=auto."
    assert f"demo_adpe kernels=triton not measured: {why} demo_adpe kernels=reference 2 " in found
