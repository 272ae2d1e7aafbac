"""Block masks: the published setting against recordings of the released collator, the recommended one by its promises.

`ELSEWHERE_GOLDEN` names the folder of recordings; every `A5_*` case in it is checked by its own description.
"""

import json
import math
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import chi2, ks_2samp

from elsewhere.data.masks import RELEASED_DEFAULTS, Masks, PublishedBlockMasks, RecommendedBlockMasks, block_masks

GOLDEN = Path(os.environ.get("ELSEWHERE_GOLDEN", Path(__file__).parent / "golden"))
FIELDS = {  # the released names
    "enc_mask_scale": "context_scale",
    "pred_mask_scale": "target_scale",
    "aspect_ratio": "target_aspect",
    "nenc": "context_blocks",
    "npred": "target_blocks",
    "min_keep": "min_keep",
}


@cache
def recording(case: str) -> tuple[dict, dict]:
    return json.loads((GOLDEN / f"{case}.json").read_text()), load_file(GOLDEN / f"{case}.safetensors")


def collators() -> list[tuple[str, str]]:
    cases = [path.stem for path in sorted(GOLDEN.glob("A5_*.json"))]
    assert cases or "ELSEWHERE_GOLDEN" in os.environ, f"no recorded masks in {GOLDEN}"
    return [(case, name) for case in cases for name in recording(case)[0]["config"]["collators"]]


def tensors(case: str, name: str) -> dict[str, np.ndarray]:
    prefix = f"out.{name}."
    return {key.removeprefix(prefix): value for key, value in recording(case)[1].items() if key.startswith(prefix)}


def released(case: str, name: str) -> tuple[PublishedBlockMasks, dict]:
    config = recording(case)[0]["config"]["collators"][name]
    grid = recording(case)[0]["info"]["configs"][name]["grid"]
    given = {field: config[key] for key, field in FIELDS.items() if key in config}
    return block_masks("published", grid=grid, **{**RELEASED_DEFAULTS, **given}), config


each_collator = pytest.mark.parametrize(("case", "name"), collators())


def observe(grid: tuple[int, int], batches: Iterable[Masks]) -> dict[str, np.ndarray]:
    """The recorded statistics of masks, one row per batch."""
    patches = math.prod(grid)
    seen = {key: [] for key in ("context", "target", "context_map", "target_map", "union", "overlap")}
    for drawn in batches:
        batch = drawn.context.shape[1]
        shown, hidden = np.zeros((2, batch, patches), dtype=bool)
        for block in drawn.context:
            np.put_along_axis(shown, block, True, axis=1)
        for block in drawn.targets:
            np.put_along_axis(hidden, block, True, axis=1)
        seen["context"].append(drawn.context.shape[-1])
        seen["target"].append(drawn.targets.shape[-1])
        for key, blocks in (("context_map", drawn.context), ("target_map", drawn.targets)):
            seen[key].append(np.bincount(blocks.ravel(), minlength=patches) / (len(blocks) * batch))
        seen["union"].append(hidden.sum(axis=1).mean())
        seen["overlap"].append((shown & hidden).any(axis=1).sum())
    return {key: np.array(value, dtype=float) for key, value in seen.items()}


@cache
def runs(case: str, name: str) -> tuple[dict, dict]:
    masks, config = released(case, name)
    ids = np.arange(config["n"]).reshape(-1, config["B"])

    def run(seed: int) -> dict[str, np.ndarray]:
        return observe(masks.grid, (masks(seed, 0, step, batch) for step, batch in enumerate(ids)))

    return run(20240601), run(20240602)


def from_torch(image: int, high: int) -> int:
    return int(torch.randint(0, high, (1,)))


def standard_error(ours: np.ndarray, twin: np.ndarray) -> np.ndarray:
    """Of a difference between two runs over the same steps: block sizes are the same, so only positions vary."""
    return (ours - twin).std(axis=0, ddof=1) / math.sqrt(len(ours))


@each_collator
def test_published_block_sizes_are_the_recorded_ones(case, name):
    masks, _ = released(case, name)
    recorded = tensors(case, name)["block_sizes"]
    ours = [[*target, *context] for target, context in map(masks.sizes, range(len(recorded)))]
    np.testing.assert_array_equal(ours, recorded)


