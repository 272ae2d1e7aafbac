"""Activation checkpointing and compiled blocks: the same numbers for less memory, or in less time."""

import copy
import functools
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elsewhere.data.batch import Batch
from elsewhere.launch.build import build_adversary, build_masks, build_method
from elsewhere.launch.config import load_config
from elsewhere.launch.engine import activation_checkpointing
from elsewhere.launch.engine.activation_checkpointing import checkpoint_activations
from elsewhere.launch.engine.parallelise import parallelise
from elsewhere.models import jepa
from elsewhere.models.attention import RelativeBlock
from elsewhere.models.relative import Relative

POLICIES = ("selective", "full", 2)


class Case:
    """A tiny method with its adversary, as built from a recipe, and batches for it."""

    def __init__(self, recipe, settings):
        self.config = load_config(recipe, settings)
        self.method = build_method(self.config)
        self.masks = build_masks(self.config, self.method.encoder.grid)
        self.adversary = build_adversary(self.config, self.method)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            if self.adversary:
                for tensor in self.adversary.tensors.values():
                    tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            for name, parameter in self.method.named_parameters():
                if name.endswith("table") and parameter.requires_grad:  # zero at first, where no attack would act
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def batch(self, step=0, images=6):
        ids = np.arange(images) + step * images
        made = self.masks(self.config.seed, 0, step, ids)
        drawn = {name: getattr(made, name) for name in ("context", "targets", "visible")}
        model, views = self.config.model, self.config.data.views
        shape = (images, *((views,) if views > 1 else ()), model.channels, *model.image_size)
        return Batch(
            images=torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(step), dtype=torch.uint8),
            sample_ids=torch.from_numpy(ids), labels=torch.zeros(images, dtype=torch.int64),
            epochs=torch.zeros(images, dtype=torch.int64), step=step,
            **{name: torch.from_numpy(part) for name, part in drawn.items() if part is not None},
        )  # fmt: skip

    def loss(self, step=0):
        batch = self.batch(step)
        return (self.method(batch, self.adversary.tensors) if self.adversary else self.method(batch))[0]

    def gradients(self):
        tensors = dict(self.method.named_parameters())
        if self.adversary:
            tensors |= {f"adversary.{name}": tensor for name, tensor in self.adversary.tensors.items()}
        return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


STOP = ("demo", {"model.depth": 3, "method.predictor.depth": 2})
ADPE = ("demo_adpe", {"model.depth": 2, "method.decoder.depth": 2})
CASES = {
    "stop": STOP,
    "stop bfloat16": STOP,
    "adpe": ADPE,
    "adpe bfloat16": ADPE,
    "adpe all terms": (ADPE[0], {**ADPE[1], "model.relative.terms": "qkv"}),
    # 64 patches and a shared table: the form of the kernel that writes products into a buffer.
    "adpe dense": (ADPE[0], {**ADPE[1], "model.patch_size": 1, "method.normalise_pixels": False}),
    "adpe table per head": (
        ADPE[0],
        {**ADPE[1], "model.patch_size": 1, "method.normalise_pixels": False, "model.relative.shared": False},
    ),
}


@pytest.fixture
def make(tiny, tiny_mae):
    def build(name, **more):
        recipe, settings = CASES[name]
        case = Case(recipe, {**(tiny if recipe == "demo" else tiny_mae), **settings, **more})
        if name.endswith("bfloat16"):
            case.method.compute_dtype = torch.bfloat16
        return case

    return build


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_without_checkpointing(make, name, policy):
    plain, case = make(name), make(name)
    checkpoint_activations(case.method, policy)
    expected, found = plain.loss(), case.loss()
    expected.backward()
    found.backward()
    assert torch.equal(found, expected)
    gradients, others = case.gradients(), plain.gradients()
    assert gradients.keys() == others.keys()
    assert [key for key in gradients if not torch.equal(gradients[key], others[key])] == []


class Watched(TorchDispatchMode):
    """Counts operations, and the bytes of their results that are still held.

    Weak references see what autograd holds and what `selective` holds; saved-tensor hooks see the former alone.
    """

    def __init__(self):
        super().__init__()
        self.storages, self.counts = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def held(self):
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def step_of(case, policy):
    """The bytes held between forward and backward, and the counts of operations in each of the two."""
    checkpoint_activations(case.method, policy)
    with Watched() as forward:
        loss = case.loss()
    held = forward.held()
    with Watched() as backward:
        loss.backward()
    return held, forward.counts, backward.counts


