"""Relative positions against the released AdPE code's recorded values and gradients (cases B3)."""

import pytest
import torch

from elsewhere.models.attention import RelativeAttention
from elsewhere.models.relative import (
    Relative,
    RelativeAttack,
    RelativeTable,
    bucket,
    bucket_ids,
    piecewise,
)

METHODS = {"euc": "euclidean", "quant": "quantised", "cross_rows": "rows", "cross_cols": "columns"}
LOOKUPS = {"irpe": "hard", "adv_embedding": "hard", "adv_coord": "published", "interpolate": "published"}
FORMS = ("gather", "dense")


def from_released_relative(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of a released table or attention layer under our names; what belongs to the adversary is left out."""
    names = (
        ("rpe_", "relative_"),
        ("rp_rows.lookup_table", "rows_table"),
        ("rp_cols.lookup_table", "columns_table"),
        ("lookup_table", "table"),
        ("table_weight", "table"),
        ("table_bias", "table"),
    )
    found = {}
    for name, tensor in state.items():
        if name.rsplit(".", 1)[-1] in ("adv_shift", "no_shift", "adv_token"):
            continue
        for released, ours in names:
            name = name.replace(released, ours)
        found[name] = tensor
    return found


def gradients(found: torch.nn.Module, attack: RelativeAttack | None) -> dict[str, torch.Tensor]:
    """Gradients under our names, those of the attack as `shift` and `embedding`."""
    named = {name: p.grad for name, p in found.named_parameters()}
    if attack is not None:
        named |= {n: t.grad for n in ("shift", "embedding") if (t := getattr(attack, n)) is not None}
    return named


def attack_of(golden, prefix: str) -> RelativeAttack | None:
    """The recorded adversary: coordinates, or an embedding on all buckets of masked query rows."""
    state = golden.part("state")
    if "in.mask" not in golden.tensors:
        return None
    masked, shift = golden.tensors["in.mask"], state.get(f"{prefix}adv_shift")
    if shift is not None:
        return RelativeAttack(masked, shift=shift.clone().requires_grad_())
    token = state[f"{prefix}adv_token"].flatten().requires_grad_()
    return RelativeAttack(masked, embedding=token, where="queries", per="table")


def expected_gradients(golden, prefix: str) -> dict[str, torch.Tensor]:
    recorded = golden.part("grad")
    expected = from_released_relative(recorded)
    for name, ours in (("adv_shift", "shift"), ("adv_token", "embedding")):
        if prefix + name in recorded:
            expected[ours] = recorded[prefix + name].flatten()
    return expected


def compare(close, found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close(found[name], tensor, name)


@pytest.mark.golden("B3_bucket_ids*")
def test_bucket_ids_are_exact(golden):
    ids = {name: tensor for name, tensor in golden.tensors.items() if name.startswith("out.ids.")}
    assert ids
    for name, expected in ids.items():
        method, ratio, size, skip = name.removeprefix("out.ids.").rsplit(".", 2)[0].split(".", 1) + name.split(".")[-2:]
        grid = (int(size.removeprefix("g")),) * 2
        found = bucket_ids(grid, int(skip[-1]), METHODS.get(method, method), float(ratio.removeprefix("r")))
        assert torch.equal(found, expected.long()), name


@pytest.mark.golden("B3_bucket_ids*")
def test_bucket_counts_are_exact(golden):
    for name, count in golden.about["info"]["num_buckets"].items():
        method, rest = name.split(".", 1)
        ratio, _, skip = rest.rsplit(".", 2)
        prefix, ratio = int(skip[-1]), float(ratio.removeprefix("r"))
        if method.startswith("cross"):
            found = RelativeTable(Relative(method="cross", ratio=ratio), "k", 1, 2, prefix).rows_table.shape[-1]
        else:
            found = Relative(method=METHODS.get(method, method), ratio=ratio).buckets(prefix)
        assert found == count, name


@pytest.mark.golden("B3_bucket_ids*")
def test_buckets_of_integers_and_fractions_are_exact(golden):
    for ratio in golden.config["ratios"]:
        whole = bucket(torch.arange(-40, 41), ratio)
        assert torch.equal(whole, golden.tensors[f"out.piecewise_int.r{ratio}"])
        fractions = bucket(golden.tensors["in.xf"], ratio)
        assert torch.equal(fractions, golden.tensors[f"out.piecewise_float_to_long.r{ratio}"])


@pytest.mark.golden("B3_bucket_ids*")
def test_piecewise_coordinates(golden, close):
    for ratio in golden.config["ratios"]:
        x = golden.tensors["in.xf"]
        close(piecewise(x, ratio), golden.tensors[f"out.piecewise_adv.r{ratio}"], "unshifted")
        close(piecewise(x + 0.3, ratio), golden.tensors[f"out.piecewise_adv_shift0.3.r{ratio}"], "shifted")
        whole = piecewise(torch.arange(-40.0, 41.0), ratio)
        close(whole, golden.tensors[f"out.piecewise_interp_int.r{ratio}"], "integers")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.golden("B3_irpe_*")
def test_tables(golden, close, form):
    run_table(golden, close, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.golden("B3_interpolate_*")
def test_interpolated_tables(golden, close, form):
    run_table(golden, close, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.golden("B3_adv*")
def test_attacked_tables(golden, close, form):
    run_table(golden, close, form)


def run_table(golden, close, form):
    config = golden.config
    relative = Relative(
        terms=config["on"],
        shared=config["shared_head"],
        method=METHODS.get(config["method"], config["method"]),
        mode=config["mode"],
        lookup=LOOKUPS[config["module"]],
        ratio=config["ratio"],
    )
    table = RelativeTable(relative, config["on"], config["heads"], config["head_dim"])
    table.form = form
    table.load_state_dict(from_released_relative(golden.part("state")))
    x, attack = golden.tensors["in.x"].requires_grad_(), attack_of(golden, "")
    grid = (config["grid"],) * 2
    out = table.values(x, grid, attack) if config["on"] == "v" else table.logits(x, grid, attack)
    close(out, golden.tensors["out.rpe"], "rpe")
    (out * golden.tensors["in.loss_weight"]).sum().backward()
    compare(close, gradients(table, attack), expected_gradients(golden, ""))
    if "grad_in.x" in golden.tensors:
        close(x.grad, golden.tensors["grad_in.x"], "x")
    else:
        assert x.grad is None, "a bias does not depend on queries or keys"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.golden("B3_attn_*")
def test_attention_layers(golden, close, form):
    config = golden.config
    attack = attack_of(golden, f"rpe_{config['on']}.")
    relative = Relative(
        terms=config["on"],
        lookup="published" if attack is not None and attack.shift is not None else "hard",
        scaled_queries=config["kind"] == "pretrain",
        **{name: config[name] for name in ("ratio", "method", "mode") if name in config},
    )
    attention = RelativeAttention(config["dim"], config["heads"], relative)
    attention.load_state_dict(from_released_relative(golden.part("state")))
    for term in relative.terms:
        getattr(attention, f"relative_{term}").form = form
    x = golden.tensors["in.x"].requires_grad_()
    out = attention(x, (config["grid"],) * 2, attack)
    close(out, golden.tensors["out.attn"], "attn")
    (out * golden.tensors["in.loss_weight"]).sum().backward()
    close(x.grad, golden.tensors["grad_in.x"], "x")
    found, expected = gradients(attention, attack), expected_gradients(golden, f"rpe_{config['on']}.")
    if "embedding" in found:
        # Softmax cancels this attack, so its gradient is rounding noise on both sides.
        for noise in (found.pop("embedding"), expected.pop("embedding")):
            assert noise.abs().max() < 1e-4 * expected["relative_k.table"].abs().max()
    compare(close, found, expected)
