"""Settings that must not change a run's result: how it is divided, loaded, saved, watched and measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from .setting_types import Count, Positive, Section, pair


class Engine(Section):
    kind: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    deepspeed: str = "zero2"  # deepspeed: a setting of ds_configs, or a JSON file
    replicas: Count = 1  # fsdp: groups of ranks that each hold the whole model among them (HSDP)
    offload: bool = False  # fsdp: weights and optimiser state in host memory
    activation_checkpointing: Literal["none", "selective", "full"] | Annotated[int, Field(ge=2)] = "none"
    compile: bool = False  # the blocks, by torch.compile
    wait_minutes: Positive = 30.0  # for ranks that do not come to the start or to a collective; then the run ends
    silence_seconds: Annotated[float, Field(ge=5)] = 22.0  # of a rank that is frozen or cut off; then the run ends


class LoaderSection(Section):
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    micro_batch: Count | None = None  # images per forward on one rank; None: the rank's whole share
    prefetch: Count = 2
    augment: Literal["auto", "device", "workers"] = "auto"  # where flip, jitter, grey and blur are done: auto on a GPU


class Checkpoint(Section):
    every_steps: Annotated[int, Field(ge=0)] = 0  # 0: by time alone
    every_minutes: Annotated[float, Field(ge=0)] = 10.0  # 0: by steps alone
    keep: Count = 2
    keep_every_epochs: Annotated[int, Field(ge=0)] = 0


class Monitor(Section):
    log_every: Count = 10
    pictures_every: Annotated[int, Field(ge=0)] = 1000
    collapse_every: Annotated[int, Field(ge=0)] = 200
    collapse_rank: Annotated[float, Field(ge=1)] = 2.0  # warn below this effective rank
    adversary_every: Annotated[int, Field(ge=0)] = 200  # steps between two measurements of the attack's gain
    peak_tflops: Positive | None = None
    tensorboard: bool = True
    wandb: bool | str = False  # Weights & Biases: true, or the name of a project there
    wandb_name: str | None = None  # of the run there; None: of its folder
    progress: bool = True


class SlidingSection(Section):
    """Testing of segmentation by windows of the training size."""

    stride: Annotated[tuple[Count, Count], BeforeValidator(pair)] | None = None  # None: two thirds of the window
    scales: list[Positive] = Field(
        default_factory=lambda: [1.0], min_length=1
    )  # factors of data.maps.scale; means over all
    flip: bool = False  # each scale also mirrored
    batch: Count = 8  # windows of a forward


class Probe(Section):
    """Figures on held-out images: k-NN and linear probe of the frozen teacher; of a task, its own."""

    every_epochs: Annotated[int, Field(ge=0)] = 0
    before: bool = True
    after: bool = True
    labels_per_class: Count | None = None  # None: every label of the training images taken
    draws: Count = 1  # repetitions over draws of those labels
    train_images: Count = 50_000
    val_images: Count = 10_000
    neighbours: Count = 20
    # segment
    sliding: SlidingSection = SlidingSection()


class Run(Section):
    dir: str | None = None  # runs/RECIPE