@pytest.mark.parametrize("name", ["stop", "stop bfloat16", "adpe", "adpe bfloat16", "adpe dense"])
def test_memory_falls_with_each_policy(make, name):
    none, selective, second, full = (step_of(make(name), policy)[0] for policy in ("none", "selective", 2, "full"))
    assert full < selective < none
    assert full < second < none


def test_selective_does_not_keep_what_is_larger_than_its_factors(make):
    """Relative tables looked up for 64 patches: kept, they would take more than checkpointing saves."""
    name = "adpe table per head"
    none, selective = (step_of(make(name), policy)[0] for policy in ("none", "selective"))
    assert selective < 0.7 * none


def products(counts):
    """Projections and fused attention in either direction."""
    return {name: count for name, count in counts.items() if name in ("mm", "addmm") or "attention" in name}


@pytest.mark.parametrize("name", ["stop", "adpe", "adpe dense"])
def test_selective_repeats_no_projection_and_no_attention(make, name):
    none, selective = (step_of(make(name), policy)[2] for policy in ("none", "selective"))
    assert products(selective) == products(none)


def test_full_repeats_projections_and_attention_of_trained_blocks(make):
    """Of a block, all but the last projection, whose result the backward does not need."""
    none, full = (step_of(make("stop"), policy)[2] for policy in ("none", "full"))
    again = {name: count - none.get(name, 0) for name, count in products(full).items()}
    blocks = 3 + 2
    assert again.pop("addmm") == 3 * blocks
    assert again.pop("_scaled_dot_product_flash_attention_for_cpu") == blocks
    assert not any(again.values())


@pytest.mark.parametrize(("policy", "recomputed"), [("full", [1, 2, 3]), ("selective", [1, 2, 3]), (2, [2]), (3, [3])])
def test_which_blocks_of_a_stack_are_recomputed(make, policy, recomputed):
    method = make("stop").method
    runs = {name: [0] * len(blocks) for name, blocks in method.stacks().items()}
    for name, blocks in method.stacks().items():
        for i, block in enumerate(blocks):
            block.norm1.register_forward_pre_hook(lambda *_, n=name, i=i: runs[n].__setitem__(i, runs[n][i] + 1))
    checkpoint_activations(method, policy)
    make_loss = make("stop")
    make_loss.method = method
    make_loss.loss().backward()
    assert [i for i, count in enumerate(runs["encoder"], start=1) if count == 2] == recomputed
    assert runs["teacher"] == [1, 1, 1]


@pytest.mark.parametrize("policy", POLICIES)
def test_noise_is_drawn_once(make, monkeypatch, policy):
    draws, draw = [], jepa.position_noise
    monkeypatch.setattr(jepa, "position_noise", lambda *args, **named: draws.append(0) or draw(*args, **named))
    case = make("stop")
    checkpoint_activations(case.method, policy)
    case.loss().backward()
    assert len(draws) == 1


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_nothing_is_checkpointed_without_gradients(make, monkeypatch, policy):
    case = make("adpe")
    checkpoint_activations(case.method, policy)
    with torch.no_grad():
        before = case.loss()
        monkeypatch.delattr(activation_checkpointing, "checkpoint")
        assert torch.equal(case.loss(), before)
    with pytest.raises(NameError):
        case.loss()


def test_names_of_modules_and_weights_stay(make):
    plain, method = make("stop").method, make("stop").method
    checkpoint_activations(method, "full")
    assert [name for name, _ in method.named_modules()] == [name for name, _ in plain.named_modules()]
    assert method.state_dict().keys() == plain.state_dict().keys()


