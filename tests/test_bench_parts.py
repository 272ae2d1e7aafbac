"""What a benchmark's step is made of: its parts and their times, its operations, and batches that need no images."""

import gzip
import json

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from elsewhere.data.order import Permutations
from elsewhere.data.sources import open_source
from elsewhere.kernels.relative_attention import relative_attention
from elsewhere.kernels.relative_lookup import make_lookup
from elsewhere.launch.bench_batches import OBJECTS, fixed_batches
from elsewhere.launch.bench_flops import flops_counted
from elsewhere.launch.bench_profile import STEPS, print_profile, profile_steps
from elsewhere.launch.bench_ranges import PartTimes
from elsewhere.launch.bench_training import Training
from elsewhere.launch.build import build_adversary, build_method
from elsewhere.launch.evaluate.task_config import any_config
from elsewhere.launch.parts import flops_per_image
from elsewhere.launch.world import World
from elsewhere.models.jepa import predictor_flops
from elsewhere.models.vit import encoder_flops

CPU = torch.device("cpu")
STOP = ["model.width=24", "model.depth=2", "model.heads=3", "engine.device=cpu", "monitor.tensorboard=false"]
ADPE = [*STOP[:2], "model.heads=2", *STOP[3:], "method.decoder.width=16", "method.decoder.depth=1",
        "method.decoder.heads=2", "method.adversary.epsilon=0.01"]  # fmt: skip


def test_a_part_is_its_own_time_and_all_are_the_whole():
    ticks = iter([0, 1, 3, 7, 15, 31, 63, 127])
    times = PartTimes(CPU, lambda: next(ticks))
    times.start()
    times.enter("forward")
    times.enter("teacher")
    times.leave()
    times.leave()
    times.enter("backward")
    times.leave()
    found = times.stop()
    assert found == {"other": 81e3, "forward": 10e3, "teacher": 4e3, "backward": 32e3}  # 127 s in all


@pytest.fixture
def training(tmp_path):
    """Makes a training of a recipe on this process, closed at the end."""
    made = []

    def make(recipe, overrides, real=False, batch=4):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Training(recipe, overrides, batch, real, folder))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Heard:
    """Ranges as they come, each with those in it."""

    def __init__(self):
        self.open = [[]]

    def enter(self, name):
        self.open[-1].append((name, []))
        self.open.append(self.open[-1][-1][1])

    def leave(self):
        self.open.pop()


@pytest.mark.parametrize("recipe, settings, teacher, adversary", [("demo", STOP, True, False),
                                                                 ("demo_adpe", ADPE, False, True)])  # fmt: skip
def test_parts_are_heard_in_the_order_of_a_step(recipe, settings, teacher, adversary, training):
    heard = Heard()
    training(recipe, settings).under(heard, 2)
    step = [
        ("data wait", []), ("forward", [("teacher", [])] if teacher else []), ("backward", []),
        ("optimiser", [("adversary", [])] if adversary else []), *([("EMA", [])] if teacher else []), ("logging", []),
    ]  # fmt: skip
    assert heard.open == [2 * step]


def test_blocks_that_are_computed_again_belong_to_the_backward(training):
    heard = Heard()
    training("demo", [*STOP, "engine.activation_checkpointing=full"]).under(heard, 1)
    assert [name for name, _ in heard.open[0]].count("forward") == 1


def test_a_skipped_step_is_logged_and_moves_no_teacher(training):
    one, heard = training("demo", [*STOP, "engine.precision=float16"]), Heard()
    one.engine.scaler.value = 2.0**60  # at which float16 gradients overflow
    one.under(heard, 1)
    assert [name for name, _ in heard.open[0]] == ["data wait", "forward", "backward", "optimiser", "logging"]


def test_nothing_is_left_that_could_slow_steps_down(training):
    one = training("demo", STOP)
    one.parts(1)
    engine = one.engine
    assert not {"forward_backward", "step", "after_step"} & vars(engine).keys()
    assert "record" not in vars(one._monitor)
    for module in (engine.method, engine.method.teacher):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_steps_are_the_same_with_and_without_measuring(training):
    plain, measured = training("demo_adpe", ADPE), training("demo_adpe", ADPE)
    plain.take(2)
    measured.parts(2)
    for a, b in zip(plain.engine.method.parameters(), measured.engine.method.parameters(), strict=True):
        assert torch.equal(a, b)


def test_real_batches_are_those_of_the_run(training):
    one = training("demo", [*STOP, "loader.workers=0"], real=True)
    images = len(open_source(["digits"], "train", 1, one.config.data.holdout, "auto"))
    places = np.arange(4 * one._step, 4 * one._step + 4)
    expected = Permutations(images, one.config.seed).at(places)[1]
    batch = next(one._batches)
    assert batch.step == one._step and batch.sample_ids.tolist() == expected.tolist()


FORMULAS = {
    "I-JEPA": ("cifar10_ijepa", []), "StoP": ("cifar10_stop", []), "MAE": ("cifar10_mae", []),
    "MAE+": ("cifar10_maeplus_ape", []), "relative": ("cifar10_maeplus_rpe", []),
    "published StoP": ("published/stop_vit_b16", ["model.size=tiny"]),
    "classifier": ("cifar10_finetune", ["model.size=tiny", "model.image_size=96"]),
    "segmenter": ("small_segment", ["model.size=tiny"]),
}  # fmt: skip


@pytest.mark.parametrize("recipe, settings", FORMULAS.values(), ids=FORMULAS.keys())
def test_formulas_say_what_is_counted(recipe, settings):
    config = any_config(recipe, [*settings, "engine.device=cpu"])
    method, batch = build_method(config), fixed_batches(config, World(), 1, 1)[0]
    counted = flops_counted(lambda: method(batch)[0].backward())
    assert flops_per_image(method, batch) == pytest.approx(counted, rel=0.02)


