"""`elsewhere plan` against counts of other origin: real tensors, hand counts, measured bytes, DeepSpeed, FSDP2."""

import argparse
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elsewhere.data.batch import Batch
from elsewhere.launch.build import build_adversary, build_masks, build_method
from elsewhere.launch.config import load_config, recipe_names
from elsewhere.launch.engine.activation_checkpointing import checkpoint_activations
from elsewhere.launch.errors import UserError
from elsewhere.launch.evaluate.task_config import any_config
from elsewhere.launch.planning import command
from elsewhere.launch.planning.activations import activations, fake_batch, make_fake, on_meta
from elsewhere.launch.planning.hardware import GPUS
from elsewhere.launch.planning.memory import Division, Weight, divide, states, weights_of
from elsewhere.launch.planning.pace import exchanges, sent
from elsewhere.launch.planning.plan import Place, memory, most_dividing, most_images, open_case, plan
from elsewhere.models.vit import SIZES

MAE = {"model.size": "nano", "model.depth": 3, "method.decoder": {"width": 48, "depth": 2, "heads": 2}}
CASES = {
    "stop": ("demo", {"model.depth": 4, "method.predictor.depth": 3}),
    "mae": ("cifar10_mae", MAE),
    "maeplus": ("cifar10_maeplus_ape", MAE),
    "adpe": ("cifar10_adpe_rpe_coord", MAE),
}
SMALL = ["model.size=nano", "model.depth=4", "model.patch_size=8"]
TASK_CASES = {
    "classify": ("finetune", [*SMALL, "model.image_size=64"]),
    "segment": ("small_segment", [*SMALL, "method.segmenter.classes=7"]),
    "detect": ("small_detect", [*SMALL, "method.detector.window=4"]),
}


