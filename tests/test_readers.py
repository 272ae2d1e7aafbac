"""A run through each reader: it starts from one command, and goes on with the next sample in another shape."""

import shutil

import pytest

from elsewhere.data.ffcv_writer import write_beton
from elsewhere.data.shard_writer import WriteOptions, write_shards
from elsewhere.launch.config import load_config
from elsewhere.launch.errors import UserError
from elsewhere.launch.pretrain import pretrain


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The digits as shards and, where FFCV is installed, as a beton."""
    folder = tmp_path_factory.mktemp("written")
    write_shards("digits", folder / "shards", split="train", options=WriteOptions(samples_per_shard=150), processes=1)
    return folder


def settings_of(kind, written):
    if kind == "shards":
        return {"data.path": str(written / "shards")}
    if kind == "webdataset":
        return {"data.path": str(written / "shards"), "data.source": "webdataset", "data.streams": 4}
    pytest.importorskip("ffcv")
    beton = written / "digits.beton"
    if not beton.exists():
        write_beton("digits", str(beton), split="train", mode="raw")
    # FFCV stores RGB; its luma is the digits' grey again.
    return {"data.path": str(beton), **({"data.source": "ffcv"} if kind == "ffcv" else {})}


def train(settings, recipe="demo"):
    return pretrain(load_config(recipe, settings))


READERS = ["shards", "webdataset", "ffcv", "beton"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_a_run_goes_on_with_other_workers(kind, written, tiny, losses, tmp_path):
    settings = {**tiny, **settings_of(kind, written), "checkpoint.every_steps": 10, "checkpoint.keep": 9}
    assert train(settings).complete
    straight = losses(tmp_path / "run")
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)  # as if killed before it
    assert train({**settings, "loader.workers": 2}).complete
    assert last.exists(), "it went on from the checkpoint before"
    assert losses(tmp_path / "run") == straight, "bitwise: the same samples, crops, masks and noise"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["webdataset", "ffcv"])
def test_two_ranks_go_on_where_one_stopped(kind, written, tiny, losses, start, tmp_path):
    settings = {**tiny, **settings_of(kind, written), "checkpoint.every_steps": 10, "checkpoint.keep": 9}
    assert train(settings).complete
    straight = losses(tmp_path / "run")
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    process = start({**settings, "loader.workers": 1}, ranks=2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == pytest.approx(straight, abs=1e-5)


@pytest.mark.parametrize("kind", READERS)
def test_adpe_trains_from_every_reader(kind, written, tiny_mae, losses, tmp_path):
    result = train({**tiny_mae, **settings_of(kind, written), "data.holdout": 0.9}, "demo_adpe")
    assert result.complete
    assert len(losses(tmp_path / "run")) == result.steps > 0


def test_another_way_of_holding_the_images_is_refused(written, tiny, tmp_path):
    settings = {**tiny, **settings_of("shards", written), "checkpoint.every_steps": 10}
    train(settings)
    with pytest.raises(UserError, match="images, which come in another order or with other pixels: shards -> digits"):
        train({**settings, "data.path": "digits"})
    with pytest.raises(
        UserError, match="images, which come in another order or with other pixels: shards -> streamed shards"
    ):
        train({**settings, "data.source": "webdataset"})


def test_ffcvs_pixels_are_not_mixed_with_others(written, tiny):
    settings = {**tiny, **settings_of("beton", written), "data.source": "auto"}
    train(settings)
    with pytest.raises(UserError, match=r"with other pixels: \.beton -> \.beton by FFCV"):
        train({**settings, "data.source": "ffcv"})


def test_other_streams_are_refused(written, tiny, tmp_path):
    settings = {**tiny, **settings_of("webdataset", written), "data.streams": None}
    train(settings)  # 8 streams, of 8 shards
    fewer = f"{written}/shards/shard-{{000000..000006}}.tar"
    with pytest.raises(UserError, match=r"shards or data\.streams, and with them the order"):
        train({**settings, "data.path": fewer})


def test_other_sizes_of_several_places_are_refused(written, tiny, tmp_path):
    one, other = (f"{written}/shards/shard-{{000000..00000{last}}}.tar" for last in (2, 3))
    settings = {**tiny, "data.holdout": 0.5, "data.path": [one, other]}
    train(settings)
    with pytest.raises(UserError, match=r"images of each place in data\.path, and with them the order"):
        train({**settings, "data.path": [other, one]})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.streams": 4}, r"data\.streams belongs to data\.source=webdataset"),
        ({"data.samples": 4}, r"data\.samples belongs to data\.source=webdataset"),
        ({"data.source": "webdataset", "data.remainder": "drop"}, r"data\.remainder=drop is not for data\.source=web"),
        ({"data.source": "webdataset", "data.val_path": "digits"}, r"data\.val_path is for the probe"),
        ({"data.source": "webdataset", "data.streams": 4, "loader.workers": 3}, r"data\.streams=4 does not divide"),
        ({"data.source": "ffcv"}, r"data\.source=ffcv, but data\.path=.* is not a \.beton file"),
    ],
)
def test_settings_that_a_reader_has_no_use_for(changes, sentence, written, tiny):
    with pytest.raises(UserError, match=sentence):
        train({**tiny, "data.path": str(written / "shards"), **changes})


def test_weights_are_for_images_by_index(written, tiny):
    places = [{"path": str(written / "shards"), "weight": 2}, {"path": "digits", "weight": 1}]
    assert train({**tiny, "data.path": places, "data.holdout": 0.5}).complete
    for change, sentence in (
        ({"data.source": "webdataset"}, "leave the weights out"),
        ({"data.remainder": "drop"}, r"data\.remainder=drop is not for weights"),
    ):
        with pytest.raises(UserError, match=sentence):
            train({**tiny, "data.path": places, **change})
