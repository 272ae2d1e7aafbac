"""Relative positions: interpolated lookups, attacks, layers and blocks."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.nn import functional as F

from elsewhere.models.attention import RelativeAttention, RelativeBlock
from elsewhere.models.relative import (
    Relative,
    RelativeAttack,
    RelativeTable,
    bucket_ids,
    interpolation_weights,
    offset_ids,
    piecewise,
    spread,
)
from elsewhere.models.vit import initialise, norm_layer

FORMS = ("gather", "dense")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def masked_patches(batch, length, prefix=1, dtype=torch.float64):
    masked = (torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < 0.7).to(dtype)
    masked[:, :prefix] = 0
    return masked


def assert_same(found, expected, tolerance=1e-12):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


def with_gradients(out, inputs):
    weight = normal(*out.shape, seed=9).detach()
    return out, *torch.autograd.grad((out * weight).sum(), inputs)


def an_attention(relative, width=24, heads=3, dtype=torch.float64, std=0.3):
    attention = RelativeAttention(width, heads, relative).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(attention.parameters()):
            parameter.copy_(std * normal(*parameter.shape, seed=seed, dtype=dtype))
    return attention


@pytest.mark.parametrize("ratio", [1.9, 1.3, 2.5])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.37, -0.81), (12.6, -1.15)], ids=str)
@pytest.mark.parametrize("grid", [(7, 7), (3, 5), (14, 14)], ids=str)
def test_published_lookup_is_grid_sample(grid, shift, ratio):
    side = 2 * int(2 * ratio) + 1
    table, shift = normal(1, 6, side**2), torch.tensor(shift, dtype=torch.float64, requires_grad=True)
    axes = [piecewise(torch.arange(1.0 - size, size).double() + s, ratio) for size, s in zip(grid, shift, strict=True)]
    # The row goes first into a function whose first coordinate is x: that is the transposition.
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None] / (2 * ratio)
    sampled = F.grid_sample(table.view(1, 6, side, side), places, padding_mode="zeros", align_corners=False)
    found = spread(table, grid, 0, ratio, "published", shift)
    inputs = (table, shift)
    assert_same(with_gradients(found, inputs), with_gradients(sampled.flatten(2), inputs))


def test_published_lookup_loses_weight_far_away():
    weights = interpolation_weights(torch.arange(9.0, 14.0), 1.9, "published").sum(dim=1)
    assert [round(w, 3) for w in weights.tolist()] == [0.941, 0.852, 0.772, 0.699, 0.632]


def test_interpolated_lookup_is_the_hard_one_on_whole_buckets():
    grid, radius = (16, 17), 3
    table, offsets = normal(2, 6, 50), offset_ids(grid)
    axes = [piecewise(torch.arange(1.0 - size, size).double(), 1.9).clamp(-radius, radius) for size in grid]
    whole = (axes[0] == axes[0].round())[:, None] & (axes[1] == axes[1].round())
    whole = torch.cat([whole.flatten(), torch.ones(1, dtype=torch.bool)])[offsets]
    hard = table[:, :, bucket_ids(grid)]
    assert whole.double().mean() > 0.05, "hardly any pair compared"
    assert_same([spread(table, grid, 1, 1.9, "interpolated")[:, :, offsets][:, :, whole]], [hard[:, :, whole]])


def test_interpolated_weights_sum_to_one_at_any_shift():
    for shift in (0.0, 0.4, -2.9, 30.0):
        weights = interpolation_weights(torch.arange(-13.0, 14.0) + shift, 1.9, "interpolated")
        assert torch.allclose(weights.sum(dim=1), torch.ones(27)), shift


def test_interpolated_weights_only_move_between_buckets():
    offsets = torch.arange(-9.0, 10.0, requires_grad=True)  # at ratio 1, offset 8 is just bucket 2, the last
    (gradient,) = torch.autograd.grad(interpolation_weights(offsets, 1.0, "interpolated").sum(), offsets)
    assert gradient.abs().max() < 1e-6


def test_a_shift_by_whole_patches_looks_up_the_neighbouring_offsets():
    table, (rows, columns) = normal(1, 6, 50), (5, 6)
    plain = spread(table, (rows, columns), 0, 1.9, "interpolated").unflatten(2, (2 * rows - 1, 2 * columns - 1))
    moved = spread(table, (rows, columns), 0, 1.9, "interpolated", torch.tensor([1.0, -2.0]).double())
    moved = moved.unflatten(2, (2 * rows - 1, 2 * columns - 1))
    assert_same([moved[:, :, :-1, 2:]], [plain[:, :, 1:, :-2]])


@pytest.mark.parametrize("lookup", ["interpolated", "published"])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0, -15.2, 40.0])
def test_gradients_are_finite(lookup, shift):
    table, shift = normal(1, 6, 50), torch.full((2,), shift, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(spread(table, (14, 14), 1, 1.9, lookup, shift).sum(), (table, shift))
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lookup", ["interpolated", "published"])
def test_gradcheck_of_a_shifted_layer(lookup, form):
    attention = an_attention(Relative(terms="qkv", lookup=lookup, ratio=0.9), width=4, heads=2)
    for term in "qkv":
        getattr(attention, f"relative_{term}").form = form
    x, shift, masked = normal(1, 7, 4), torch.tensor([0.3, -0.4], dtype=torch.float64), masked_patches(1, 7)
    tables = [attention.relative_q.table, attention.relative_k.table, attention.relative_v.table]

    def layer(x, shift, *_):
        return attention(x, (2, 3), RelativeAttack(masked, shift=shift))

    assert torch.autograd.gradcheck(layer, (x, shift.requires_grad_(), *tables))


def written_out(attention, x, grid, shift, masked):
    """A shifted layer as its formula says, one table entry per pair."""
    heads, scale = attention.heads, attention.scale
    q, k, v = attention.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)

    def looked_up(term, product, tokens):
        found = []
        for moved in (None, shift):
            table = getattr(attention, f"relative_{term}").whole()
            table = spread(table, grid, 1, 1.9, attention.relative.lookup, moved)[:, :, offset_ids(grid)]
            found.append(torch.einsum(product, tokens, table.expand(heads, -1, -1, -1)))
        return torch.where(masked[:, None, :, None] == 1, found[1], found[0])

    logits = scale * q @ k.transpose(2, 3) + looked_up("k", "bhid,hdij->bhij", scale * q)
    logits = logits + looked_up("q", "bhjd,hdji->bhji", scale * k).transpose(2, 3)
    p = logits.softmax(dim=-1)
    out = p @ v + looked_up("v", "bhij,hdij->bhid", p)
    return attention.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("lookup", ["interpolated", "published"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_head"])
def test_a_shifted_layer_is_its_formula(shared, lookup):
    attention, grid = an_attention(Relative(terms="qkv", shared=shared, lookup=lookup)), (3, 5)
    x, shift, masked = normal(2, 16, 24), torch.tensor([0.4, -0.7], dtype=torch.float64), masked_patches(2, 16)
    inputs = (x, shift.requires_grad_(), *attention.parameters())
    found = attention(x, grid, RelativeAttack(masked, shift=shift))
    assert_same(with_gradients(found, inputs), with_gradients(written_out(attention, x, grid, shift, masked), inputs))


def shifted_logits(shift, masked, form=None):
    table = RelativeTable(Relative(lookup="interpolated"), "k", 2, 6).double()
    table.form = form
    with torch.no_grad():
        table.table.copy_(normal(1, 6, 50))
    attack = None if shift is None else RelativeAttack(masked, shift=torch.tensor(shift).double())
    return table.logits(normal(2, 2, 16, 6, seed=4), (3, 5), attack).detach()


def test_a_shift_moves_masked_rows_alone():
    masked = masked_patches(2, 16)
    moved = (shifted_logits((0.4, 0.7), masked) != shifted_logits(None, masked)).any(dim=-1).any(dim=1)
    assert torch.equal(moved, masked.bool())


def test_a_shift_leaves_the_prefix_column():
    masked = masked_patches(2, 16)
    assert_same([shifted_logits((0.4, 0.7), masked)[..., 0]], [shifted_logits(None, masked)[..., 0]])


def attacked_output(attention, where, per, delta, shape=(3, 5)):
    length = 1 + shape[0] * shape[1]
    attack = RelativeAttack(masked_patches(2, length), embedding=delta, where=where, per=per)
    return attention(normal(2, length, 24, seed=2), shape, attack)


def test_the_released_embedding_attack_does_nothing():
    attention, delta = an_attention(Relative()), (5 * torch.ones(8, dtype=torch.float64)).requires_grad_()
    out = attacked_output(attention, "queries", "table", delta)
    assert_same([out], [attention(normal(2, 16, 24, seed=2), (3, 5))])


def test_the_released_embedding_attack_has_no_gradient():
    attention, delta = an_attention(Relative()), normal(8)
    out = attacked_output(attention, "queries", "table", delta)
    (gradient,) = torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), delta)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("lookup", ["hard", "interpolated"])
@pytest.mark.parametrize(("where", "per"), [("keys", "table"), ("keys", "bucket"), ("queries", "bucket")])
def test_other_embedding_attacks_act(where, per, lookup):
    attention, delta = an_attention(Relative(lookup=lookup)), normal(8 * (50 if per == "bucket" else 1))
    out = attacked_output(attention, where, per, delta)
    (gradient,) = torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), delta)
    assert (out - attention(normal(2, 16, 24, seed=2), (3, 5))).abs().max() > 1e-2
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_one_embedding_for_all_buckets_is_one_per_table(shared, scaled):
    attention, groups = an_attention(Relative(terms="qk", shared=shared, scaled_queries=scaled)), 1 if shared else 3
    delta = normal(groups, 8, 1)
    per_table = attacked_output(attention, "keys", "table", delta.flatten())
    per_bucket = attacked_output(attention, "keys", "bucket", delta.expand(-1, -1, 50).flatten())
    assert_same([per_table], [per_bucket])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["output", "table", "shift"])
def test_bfloat16_autocast(form, what):
    def run(bfloat16):
        attention = an_attention(Relative(terms="qkv", lookup="interpolated"), dtype=torch.float32)
        for term in "qkv":
            getattr(attention, f"relative_{term}").form = form
        shift = torch.tensor([0.3, -0.4], requires_grad=True)
        attack = RelativeAttack(masked_patches(2, 50, dtype=torch.float32), shift=shift)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = attention(normal(2, 50, 24, seed=2, dtype=torch.float32), (7, 7), attack)
        (out.float() * normal(*out.shape, seed=9, dtype=torch.float32)).sum().backward()
        return {"output": out, "table": attention.relative_k.table.grad, "shift": shift.grad}[what]

    exact, rounded = run(False), run(True)
    assert rounded.dtype == (torch.bfloat16 if what == "output" else torch.float32)
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_tables_are_interpolated_in_float32_under_autocast():
    table = RelativeTable(Relative(lookup="interpolated"), "k", 1, 6)
    with torch.no_grad():
        table.table.copy_(normal(1, 6, 50, dtype=torch.float32))
    shift = torch.tensor([0.3, -0.4])
    attack = RelativeAttack(torch.ones(6, 16), shift=shift)
    one_hot = torch.eye(6, dtype=torch.bfloat16)[:, None, None].expand(6, 1, 16, 6)  # picks out the table's rows
    with torch.autocast("cpu", torch.bfloat16):
        found = table.logits(one_hot, (3, 5), attack)
    expected = spread(table.table, (3, 5), 1, 1.9, "interpolated", shift)[0][:, offset_ids((3, 5))].bfloat16()
    assert torch.equal(found[:, 0], expected)


def test_value_tables_are_interpolated_in_float32_under_autocast():
    table = RelativeTable(Relative(terms="v", lookup="interpolated"), "v", 1, 6)
    with torch.no_grad():
        table.table.copy_(normal(1, 50, 6, dtype=torch.float32))
    shift = torch.tensor([0.3, -0.4])
    attack = RelativeAttack(torch.ones(16, 16), shift=shift)
    one_hot = torch.eye(16, dtype=torch.bfloat16)[:, None, None].expand(16, 1, 16, 16)  # key b alone in image b
    with torch.autocast("cpu", torch.bfloat16):
        found = table.values(one_hot, (3, 5), attack)
    expected = spread(table.whole(), (3, 5), 1, 1.9, "interpolated", shift)[0][:, offset_ids((3, 5))].bfloat16()
    assert torch.equal(found[:, 0], expected.permute(2, 1, 0))


def test_layers_share_one_index():
    tables = [RelativeTable(Relative(), term, 2, 6) for term in "kk"]
    first, second = (table.index((3, 5), torch.device("cpu")) for table in tables)
    assert first is second


@pytest.mark.parametrize(("form", "grid"), [("gather", (2, 9)), ("dense", (9, 2))])
def test_what_inference_mode_caches_serves_training(form, grid):
    attention = an_attention(Relative(lookup="interpolated"))
    attention.relative_k.form = form
    with torch.inference_mode():
        attention(torch.zeros(1, 19, 24, dtype=torch.float64), grid)
    attention(normal(1, 19, 24), grid).sum().backward()
    assert attention.relative_k.table.grad is not None


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_prefix_tokens_share_the_last_bucket(prefix):
    ids = bucket_ids((3, 5), prefix)
    others = torch.ones_like(ids, dtype=torch.bool)
    others[prefix:, prefix:] = False
    assert torch.equal(ids == 49, others)


@pytest.mark.parametrize("lookup", ["hard", "interpolated"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_layers_take_any_number_of_prefix_tokens(prefix, lookup):
    attention = RelativeAttention(24, 3, Relative(terms="qkv", lookup=lookup), prefix).double()
    attention(normal(1, prefix + 6, 24), (2, 3)).sum().backward()
    assert attention.relative_v.table.shape == (1, 49 + (prefix > 0), 8)


@pytest.mark.parametrize("method", ["product", "cross", "euclidean", "quantised"])
@pytest.mark.parametrize("mode", ["contextual", "bias"])
@pytest.mark.parametrize("shared", [True, False])
def test_every_kind_of_table_gets_a_gradient(method, mode, shared):
    terms = "qk" if mode == "bias" else "qkv"
    attention = an_attention(Relative(terms=terms, shared=shared, method=method, mode=mode, ratio=1.4))
    attention(normal(2, 16, 24), (3, 5)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 1e-6 for n, p in attention.named_parameters() if "table" in n
    )


def test_a_block_with_zero_tables_is_timms_block():
    layer = norm_layer()
    ours = RelativeBlock(24, 3, 4.0, Relative(terms="qkv"), layer)
    theirs = Block(24, 3, 4.0, qkv_bias=True, norm_layer=layer)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    x = normal(2, 16, 24, dtype=torch.float32)
    assert all(name.endswith(".table") for name in missing)
    assert torch.allclose(ours(x, (3, 5)), theirs(x), atol=1e-6)


def test_initialise_scales_a_relative_blocks_residual_branches():
    blocks = torch.nn.ModuleList(RelativeBlock(64, 4, 4.0, Relative(), norm_layer()) for _ in range(2))
    initialise(blocks, blocks)
    assert blocks[1].attn.proj.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"terms": "kx"}, "choose some of q, k and v"),
        ({"terms": ""}, "choose some of q, k and v"),
        ({"method": "manhattan"}, "choose one of product"),
        ({"terms": "kv", "mode": "bias"}, "no meaning on values"),
        ({"lookup": "interpolated", "method": "cross"}, "needs method=product"),
        ({"ratio": 0.4}, "use 0.5 or more"),
    ],
    ids=str,
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Relative(**settings)


@pytest.mark.parametrize(
    ("relative", "attack", "message"),
    [
        (Relative(), {"shift": torch.zeros(2)}, "no gradient through hard buckets"),
        (Relative(terms="v"), {"embedding": torch.zeros(8)}, "add k to the terms"),
        (Relative(mode="bias"), {"embedding": torch.zeros(8)}, "add k to the terms"),
        (Relative(), {"embedding": torch.zeros(9)}, "takes 1 x 8 x 1 numbers, not 9"),
        (Relative(), {"embedding": torch.zeros(8), "where": "values"}, "choose keys or queries"),
        (Relative(lookup="published"), {"shift": torch.zeros(2), "embedding": torch.zeros(8)}, "not both"),
    ],
    ids=lambda value: "",
)
def test_attacks_without_meaning_are_refused(relative, attack, message):
    attention = an_attention(relative)
    with pytest.raises(ValueError, match=message):
        attention(normal(2, 16, 24), (3, 5), RelativeAttack(masked_patches(2, 16), **attack))


def test_a_grid_of_other_tokens_is_refused():
    with pytest.raises(ValueError, match="16 tokens are not 1 and a grid of 4 x 4"):
        an_attention(Relative())(normal(2, 16, 24), (4, 4))
