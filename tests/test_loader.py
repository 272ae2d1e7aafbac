import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from elsewhere.data.augment import Augment
from elsewhere.data.decode import UnreadableImage
from elsewhere.data.images import DataError, Digits, ImageFolder
from elsewhere.data.loader import Batches, Loader, batches, replacements
from elsewhere.data.masks import ContextAndTargets
from elsewhere.data.order import Permutations, Plan, Request, Requests, check_batch_sizes, epoch_length, permutation
from elsewhere.data.random_masks import RandomMasks
from elsewhere.data.streams import uniforms

AUGMENT = Augment(size=(8, 8), colour_jitter=0.5)
VIEWS = {"augment": Augment(size=(8, 8), colour_jitter=0.5, views=2), "masks": RandomMasks((4, 4), 0.75, views=2)}


def masks(seed, epoch, step, sample_ids):
    drawn = (uniforms(seed, "mask", epoch, sample_ids, 3 + step % 2) * 16).astype(np.int64)
    return ContextAndTargets(context=drawn[None], targets=np.stack([drawn, drawn]), redraws=int(drawn.sum() % 7))


class Numbered:
    """100 images of their own number; those in `bad` cannot be read."""

    channels = 5
    classes = None

    def __init__(self, bad=(), n=100):
        self.bad, self.n = set(bad), n

    def __len__(self):
        return self.n

    def read(self, i):
        if i in self.bad:
            raise UnreadableImage(self.name(i), "cut off")
        return np.full((6, 9, 5), i, dtype=np.uint8)

    def label(self, i):
        return i

    def name(self, i):
        return f"numbered[{i}]"


def loader(source=None, augment=AUGMENT, masks=masks, **changes):
    plan = Plan(**{"seed": 3, "global_batch": 24, "micro_batch": 6, "stop_step": 7, **changes})
    source = Numbered() if source is None else source
    return Loader(source, augment, masks, Permutations(len(source), plan.seed), plan)


def requests(**changes):
    """The requests for 100 samples, of which an epoch takes four batches of 24."""
    plan = {"seed": 3, "global_batch": 24, "micro_batch": 6, "stop_step": 9, **changes}
    return Requests(Permutations(100, 3, epoch_length(100, 24, "drop")), Plan(**plan))


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


def test_order_is_a_permutation_of_seed_and_epoch():
    assert sorted(permutation(0, 0, 50)) == list(range(50))
    assert np.array_equal(permutation(4, 2, 50), permutation(4, 2, 50))
    assert not np.array_equal(permutation(4, 2, 50), permutation(4, 3, 50))
    assert not np.array_equal(permutation(4, 2, 50), permutation(5, 2, 50))


def test_requests_follow_the_order_across_epochs():
    found = list(requests())
    assert len(found) == 36
    assert [r.step for r in found] == [step for step in range(9) for _ in range(4)]
    assert [r.micro for r in found] == [0, 1, 2, 3] * 9
    assert [set(r.epochs.tolist()) for r in found] == [{0}] * 16 + [{1}] * 16 + [{2}] * 4
    for epoch in (0, 1):
        ids = np.concatenate([r.ids for r in found if r.epochs[0] == epoch])
        assert np.array_equal(ids, permutation(3, epoch, 100)[:96])


def test_ranks_together_see_the_global_batch_of_one():
    one = list(requests(micro_batch=24))
    ranks = [requests(micro_batch=4, rank=r, world=3) for r in range(3)]
    listed = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(rank) for rank in listed] == [18] * 3
    for step, whole in enumerate(one):
        parts = [r.ids for rank in listed for r in rank if r.step == step]
        assert np.array_equal(np.concatenate(parts), whole.ids)


def test_images_and_masks_of_ranks_are_those_of_one():
    whole = list(loader(micro_batch=24))
    parts = [list(loader(micro_batch=6, rank=r, world=2)) for r in range(2)]
    for step, batch in enumerate(whole):
        mine = [b for rank in parts for b in rank if b.step == step]
        assert torch.equal(torch.cat([b.images for b in mine]), batch.images)
        assert torch.equal(torch.cat([b.context for b in mine], dim=1), batch.context)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(workers):
    assert_equal(list(loader(Numbered(bad=[5, 17]))), list(loader(Numbered(bad=[5, 17]), workers=workers)))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_views(workers):
    assert_equal(list(loader(**VIEWS)), list(loader(**VIEWS, workers=workers)))


