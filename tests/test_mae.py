"""Masked autoencoders and their adversaries: what is seen, what is lost, and whom an attack helps."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from elsewhere.models.adversary import Adversary
from elsewhere.models.mae import Attack, Decoder, Mae
from elsewhere.models.relative import Relative
from elsewhere.models.vit import SIZES, Encoder, Size

SIZE, NARROW = Size(24, 2, 3), Size(16, 1, 2)


def make(attack=None, relative=None, mask_token="learned", visible_only=False, image=12, patch=3, **options) -> Mae:
    torch.manual_seed(0)
    encoder = Encoder(
        (image, image), patch, 3, SIZE, class_token=True, relative=relative, init_std=None, depth_scaled_init=False
    )
    decoder = Decoder(
        24, encoder.grid, NARROW, 3 * patch**2, visible_only, relative=relative, init_std=None, depth_scaled_init=False
    )
    method = Mae(encoder, decoder, attack=attack, mask_token=mask_token, visible_only=visible_only, **options)
    for name, parameter in method.named_parameters():
        if name.endswith("table"):  # zero at first, where no attack on relative positions could act
            torch.nn.init.normal_(parameter)
    return method


def some_images(count=6, size=12):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def some_visible(count=6, patches=16, keep=4):
    noise = torch.rand(count, patches, generator=torch.Generator().manual_seed(2))
    return noise.argsort(dim=1)[:, :keep].sort(dim=1).values


def loss_of(method, images, visible, adversary=None):
    return method.loss(images, *method.predict(images, visible, adversary))


ATTACKS = {
    "absolute embedding": (Attack("embedding"), None),
    "absolute coordinate": (Attack("coordinate"), None),
    "relative coordinate": (Attack("coordinate"), Relative(lookup="interpolated")),
    "relative coordinate, as released": (Attack("coordinate"), Relative(lookup="published")),
    "relative embedding on keys": (Attack("embedding", "keys", "table"), Relative()),
    "relative embedding on keys per bucket": (Attack("embedding", "keys", "bucket"), Relative()),
    "relative embedding on queries per bucket": (Attack("embedding", "queries", "bucket"), Relative()),
    "relative embedding per head": (Attack("embedding", "keys", "table"), Relative(shared=False)),
    "relative coordinate in all terms": (Attack("coordinate"), Relative(terms="qkv", lookup="interpolated")),
}


def climb(method, adversary, images, visible, steps=20, lr=0.05):
    for _ in range(steps):
        loss_of(method, images, visible, adversary.tensors).backward()
        adversary.step(lr)
        adversary.zero_grad()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_raises_the_loss_within_its_bound(name):
    attack, relative = ATTACKS[name]
    method, images, visible = make(attack, relative), some_images(), some_visible()
    adversary = Adversary(method.attack_tensors(), norm="l2", epsilon=1.0)
    before = loss_of(method, images, visible)
    assert torch.equal(before, loss_of(method, images, visible, adversary.tensors)), "zero is no attack"
    climb(method, adversary, images, visible)
    after = loss_of(method, images, visible, adversary.tensors)
    assert after > before + 1e-3, f"{float(before):.4f} -> {float(after):.4f}"
    for tensor in adversary.tensors.values():
        assert tensor.flatten(1).norm(dim=1).max() <= 1 + 1e-6


def test_the_released_relative_embedding_attack_is_a_no_op():
    method = make(Attack("embedding", "queries", "table"), Relative()).double()
    images, visible = some_images().double(), some_visible()
    tensors = {n: t.double().normal_().mul_(5).requires_grad_() for n, t in method.attack_tensors().items()}
    attacked, _ = method.predict(images, visible, tensors)
    free, masked = method.predict(images, visible)
    assert (attacked - free).abs().max() < 1e-12, "softmax cancels it"
    method.loss(images, attacked, masked).backward()
    assert max(float(t.grad.abs().max()) for t in tensors.values() if t.grad is not None) < 1e-14


def test_mask_token_and_delta_both_move_and_delta_raises_the_loss():
    method, images, visible = make(Attack("embedding")), some_images(), some_visible()
    adversary = Adversary(method.attack_tensors(), norm="l2", epsilon=0.5)
    assert adversary.tensors["positions"].shape == (16, 24)
    assert method.mask_token is not None
    first = method.mask_token.detach().clone()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    for _ in range(30):
        loss_of(method, images, visible, adversary.tensors).backward()
        optimizer.step()
        adversary.step(1e-2)
        optimizer.zero_grad()
        adversary.zero_grad()
    assert (method.mask_token - first).norm() > 1e-2
    moved = adversary.tensors["positions"].detach()
    assert moved.norm(dim=1).min() > 0.1
    # Not one vector for all patches, which the mask token could simply take back.
    assert (moved - moved.mean(dim=0)).norm() > 0.5 * moved.norm()
    assert loss_of(method, images, visible, adversary.tensors) > loss_of(method, images, visible) + 1e-4


@pytest.mark.parametrize("visible_only", [True, False])
def test_masked_pixels_are_not_seen(visible_only):
    method, images, visible = make(visible_only=visible_only), some_images(), some_visible()
    predictions, masked = method.predict(images, visible)
    patches = method.patches(images)
    other = method.images_of(torch.where(masked[..., None], torch.randn_like(patches), patches))
    assert not torch.equal(other, images)
    torch.testing.assert_close(method.predict(other, visible)[0], predictions)


@pytest.mark.parametrize("visible_only", [True, False])
def test_visible_pixels_are_seen(visible_only):
    method, images, visible = make(visible_only=visible_only), some_images(), some_visible()
    predictions, masked = method.predict(images, visible)
    patches = method.patches(images)
    other = method.images_of(torch.where(masked[..., None], patches, -patches))
    assert (method.predict(other, visible)[0] - predictions).abs().max() > 1e-3


def test_loss_counts_masked_patches_alone():
    method, images, visible = make(), some_images(), some_visible()
    predictions, masked = method.predict(images, visible)
    wrong = torch.where(masked[..., None], predictions, predictions + 100)
    assert torch.equal(method.loss(images, wrong, masked), method.loss(images, predictions, masked))


def test_true_patches_have_no_loss_and_reconstruct_the_image():
    method, images, visible = make(), some_images(), some_visible()
    _, masked = method.predict(images, visible)
    truth = method.targets(images)[0]
    assert method.loss(images, truth, masked) == 0
    torch.testing.assert_close(method.reconstruct(images, truth), images, rtol=0, atol=1e-5)


def test_denormalise_undoes_normalise():
    method = make(mean=(0.2, 0.4, 0.6), std=(0.3, 0.2, 0.1))
    raw = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    torch.testing.assert_close(255 * method.denormalise(method.normalise(raw)), raw.float(), rtol=0, atol=1e-3)


def second_implementation(method: Mae) -> ViTMAEForPreTraining:
    """The MAE of the transformers library with the weights of `method`."""
    encoder, decoder = method.encoder, method.decoder
    config = ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=12, patch_size=3,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, mask_ratio=0.75, norm_pix_loss=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config)

    def put(module, weight, bias):
        module.load_state_dict({"weight": weight, "bias": bias})

    def put_block(layer, block):
        # By order, since the library's names differ between its versions.
        query, key, value, *linears = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
        norms = [part for part in layer.modules() if isinstance(part, torch.nn.LayerNorm)]
        qkv = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        for part, (weight, bias) in zip((query, key, value), qkv, strict=True):
            put(part, weight, bias)
        ours = (block.attn.proj, block.mlp.fc1, block.mlp.fc2, block.norm1, block.norm2)
        for part, module in zip((*linears, *norms), ours, strict=True):
            put(part, module.weight, module.bias)

    layers = theirs.vit.layers if hasattr(theirs.vit, "layers") else theirs.vit.encoder.layer
    for layer, block in zip((*layers, *theirs.decoder.decoder_layers), (*encoder.blocks, *decoder.blocks), strict=True):
        put_block(layer, block)
    for part, module in (
        (theirs.vit.embeddings.patch_embeddings.projection, encoder.patch_embed.proj),
        (theirs.vit.layernorm, encoder.norm),
        (theirs.decoder.decoder_embed, decoder.embed),
        (theirs.decoder.decoder_norm, decoder.norm),
        (theirs.decoder.decoder_pred, decoder.proj),
    ):
        put(part, module.weight, module.bias)
    theirs.vit.embeddings.cls_token.data.copy_(encoder.cls_token)
    theirs.vit.embeddings.position_embeddings.data[0, 1:] = encoder.positions()  # some versions leave them at zero
    theirs.decoder.decoder_pos_embed.data[0, 1:] = decoder.positions()
    theirs.decoder.mask_token.data.copy_(decoder.mask_token)
    return theirs.eval()


def test_mae_equals_a_second_implementation():
    method, images, visible = make(visible_only=True), some_images(), some_visible()
    theirs = second_implementation(method)
    noise = torch.ones(6, 16).scatter_(1, visible, torch.linspace(0, 0.5, 4).expand(6, -1))  # keeps `visible`, in order
    out = theirs(images, noise=noise)
    predictions, masked = method.predict(images, visible)
    torch.testing.assert_close(masked.float(), out.mask)
    torch.testing.assert_close(predictions, out.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(method.loss(images, predictions, masked), out.loss, rtol=1e-5, atol=1e-5)


def test_forward_in_bfloat16_leaves_weights_and_adversary_float32():
    method = make(Attack("embedding"), Relative())
    method.compute_dtype = torch.bfloat16
    adversary = Adversary(method.attack_tensors(), norm="l2", epsilon=1.0)
    raw = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    batch = SimpleNamespace(images=raw, visible=some_visible()[:, None])
    loss, _ = method(batch, adversary.tensors)
    loss.backward()
    method.compute_dtype = torch.float32
    exact, _ = method(batch, adversary.tensors)
    assert loss.dtype == torch.float32 and loss != exact
    assert (loss - exact).abs() < 0.03 * exact
    gradients = [p.grad for p in (*method.parameters(), *adversary.tensors.values())]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize(
    ("size", "patch", "heads", "gigaflops"), [("base", 16, 12, 135), ("large", 16, 16, 398), ("huge", 14, 16, 1033)]
)
def test_flops_of_four_crops(size, patch, heads, gigaflops):
    with torch.device("meta"):
        encoder = Encoder((112, 112), patch, 3, SIZES[size], class_token=True)
        decoder = Decoder(encoder.size.width, encoder.grid, Size(512, 8, 16), 3 * patch**2, False)
        method = Mae(encoder, decoder)
    assert math.isclose(method.flops_per_image(4, 12) / 1e9, gigaflops, rel_tol=0.02)