@each_collator
def test_published_replays_recorded_examples(case, name):
    masks, config = released(case, name)
    recorded = tensors(case, name)
    examples = sum(key.endswith("enc.0") for key in recorded)
    for example in range(examples):
        batch = len(recorded[f"ex{example}.enc.0"])
        torch.manual_seed(config["gseed"] + 1 + example)
        drawn = masks.draw(example, batch, from_torch)
        for kind, blocks in (("enc", drawn.context), ("pred", drawn.targets)):
            for number, block in enumerate(blocks):
                np.testing.assert_array_equal(block, recorded[f"ex{example}.{kind}.{number}"])


@each_collator
def test_published_replays_the_recorded_run(case, name):
    masks, config = released(case, name)
    recorded, info = tensors(case, name), recording(case)[0]["info"]["configs"][name]
    torch.manual_seed(config["gseed"])
    steps = config["n"] // config["B"]
    seen = observe(masks.grid, (masks.draw(step, config["B"], from_torch) for step in range(steps)))
    np.testing.assert_array_equal(seen["context"], recorded["ctx_tokens_per_batch"])
    np.testing.assert_array_equal(seen["target"], recorded["tgt_tokens_per_batch"])
    for kind in ("context", "target"):
        used = seen[f"{kind}_map"].mean(axis=0).reshape(masks.grid)
        np.testing.assert_allclose(used, recorded[f"freq_{kind}"], atol=1e-6)
    assert seen["union"].mean() == pytest.approx(info["target_union_tokens"]["mean"])
    assert seen["overlap"].sum() == info["images_with_context_target_overlap"]


@each_collator
@pytest.mark.parametrize("kind", ["context", "target"])
def test_published_token_counts_are_distributed_as_recorded(case, name, kind):
    recorded = tensors(case, name)[{"context": "ctx_tokens_per_batch", "target": "tgt_tokens_per_batch"}[kind]]
    ours, twin = (run[kind] for run in runs(case, name))
    centre = recorded.mean()
    for power in (1, 2):  # mean, then variance about the recorded mean
        ours_about, twin_about, recorded_about = ((run - centre) ** power for run in (ours, twin, recorded))
        gap = abs(ours_about.mean() - recorded_about.mean())
        assert gap <= 5 * standard_error(ours_about, twin_about) + 1e-9
    assert ks_2samp(np.concatenate([ours, twin]), recorded).pvalue > 1e-6


@each_collator
@pytest.mark.parametrize("kind", ["context", "target"])
def test_published_patches_are_used_as_often_as_recorded(case, name, kind):
    masks, config = released(case, name)
    recorded = tensors(case, name)[f"freq_{kind}"].astype(float).ravel()
    ours, twin = (run[f"{kind}_map"] for run in runs(case, name))
    count = config["n"]
    # A patch seen in none or in all of the images still has some error.
    rate = np.clip((ours.mean(axis=0) + recorded) / 2, 3 / count, 1 - 3 / count)
    error = np.maximum(standard_error(ours, twin), np.sqrt(2 * rate * (1 - rate) / count))
    assert (np.abs(ours.mean(axis=0) - recorded) / error).max() < 6
    maps = [ours.mean(axis=0).reshape(masks.grid), recorded.reshape(masks.grid)]
    assert all(not used[-1].any() and not used[:, -1].any() for used in maps)


@each_collator
def test_published_targets_overlap_each_other_and_the_context_as_recorded(case, name):
    info = recording(case)[0]["info"]["configs"][name]
    ours, twin = runs(case, name)
    error = standard_error(ours["union"], twin["union"])
    assert abs(ours["union"].mean() - info["target_union_tokens"]["mean"]) <= 5 * error
    seen, expected = (ours["overlap"] + twin["overlap"]).sum() / 2, info["images_with_context_target_overlap"]
    assert abs(seen - expected) <= 5 * math.sqrt((seen + expected) * 0.75 + 1)


def test_published_refuses_blocks_that_can_never_be_valid():
    with pytest.raises(ValueError, match=r"mask\.min_keep=10"):
        PublishedBlockMasks(grid=(4, 4))