def test_views_and_visible_patches_of_ranks_are_those_of_one():
    for whole, *halves in zip(
        loader(**VIEWS, micro_batch=24),
        loader(**VIEWS, micro_batch=12, rank=0, world=2),
        loader(**VIEWS, micro_batch=12, rank=1, world=2),
        strict=True,
    ):
        assert torch.equal(torch.cat([half.images for half in halves]), whole.images)
        assert torch.equal(torch.cat([half.visible for half in halves]), whole.visible)


def test_a_batch_of_views_counts_images():
    batch = next(iter(loader(**VIEWS)))
    assert len(batch) == 6
    assert batch.images.shape == (6, 2, 5, 8, 8)


def test_visible_patches_are_those_of_the_samples():
    batch = next(iter(loader(**VIEWS, start_step=5)))
    expected = VIEWS["masks"](3, 1, 5, batch.sample_ids.numpy())
    assert np.array_equal(batch.visible.numpy(), expected.visible)
    assert batch.context is None
    assert batch.targets is None


class Counting(Numbered):
    """Writes down every image that is read."""

    def __init__(self):
        super().__init__()
        self.read_ids = []

    def read(self, i):
        self.read_ids.append(i)
        return super().read(i)


def test_an_image_is_decoded_once_for_all_its_views():
    source = Counting()
    batch = next(iter(loader(source, **VIEWS)))
    assert source.read_ids == batch.sample_ids.tolist()


@pytest.mark.parametrize("start", [2, 5])
def test_a_later_start_gives_the_rest_of_the_same_run(start):
    late = list(loader(start_step=start))
    assert_equal([batch for batch in loader() if batch.step >= start], late)
    assert len(loader(start_step=start)) == len(late) == (7 - start) * 4


def test_views_change_with_epoch_and_seed_only():
    source = Digits("train")
    first = next(iter(loader(source, global_batch=6)))
    batches = Batches(source, AUGMENT, masks, seed=3)
    again = batches[Request(np.zeros(6, np.int64), 99, 1, first.sample_ids.numpy())]
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.labels, torch.tensor([source.label(int(i)) for i in first.sample_ids]))
    later = batches[Request(np.ones(6, np.int64), 0, 0, first.sample_ids.numpy())]
    assert not torch.equal(later.images, first.images)
    other = Batches(source, AUGMENT, masks, seed=4)[Request(np.zeros(6, np.int64), 0, 0, first.sample_ids.numpy())]
    assert not torch.equal(other.images, first.images)


def test_a_batch_holds_what_the_step_needs():
    batch = next(iter(loader(start_step=5)))
    assert batch.images.shape == (6, 5, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert (batch.epochs.tolist(), batch.step) == ([1] * 6, 5)
    expected = masks(3, 1, 5, batch.sample_ids.numpy())
    assert np.array_equal(batch.context.numpy(), expected.context)
    assert np.array_equal(batch.targets.numpy(), expected.targets)
    assert batch.redraws == expected.redraws
    bare = next(iter(loader(masks=None)))
    assert bare.context is None
    assert bare.targets is None


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(stop_step=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unreadable_image_is_replaced_and_named():
    first, second = replacements(3, 2, 7, 100)[:2]
    bad = [7, int(first)]
    batch = Batches(Numbered(bad=bad), AUGMENT, masks, seed=3)[Request(np.full(2, 2), 0, 0, np.array([7, 1]))]
    assert batch.sample_ids.tolist() == [second, 1]
    assert batch.labels.tolist() == [second, 1]
    assert batch.skipped == ["numbered[7]: cut off", f"numbered[{first}]: cut off"]
    clean = Batches(Numbered(), AUGMENT, masks, seed=3)[Request(np.full(2, 2), 0, 0, np.array([second, 1]))]
    assert torch.equal(batch.images, clean.images)
    assert torch.equal(batch.context, clean.context)


def test_a_replacement_depends_on_what_was_wanted_alone():
    assert np.array_equal(replacements(3, 2, 7, 100), replacements(3, 2, 7, 100))
    drawn = [replacements(*name, 1000) for name in ((3, 2, 7), (4, 2, 7), (3, 1, 7), (3, 2, 8))]
    assert len({tuple(one) for one in drawn}) == 4
    assert all(one.min() >= 0 and one.max() < 1000 for one in drawn)


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_ends_with_one_sentence(workers):
    with pytest.raises(DataError) as caught:
        list(loader(Numbered(bad=[7]), on_error="stop", workers=workers))
    assert str(caught.value) == (
        "An image cannot be read (numbered[7]: cut off): repair or remove it, or set data.on_error=skip."
    )
    assert caught.value.__cause__ is None


class Breaking:
    """A loader whose next batch is an error; `workers` says how many processes it has."""

    def __init__(self, error, workers):
        self.error, self.num_workers = error, workers

    def __iter__(self):
        raise self.error
        yield


CUT_OFF = [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "No such file")]


@pytest.mark.parametrize("error", CUT_OFF, ids=lambda error: type(error).__name__)
def test_a_worker_that_dies_while_it_hands_over_is_named(error):
    with pytest.raises(DataError, match=r"^A loader worker died \(.+\); often memory"):
        next(batches(Breaking(error, 2)))


@pytest.mark.parametrize(
    ("error", "workers"),
    [(FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), 2), (EOFError(), 0)],
    ids=["in a worker", "without workers"],
)
def test_an_error_of_reading_stays_what_it_is(error, workers):
    with pytest.raises(type(error)) as found:
        next(batches(Breaking(error, workers)))
    assert found.value is error


