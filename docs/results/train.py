"""Trains, probes and fine-tunes every row of docs/results.md, one command after another, and writes its tables.

`python3 docs/results/train.py DATA RUNS` does what is missing (stop it and start it again as you like; several at once
share the work), `--table` prints the tables of what is there, `--list` the commands.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import statistics
from pathlib import Path

QUIET = ["loader.workers=1", "monitor.tensorboard=false", "monitor.progress=false"]
PRETRAINING = [
    "model.size=nano", "model.depth=4", "optim.batch_size=64", "optim.steps=400", "optim.warmup_steps=40",
    "probe.before=false", "probe.after=false", "probe.every_epochs=0", *QUIET,
]  # fmt: skip
PROBE = ["--kind", "knn,linear", "--train-images", "10000", "--val-images", "10000", "--layers", "last",
         "--neighbours", "20", "--rates", "0.1,0.3,1", "--decays", "0", "--select", "held-out",
         "model.image_size=32"]  # fmt: skip
# So few steps fit better without what regularises a hundred epochs.
FINETUNING = ["model.image_size=32", "model.drop_path=0", "data.rand_augment=null", "data.erase=0", "data.mixup=0",
              "data.cutmix=0", "data.label_smoothing=0", "optim.layer_decay=1", "optim.batch_size=32",
              "optim.base_lr=8e-3", "optim.steps=300", "optim.warmup_steps=30", *QUIET]  # fmt: skip
PREDICTOR = ["method.predictor.width=48", "method.predictor.depth=2"]
# Four crops of 16 pixels are as many patches of 4 as the one of 32 that MAE sees.
DECODER = ["method.decoder.width=48", "method.decoder.depth=2", "model.patch_size=4", "optim.base_lr=8e-3",
           "engine.precision=bfloat16", "data.crop_scale=[0.2,1.0]"]  # fmt: skip
ADVERSARY = ["method.adversary.base_lr=8e-3"]  # the model's, as in the recipes
UNTRAINED = ["optim.steps=1", "optim.warmup_steps=0", "optim.start_lr=0", "optim.final_lr=0"]
NO_BOUND = ["method.adversary.norm=none", "method.adversary.epsilon=null"]
RELEASED = ["optim.schedule=mae_micro", "optim.decay_all=true", "data.remainder=drop", "loader.micro_batch=64"]
# Of each family: what its rows share, then names, recipes and settings.
FAMILIES = {
    "I-JEPA and StoP": (PREDICTOR, [
        ("I-JEPA", "cifar10_ijepa", []),
        *[(f"StoP, targets, std {std}", "cifar10_stop", [f"method.stop.std={std}"]) for std in (0.1, 0.25, 0.5, 1.0)],
        ("StoP, context, std 0.25", "cifar10_stop", ["method.stop.where=context"]),
        ("StoP, both, std 0.25", "cifar10_stop", ["method.stop.where=both"]),
        (
            "StoP as released, std 0.25", "cifar10_stop",
            ["method.mask_token=projection_bias", "method.pairing=published", "mask.setting=published",
             "mask.min_keep=4", "mask.context_keep=null", "model.depth_scaled_init=false", "loader.micro_batch=64",
             "data.remainder=drop"],
        ),
        ("not pre-trained", "cifar10_ijepa", [*UNTRAINED, "optim.lr=1e-12"]),
    ]),
    "MAE, MAE+ and AdPE": (DECODER, [
        ("MAE", "cifar10_mae", []),
        ("MAE+, absolute", "cifar10_maeplus_ape", []),
        ("MAE+, relative", "cifar10_maeplus_rpe", []),
        *[
            (f"AdPE, {positions}, {mode}", f"cifar10_adpe_{short}_{mode[:5]}", ADVERSARY)
            for positions, short in (("absolute", "ape"), ("relative", "rpe"))
            for mode in ("embed", "coord")
        ],
        ("AdPE as released, absolute, coord", "cifar10_adpe_ape_coord", [*ADVERSARY, *NO_BOUND, *RELEASED]),
        (
            "AdPE as released, relative, coord", "cifar10_adpe_rpe_coord",
            [*ADVERSARY, *NO_BOUND, *RELEASED, "model.relative.lookup=published"],
        ),
        ("not pre-trained, absolute", "cifar10_mae", [*UNTRAINED, "optim.base_lr=1e-12"]),
        ("not pre-trained, relative", "cifar10_maeplus_rpe", [*UNTRAINED, "optim.base_lr=1e-12"]),
    ]),
}  # fmt: skip
FIGURES = ("linear", "knn", "tuned")


def commands(recipe: str, settings: list[str], folder: Path, data: str, seed: int) -> list[list[str]]:
    """The commands of a row and a seed; one that was done before goes on, or measures again, to the same end."""
    place, probed, tuned = f"data.path={data}", f"{folder}_probed", f"{folder}_tuned"
    first = ["pretrain", recipe, *PRETRAINING, *settings, place, f"seed={seed}", f"run.dir={folder}"]
    probe = ["probe", str(folder), *PROBE, place, "-o", probed]
    tune = ["finetune", "cifar10_finetune", f"init.from={folder}", *FINETUNING, place, f"seed={seed}"]
    tune.append(f"run.dir={tuned}")
    return [first, probe, tune]


def rows(runs: Path, seeds: int):
    """Family, name, recipe, settings, seed and folder; all rows of a seed before the next one."""
    for seed in range(seeds):
        for family, (shared, members) in FAMILIES.items():
            for name, recipe, settings in members:
                slug = "".join(c if c.isalnum() else "_" for c in name)
                yield family, name, recipe, [*shared, *settings], seed, runs / f"{slug}_{seed}"


def figures(folder: Path) -> dict[str, float] | None:
    """What a row and a seed reached, in percent; None if it is not complete."""
    probed, tuned = Path(f"{folder}_probed/results.json"), Path(f"{folder}_tuned/results.json")
    if not (probed.exists() and tuned.exists() and json.loads(tuned.read_text()).get("after")):
        return None
    found = {one["probe"]: 100 * one["best"][0]["top1"] for one in json.loads(probed.read_text())["evaluations"]}
    found["tuned"] = 100 * json.loads(tuned.read_text())["after"]["top1"]
    return found if all(figure in found for figure in FIGURES) else None


def train(data: str, runs: Path, seeds: int) -> None:
    """Run what is missing; a lock beside each folder lets several of these share the work."""
    from elsewhere.launch.cli import main

    runs.mkdir(parents=True, exist_ok=True)
    for _, _, recipe, settings, seed, folder in rows(runs, seeds):
        with Path(f"{folder}.busy").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another one is at it
                continue
            if figures(folder):
                continue
            for command in commands(recipe, settings, folder, data, seed):
                status = main(command)
                if status == 3:  # diverged: it has no figures, and its row says so
                    break
                if status:
                    raise SystemExit(status)


def against(name: str) -> list[str]:
    """The rows that one is compared with, seed by seed."""
    positions = "relative" if "relative" in name else "absolute"
    if name.startswith("StoP"):
        return ["I-JEPA"]
    if name.startswith("AdPE"):
        return [f"MAE+, {positions}"]
    if name.startswith("MAE+"):
        return ["MAE", f"not pre-trained, {positions}"]
    return {"I-JEPA": ["not pre-trained"], "MAE": ["not pre-trained, absolute"]}.get(name, [])


def difference(ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]], figure: str) -> str:
    """Mean and standard error over the seeds that both have; a star where a paired t-test has p < 0.05."""
    from scipy.stats import t

    pairs = [ours[seed][figure] - theirs[seed][figure] for seed in ours if seed in theirs]
    if len(pairs) < 2:
        return "-"
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.2f} ± {error:.2f}" + " *" * bool(abs(mean) > t.ppf(0.975, len(pairs) - 1) * error)


def table(runs: Path, seeds: int) -> str:
    """Of each family a table of mean ± standard deviation over the seeds, and one of differences."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for family, name, _, _, seed, folder in rows(runs, seeds):
        reached = figures(folder)
        found.setdefault((family, name), {}).update({seed: reached} if reached else {})
    lines = []
    for family, (_, members) in FAMILIES.items():
        means, pairs = [], []
        for name, *_ in members:
            got = found[family, name]
            values = [[one[figure] for one in got.values()] for figure in FIGURES]
            cells = [f"{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}" if len(v) > 1 else "-" for v in values]
            means.append(f"| {name} | {len(got)} | {' | '.join(cells)} |")
            for other in against(name):
                cells = [difference(got, found[family, other], figure) for figure in FIGURES]
                pairs.append(f"| {name} − {other} | {' | '.join(cells)} |")
        lines += ["", f"| {family} | seeds | linear | k-NN | fine-tuned |", "|---|---|---|---|---|", *means]
        lines += ["", "| difference | linear | k-NN | fine-tuned |", "|---|---|---|---|", *pairs]
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10: cifar10:FOLDER, or a folder with train/ and val/")
    parser.add_argument("runs", type=Path, help="where runs are and come to be")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        for _, _, recipe, settings, seed, folder in rows(given.runs, given.seeds):
            for command in commands(recipe, settings, folder, given.data, seed):
                print("elsewhere", shlex.join(command))
    elif given.table:
        print(table(given.runs, given.seeds))
    else:
        train(given.data, given.runs, given.seeds)


if __name__ == "__main__":
    main()