def pickled(method):
    file = io.BytesIO()
    torch.save(method, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_a_copy_computes_with_its_own_weights(make, policy, again):
    case = make("stop")
    checkpoint_activations(case.method, policy)
    before, original = case.loss().detach(), case.method
    case.method = again(original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.zero_()
    loss = case.loss()
    loss.backward()
    assert torch.equal(loss, before)
    assert all(parameter.grad is None for parameter in original.parameters())


def test_blocks_are_sharded_at_the_same_places_in_student_and_teacher_and_the_method_last(make):
    method, seen = make("stop").method, []
    parallelise(method, "none", False, seen.append)
    names = {module: name for name, module in method.named_modules()}
    sharded = [names[module] for module in seen]
    student = [name for name in sharded if name.startswith("encoder.")]
    assert student == [f"encoder.blocks.{i}" for i in range(3)]
    assert [name for name in sharded if name.startswith("teacher.")] == [
        n.replace("encoder", "teacher") for n in student
    ]
    assert sharded[-1] == "" and len(sharded) == 3 + 3 + 2 + 1


@pytest.fixture
def compiler(monkeypatch):
    """Compiles with `backend` and counts graphs from zero; torch's own settings come back."""
    from torch._dynamo import config, reset
    from torch._dynamo.utils import counters

    def use(backend):
        monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
        return counters["stats"]

    reset()
    counters.clear()
    with config.patch({}):
        kept = config.recompile_limit, config.optimize_ddp
        yield use
        config.recompile_limit, config.optimize_ddp = kept
    reset()


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["stop", "adpe"])
def test_compiled_blocks_give_the_same_loss_and_gradients(make, compiler, name, policy):
    """Traced and parted into forward and backward as for real, without the wait for generated code."""
    stats = compiler("aot_eager_decomp_partition")
    plain, case = make(name), make(name)
    parallelise(case.method, policy, True)
    expected, found = plain.loss(), case.loss()
    expected.backward()
    found.backward()
    assert stats["unique_graphs"] > 0
    assert abs(float(found.detach() - expected.detach())) <= 1e-6
    assert furthest(case.gradients(), plain.gradients()) <= 1e-5


@pytest.mark.long
def test_compiled_predictor_takes_targets_of_any_length_with_few_graphs(make, compiler):
    """Each stack gets a graph for the first length and one for all others."""
    stats = compiler("aot_eager_decomp_partition")
    masks = {"mask.setting": "published", "mask.context_keep": None, "mask.min_keep": 4}
    plain, case = make("stop", **masks), make("stop", **masks)
    parallelise(case.method, "selective", True)
    lengths, graphs = set(), []
    for step in range(8):
        batch = case.batch(step)
        lengths.add((batch.context.shape[2], batch.targets.shape[2]))
        expected, found = plain.loss(step), case.loss(step)
        expected.backward()
        found.backward()
        assert abs(float(found.detach() - expected.detach())) <= 1e-6
        graphs.append(stats["unique_graphs"])
    assert furthest(case.gradients(), plain.gradients()) <= 1e-5
    assert len(lengths) >= 4, "the test needs lengths that differ"
    assert graphs[-1] <= 2 * 4 and graphs[-1] == graphs[3]  # encoder, teacher, predictor and its last block


def test_recommended_masks_give_each_stack_one_graph_a_shape(compiler):
    """Steps 0 to 5, each twice: no more graphs the second time, none dropped for being too many."""
    stats = compiler("eager")
    sizes = {"width": 24, "depth": 2, "heads": 3}
    small = {f"{part}.{key}": value for part in ("model", "method.predictor") for key, value in sizes.items()}
    case = Case("stop_vit_b16", small)
    parallelise(case.method, "none", True, few_shapes=True)
    lengths, graphs = {}, []
    for step in (*range(6), *range(6)):
        lengths[step] = case.batch(step).targets.shape[2]
        case.loss(step).backward()
        graphs.append(stats["unique_graphs"])
    different = len(set(lengths.values()))
    assert different >= 3, "the test needs lengths that differ"
    # One of the encoder and one of the teacher, which see the same numbers of tokens; two of the predictor for each.
    assert graphs[5] == graphs[-1] == 2 + 2 * different


def test_compiled_relative_blocks_make_no_table_anew(compiler):
    """The graph of hard buckets holds no step of what finds them."""
    graphs = []

    def keep(graph, inputs):
        graphs.append([getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes])
        return graph.forward

    compiler(keep)
    for lookup in ("hard", "interpolated"):
        block = RelativeBlock(24, 2, 4.0, Relative(lookup=lookup), nn.LayerNorm)
        block.compile()
        block(torch.randn(2, 17, 24), (4, 4))
    assert len(graphs) == 2 and {"log", "round", "einsum"}.isdisjoint({*graphs[0], *graphs[1]})
