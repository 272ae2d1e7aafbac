"""The published setting of MAE+ and AdPE against the released code's recorded values and gradients (B1, B2, B6)."""

from types import SimpleNamespace

import pytest
import torch

from elsewhere.models.mae import Attack, Decoder, Mae
from elsewhere.models.positions import interpolate_table, shifted_sincos
from elsewhere.models.relative import Relative
from elsewhere.models.vit import Encoder, Size
from elsewhere.models.zoo import from_released_mae, to_released_mae

MODES = ("none", "embedding", "coordinate")


def build(config) -> Mae:
    """The published method that a recording's configuration describes."""
    mode = MODES[config["adv_type"]]
    relative = None
    if config["pe"] == "rpe":
        relative = Relative(lookup="published" if mode == "coordinate" else "hard")
    size = Size(config["embed_dim"], config["depth"], config["num_heads"])
    encoder = Encoder(
        (config["img_size"],) * 2, config["patch_size"], 3, size, depth_scaled_init=False, class_token=True,
        relative=relative,
    )  # fmt: skip
    decoder = Decoder(
        size.width, encoder.grid, Size(config["dec_dim"], config["dec_depth"], config["dec_heads"]),
        3 * config["patch_size"] ** 2, mask_token=False, relative=relative,
    )  # fmt: skip
    token = "adversary" if config["pe"] == "ape" and mode == "embedding" else "learned"
    attack = Attack(mode, where="queries", per="table")
    return Mae(encoder, decoder, mask_token=token, attack=attack, mean=(0.0,) * 3, std=(1.0,) * 3)


def load(golden) -> tuple[Mae, dict[str, torch.Tensor]]:
    method = build(golden.config)
    state, adversary = from_released_mae(golden.part("state"))
    method.load_state_dict(state)
    assert {n: t.shape for n, t in adversary.items()} == {n: t.shape for n, t in method.attack_tensors().items()}
    return method, {name: tensor.requires_grad_() for name, tensor in adversary.items()}


def visible_of(golden) -> torch.Tensor:
    noise = golden.replay("rng.mask_noise")[0]
    keep = int(noise.shape[1] * (1 - golden.config["mask_ratio"]))
    return noise.argsort(dim=1)[:, :keep].sort(dim=1).values


@pytest.mark.golden("B[12]_*")
def test_values_and_gradients(golden, close, compare_named):
    method, adversary = load(golden)
    images = golden.tensors["in.imgs"]
    predictions, masked = method.predict(images, visible_of(golden), adversary)
    close(masked.float(), golden.tensors["out.mask"], "mask")
    close(predictions, golden.tensors["out.pred"], "predictions")
    loss = method.loss(images, predictions, masked)
    close(loss.reshape(1), golden.tensors["out.loss"], "loss")
    loss.backward()
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    expected, attacked = from_released_mae(golden.part("grad"))
    compare_named(found, expected)
    for name, gradient in attacked.items():
        ours = adversary[name].grad
        assert ours is not None, f"{name} got no gradient"
        if golden.config["pe"] == "rpe" and method.attack.mode == "embedding":  # a mathematical no-op
            assert ours.abs().max() < 1e-6 and gradient.abs().max() < 1e-6, "this attack has no effect"
        else:
            close(ours, gradient, name)


@pytest.mark.golden("B[12]_*")
def test_latent(golden, close):
    method, adversary = load(golden)
    seen = []
    method.encoder.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    method.predict(golden.tensors["in.imgs"], visible_of(golden), adversary)
    close(seen[0], golden.tensors["out.latent"], "latent")


@pytest.mark.golden("B1_ape_adv0_strong")
def test_patches(golden, close):
    method, _ = load(golden)
    images = golden.tensors["in.imgs"]
    close(method.patches(images[:1]), golden.tensors["out.patchify"], "patches")
    assert torch.equal(method.images_of(method.patches(images)), images)


@pytest.mark.golden("B[12]_*")
def test_state_goes_back_to_released_names(golden):
    method, adversary = load(golden)
    released = golden.part("state")
    back = to_released_mae(method, adversary)
    assert back.keys() == released.keys()
    for name, tensor in released.items():
        assert back[name].shape == tensor.shape, name
        # Their position tables were computed in float64 and rounded; ours, too.
        assert torch.equal(back[name], tensor) or name.endswith("pos_embed"), name
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.golden("B1_ape_adv0_strong")
def test_batch_of_views_is_the_mean_over_their_rows(golden):
    method, _ = load(golden)
    images = (golden.tensors["in.imgs"].abs() * 60).to(torch.uint8)
    visible = visible_of(golden)
    flat, _ = method(SimpleNamespace(images=images, visible=visible[:, None]))
    views, _ = method(SimpleNamespace(images=images[None], visible=visible[None]))
    assert torch.equal(flat, views)


@pytest.mark.golden("B6_*")
def test_shifted_and_resized_positions(golden, close):
    for dim, side, (column, row) in golden.config["advpos"]:
        expected = golden.tensors[f"out.adv_pos.d{dim}_g{side}_s{column}_{row}"]
        close(shifted_sincos(dim, (side, side), torch.tensor([row, column])), expected, f"shift {row}, {column}")
    for old, new, _ in golden.config["resizes"]:
        table, expected = golden.tensors[f"in.pos.{old}to{new}"][0], golden.tensors[f"out.pos.{old}to{new}"][0]
        close(interpolate_table(table[1:], (old, old), (new, new)), expected[1:], f"{old} to {new}")