def test_skip_gives_up_when_nothing_reads():
    with pytest.raises(DataError, match="100 images in a row cannot be read"):
        next(iter(loader(Numbered(bad=range(300), n=300))))


def test_skip_reads_a_broken_file_of_a_folder(tmp_path):
    for i in range(8):
        Image.new("RGB", (10, 12), (i, i, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:30])
    batch = next(iter(loader(ImageFolder(str(tmp_path)), global_batch=8, micro_batch=8)))
    assert 3 not in batch.sample_ids.tolist()
    assert len(batch) == 8
    assert len(batch.skipped) == 1
    assert batch.skipped[0].startswith(str(tmp_path / "3.png") + ": ")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"global_batch": 25}, "optim.batch_size to 24 or 30, or loader.micro_batch to 1 or 5"),
        ({"global_batch": 20, "world": 3}, "optim.batch_size to 18 or 36"),
        ({"micro_batch": 0}, "loader.micro_batch=0"),
        ({"on_error": "ignore"}, "choose skip or stop"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(changes, sentence):
    with pytest.raises(DataError, match=sentence):
        loader(**changes)


def test_a_batch_that_ranks_cannot_share_says_nothing_of_micro_batches():
    with pytest.raises(DataError, match=r"^optim.batch_size=20 does not divide among 3 ranks: .* to 18 or 21\.$"):
        check_batch_sizes(100, 20, None, 3)


def test_a_batch_larger_than_the_data_names_one_that_fits():
    with pytest.raises(DataError, match=r"has 100 images.*optim.batch_size to 96 or less"):
        check_batch_sizes(100, 128, 32, 1)


class Killed(Numbered):
    def read(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_sentence_within_seconds():
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"worker died.*loader\.workers"):
        list(loader(Killed(), workers=1))
    assert time.monotonic() - begin < 30, "a guard against waiting for ever, not a measurement"


class Signalled(Numbered):
    def read(self, i):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return super().read(i)


def test_workers_outlive_the_signals_that_end_a_run():
    assert len(list(loader(Signalled(), workers=1, stop_step=2))) == 8


def test_an_exception_in_the_loop_leaves_no_worker_to_wait_for():
    code = """if True:
        from elsewhere.data.augment import Augment
        from elsewhere.data.images import Digits
        from elsewhere.data.loader import Loader
        from elsewhere.data.order import Permutations, Plan
        plan = Plan(seed=0, global_batch=8, micro_batch=8, workers=2, stop_step=10**6)
        batches = iter(Loader(Digits(), Augment(size=8), None, Permutations(100, 0), plan))
        next(batches)
        raise RuntimeError("in the loop")
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 1
    assert out.stderr.strip().endswith("RuntimeError: in the loop")


class Wrong(Numbered):
    def read(self, i):
        raise KeyError("a mistake in the code")


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(KeyError, match="a mistake in the code"):
        list(loader(Wrong(), workers=1))


def test_what_a_worker_needs_pickles():
    batches = Batches(Digits("train"), AUGMENT, None, seed=0)
    request = Request(np.zeros(4, np.int64), 0, 0, np.arange(4))
    assert_equal([pickle.loads(pickle.dumps(batches))[request]], [batches[request]])
