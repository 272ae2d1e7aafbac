"""The published checkpoints by name: the list, the check of a local file, and weights read by that name."""

import pytest
import torch
from torch.nn import functional as F

import elsewhere
from elsewhere.launch.build import build_method
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.encoder_weights import encoder_weights
from elsewhere.launch.errors import UserError
from elsewhere.models.positions import grid_coordinates, sincos
from elsewhere.models.relative import Relative
from elsewhere.models.vit import SIZES, Encoder
from elsewhere.models.zoo_in import read_foreign
from elsewhere.models.zoo_names import ADPE, renamed, reversed_pairs
from elsewhere.models.zoo_published import PUBLISHED, differs

STAND_IN = "ijepa_vit_t16"


def shapes_of(entry):
    """The shapes of the published encoder under its own names, from our encoder of its recipe's size; no memory."""
    relative = Relative(lookup=entry.lookup) if entry.lookup else None
    with torch.device("meta"):
        encoder = Encoder(
            (entry.image_size,) * 2, entry.patch, 3, SIZES[entry.size], class_token=entry.class_token, relative=relative
        )
    return {renamed(name, reversed_pairs(ADPE)): tensor.shape for name, tensor in encoder.state_dict().items()}


def state_of(entry, only_shapes=True):
    """A state like the published one: zeros that take no memory, and its real position table."""
    size, side = SIZES[entry.size], entry.image_size // entry.patch
    zero = torch.zeros(1)
    state = {
        name: zero.expand(shape) if only_shapes else torch.randn(shape) * 0.1
        for name, shape in shapes_of(entry).items()
    }
    table = sincos(size.width, *grid_coordinates((side, side))).float()
    state["pos_embed"] = (F.pad(table, (0, 0, 1, 0)) if entry.class_token else table)[None]
    if entry.adversary:
        name = "adv_token" if entry.lookup is None else "blocks.0.attn.rpe_k.adv_token"
        if entry.lookup == "published":
            name = "blocks.0.attn.rpe_k.adv_shift"
        state[name] = torch.zeros(2)
    return state


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_entry_is_the_encoder_of_its_size(name):
    """Numbers and sizes are those of our encoder, and a state of its shapes is recognised."""
    entry = PUBLISHED[name]
    assert entry.numbers == sum(shape.numel() for shape in shapes_of(entry).values())
    called = "encoder" if entry.class_token else "target_encoder"
    found = read_foreign(state_of(entry), called)
    assert differs(entry, found) is None and not found.unread
    assert found.heads == SIZES[entry.size].heads


@pytest.mark.parametrize(
    ("name", "other", "text"),
    [
        ("stop_vit_b16", "stop_vit_l16", "it has width 1024, and stop_vit_b16 width 768"),
        ("ijepa_vit_h14", "stop_vit_h16", "it has patch 16, and ijepa_vit_h14 patch 14"),
        ("ijepa_vit_h16_448", "stop_vit_h16", "it has grid 14x14, and ijepa_vit_h16_448 grid 28x28"),
        ("mae_vit_b16", "maeplus_ape_vit_b16", "it has grid 7x7, and mae_vit_b16 grid 14x14"),
        ("maeplus_ape_vit_b16", "maeplus_rpe_vit_b16", "it has some relative positions, and .* no relative positions"),
        ("maeplus_ape_vit_b16", "adpe_ape_coord_vit_b16", "it has an adversary, and maeplus_ape_vit_b16 no adversary"),
        ("adpe_rpe_coord_vit_b16", "adpe_rpe_embed_vit_b16", "trained with lookup=hard, .* with lookup=published"),
        ("stop_vit_b16", "mae_vit_b16", "it has a class token, and stop_vit_b16 no class token"),
    ],
)
def test_another_checkpoint_is_told_apart(name, other, text):
    entry = PUBLISHED[other]
    found = read_foreign(state_of(entry), "encoder" if entry.class_token else "target_encoder")
    problem = differs(PUBLISHED[name], found)
    assert problem is not None
    with pytest.raises(ValueError, match=text):
        raise ValueError(problem)


