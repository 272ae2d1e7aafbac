"""The published setting against the released code's recorded values and gradients (cases A1–A4)."""

import pytest
import torch

from elsewhere.models.jepa import Jepa, Predictor, Stop
from elsewhere.models.positions import grid_coordinates, sincos
from elsewhere.models.vit import Encoder, Size
from elsewhere.models.zoo import from_released, from_released_encoder, from_released_predictor


def build_encoder(config):
    size = Size(config["embed_dim"], config["depth"], config["num_heads"])
    channels = config.get("in_chans", 3)
    return Encoder((config["img_size"],) * 2, config["patch_size"], channels, size, depth_scaled_init=False)


def build_predictor(config):
    grid = (config["img_size"] // config["patch_size"],) * 2
    stop = Stop("targets" if config["apply_stop"] else "none", config["noise_var"])
    token = "projection_bias" if config["apply_stop"] else "none"
    size = Size(config["pred_dim"], config["pred_depth"], config["num_heads"])
    return Predictor(config["embed_dim"], grid, size, stop, token, depth_scaled_init=False)


def recorded_noise(golden):
    """The noise as it was drawn, std · n, which is how ours enters."""
    recorded = golden.replay("rng.noise")
    return torch.stack(recorded) if recorded else None


@pytest.mark.golden("A1_*")
def test_sincos_tables(golden, close):
    for dim, grid, cls in golden.config["cases"]:
        expected = golden.tensors[f"out.pos_d{dim}_g{grid}_cls{int(cls)}"]
        table = sincos(dim, *grid_coordinates((grid, grid)))
        if cls:
            assert not expected[0].any(), "the class token's position is zero"
            expected = expected[1:]
        close(table, expected, f"d{dim}_g{grid}")


@pytest.mark.golden("A2_*")
def test_encoder_values_and_gradients(golden, close, compare_named):
    encoder = build_encoder(golden.config)
    encoder.load_state_dict(from_released_encoder(golden.part("state")))
    images, masks = golden.tensors["in.imgs"], torch.stack(golden.replay("in.masks"))
    for last in golden.config["Ks"]:
        close(encoder(images, last=last), golden.tensors[f"out.full_K{last}"], f"full_K{last}")
        close(encoder(images, masks, last=last), golden.tensors[f"out.masked_K{last}"], f"masked_K{last}")
        single = f"out.masked_single_tensor_K{last}"
        if single in golden.tensors:
            close(encoder(images, masks[0], last=last), golden.tensors[single], single)
    (encoder(images, masks) * golden.tensors["in.loss_weight"]).sum().backward()
    found = {name: p.grad for name, p in encoder.named_parameters()}
    compare_named(found, from_released_encoder(golden.part("grad")))


@pytest.mark.golden("A3_*")
def test_predictor_values_and_gradients(golden, close, compare_named):
    predictor = build_predictor(golden.config)
    predictor.load_state_dict(from_released_predictor(golden.part("state")))
    tokens = golden.tensors["in.x_enc"].requires_grad_()
    context, targets = torch.stack(golden.replay("in.masks_x")), torch.stack(golden.replay("in.masks"))
    predictions = predictor(tokens, context, targets, recorded_noise(golden))
    close(predictions, golden.tensors["out.pred"], "pred")
    (predictions * golden.tensors["in.loss_weight"]).sum().backward()
    close(tokens.grad, golden.tensors["grad_in.x_enc"], "grad_in.x_enc")
    found = {name: p.grad for name, p in predictor.named_parameters()}
    compare_named(found, from_released_predictor(golden.part("grad")))


@pytest.mark.golden("A4_*")
def test_train_steps(golden, close, compare_named, schedules_of):
    """Forward, loss, backward, clip, AdamW, schedules and teacher, over every recorded step."""
    from elsewhere.launch.optim import clip_gradients, make_optimizer, set_step

    config, about = golden.config, golden.about["info"]
    method = Jepa(
        build_encoder(config), build_predictor(config), teacher_layers=config["target_blocks"], pairing="published"
    )
    state = {part: golden.part(f"state.{part}") for part in ("encoder", "predictor", "target_encoder")}
    method.load_state_dict(from_released(state))
    schedules = schedules_of(config["opt"])
    optimizer = make_optimizer(method, betas=(0.9, 0.999), eps=1e-8)
    blocks, noise = len(config["tgt_lens"]), recorded_noise(golden)
    images = golden.replay("in.imgs")
    for step in range(config["steps"]):
        set_step(optimizer, schedules, step)
        masks = golden.part(f"in.step{step}")
        context = torch.stack([masks[f"masks_enc.{i}"] for i in range(len(config["ctx_lens"]))])
        targets = torch.stack([masks[f"masks_pred.{i}"] for i in range(blocks)])
        drawn = noise[step * blocks : (step + 1) * blocks] if noise is not None else None
        predictions, features = method.predict(images[step], context, targets, drawn)
        if step == 0:
            close(predictions, golden.tensors["out.z_step0"], "z")
            close(features, golden.tensors["out.h_step0"], "h")
        loss = torch.nn.functional.smooth_l1_loss(predictions, features)
        close(loss, torch.tensor(about["loss"][step]), f"loss of step {step}")
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(dict(method.named_parameters()), config["clip_grad"], scope="encoder")
        if step == 0:
            found = {
                "encoder": {n: p.grad for n, p in method.encoder.named_parameters()},
                "predictor": {n: p.grad for n, p in method.predictor.named_parameters()},
            }
            compare_named(found["encoder"], from_released_encoder(golden.part("grad.encoder")))
            compare_named(found["predictor"], from_released_predictor(golden.part("grad.predictor")))
        optimizer.step()
        method.after_step(schedules.momentum_at(step))
        stage = "after1" if step == 0 else "afterN" if step + 1 == config["steps"] else None
        if stage and golden.part(f"{stage}.encoder"):
            for part in ("encoder", "target_encoder"):
                module = method.encoder if part == "encoder" else method.teacher
                compare_named(dict(module.named_parameters()), from_released_encoder(golden.part(f"{stage}.{part}")))
            predictor = from_released_predictor(golden.part(f"{stage}.predictor"))
            if predictor:
                compare_named(dict(method.predictor.named_parameters()), predictor)
