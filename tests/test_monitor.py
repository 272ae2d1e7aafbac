"""What a run writes: metrics, TensorBoard files that TensorBoard reads, pictures, collapse watch."""

import json

import pytest
import torch
from rich.console import Console

from elsewhere.launch.config import load_config
from elsewhere.launch.monitor import Monitor, NonFiniteLoss, keep_rows_before, rank_me
from elsewhere.launch.pictures import draw_masks
from elsewhere.launch.pretrain import pretrain
from elsewhere.launch.world import World


def monitor(path, **options):
    settings = {"first_step": 0, "last_step": 100, "images_per_step": 8, "flops_per_image": 1e9, "peak": None}
    return Monitor(path, World(), Console(), **{**settings, "every": 10, "progress": False, **options})


def record(watch, loss=1.0):
    watch.record(torch.tensor(loss), {"target_std": torch.tensor(0.5)}, {"lr": 1e-3, "epoch": 0.0}, 0.0)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def events():
    """TensorBoard's own reader on a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(run):
        accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
        accumulator.Reload()
        return accumulator

    return read


def test_every_step_has_its_row_with_its_own_loss(tmp_path):
    watch = monitor(tmp_path)
    for step in range(25):
        record(watch, float(step))
    watch.flush()
    watch.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(step, float(step)) for step in range(25)]


def test_nothing_is_read_from_the_device_between_readings(tmp_path):
    """A tensor on the meta device cannot be read: recording it must not try."""
    watch = monitor(tmp_path)
    for _ in range(9):
        watch.record(torch.zeros((), device="meta"), {}, {"lr": 0.0}, 0.0)
    with pytest.raises(NotImplementedError):
        watch.record(torch.zeros((), device="meta"), {}, {"lr": 0.0}, 0.0)
    watch.close()


def test_a_number_that_comes_later_is_written_from_there_on(tmp_path):
    """As the norm of the gradient, of which a skipped first step has none."""
    watch = monitor(tmp_path)
    for step in range(3):
        more = {"gradient_norm": torch.tensor(float(step))} if step else {}
        watch.record(torch.tensor(1.0), {"target_std": torch.tensor(0.5), **more}, {"lr": 1e-3, "epoch": 0.0}, 0.0)
    watch.flush()
    watch.close()
    assert [row.get("gradient_norm") for row in rows(tmp_path)] == [None, 1.0, 2.0]
    assert all(row["target_std"] == 0.5 for row in rows(tmp_path))


def test_model_flops_utilisation_is_flops_by_time_and_peak(tmp_path):
    watch = monitor(tmp_path, peak=1e-3)
    for _ in range(10):
        record(watch)
    watch.close()
    row = rows(tmp_path)[-1]
    assert row["mfu"] == pytest.approx(row["images_per_s"] * 1e9 / 1e9, rel=1e-2)


def test_the_first_bad_step_is_named(tmp_path):
    watch = monitor(tmp_path)
    for step in range(9):
        record(watch, float("nan") if step >= 6 else 1.0)
    with pytest.raises(NonFiniteLoss, match="rank 0 at step 6"):
        watch.flush()
    watch.close()


def test_a_skipped_step_has_a_row_with_reason_and_scale(tmp_path):
    watch = monitor(tmp_path)
    record(watch)
    record(watch)
    watch.say_skip("adversary", 512.0)
    watch.close()
    assert [row for row in rows(tmp_path) if row.get("group") == "skipped"] == [
        {"step": 1, "group": "skipped", "reason": "gradients of the adversary overflowed in float16",
         "loss_scale": 512.0}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "message"),
    [(float("inf"), "loss of rank 0 at step 3 is not finite"), (1.0, r"gradients of step 3 .* all ranks \(0 to 0\)")],
)
def test_a_skip_outside_float16_ends_the_run(loss, message, tmp_path):
    watch = monitor(tmp_path)
    for _ in range(3):
        record(watch)
    record(watch, loss)
    with pytest.raises(NonFiniteLoss, match=message):
        watch.say_skip("method", None)
    watch.close()


def test_rows_beyond_a_checkpoint_and_a_cut_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(6)) + '{"step": 2, "lo')
    keep_rows_before(path, 4)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3]


def test_tensorboard_opens_the_logs_of_a_run(tiny, events, tmp_path):
    pretrain(load_config("demo", {**tiny, "monitor.tensorboard": True, "probe.after": True}))
    found = events(tmp_path / "run")
    tags = found.Tags()
    assert {"train/loss", "train/lr", "train/images_per_s", "train/target_std", "probe/knn"} <= set(tags["scalars"])
    logged = {event.step: event.value for event in found.Scalars("train/loss")}
    for row in rows(tmp_path / "run"):
        if "group" not in row:
            assert logged[row["step"]] == pytest.approx(row["loss"], rel=1e-6)
    assert tags["images"] == ["masks"]


def test_masks_are_drawn_where_they_are():
    images = torch.full((1, 1, 8, 8), 100, dtype=torch.uint8)
    context, targets = torch.tensor([[[0]]]), torch.tensor([[[3]]])
    picture = draw_masks(images, context, targets, (2, 2), side=8)
    assert picture.shape == (3, 12, 36)
    _, known, painted = (picture[:, 2:10, 12 * i + 2 : 12 * i + 10] for i in range(3))
    assert (known[:, :4, :4] == 100).all(), "a context patch is shown as it is"
    assert (known[:, 4:, :] > 200).all(), "what is no context is bleached"
    grey = (painted.float().std(dim=0) < 1).reshape(2, 4, 2, 4).transpose(1, 2).flatten(2).all(dim=2)
    assert grey.tolist() == [[True, True], [True, False]], "only the target patch is coloured"


def test_effective_rank_of_known_matrices():
    assert rank_me(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert rank_me(torch.ones(16, 8)) == pytest.approx(1, abs=1e-3)
    values = torch.tensor([3.0, 1.0])  # entropy of (3/4, 1/4)
    assert rank_me(torch.diag(values)) == pytest.approx(4 / 3 ** (3 / 4), rel=1e-3)


def test_collapsed_features_are_reported(tiny, tmp_path, capsys):
    settings = {**tiny, "monitor.collapse_every": 20, "monitor.collapse_rank": 24}
    pretrain(load_config("demo", settings))
    assert "may have collapsed" in capsys.readouterr().out
    collapse = [row for row in rows(tmp_path / "run") if row.get("group") == "collapse"]
    assert [row["step"] for row in collapse] == [19, 39]
    assert all(1 <= row["rank_me"] <= 24 for row in collapse)


def test_a_log_file_gets_a_line_every_half_minute(tmp_path, capsys):
    watch = monitor(tmp_path)
    for _ in range(10):
        record(watch)
    assert "step 10 of 100" not in capsys.readouterr().out
    watch._said -= 31
    for _ in range(10):
        record(watch)
    watch.close()
    assert "step 20 of 100  loss 1.0000" in capsys.readouterr().out
