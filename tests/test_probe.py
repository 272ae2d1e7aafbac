"""`elsewhere probe` and `elsewhere evaluate`: whole commands on a small checkpoint, and what they refuse."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elsewhere.data.images import Digits, ImageFolder
from elsewhere.data.sources import open_source
from elsewhere.data.views import CentreView, Views
from elsewhere.launch.build import build_method
from elsewhere.launch.cli import main
from elsewhere.launch.config import load_config
from elsewhere.launch.evaluate.features import Reading, extract, pooled_layers
from elsewhere.launch.evaluate.precision import choose_compute, difference
from elsewhere.launch.evaluate.session import Options, open_session
from elsewhere.launch.evaluate.store import Cache, Features
from elsewhere.launch.load import load
from elsewhere.launch.pretrain import pretrain
from elsewhere.launch.weights import write_part
from elsewhere.launch.world import World
from elsewhere.models.method import Method
from elsewhere.tests.conftest import TINY  # pyright: ignore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch on the digits."""
    folder = tmp_path_factory.mktemp("probe") / "run"
    pretrain("demo", **{**TINY, "optim.batch_size": 128, "model.patch_size": 2, "mask.context_keep": 6,
                        "mask.target_scale": [0.2, 0.3], "run.dir": str(folder)})  # fmt: skip
    return folder