def uses(masks: RecommendedBlockMasks, images: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """How often each patch is in a context and in a target, over steps of 50 images: two `[rows, cols]`."""
    count = np.zeros((2, math.prod(masks.grid)), dtype=int)
    for step in range(images // 50):
        drawn = masks(seed, 0, step, np.arange(step * 50, (step + 1) * 50))
        for row, blocks in enumerate((drawn.context, drawn.targets)):
            count[row] += np.bincount(blocks.ravel(), minlength=count.shape[1])
    return count[0].reshape(masks.grid), count[1].reshape(masks.grid)


SETTINGS = {
    "defaults": dict(grid=(14, 14)),
    "wide": dict(grid=(8, 16)),
    "tall": dict(grid=(12, 7), target_aspect=(0.5, 2)),
    "small": dict(grid=(8, 8)),
    "tiny": dict(grid=(4, 4)),
    "two contexts": dict(grid=(14, 14), context_blocks=2, context_scale=(0.4, 0.6), target_blocks=2),
    "tight": dict(grid=(6, 6), target_scale=(0.5, 0.6), context_keep=14),
}
each_setting = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)


@pytest.mark.parametrize("fields", [SETTINGS[name] for name in SETTINGS if name != "tight"])  # its middle is never free
def test_recommended_reaches_every_patch_with_contexts_and_targets(fields):
    masks = RecommendedBlockMasks(**fields)
    context, target = uses(masks, 3000)
    assert context.min() > 0
    assert target.min() > 0


@each_setting
def test_recommended_keeps_the_count_and_never_overlaps(fields):
    masks = RecommendedBlockMasks(**fields)
    for step in range(10):
        drawn = masks(5, 2, step, np.arange(64) + 1000 * step)
        height, width = masks.shape(5, step)
        assert drawn.context.shape == (masks.context_blocks, 64, masks.keep)
        assert drawn.targets.shape == (masks.target_blocks, 64, height * width)
        assert drawn.context.dtype == drawn.targets.dtype == np.int64
        assert (np.diff(drawn.context, axis=-1) > 0).all()
        for image in range(64):
            assert not np.intersect1d(drawn.context[:, image], drawn.targets[:, image]).size


@each_setting
def test_recommended_targets_are_rectangles_of_the_steps_shape(fields):
    masks = RecommendedBlockMasks(**fields)
    for step in range(5):
        height, width = masks.shape(0, step)
        rows, cols = np.divmod(masks(0, 0, step, np.arange(32)).targets, masks.grid[1])
        expected = np.indices((height, width)).reshape(2, -1)
        np.testing.assert_array_equal(rows - rows[..., :1], np.broadcast_to(expected[0], rows.shape))
        np.testing.assert_array_equal(cols - cols[..., :1], np.broadcast_to(expected[1], cols.shape))


@each_setting
def test_recommended_masks_do_not_depend_on_the_rest_of_the_batch(fields):
    masks = RecommendedBlockMasks(**fields)
    ids = np.array([7, 123456789012, 0, 55, 54, 10**6])
    together = masks(9, 4, 17, ids)
    for place, sample in enumerate(ids):
        alone = masks(9, 4, 17, np.array([sample]))
        np.testing.assert_array_equal(alone.context[:, 0], together.context[:, place])
        np.testing.assert_array_equal(alone.targets[:, 0], together.targets[:, place])


def test_recommended_positions_change_with_seed_epoch_and_sample():
    masks = RecommendedBlockMasks(grid=(14, 14))
    step = next(step for step in range(1, 100) if masks.shape(1, step) == masks.shape(2, step))
    ids = np.arange(16)
    base = masks(1, 0, step, ids).targets
    for other in (masks(2, 0, step, ids), masks(1, 1, step, ids), masks(1, 0, step, ids + 16)):
        assert (other.targets != base).any(axis=(0, 2)).mean() > 0.9


def test_recommended_shape_is_a_function_of_seed_and_step():
    masks = RecommendedBlockMasks(grid=(14, 14))
    again = RecommendedBlockMasks(grid=(14, 14))
    first, second = ([maker.shape(seed, step) for step in range(1000)] for maker, seed in ((masks, 1), (again, 2)))
    assert first == [again.shape(1, step) for step in range(1000)]
    assert first != second
    counts = [first.count(shape) for shape in masks.shapes]
    assert min(counts) > 0.8 * 1000 / len(counts)


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (37, 37), (24, 12), (7, 7)])
def test_recommended_has_at_most_five_shapes_within_the_ranges(grid):
    masks = RecommendedBlockMasks(grid=grid)
    assert 1 <= len(set(masks.shapes)) == len(masks.shapes) <= 5
    for height, width in masks.shapes:
        assert 0.15 <= height * width / math.prod(grid) <= 0.2
        assert 0.75 <= height / width <= 1.5