class Held(TorchDispatchMode):
    """The bytes of results that are still there, by weak references to their memory."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out


def real_batch(config, method, images):
    make = build_masks(config, method.encoder.grid)
    masks = make(config.seed, 0, 0, np.arange(images)) if make else None
    parts = {name: getattr(masks, name, None) for name in ("context", "targets", "visible")}
    views = (config.data.views,) if config.data.views > 1 else ()
    ids = torch.arange(images)
    return Batch(
        images=torch.zeros(images, *views, config.model.channels, *config.model.image_size, dtype=torch.uint8),
        sample_ids=ids, labels=ids, epochs=ids, step=0,
        **{name: torch.from_numpy(part) for name, part in parts.items() if part is not None},
    )  # fmt: skip


def measured(config, policy, dtype, images, batch=None):
    """Bytes that a real forward on the CPU leaves for its backward."""
    method = build_method(config)
    method.compute_dtype = dtype
    checkpoint_activations(method, policy)
    adversary, batch = build_adversary(config, method), batch or real_batch(config, method, images)
    old = [*method.parameters(), *method.buffers(), *tree_leaves(vars(batch))]
    known = {t.untyped_storage()._cdata for t in old if isinstance(t, torch.Tensor)}
    with Held() as held:
        loss, scalars = method(batch, adversary.tensors) if adversary else method(batch)
    assert loss.requires_grad and scalars
    # torch's smooth L1 leaves its mean in memory made for all terms, which fake tensors do not show: 1 % at full width.
    known.add(loss.untyped_storage()._cdata)
    return sum(size for key, (reference, size) in held.found.items() if key not in known and not reference.expired())


@pytest.mark.parametrize("policy", ["none", "selective", "full", 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_kept_activations_are_those_of_real_tensors(name, precision, policy):
    recipe, settings = CASES[name]
    config, dtype = load_config(recipe, settings), getattr(torch, precision)
    found = activations(config, policy, dtype, cuda=False).kept(8)
    assert found == pytest.approx(measured(config, policy, dtype, 8), rel=0.02)


def labelled_batch(config, images):
    """A task's batch; of a detector's, each image is full of boxes, so that all regions are sampled."""
    ids, size = torch.arange(images), config.model.image_size
    pixels = torch.randint(0, 256, (images, 3, *size), dtype=torch.uint8)
    batch = Batch(images=pixels, sample_ids=ids, labels=ids, epochs=ids, step=0)
    if config.method.kind == "classify":
        batch.images = pixels.float()  # as mixed ones are
    elif config.method.kind == "segment":
        batch.truth = torch.randint(0, 7, (images, *size))
    else:
        corners = torch.cartesian_prod(torch.arange(0.0, 80, 8), torch.arange(0.0, 80, 8))
        boxes, masks = torch.cat([corners, corners + 14], dim=1), torch.ones(len(corners), *size, dtype=torch.uint8)
        one = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64), "masks": masks}
        batch.truth = [one for _ in range(images)]
    return batch


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "least"), [("classify", 0.98), ("segment", 0.98), ("detect", 0.9)])
def test_kept_activations_of_tasks_are_those_of_real_tensors(name, least, precision, policy):
    config, dtype = any_config(*TASK_CASES[name]), getattr(torch, precision)
    found = activations(config, policy, dtype, cuda=False).kept(4)
    real = measured(config, policy, dtype, 4, labelled_batch(config, 4))
    assert least * found <= real <= found / least


def test_saved_tensors_of_autograd_are_the_kept_activations():
    """Counted a second way: what autograd packs, each memory once."""
    config = load_config(*CASES["stop"])
    method, seen = build_method(config), {}
    known = {p.untyped_storage().data_ptr() for p in (*method.parameters(), *method.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = method(real_batch(config, method, 8))
    assert activations(config, "none", torch.float32, cuda=False).kept(8) == pytest.approx(sum(seen.values()), rel=0.05)
    assert loss.requires_grad


def test_bytes_of_a_block_on_cuda_are_a_hand_count():
    """Of a token in bfloat16, in widths D: residual stream before each norm 2 × 4, norms' results 2 × 2, qkv 6,
    attention 2, fc1 and GELU 8 each. Beside it, mean and deviation of two norms, and a logarithm for each head."""
    settings = {"model.size": "base", "mask.ratio": 0.75}
    few, more = (
        activations(load_config("mae_vit_b16", {**settings, "model.depth": depth}), "none", torch.bfloat16)
        for depth in (4, 5)
    )
    tokens, size = 1 + 49, SIZES["base"]
    by_hand = tokens * (36 * size.width + 16 + 4 * size.heads)
    assert more.kept.per_image - few.kept.per_image == pytest.approx(by_hand, rel=0.01)
    half_copies = 2 * 12 * size.width**2
    assert more.kept.fixed - few.kept.fixed == pytest.approx(half_copies, rel=0.01)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_relative_attention_keeps_its_logits(precision):
    """A bias of [crops, heads, L, L] more than attention without positions, at the least."""
    settings = {**MAE, "data.views": 2}
    dtype, length, heads = getattr(torch, precision), 1 + 64, SIZES["nano"].heads
    with_, without = (
        activations(load_config(name, settings), "none", dtype).kept.per_image
        for name in ("cifar10_maeplus_rpe", "cifar10_maeplus_ape")
    )
    logits = 2 * dtype.itemsize * length**2 * (3 * heads + 2 * 2)
    assert 1.0 * logits <= with_ - without <= 2.5 * logits


@pytest.mark.long
@pytest.mark.parametrize("policy", ["none", "selective", "full", 2])
@pytest.mark.parametrize("recipe", ["stop_vit_b16", "adpe_rpe_coord_vit_b16"])
def test_few_blocks_and_images_tell_all(recipe, policy):
    """Traced with all blocks, and the peak at other numbers of images than it was made of."""
    config = load_config(recipe, {"model.depth": 7})
    short, whole = (activations(config, policy, torch.bfloat16, shorten=shorten) for shorten in (True, False))
    for images in (1, 64, 1000):
        assert short.kept(images) == pytest.approx(whole.kept(images), rel=0.002)
        assert short.peak(images) == pytest.approx(whole.peak(images), rel=0.005)


# docs/benchmarks/engines.md, "Bytes": counted from the memory behind the engines' tensors, at two ranks, in MB.
MEASURED = {
    "fsdp": {"weights": 193.8, "teacher": 171.3, "moments": 387.5, "gradients": 193.8},
    "zero2": {"weights": 387.5, "masters": 193.8, "teacher": 342.6, "moments": 387.5, "gradients": 200.9},
    "zero3": {"weights": 193.8, "teacher": 171.3, "moments": 387.5, "gradients": 193.8},
    "ddp": {"weights": 387.5, "teacher": 342.6, "moments": 775.1, "gradients": 387.5},
}


@pytest.fixture(scope="module")
def stop_weights():
    return weights_of(on_meta(load_config("stop_vit_b16")))


@pytest.mark.parametrize("engine", MEASURED)
def test_states_are_the_measured_ones(stop_weights, engine):
    config = load_config("stop_vit_b16", command._engine(engine))
    found = states(stop_weights, divide(config, 2, 64, 16)).gpu
    assert found.keys() == MEASURED[engine].keys()
    for part, megabytes in MEASURED[engine].items():
        assert found[part] / 1e6 == pytest.approx(megabytes, rel=0.04 if part == "gradients" else 0.001), part
    assert sum(found.values()) / 1e6 == pytest.approx(sum(MEASURED[engine].values()), rel=0.006)


def vit_huge():
    """timm's ViT-H/14 for 224 pixels, 632 million weights, cut into blocks."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_huge_patch14_224", num_classes=1000)
    return [
        Weight(tuple(p.shape), True, ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "")
        for name, p in model.named_parameters()
    ]


