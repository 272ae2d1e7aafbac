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

ENCODER = ["model.size=nano", "model.depth=4"]
BUDGET = [
    "optim.batch_size=128", "optim.epochs=20", "optim.warmup_epochs=2", "probe.before=false", "probe.every_epochs=0",
    "probe.train_images=10000", "probe.val_images=10000", "loader.workers=1", "monitor.tensorboard=false",
    "monitor.progress=false",
]  # fmt: skip
FINETUNING = ["optim.batch_size=128", "optim.epochs=10", "optim.warmup_epochs=1", "loader.workers=1",
              "monitor.tensorboard=false", "monitor.progress=false"]  # fmt: skip
NO_BOUND = ["method.adversary.norm=none", "method.adversary.epsilon=null"]
RELEASED = ["optim.schedule=mae_micro", "optim.decay_all=true", "data.remainder=drop", "loader.micro_batch=128"]
# Of each family: what its first row is compared with, then names, recipes and settings.
FAMILIES = {
    "I-JEPA and StoP": [
        ("I-JEPA", "cifar10_ijepa", []),
        *[(f"StoP, targets, std {std}", "cifar10_stop", [f"method.stop.std={std}"]) for std in (0.1, 0.25, 0.5, 1.0)],
        ("StoP, context, std 0.25", "cifar10_stop", ["method.stop.where=context"]),
        ("StoP, both, std 0.25", "cifar10_stop", ["method.stop.where=both"]),
        (
            "StoP as released, std 0.25", "cifar10_stop",
            ["method.mask_token=projection_bias", "method.pairing=published", "mask.setting=published",
             "mask.min_keep=4", "mask.context_keep=null", "model.depth_scaled_init=false", "loader.micro_batch=128",
             "data.remainder=drop"],
        ),
    ],
    "MAE, MAE+ and AdPE": [
        ("MAE", "cifar10_mae", []),
        ("MAE+, absolute", "cifar10_maeplus_ape", []),
        ("MAE+, relative", "cifar10_maeplus_rpe", []),
        *[
            (f"AdPE, {positions}, {mode}", f"cifar10_adpe_{short}_{mode[:5]}", [])
            for positions, short in (("absolute", "ape"), ("relative", "rpe"))
            for mode in ("embed", "coord")
        ],
        ("AdPE as released, absolute, coord", "cifar10_adpe_ape_coord", [*NO_BOUND, *RELEASED]),
        (
            "AdPE as released, relative, coord", "cifar10_adpe_rpe_coord",
            [*NO_BOUND, *RELEASED, "model.relative.lookup=published"],
        ),
    ],
}  # fmt: skip
FIGURES = ("linear", "knn", "top1")


def commands(recipe: str, settings: list[str], folder: Path, data: str, seed: int) -> dict[str, list[str]]:
    """The commands of a row and a seed, by the folder that each fills."""
    where = [f"data.path={data}", f"seed={seed}"]
    first = ["pretrain", recipe, *ENCODER, *BUDGET, *settings, *where, f"run.dir={folder}"]
    tuned = ["finetune", "cifar10_finetune", f"init.from={folder}", *FINETUNING, *where, f"run.dir={folder}_tuned"]
    return {str(folder): first, f"{folder}_tuned": tuned}


def rows(runs: Path, seeds: int):
    """Family, name, recipe, settings, seed and folder; all rows of a seed before the next one."""
    for seed in range(seeds):
        for family, members in FAMILIES.items():
            for name, recipe, settings in members:
                slug = "".join(c if c.isalnum() else "_" for c in name)
                yield family, name, recipe, settings, seed, runs / f"{slug}_{seed}"


def figures(folder: Path) -> dict[str, float] | None:
    """What a row and a seed reached; None if it is not complete."""
    found = {}
    for path, names in ((folder, FIGURES[:2]), (Path(f"{folder}_tuned"), FIGURES[2:])):
        results = path / "results.json"
        after = json.loads(results.read_text()).get("after") if results.exists() else None
        if not after:
            return None
        found |= {name: 100 * after[name] for name in names}
    return found


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
            for command in commands(recipe, settings, folder, data, seed).values():
                status = main(command)
                if status == 3:  # diverged: it has no figures, and its row says so
                    break
                if status:
                    raise SystemExit(status)


def table(runs: Path, seeds: int) -> str:
    """Mean ± standard deviation over the seeds, and the paired difference to the family's first row."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for family, name, _, _, seed, folder in rows(runs, seeds):
        reached = figures(folder)
        found.setdefault((family, name), {}).update({seed: reached} if reached else {})
    lines = []
    for family, members in FAMILIES.items():
        first = found[family, members[0][0]]
        lines += ["", f"| {family} | seeds | linear | k-NN | fine-tuned |", "|---|---|---|---|---|"]
        for name, *_ in members:
            got, cells = found[family, name], []
            for figure in FIGURES:
                values = [one[figure] for one in got.values()]
                cell = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else "-"
                pairs = [got[seed][figure] - first[seed][figure] for seed in got if seed in first]
                if got is not first and len(pairs) > 1:
                    error = statistics.stdev(pairs) / len(pairs) ** 0.5
                    cell += f" ({statistics.mean(pairs):+.2f} ± {error:.2f})"
                cells.append(cell)
            lines.append(f"| {name} | {len(got)} | {' | '.join(cells)} |")
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
            for command in commands(recipe, settings, folder, given.data, seed).values():
                print("elsewhere", shlex.join(command))
    elif given.table:
        print(table(given.runs, given.seeds))
    else:
        train(given.data, given.runs, given.seeds)


if __name__ == "__main__":
    main()