def test_what_is_computed_again_is_counted(training):
    settings = ["model.size=nano", *STOP[3:]]
    none, full = training("demo", settings), training("demo", [*settings, "engine.activation_checkpointing=full"])
    plain, again = none.flops(), full.flops()
    assert plain["flops_counted"] == pytest.approx(plain["flops_by_formula"], rel=0.02)
    assert plain["flops_by_formula"] == again["flops_by_formula"]
    batch, method = next(full._batches), full.engine.method
    context, target, blocks = batch.context.shape[2], batch.targets.shape[2], batch.targets.shape[0]

    def spared(size, *lengths):
        """torch stops before a block's last product, of which the backward needs nothing."""
        return sum(2 * length * size.width**2 * size.mlp_ratio for length in lengths)

    student, predictor = method.encoder.size, method.predictor.size
    forward = encoder_flops(student, context) - spared(student, *[context] * student.depth)
    before = [context + target] * (predictor.depth - 1)  # its last block goes on with the targets alone
    again_predicted = predictor_flops(predictor, context, target) - spared(predictor, *before, target)
    forward += blocks * again_predicted
    assert again["flops_counted"] - plain["flops_counted"] == pytest.approx(forward, rel=1e-6)


def test_fused_attention_counts_as_its_products():
    q, k, v = (torch.randn(2, 3, 10, 8, requires_grad=True) for _ in range(3))

    def attend(backend):
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v).sum().backward()

    fused = flops_counted(lambda: attend(SDPBackend.FLASH_ATTENTION))
    assert fused == flops_counted(lambda: attend(SDPBackend.MATH)) > 0


def test_relative_kernels_count_as_the_reference():
    length, heads, depth, columns = 17, 2, 16, 9
    index = torch.randint(columns, (length, length))
    lookup = make_lookup(index, columns, (4, 4), 1)
    qkv, table = torch.randn(2, length, 3, heads, depth), torch.randn(1, depth, columns)
    leaves = [each.requires_grad_() for each in (qkv, table)]
    expected = flops_counted(
        lambda: relative_attention(qkv, table, lookup, 0.25, operator="reference").sum().backward()
    )

    mode, operator = FakeTensorMode(), torch.ops.elsewhere.relative_attention
    fakes = [mode.from_tensor(each.detach()).requires_grad_() for each in leaves]
    maps = [mode.from_tensor(torch.zeros(size, 64, 64, dtype=torch.uint8)) for size in (2, 4)]

    def step():
        out, _ = operator(*fakes, *maps, None, None, None, [1, 0], 0.25)
        out.sum().backward()

    with mode:
        assert flops_counted(step) == pytest.approx(expected, rel=0.02)


@pytest.fixture
def traced(training, tmp_path):
    """What is said of a profile of a recipe's steps, and the events of its trace."""
    found = profile_steps(training("demo", STOP), tmp_path / "trace.json.gz")
    return found, json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]


def ranges(events, name):
    found = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == name]
    return sorted((event["ts"], event["ts"] + event["dur"]) for event in found)


def test_a_trace_has_a_range_for_each_part_of_each_step(traced):
    names = ("step", "data wait", "forward", "teacher", "backward", "optimiser", "EMA", "logging")
    assert [len(ranges(traced[1], name)) for name in names] == [STEPS] * len(names)
    for (start, end), (before, after) in zip(*(ranges(traced[1], n) for n in ("teacher", "forward")), strict=True):
        assert before <= start < end <= after


def test_the_top_operators_are_those_with_most_time_of_their_own(traced, capsys):
    found, events = traced
    print_profile(found)
    printed, top = capsys.readouterr().out, found["operators"]
    assert [one["milliseconds"] for one in top] == sorted((one["milliseconds"] for one in top), reverse=True)
    assert all(one["name"][:40] in printed for one in top) and found["trace"] in printed
    # Products take the most of any step, and parts are no operators.
    products = sum(event["name"] == "aten::addmm" for event in events)
    assert next(one["calls"] for one in top if one["name"] == "aten::addmm") == products / STEPS
    assert not {one["name"] for one in top} & {"step", "forward", "backward"}


@pytest.mark.parametrize("recipe", ["small_detect", "small_segment"])
def test_tasks_have_something_to_find(recipe, training):
    settings = ["model.size=nano", "model.image_size=64", "engine.device=cpu", "monitor.tensorboard=false"]
    one = training(recipe, settings, batch=2)
    parts = one.parts(1)
    assert parts["forward"] > 0 and parts["backward"] > 0 and "teacher" not in parts


def test_objects_lie_on_their_images_with_masks_in_their_boxes():
    config = any_config("small_detect", ["model.size=nano", "model.image_size=64"])
    for one in fixed_batches(config, World(), 3, 1)[0].truth:
        assert one["boxes"].shape == (OBJECTS, 4) and one["labels"].min() >= 1 and one["labels"].max() <= 80
        assert one["boxes"].min() >= 0 and one["boxes"].max() <= 64
        for mask, (left, top, right, bottom) in zip(one["masks"], one["boxes"].tolist(), strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert left - 1 < columns.min() <= columns.max() <= right and top - 1 < rows.min() <= rows.max() <= bottom


def test_a_shift_of_the_adversary_is_counted_like_the_rest():
    config = any_config("adpe_rpe_coord_vit_b16", ["model.depth=1", "method.decoder.depth=1", "engine.device=cpu"])
    method, batch = build_method(config), fixed_batches(config, World(), 1, 1)[0]
    adversary = build_adversary(config, method)
    counted = flops_counted(lambda: method(batch, adversary.tensors)[0].backward())
    assert flops_per_image(method, batch) == pytest.approx(counted, rel=0.02)