def test_a_huge_encoder_at_eight_ranks_is_what_fsdp_s_tracker_found():
    """Figures of a run of FSDPMemTracker, GiB: parameters 0.295, Adam 0.59, all-gather 2.35, reduce-scatter 2.36."""
    weights, by = vit_huge(), Division("fsdp", 8, stage=3)
    found = states(weights, by).gpu
    assert found["weights"] / 2**30 == pytest.approx(0.295, rel=0.01)
    assert found["moments"] / 2**30 == pytest.approx(0.59, rel=0.01)
    moved = {one.what: one.times * one.size / 2**30 for one in exchanges(weights, by)}
    assert moved["blocks, forward"] + moved["weights outside of blocks"] == pytest.approx(2.35, rel=0.01)
    assert moved["gradients"] == pytest.approx(2.36, rel=0.01)


def test_fsdp_gives_a_rank_whole_rows():
    """768 rows over 4,096 ranks: the first ranks hold one each, as much as at 768 ranks."""
    weights = [Weight((768, 10), True, "")]
    at = {n: states(weights, Division("fsdp", n, stage=3)).gpu["weights"] for n in (8, 768, 4096)}
    assert at == {8: 96 * 40, 768: 40, 4096: 40}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [8, 64])
def test_zero_states_are_deepspeed_s_estimate_less_what_is_named(stop_weights, stage, ranks):
    """Its half-precision weights (2 bytes, whole at stage 2) and gradients (2 of 18) in place of ours."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    trained = sum(p.numel() for p in on_meta(load_config("stop_vit_b16")).parameters() if p.requires_grad)
    options = {"num_gpus_per_node": ranks, "num_nodes": 1, "cpu_offload": False}
    if stage == 2:
        theirs = estimate_zero2_model_states_mem_needs(trained, **options)[1] + 2 * trained - 2 * trained / ranks
    else:
        theirs = estimate_zero3_model_states_mem_needs(trained, 0, **options)[1] - 2 * trained / ranks
    ours = states(stop_weights, Division("zero", ranks, stage=stage)).gpu
    assert sum(ours.values()) - ours["teacher"] == pytest.approx(theirs, rel=0.01)


class Collectives(TorchDispatchMode):
    """Bytes of whole tensors in the collectives of torch.distributed, and how many there are."""

    def __init__(self):
        super().__init__()
        self.bytes, self.count = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole = max(tensor.numel() * tensor.itemsize for tensor in args[:2])
            self.bytes[name] = self.bytes.get(name, 0) + whole
            self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["stop", "adpe"])
def test_fsdp_exchanges_what_it_exchanges(name):
    """The collectives of a real FSDP2 step of two micro-batches, in a group of ranks that are not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    recipe, settings = CASES[name]
    config = load_config(recipe, {**settings, "engine.kind": "fsdp", "method.adversary": {"mode": "none"}}
                         if name == "adpe" else {**settings, "engine.kind": "fsdp"})  # fmt: skip
    method = on_meta(config)
    weights = weights_of(method)
    masks = build_masks(config, method.encoder.grid)(0, 0, 0, np.arange(2))
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        with FakeTensorMode():
            make_fake(method)
            for stack in method.stacks().values():
                for block in stack:
                    fully_shard(block, mesh=mesh)
            fully_shard(method, mesh=mesh)
            batch = fake_batch(config, masks, 2)
            with Collectives() as seen:
                for last in (False, True):
                    method.set_requires_gradient_sync(last)
                    torch.autograd.backward(method(batch)[0])
    finally:
        dist.destroy_process_group()
    ours = exchanges(weights, Division("fsdp", 4, 2, 3))
    for kind, theirs in (("all_gather", "_allgather_base_"), ("reduce_scatter", "_reduce_scatter_base_")):
        mine = [one for one in ours if one.kind == kind]
        assert sum(one.times for one in mine) == seen.count[theirs]
        assert sum(one.times * one.size for one in mine) == pytest.approx(seen.bytes[theirs], rel=0.02)


