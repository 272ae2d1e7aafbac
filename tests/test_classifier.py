"""Fine-tuning models: equal to the released ones, number for number, with their groups of layer decay."""

import math

import pytest
import torch
from timm.layers.drop import DropPath as TimmDropPath
from torch import nn

from elsewhere.data.batch import Batch
from elsewhere.launch.optim import decays_in_finetuning, layer_of, make_optimizer, set_step
from elsewhere.models.classifier import Classifier
from elsewhere.models.drop_path import DropPath, draw_paths
from elsewhere.models.relative import Relative
from elsewhere.models.vit import Encoder, Size, transformer_blocks

LOOKUPS = {"rpe": "hard", "rpe_interpolate": "published"}


def released_classifier(config: dict) -> Classifier:
    """The classifier that a recording's configuration describes."""
    relative = None
    if config["pe"] != "ape":
        relative = Relative(lookup=LOOKUPS[config["pe"]], scaled_queries=False)
    side = config["img_size"]
    size = Size(config["embed_dim"], config["depth"], config["num_heads"])
    encoder = Encoder((side, side), config["patch_size"], 3, size, "learned", class_token=True, relative=relative)
    return Classifier(encoder, config["classes"], "mean" if config["global_pool"] else "token")


def our_name(name: str) -> str:
    name = name.replace("rpe_k.lookup_table_weight", "relative_k.table")
    return name if name.startswith(("head.", "fc_norm.")) else f"encoder.{name}"


def ours(tensors: dict) -> dict:
    """Parameters of `Classifier` by the released names; the class token's position stands apart."""
    out = {our_name(name): tensor for name, tensor in tensors.items() if name != "pos_embed"}
    first, table = tensors["pos_embed"][:, :1], tensors["pos_embed"][0, 1:]
    return {**out, "encoder.cls_position": first, "encoder.positions.table": table}


@pytest.mark.golden("B4_*")
def test_equals_the_released_finetuning_model(golden, close, compare_named):
    method = released_classifier(golden.config)
    method.load_state_dict(ours(golden.part("state")))
    pooled = []
    method.head.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    method.normalise = lambda images: images  # the recorded images are normalised
    logits = method.logits(golden.tensors["in.imgs"])
    close(pooled[0], golden.tensors["out.features"], "features")
    close(logits, golden.tensors["out.logits"], "logits")
    (logits * golden.tensors["in.loss_weight"]).sum().backward()
    compare_named({name: p.grad for name, p in method.named_parameters()}, ours(golden.part("grad")))


@pytest.mark.golden("B6_*")
def test_groups_and_rates_are_those_of_the_released_layer_decay(golden):
    for name, groups in golden.about["info"]["lrd"].items():
        config = golden.config["vits"][name]
        method, decay = released_classifier(config), config["layer_decay"]
        optimizer = make_optimizer(method, rule=decays_in_finetuning, layer_decay=decay, depth=config["depth"])
        expected = {}
        for group in groups:
            for parameter in group["params"]:
                expected[our_name(parameter)] = (group["lr_scale"], group["weight_decay"] > 0)
        expected["encoder.positions.table"] = expected["encoder.cls_position"] = expected.pop("encoder.pos_embed")
        names = {id(p): n for n, p in method.named_parameters()}
        found = {names[id(p)]: (g["lr_scale"], g["decayed"]) for g in optimizer.param_groups for p in g["params"]}
        assert found.keys() == expected.keys()
        for parameter, (scale, decayed) in expected.items():
            assert found[parameter] == (pytest.approx(scale, rel=1e-12), decayed), (name, parameter)


def test_the_rate_of_a_group_is_its_share_of_the_schedule_s(mae_schedules_of):
    method = Classifier(Encoder((8, 8), 4, 3, Size(8, 2, 2), "learned"), 3)
    optimizer = make_optimizer(method, layer_decay=0.5, depth=2)
    args = {"epochs": 2, "warmup_epochs": 0, "lr": 1.0, "min_lr": 0.0}
    set_step(optimizer, mae_schedules_of(args, 10), 0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.125, 0.25, 0.5, 1.0]


def test_what_is_no_encoder_s_counts_as_the_last_layer():
    assert [layer_of(name, 12) for name in ("head.weight", "fc_norm.bias", "pyramid.0.weight")] == [13] * 3
    assert layer_of("encoder.norm.weight", 12) == 13 and layer_of("encoder.blocks.11.norm1.bias", 12) == 12


def test_a_class_token_that_is_not_there_cannot_be_pooled():
    with pytest.raises(ValueError, match="no class token; choose pool=mean"):
        Classifier(Encoder((8, 8), 4, 3, Size(8, 1, 2)), 3, pool="token")


def batch_of(count: int, first: int = 0) -> Batch:
    ids = torch.arange(first, first + count)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(first))
    return Batch(images, ids, ids % 3, torch.zeros_like(ids), 0)


def test_dropped_paths_are_a_sample_s_own_whatever_its_neighbours():
    method = Classifier(Encoder((8, 8), 4, 3, Size(8, 4, 2), "learned", drop_path=0.5), 3)
    nn.init.normal_(method.head.weight)
    whole = batch_of(8)
    draw_paths(method.encoder.blocks, 0, whole.epochs, whole.sample_ids)
    together = method.logits(whole.images)
    draw_paths(method.encoder.blocks, 0, whole.epochs[5:], whole.sample_ids[5:])
    torch.testing.assert_close(method.logits(whole.images[5:]), together[5:])
    draw_paths(method.encoder.blocks, 0, whole.epochs + 1, whole.sample_ids)
    assert not torch.allclose(method.logits(whole.images), together)


def test_the_share_of_dropped_paths_is_the_block_s_rate():
    blocks = transformer_blocks(Size(8, 5, 2), "torch", drop_path=0.4)
    draw_paths(blocks, 0, torch.zeros(4000, dtype=torch.int64), torch.arange(4000))
    for i, block in enumerate(blocks):
        for part in (block.drop_path1, block.drop_path2):
            rate = 0.1 * i
            dropped = 0.0 if not i else float((part(torch.ones(4000, 1)) == 0).float().mean())
            assert abs(dropped - rate) < 5 * math.sqrt(0.25 / 4000)
    first, second = (part(torch.ones(4000, 1)) for part in (blocks[4].drop_path1, blocks[4].drop_path2))
    assert abs(float(((first == 0) & (second == 0)).float().mean()) - 0.16) < 0.03, "the two are independent"


def test_what_is_kept_is_enlarged_as_timm_does():
    ours_, theirs = DropPath(0.3), TimmDropPath(0.3)
    ours_.uniforms = torch.rand(1000)
    values = {float(v) for v in ours_(torch.ones(1000, 2)).unique()}
    assert values == {float(v) for v in theirs(torch.ones(1000, 2)).unique()}


def test_windows_of_a_sample_are_dropped_together():
    part = DropPath(0.5)
    part.uniforms = torch.tensor([0.1, 0.9])
    assert part(torch.ones(6, 1)).flatten().tolist() == [0.0] * 3 + [2.0] * 3


def test_nothing_is_dropped_where_accuracy_is_measured():
    method = Classifier(Encoder((8, 8), 4, 3, Size(8, 4, 2), "learned", drop_path=0.9), 3)
    images = batch_of(4).images
    torch.testing.assert_close(method.classify(images), method.eval().logits(images))
    method.train()
    method.classify(images)
    assert method.training