@pytest.fixture
def folder(tmp_path):
    """Function that makes an image folder: `{class: images}` for each of its splits."""

    def make(name="images", **splits):
        for split, classes in splits.items():
            for label, (title, count) in enumerate(classes.items()):
                place = tmp_path / name / split / title
                place.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    rng = np.random.default_rng([label, i, len(split)])
                    pixels = rng.integers(0, 80, (8, 8)) + 120 * (np.arange(8) // 3 == label)
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{title}_{i}.png")
        return tmp_path / name

    return make


@pytest.fixture
def probe(run, tmp_path, capsys):
    """Run `elsewhere probe`; returns exit status, stdout, stderr."""

    def start(*arguments, command="probe", checkpoint=None):
        status = main([
            command, str(checkpoint or run), "-o", str(tmp_path / "out"), *map(str, arguments), "loader.workers=0",
            "engine.device=cpu",
        ])  # fmt: skip
        return status, *capsys.readouterr()

    return start


@pytest.fixture
def refused(probe, tmp_path):
    """The one sentence that refuses a probe, which then leaves no result."""

    def start(*arguments, **more):
        status, _, err = probe(*arguments, **more)
        said = [line for line in err.splitlines() if line.startswith("elsewhere: ")]
        assert status == 2 and len(said) == 1 and "Traceback" not in err, err
        assert not (tmp_path / "out" / "results.json").exists()
        return said[0].removeprefix("elsewhere: ")

    return start


def entries(path):
    return json.loads((path / "results.json").read_text())["evaluations"]


def test_every_probe_beats_chance_on_digits_and_is_recorded(probe, tmp_path):
    settings = ["--shots", "5,1%", "--attentive-epochs", "30", "--attentive-rates", "1e-2", "--rates", "0.1,0.3"]
    status, out, _ = probe("--kind", "knn,low-shot,linear,attentive", *settings, "--epochs", "6", "data.path=digits")
    assert status == 0
    found = {entry["probe"]: entry for entry in entries(tmp_path / "out")}
    assert list(found) == ["knn", "low-shot", "linear", "attentive"]
    for name, entry in found.items():
        best = entry["best"][0]
        assert best["top1"] > (0.15 if name == "attentive" else 0.25), name
        assert entry["train_images"] == 1438 and entry["val_images"] == 359 and entry["classes"] == 10
        assert {"protocol", "encoder", "data", "precision", "versions", "date", "machine", "seed"} <= entry.keys()
        assert "interval" in best or {"std", "draws"} <= best.keys()
        assert f"{100 * best['top1']:.2f} %" in out
    assert len(found["linear"]["figures"]) == 8 and len(found["linear"]["best"]) == 2


def test_probe_figures_are_those_of_the_encoders_features(probe, run, tmp_path):
    """k-NN of features computed apart, image by image, by scikit-learn."""
    from sklearn.neighbors import KNeighborsClassifier

    probe("--kind", "knn", "--neighbours", "10", "data.path=digits")
    encoder = load(run)
    features, labels = [], []
    for split in ("train", "val"):
        source = open_source("digits", split, 1)
        images = torch.stack([torch.from_numpy(source.read(i).copy()).permute(2, 0, 1) for i in range(len(source))])
        with torch.inference_mode():
            features.append(encoder((images / 255 - 0.3) / 0.37).mean(dim=1).numpy())
        labels.append(np.array([source.label(i) for i in range(len(source))]))
    mean, std = features[0].mean(0), features[0].std(0)
    model = KNeighborsClassifier(10, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    model.fit((features[0] - mean) / std, labels[0])
    expected = model.score((features[1] - mean) / std, labels[1])
    assert entries(tmp_path / "out")[0]["figures"][0]["top1"] == pytest.approx(expected, abs=0.0029)


def test_results_are_merged_and_replaced_by_their_like(probe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"steps": 7}')
    for neighbours in ("10", "20", "10"):
        probe("--neighbours", neighbours, "--train-images", "200", "--val-images", "50", "data.path=digits")
    held = json.loads((tmp_path / "out" / "results.json").read_text())
    assert held["steps"] == 7
    assert [entry["protocol"]["neighbours"] for entry in held["evaluations"]] == [[20], [10]]


def test_a_run_that_ends_leaves_the_evaluations_of_its_checkpoints(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"evaluations": ["kept"]}')
    pretrain("demo", **{**tiny, "optim.batch_size": 512})
    held = json.loads((tmp_path / "run" / "results.json").read_text())
    assert held["evaluations"] == ["kept"] and held["steps"] == 2


def test_a_suite_prints_one_table_and_extracts_once(probe, tmp_path):
    status, out, err = probe("--epochs", "1", "--draws", "2", "data.path=digits", command="evaluate")
    assert status == 0
    assert [entry["probe"] for entry in entries(tmp_path / "out")] == ["knn", "low-shot", "linear"]
    assert err.count("features of train") == 1 and err.count("features of val") == 1
    assert [line.split()[0] for line in out.splitlines()[2:-1]] == ["knn", *["low-shot"] * 4, "linear"]


def test_the_best_rate_may_be_chosen_on_a_tenth_of_train(probe, tmp_path):
    probe("--kind", "linear", "--layers", "last", "--epochs", "2", "--select", "held-out", "data.path=digits")
    entry = entries(tmp_path / "out")[0]
    assert entry["best"][0]["held_out"] == max(row["held_out"] for row in entry["figures"])


def test_augmented_views_are_extracted_anew_each_epoch(probe, tmp_path):
    _, _, err = probe("--kind", "linear", "--layers", "last", "--epochs", "2", "--augment", "--train-images", "300",
                      "data.path=digits")  # fmt: skip
    assert [line.split(" of")[0] for line in err.splitlines() if line.startswith("epoch")] == ["epoch 0", "epoch 1"]
    assert "each epoch" in entries(tmp_path / "out")[0]["protocol"]["views"]


def test_a_consolidated_file_gives_the_figures_of_its_run(probe, run, tmp_path):
    file = tmp_path / "encoder.safetensors"
    write_part(run, file, "teacher", torch.float32)
    figures = []
    for checkpoint in (run, run / "checkpoints" / os.listdir(run / "checkpoints")[0], file):
        probe("data.path=digits", "--val-images", "100", checkpoint=checkpoint)
        figures.append(entries(tmp_path / "out")[-1]["figures"])
    assert figures[0] == figures[1] == figures[2]


# Features


class Threads(World):
    """A rank that is a thread: they exchange what they gather through a shared list."""

    def __init__(self, rank, barrier, slots):
        super().__init__(rank, len(slots))
        self.barrier, self.slots = barrier, slots

    def gather_host(self, value):
        self.slots[self.rank] = value
        self.barrier.wait(30)
        found = list(self.slots)
        self.barrier.wait(30)
        return found


@pytest.mark.parametrize("count", [1, 15, 16, 17, 50])
def test_ranks_find_bitwise_what_one_finds_and_read_each_image_once(run, tmp_path, count):
    method = Method(load(run), (0.3,), (0.37,))
    indices, reading, view = np.arange(0, 3 * count, 3), Reading(batch=16), CentreView((8, 8), "bilinear")
    read = []

    class Counted(Digits):
        def read(self, i):
            read.append(i)
            return super().read(i)

    def found_by(world):
        def compute(images):
            return pooled_layers(method, images, 2)

        return extract(compute, Counted("train"), indices, view, (1, 8, 8), world, reading, tmp_path, "x")[0]

    alone = found_by(World())
    assert read == indices.tolist()
    read.clear()
    barrier, slots = threading.Barrier(3), [None] * 3
    with ThreadPoolExecutor(3) as pool:
        everyone = list(pool.map(lambda rank: found_by(Threads(rank, barrier, slots)), range(3)))
    assert sorted(read) == indices.tolist()
    for found in everyone:
        assert np.array_equal(found.values, alone.values) and np.array_equal(found.labels, alone.labels)
        assert np.array_equal(found.indices, indices)


def test_layers_are_normalised_and_pooled_apart(run):
    encoder = load(run)
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    method = Method(encoder, (0.3,), (0.37,))
    with torch.no_grad():
        found = pooled_layers(method, images, 2)
        tokens = encoder.embed((images / 255 - 0.3) / 0.37)
        for layer, block in enumerate(encoder.blocks):
            tokens = block(tokens)
            assert (found[:, layer, 0] - encoder.norm(tokens).mean(dim=1)).abs().max() < 1e-5
        assert (pooled_layers(method, images, 1)[:, 0] - found[:, -1]).abs().max() < 1e-5
    features = Features(found.numpy(), np.zeros(3), np.arange(3))
    assert np.array_equal(features.pooled("last4"), np.concatenate([found[:, 0, 0], found[:, 1, 0]], axis=1))


def test_the_class_token_stands_beside_the_patches(tiny_mae):
    method = build_method(load_config("demo_adpe", tiny_mae)).eval()
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        found = Features(pooled_layers(method, images, 1).numpy(), np.zeros(3), np.arange(3))
        tokens = method.encoder(method.normalise(images))
    assert np.abs(found.pooled(pool="class") - tokens[:, 0].numpy()).max() < 1e-6
    assert np.abs(found.pooled(pool="patch") - tokens[:, 1:].mean(dim=1).numpy()).max() < 1e-6
    assert found.pooled(pool="both").shape == (3, 48)


def test_an_unreadable_image_is_left_out_and_counted_or_ends_it(run, folder, probe, refused, tmp_path):
    images = folder(train={"a": 6, "b": 6}, val={"a": 3, "b": 3})
    (images / "train" / "a" / "a_2.png").write_bytes(b"no image")
    assert "a_2.png" in refused(f"data.path={images}") and "data.on_error=skip" in refused(f"data.path={images}")
    assert probe(f"data.path={images}", "data.on_error=skip")[0] == 0
    assert entries(tmp_path / "out")[0]["unreadable"] == 1


def test_an_unreadable_image_does_not_move_those_behind_it(run, folder, tmp_path):
    images = folder(train={"a": 4, "b": 4})
    method, view, size = Method(load(run), (0.3,), (0.37,)), CentreView((8, 8), "bilinear"), (1, 8, 8)

    def found_by():
        source = ImageFolder(str(images), "train", 1)
        reading, indices = Reading(batch=8, on_error="skip"), np.arange(len(source))

        def compute(pixels):
            return pooled_layers(method, pixels, 1)

        return extract(compute, source, indices, view, size, World(), reading, tmp_path, "x")[0]

    whole = found_by()
    (images / "train" / "a" / "a_2.png").write_bytes(b"no image")
    rest = found_by()
    assert np.abs(rest.values - np.delete(whole.values, 2, axis=0)).max() < 1e-5
    assert rest.indices.tolist() == [0, 1, 3, 4, 5, 6, 7] and rest.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_views_leave_unreadable_images_out_and_keep_their_places(folder):
    images = folder(train={"a": 4, "b": 1})
    (images / "train" / "a" / "a_1.png").write_bytes(b"no image")
    views = Views(ImageFolder(str(images), "train", 1), np.array([4, 1, 0]), CentreView((8, 8), "bilinear"), 3)
    found = views[0]
    assert found.places == [0, 2] and found.labels == [1, 0] and len(found.images) == 2
    assert len(found.unreadable) == 1


def test_take_gives_rows_in_the_order_asked_for_without_missing_ones():
    features = Features(np.array([[5.0], [1.0], [9.0]]), np.array([0, 1, 2]), np.array([50, 10, 90]))
    found = features.take(np.array([90, 20, 50]))
    assert found.values[:, 0].tolist() == [9, 5] and found.indices.tolist() == [90, 50]


def test_a_cache_answers_for_the_same_weights_images_and_view_alone(run, folder, tmp_path, probe):
    images, cache = folder(train={"a": 6, "b": 6}, val={"a": 3, "b": 3}), tmp_path / "cache"

    def kept(*more):
        return probe(f"data.path={images}", "--cache", cache, *more)[2].count("as kept in")

    assert kept() == 0
    assert kept() == 2
    assert kept("data.interpolation=bicubic") == 0
    assert kept("data.mean=[0.4]") == 0
    assert kept("data.std=[0.4]") == 0
    assert kept("--which", "student") == 0
    (images / "train" / "a" / "a_0.png").unlink()
    assert kept() == 1  # val's


def test_a_cache_that_was_cut_off_is_no_cache(tmp_path):
    path = tmp_path / "features-0.npy"
    np.save(path, np.zeros((2, 3)))
    assert Cache(tmp_path).read(path) is None


# Precision


def test_half_precision_that_changes_features_is_given_up(run, monkeypatch):
    method = Method(load(run), (0.3,), (0.37,))
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    choose = "elsewhere.launch.evaluate.precision.choose_precision"
    monkeypatch.setattr(choose, lambda wanted, device: (torch.bfloat16, "as a GPU would"))
    said = choose_compute(method, "auto", torch.device("cpu"), images)
    small = difference(torch.zeros(4, 3), torch.randn(4, 3))
    assert not small.harmless
    if said.startswith("float32"):
        assert "changes the features" in said and method.compute_dtype == torch.float32
    else:
        assert "off by" in said and method.compute_dtype == torch.bfloat16
    for parameter in method.encoder.norm.parameters():  # the spread between images becomes what rounding loses
        parameter.data.zero_()
    assert choose_compute(method, "auto", torch.device("cpu"), images).startswith("float32")
    assert method.compute_dtype == torch.float32


def test_a_difference_is_of_the_spread_between_images():
    exact = 1000 + torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = float((exact - exact.mean(0)).square().mean().sqrt())
    found = difference(exact + 0.005 * spread, exact)
    assert found.error == pytest.approx(0.005) and found.agreement >= 0.98 and found.harmless
    assert not difference(exact + 0.02 * spread, exact).harmless


# What is refused


def test_a_setting_of_training_is_refused(refused):
    assert "optim.lr is a setting of training" in refused("optim.lr=1", "data.path=digits")
    assert "did you mean data.path" in refused("data.pth=digits")
    assert "not divisible by the encoder's patches of 2" in refused("model.image_size=9", "data.path=digits")


def test_classes_that_do_not_match_are_refused(refused, folder):
    train = folder("one", train={"a": 3, "b": 3}, val={"a": 2, "b": 2})
    other = folder("other", train={"a": 2, "c": 2})
    text = refused(f"data.path={train}", f"data.val_path={other}/train")
    assert "train has 2 classes and val has 2 (first c, which train lacks)" in text


def test_one_class_or_no_labels_are_refused(refused, folder):
    one = folder("one", train={"a": 3}, val={"a": 2})
    assert "of one class" in refused(f"data.path={one}")
    assert "have no label" in refused(f"data.path={one}/train/a", "data.holdout=0", f"data.val_path={one}/val")


def test_a_class_token_that_is_not_there_is_refused(refused):
    assert "needs a class token" in refused("--pool", "class", "data.path=digits")


def test_streamed_images_are_refused(refused):
    assert "is streamed" in refused("data.path=https://host/shard-{000000..000009}.tar")


def test_val_path_is_measured_on_as_a_whole(probe, folder, tmp_path):
    train, other = folder("one", train={"a": 20, "b": 20}), folder("other", test={"a": 4, "b": 5})
    probe(f"data.path={train}/train", f"data.val_path={other}/test")
    entry = entries(tmp_path / "out")[0]
    assert (entry["train_images"], entry["val_images"]) == (40, 9)
    assert entry["measured_on"].startswith("all of ")


# List files


@pytest.fixture
def listed(folder, tmp_path):
    """Function that writes a list file for images of classes a, b and c."""
    images = folder(train={"a": 5, "b": 5, "c": 5}, val={"a": 3, "b": 3, "c": 3})

    def write(text):
        (tmp_path / "list.txt").write_text(text)
        return ["--kind", "low-shot", "--list", tmp_path / "list.txt", f"data.path={images}"]

    return write


def test_a_list_file_says_which_images_are_labelled(listed, probe, tmp_path, run):
    arguments = listed("a_1.JPEG\nb/b_0.png\n\nc_4.png\n")
    status, out, _ = probe(*arguments)
    entry = entries(tmp_path / "out")[0]
    assert status == 0 and "list.txt (3 images)" in out
    assert entry["figures"][0]["images"] == 3 and "interval" in entry["figures"][0]
    from elsewhere.launch.evaluate.low_shot import read_list

    source = ImageFolder(str(arguments[4]).removeprefix("data.path="), "train", 1)
    names = [Path(source.name(i)).name for i in read_list(arguments[3], source)]
    assert names == ["a_1.png", "b_0.png", "c_4.png"]


def test_a_list_file_with_unknown_names_is_refused(listed, refused):
    text = refused(*listed("a_1.png\nz_7.png\na_99.png\n"))
    assert "2 of 3 names are not among the training images (first in line 2: z_7.png)" in text
    assert "1 of 1 names" in refused(*listed("b/a_1.png"))


def test_a_list_file_that_names_an_image_twice_or_is_missing_is_refused(listed, refused, tmp_path):
    assert "line 2: a/a_1.png is there twice" in refused(*listed("a_1.png\na/a_1.png"))
    assert "is empty" in refused(*listed("\n\n"))
    arguments = listed("")
    (tmp_path / "list.txt").unlink()
    assert "cannot be read (No such file or directory)" in refused(*arguments)
    for flag in ("--shots", "--train-images"):
        assert "leave one out" in refused(*listed("a_1.png"), flag, "5")


def test_a_name_of_two_images_is_refused(folder, refused, tmp_path):
    images = folder(train={"a": 2, "b": 2}, val={"a": 1, "b": 1})
    (images / "train" / "b" / "a_0.png").write_bytes((images / "train" / "a" / "a_0.png").read_bytes())
    (tmp_path / "list.txt").write_text("a_0.png\nb_1.png")
    text = refused("--kind", "low-shot", "--list", tmp_path / "list.txt", f"data.path={images}")
    assert "line 1: a_0.png names 2 images" in text


def test_classes_without_a_labelled_image_are_named(listed, probe, tmp_path):
    _, _, err = probe(*listed("a_1.png\nb_1.png"))
    assert "1 of 3 classes have no labelled image (first c)" in err
    assert "first c" in entries(tmp_path / "out")[0]["notes"][0]


def test_a_list_file_names_images_in_shards_as_they_were_called(folder, tmp_path):
    from elsewhere.launch.evaluate.low_shot import read_list

    images = folder(train={"a": 3, "b": 3})
    assert main(["shards", "write", str(images / "train"), str(tmp_path / "shards"), "--processes", "1"]) == 0
    source = open_source(str(tmp_path / "shards"), "train", 1, 0.0)
    (tmp_path / "list.txt").write_text("b_2.JPEG\n")
    found = read_list(tmp_path / "list.txt", source)
    assert len(found) == 1 and source.label(int(found[0])) == 1
    pixels = np.asarray(Image.open(images / "train" / "b" / "b_2.png"))
    assert np.array_equal(source.read(int(found[0]))[..., 0], pixels)


# Ranks


@pytest.mark.long
def test_two_ranks_have_the_figures_of_one(run, tmp_path):
    arguments = [
        "probe", str(run), "--kind", "knn,low-shot,linear,attentive", "--shots", "3", "--epochs", "2",
        "--attentive-epochs", "1", "data.path=digits", "engine.device=cpu", "loader.workers=1",
    ]  # fmt: skip
    figures = []
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "elsewhere.launch", *arguments, "-o", str(tmp_path / str(ranks))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
            cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        figures.append([entry["figures"] for entry in entries(tmp_path / str(ranks))])
        assert [path.name for path in (tmp_path / str(ranks)).iterdir()] == ["results.json"]
    assert figures[0] == figures[1]


def test_a_session_closes_its_world_when_it_fails(run, tmp_path):
    from elsewhere.launch.errors import UserError

    options = Options(run, ["data.path=nowhere", "engine.device=cpu"], output=tmp_path / "out")
    with pytest.raises(UserError, match="nowhere does not exist"), open_session(options):
        pass