def test_what_ddp_sends_is_twice_the_gradients_but_a_share():
    weights, by = [Weight((1000, 1000), True, "")], Division("ddp", 8, 4)
    assert sum(sent(one, by) for one in exchanges(weights, by)) == pytest.approx(2 * 7 / 8 * 4e6, rel=1e-6)


def test_zero_2_sums_gradients_of_every_micro_batch_and_ddp_once():
    weights = [Weight((1000, 1000), True, "")]
    zero = exchanges(weights, Division("zero", 8, 4, 2, zero={"reduce_bucket_size": 5e7}))
    moved = {one.what: one.times * one.size for one in zero}
    assert moved["gradients"] == 4 * 4e6 and moved["weights after the step"] == 4e6


def test_parts_of_memory_add_up(small_plan):
    *parts, total = small_plan["memory"].values()
    assert sum(parts) == pytest.approx(total)


@pytest.fixture(scope="module")
def small_plan():
    config = load_config("cifar10_stop", {"optim.batch_size": 512})
    return plan("cifar10_stop", config, Place(8, "a10g-24g"), mfu=0.2, scales=(8, 16, 24))


def test_largest_micro_batch_fits_and_one_more_does_not(small_plan):
    most = small_plan["policies"][0]["most"]
    for more, fits in ((0, True), (1, False)):
        batch = 8 * (most + more)
        config = load_config("cifar10_stop", {"optim.batch_size": batch})
        memory = plan("cifar10_stop", config, Place(8, "a10g-24g"), images=10**7, scales=())["memory"]["total"]
        assert (memory <= GPUS["a10g-24g"].memory) == fits


def test_step_time_is_operations_over_rate(small_plan):
    seconds = 64 * small_plan["gflop_per_image"] * 1e9 / (0.2 * 70e12)
    assert small_plan["computing"] == pytest.approx(seconds)
    assert small_plan["days"] == pytest.approx(small_plan["steps"] * small_plan["seconds"] / 86400)
    assert small_plan["steps"] == 50_000 * small_plan["epochs"] // 512


def test_table_says_where_the_batch_does_not_divide(small_plan):
    assert [row["divides"] for row in small_plan["scales"]] == [True, True, False]


def test_advice_for_a_batch_that_does_not_fit_makes_it_fit():
    settings = {"optim.batch_size": 32768}
    at = Place(2, "a10g-24g")
    before = plan("cifar10_stop", load_config("cifar10_stop", settings), at, scales=())
    assert before["memory"]["total"] > 24e9
    text = command._advice(before)
    assert "does not fit" in text
    settings |= dict(item.rstrip(".,").split("=") for item in text.split() if "=" in item and "micro" in item)
    after = plan("cifar10_stop", load_config("cifar10_stop", settings), at, scales=())
    assert after["memory"]["total"] <= 24e9


def test_what_divides_the_share_fits_with_the_gradients_that_add_up_beside_it():
    """FSDP2 keeps gradients of earlier micro-batches whole, which a step of one micro-batch has not."""
    settings = {"optim.batch_size": 4096, "engine.kind": "fsdp"}
    # A GPU on which the largest divisor fits by itself and not beside the gradients.
    case = open_case(load_config("cifar10_stop", settings), "a10g-24g", 50_000, "cifar10_stop")
    alone = memory(case, divide(case.config, 2, 1024, 1), 1024, "none")["total"]
    tight = dataclasses.replace(case, gpu=dataclasses.replace(case.gpu, memory=alone + 1))
    assert most_images(tight, divide(case.config, 2, 1024, 1), "none") == 1024
    assert most_dividing(tight, 2, 2048, "none") == 512