def test_recommended_shapes_spread_over_both_ranges():
    shapes = np.array(RecommendedBlockMasks(grid=(37, 37), target_scale=(0.1, 0.2), target_aspect=(0.5, 2)).shapes)
    scale, aspect = shapes.prod(axis=1) / 37**2, shapes[:, 0] / shapes[:, 1]
    assert len(shapes) == 5
    assert scale.min() < 0.12 and scale.max() > 0.18
    assert aspect.min() < 0.65 and aspect.max() > 1.55


def test_recommended_takes_the_nearest_shape_where_none_is_within_the_ranges():
    assert RecommendedBlockMasks(grid=(4, 4)).shapes == [(2, 2)]


def test_recommended_drops_surplus_without_favouring_any_place():
    # One target in the middle of a grid-sized context: what is left of the grid must be kept evenly.
    masks = RecommendedBlockMasks(grid=(10, 10), context_scale=(1, 1), target_blocks=1, context_keep=30)
    kept, expected = np.zeros((2, 100))
    for step in range(200):
        drawn = masks(0, 0, step, np.arange(step * 50, (step + 1) * 50))
        kept += np.bincount(drawn.context.ravel(), minlength=100)
        free = np.ones((50, 100), dtype=bool)
        np.put_along_axis(free, drawn.targets[0], False, axis=1)
        expected += (free * (30 / free.sum(axis=1, keepdims=True))).sum(axis=0)
    rate = expected / 10_000
    statistic = ((kept - expected) ** 2 / (10_000 * rate * (1 - rate))).sum()
    # Keeping exactly 30 ties the counts together, which costs about one of the 100 degrees of freedom.
    assert chi2.ppf(1e-4, 98) < statistic < chi2.ppf(1 - 1e-4, 101)


def test_recommended_contexts_stay_inside_one_block_but_for_topped_up_samples():
    masks = RecommendedBlockMasks(grid=(14, 14), context_scale=(0.3, 0.3), context_keep=20, target_blocks=1)
    rows, cols = np.divmod(masks(0, 0, 0, np.arange(2000)).context[0], 14)
    side = round(math.sqrt(0.3 * 196))
    outside = (np.ptp(rows, axis=1) >= side) | (np.ptp(cols, axis=1) >= side)
    assert outside.mean() < 0.01


def test_recommended_redraws_few_samples_by_default():
    masks = RecommendedBlockMasks(grid=(14, 14))
    redraws = sum(masks(0, 0, step, np.arange(step * 500, (step + 1) * 500)).redraws for step in range(20))
    assert 0.004 < redraws / 10_000 < 0.02


def test_recommended_redrawing_keeps_contexts_in_their_block():
    # Without redraws more than one sample in two would have to be topped up here.
    fields = dict(grid=(14, 14), context_scale=(0.85, 0.85), context_keep=80)
    masks = RecommendedBlockMasks(**fields)
    drawn = masks(0, 0, 0, np.arange(1000))
    rows, cols = np.divmod(drawn.context[0], 14)
    assert drawn.redraws > 300
    assert ((np.ptp(rows, axis=1) < 13) & (np.ptp(cols, axis=1) < 13)).mean() > 0.99


def test_recommended_stacks_targets_where_nothing_else_leaves_room():
    # 18 of 36 patches are hidden by one block and 18 must be shown: only fully stacked targets do.
    masks = RecommendedBlockMasks(grid=(6, 6), target_scale=(0.5, 0.5), target_aspect=(0.5, 0.5), context_keep=18)
    drawn = masks(0, 0, 0, np.arange(100))
    assert drawn.redraws > 100 * 10
    assert (drawn.targets == drawn.targets[:1]).all()
    assert drawn.context.shape == (1, 100, 18)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        (dict(context_keep=170), r"lower mask\.context_keep or mask\.target_scale, or choose a larger image or a sm"),
        (dict(context_keep=0), r"mask\.context_keep=0"),
        (dict(target_scale=(0.3, 0.2)), r"mask\.target_scale=\[0\.3, 0\.2\]"),
        (dict(context_scale=(0.9, 1.1)), r"mask\.context_scale"),
        (dict(target_aspect=(0, 1)), r"mask\.target_aspect"),
        (dict(target_scale=(0.3, 0.4), target_aspect=(6, 9)), "does not fit in a grid of 14×14"),
        (dict(target_blocks=0), r"mask\.target_blocks=0"),
    ],
)
def test_impossible_settings_are_refused_with_advice(fields, advice):
    with pytest.raises(ValueError, match=advice):
        RecommendedBlockMasks(grid=(14, 14), **fields)


def test_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="choose published or recommended"):
        block_masks("random", grid=(14, 14))