def test_the_list_names_source_and_licence_of_each(capsys):
    assert main(["zoo"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:-1]}
    assert set(lines) == set(PUBLISHED)
    assert "343" in lines["stop_vit_b16"] and "CC-BY-NC 4.0" in lines["stop_vit_b16"]
    assert "MIT for academic use" in lines["adpe_rpe_coord_vit_l16"] and "https://" in lines["adpe_rpe_coord_vit_l16"]


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A small published checkpoint, and a file of random weights that is it."""
    from dataclasses import replace

    from elsewhere.models import zoo_published

    entry = replace(PUBLISHED["ijepa_vit_h14"], name=STAND_IN, size="tiny", patch=16, image_size=32)
    monkeypatch.setitem(zoo_published.PUBLISHED, STAND_IN, entry)
    torch.manual_seed(0)
    state = {f"module.{name}": tensor for name, tensor in state_of(entry, only_shapes=False).items()}
    torch.save({"target_encoder": state, "encoder": state, "epoch": 1}, tmp_path / "some.pth.tar")
    return tmp_path / "some.pth.tar"


def test_a_local_file_is_checked(stand_in, capsys):
    assert main(["zoo", STAND_IN, "--file", str(stand_in)]) == 0
    said = capsys.readouterr().out
    assert f"checked    {stand_in}: the encoder of {STAND_IN} by names and shapes, 148 tensors" in said
    assert "licence    CC-BY-NC 4.0" in said


def test_the_md5_is_compared_with_what_the_source_prints(tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    from elsewhere.models import zoo_published

    entry = replace(PUBLISHED["mae_vit_b16"], name="mae_vit_t16", size="tiny", image_size=32)
    monkeypatch.setitem(zoo_published.PUBLISHED, "mae_vit_t16", entry)
    torch.save({"model": state_of(entry, only_shapes=False)}, tmp_path / "mae.pth")
    assert main(["zoo", "mae_vit_t16", "--file", str(tmp_path / "mae.pth")]) == 0
    assert "the published file has 8cad7c…: it was saved anew, or damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["stop_vit_b61"], "There is no published checkpoint called stop_vit_b61; did you mean stop_vit_b16?"),
        (["stop_vit_b16", "--file", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--file", "nowhere.pth"], "--file belongs to a name: elsewhere zoo NAME --file PATH."),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, text, capsys):
    assert main(["zoo", *arguments]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1


def test_a_file_that_is_another_is_refused(stand_in, capsys):
    assert main(["zoo", "stop_vit_b16", "--file", str(stand_in)]) == 2
    assert f"{stand_in} is not stop_vit_b16: it has width 192, and stop_vit_b16 width 768." in capsys.readouterr().err


def test_weights_are_read_by_that_name(stand_in):
    weights = encoder_weights(f"zoo:{STAND_IN}={stand_in}")
    assert weights.origin is not None and weights.what == f"the target_encoder of {stand_in} ({STAND_IN})"
    encoder = elsewhere.load(f"zoo:{STAND_IN}={stand_in}")
    assert encoder.size.heads == 3 and encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 192)


@pytest.mark.parametrize(
    ("path", "text"),
    [("zoo:stop_vit_b16", "names no file; write zoo:stop_vit_b16=PATH"), ("zoo:nobody=x", "no published checkpoint")],
)
def test_an_incomplete_name_is_refused(path, text):
    with pytest.raises(UserError, match=text):
        elsewhere.load(path)


def test_a_run_starts_from_that_name(stand_in, tiny, capsys):
    settings = {"model.size": "tiny", "model.width": None, "model.depth": None, "model.heads": None,
                "model.patch_size": 16, "model.image_size": 32, "model.channels": 3, "data.mean": None,
                "data.std": None}  # fmt: skip
    method = build_method(load_config("demo", {**settings, "init.from": f"zoo:{STAND_IN}={stand_in}"}))
    from elsewhere.launch.load import start_from

    assert STAND_IN in start_from(method, f"zoo:{STAND_IN}={stand_in}")
    assert torch.equal(method.teacher.norm.weight, elsewhere.load(f"zoo:{STAND_IN}={stand_in}").norm.weight)
