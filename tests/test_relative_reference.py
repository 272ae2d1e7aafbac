"""The relative terms of attention: two forms of one function, and what they keep for the backward."""

import pytest
import torch

from elsewhere.kernels.relative_reference import attention, choose_form, relative_bias, relative_values
from elsewhere.models.relative import Relative, RelativeAttack, RelativeTable

FORMS = ("gather", "dense")
GRIDS = ((7, 7), (8, 8), (3, 5), (14, 14))  # 50, 65, 16 and 197 tokens


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


def term_case(grid, groups, attacked, columns=11):
    """A random table, index and mask for two images and four heads."""
    length = 1 + grid[0] * grid[1]
    index = torch.randint(columns, (length, length), generator=torch.Generator().manual_seed(3))
    tables = [normal(groups, 6, columns, seed=seed) for seed in range(1 + attacked)]
    return index, tables, masked_patches(2, length) if attacked else None, length


@pytest.mark.parametrize("attacked", [False, True], ids=["plain", "attacked"])
@pytest.mark.parametrize("groups", [1, 4], ids=["shared", "per_head"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
class TestForms:
    def test_bias_and_its_gradients_agree(self, grid, groups, attacked):
        index, tables, rows, length = term_case(grid, groups, attacked)
        x = normal(2, 4, length, 6, seed=7)
        dense, gather = (
            with_gradients(relative_bias(x, tables[0], index, form, *tables[1:], rows=rows), (x, *tables))
            for form in ("dense", "gather")
        )
        assert_same(dense, gather)

    def test_values_and_their_gradients_agree(self, grid, groups, attacked):
        index, tables, rows, length = term_case(grid, groups, attacked)
        tables = [table.detach().transpose(1, 2).requires_grad_() for table in tables]
        p = normal(2, 4, length, length, seed=7)
        dense, gather = (
            with_gradients(relative_values(p, tables[0], index, form, *tables[1:], rows=rows), (p, *tables))
            for form in ("dense", "gather")
        )
        assert_same(dense, gather)


@pytest.mark.parametrize("form", FORMS)
def test_bias_is_what_it_says(form):
    index, (table, attacked), rows, length = term_case((3, 5), 4, True)
    x = normal(2, 4, length, 6)
    plain, other = (torch.einsum("bhid,hdij->bhij", x, t[:, :, index]) for t in (table, attacked))
    expected = torch.where(rows[:, None, :, None] == 1, other, plain)
    assert_same([relative_bias(x, table, index, form, attacked, rows)], [expected])


@pytest.mark.parametrize("form", FORMS)
def test_values_are_what_they_say(form):
    index, tables, rows, length = term_case((3, 5), 4, True)
    table, attacked = (t.transpose(1, 2) for t in tables)
    p = normal(2, 4, length, length)
    plain, other = (torch.einsum("bhij,hijd->bhid", p, t[:, index]) for t in (table, attacked))
    expected = torch.where(rows[:, None, :, None] == 1, other, plain)
    assert_same([relative_values(p, table, index, form, attacked, rows)], [expected])


def test_positions_in_one_chunk_or_many_give_the_same(monkeypatch):
    index, tables, rows, length = term_case((7, 7), 1, True)
    x = normal(2, 4, length, 6)
    found = []
    for numbers in (1, 1 << 30):
        monkeypatch.setitem(relative_bias.__globals__, "_CPU_CHUNK", numbers)
        found.append(with_gradients(relative_bias(x, tables[0], index, "dense", tables[1], rows), (x, *tables)))
    assert_same(*found)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="gather, dense"):
        relative_bias(normal(1, 1, 2, 3), normal(1, 3, 4), torch.zeros(2, 2, dtype=torch.int64), "sparse")


@pytest.mark.parametrize(
    ("columns", "groups", "form"), [(50, 1, "gather"), (730, 1, "dense"), (730, 12, "gather")], ids=str
)
def test_form_chosen_at_197_tokens(columns, groups, form):
    assert choose_form(torch.device("cpu"), 197, columns, groups) == form


@pytest.mark.parametrize("value_term", [None, torch.zeros_like], ids=["plain", "values"])
def test_attention_takes_its_scale(value_term):
    q, k, v = (normal(1, 2, 5, 6, seed=seed) for seed in range(3))
    bias = normal(1, 2, 5, 5, seed=3)
    expected = (0.3 * q @ k.transpose(2, 3) + bias).softmax(dim=-1) @ v
    term = None if value_term is None else lambda p: value_term(v)
    assert_same([attention(q, k, v, 0.3, bias, term)], [expected])


def large_tensors_kept(forward, at_least):
    """Storages that autograd keeps with at least so many numbers, and all kept dtypes of that size."""
    storages, dtypes = set(), set()

    def note(tensor):
        if tensor.numel() >= at_least:
            storages.add(tensor.untyped_storage().data_ptr())
            dtypes.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward()
    return len(storages), dtypes, out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lookup", ["hard", "interpolated"])
@pytest.mark.parametrize("terms", ["k", "qk"])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14)], ids=str)
def test_only_bias_and_probabilities_are_kept(grid, terms, lookup, form):
    relative, length = Relative(terms=terms, lookup=lookup), 1 + grid[0] * grid[1]
    tables = {term: RelativeTable(relative, term, 4, 8) for term in terms}
    q, k, v = (normal(2, 4, length, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    shift = None if lookup == "hard" else torch.tensor([0.3, -0.2], requires_grad=True)
    attack = RelativeAttack(masked_patches(2, length, dtype=torch.float32), shift=shift)
    for table in tables.values():
        table.form = form

    def forward():
        bias = tables["k"].logits(q, grid, attack)
        if "q" in tables:
            bias = bias + tables["q"].logits(k, grid, attack).transpose(-2, -1)
        return attention(q, k, v, 0.3, bias)

    kept, dtypes, out = large_tensors_kept(forward, 2 * 4 * length * length)
    assert out.requires_grad
    assert kept <= 2
    assert all(dtype.is_floating_point for dtype in dtypes)


@pytest.mark.parametrize("lookup", ["hard", "interpolated"])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14)], ids=str)
def test_a_value_term_keeps_no_more(grid, lookup):
    table, length = RelativeTable(Relative(terms="v", lookup=lookup), "v", 4, 8), 1 + grid[0] * grid[1]
    q, k, v = (normal(2, 4, length, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    bias = normal(2, 4, length, length, dtype=torch.float32)
    shift = None if lookup == "hard" else torch.tensor([0.3, -0.2], requires_grad=True)
    attack = RelativeAttack(masked_patches(2, length, dtype=torch.float32), shift=shift)
    kept, dtypes, _ = large_tensors_kept(
        lambda: attention(q, k, v, 0.3, bias, lambda p: table.values(p, grid, attack)),
        2 * 4 * length * length,
    )
    assert kept <= 2
    assert all(dtype.is_floating_point for dtype in dtypes)


@pytest.mark.parametrize("form", FORMS)
def test_table_gradients_add_up_in_float32(form):
    ones, table = torch.ones(1, 1, 300, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, requires_grad=True)
    relative_bias(ones, table, torch.zeros(300, 300, dtype=torch.int64), form).sum(dtype=torch.float32).backward()
    assert table.grad.item() == pytest.approx(300 * 300, rel=0.01)  # a sum in bfloat16 would stop at 256


@pytest.mark.parametrize("form", FORMS)
def test_values_add_up_in_float32(form):
    ones, table = torch.ones(1, 1, 300, 300, dtype=torch.bfloat16), torch.ones(1, 1, 1)
    out = relative_values(ones, table, torch.zeros(300, 300, dtype=torch.int64), form)
    assert (out == 300).all()