def ask(*words):
    parser = argparse.ArgumentParser()
    command.add_plan_command(parser.add_subparsers())
    parsed, rest = parser.parse_known_args(["plan", *words])
    parsed.overrides += rest
    return command.run_plan(parsed)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--gpus", "8", "--gpu", "h20-141g"], "did you mean h200-141g"),
        (["--gpus", "8", "--gpu", "h100"], "h100-80g"),
        (["--gpus", "8", "--gpu", "x"], "there are b200-180g"),
        (["--gpus", "8", "--gpu", "h100-80g", "--interconnect", "infiniband"], "there are ethernet-10g"),
        (["--gpus", "8", "--gpu", "h100-80g", "--engine", "fdsp"], "did you mean fsdp"),
        (["--gpus", "0", "--gpu", "h100-80g"], "choose 1 or more"),
        (["--gpus", "8", "--gpu", "h100-80g", "--interconnect", "ib400"], "ib-400g"),
        (["--gpus", "8", "--gpu", "h100-80g", "--nvlink", "ib-400g"], "nvlink"),
        (["--gpus", "7", "--gpu", "h100-80g"], "Or take --gpus 8"),
        (["--gpus", "8", "--gpu", "h100-80g", "--engine", "zero4"], "zero3"),
        (["--gpus", "8", "--gpu", "v100-32g", "engine.precision=bfloat16"], "float16"),
        (["--gpus", "8", "--gpu", "h100-80g", "--mfu", "40"], "0.4"),
        (["--gpus", "8", "--gpu", "h100-80g", "--engine", "fsdp", "engine.replicas=3"], "engine.replicas=3"),
        (["--gpus", "8", "--gpu", "h100-80g", "--images", "5"], "5 images"),
        (["--gpus", "8", "--gpu", "h100-80g", "--json", "/nowhere/x.json"], "choose another"),
    ],
)
def test_what_cannot_be_is_one_sentence_with_the_way_out(words, complaint):
    with pytest.raises(UserError) as error:
        ask("cifar10_stop", *words)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_command_prints_all_parts_and_writes_json(tmp_path, capsys):
    file = tmp_path / "plan.json"
    words = ["--gpus", "16", "--gpu", "a100-40g", "--engine", "zero2", "--json", str(file), "loader.micro_batch=8"]
    assert ask("cifar10_stop", *words) == 0
    printed = capsys.readouterr().out
    for part in (
        "moments",
        "teacher",
        "buckets",
        "selective",
        "largest micro-batch",
        "all_reduce",
        "assumed",
        "Loader",
    ):
        assert part in printed
    written = json.loads(file.read_text())
    assert written["accumulation"] == 2 and written["memory"]["total"] > 0
    assert [row["gpus"] for row in written["scales"]] == [2**k for k in range(3, 13)]


def test_a_folder_of_another_machine_and_a_node_that_is_not_full_are_said(capsys):
    assert ask("cifar10_stop", "--gpus", "12", "--gpu", "a100-40g", "data.path=/no/where", "optim.batch_size=120") == 0
    printed = capsys.readouterr().out
    assert "2 nodes of 8 (the last one of 4)" in printed
    assert "/no/where is not on this machine: the number of images is assumed" in printed
    assert "epochs of 50,000 images" in printed


def test_planning_leaves_no_fake_tensors_in_the_tables_of_relative_positions():
    """A real forward after a plan, in the same process."""
    config = load_config(*CASES["adpe"])
    activations(copy.deepcopy(config), "none", torch.float32, cuda=False)
    activations(copy.deepcopy(config), "none", torch.bfloat16)
    method = build_method(config)
    adversary = build_adversary(config, method)
    assert adversary is not None
    loss, _ = method(real_batch(config, method, 2), adversary.tensors)
    loss.backward()
    assert isinstance(method, nn.Module) and bool(loss.isfinite())


@pytest.mark.long
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_plans(recipe):
    config = any_config(recipe, [])
    found = plan(recipe, config, Place(4, "h200-141g"), scales=(), policies=())
    real = on_meta(config).parameters()
    assert found["trained"] + found["frozen"] == sum(p.numel() for p in real)
    assert found["memory"]["total"] > 4 * (found["trained"] + found["frozen"])


@pytest.mark.long
def test_check_agrees_with_fsdp_s_tracker_and_deepspeed():
    from elsewhere.launch.planning.check import check

    found = check(load_config("stop_vit_b16"), Place(8, "h200-141g"))
    theirs, ours = found["tracker"]["theirs"], found["tracker"]["ours"]
    assert ours["sharded weights"] == pytest.approx(theirs["Sharded Param"], rel=0.01)
    assert ours["moments"] == pytest.approx(theirs["OptState"], rel=0.01)
    assert ours["activations"] == pytest.approx(theirs["Activation"] + theirs["Temp"], rel=0.05)
    assert "not_run" in found["step"] or torch.cuda.is_available()
