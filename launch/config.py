"""The typed configuration: recipes in YAML with `base:` inheritance, `key=value` overrides, and their checks.

What changes a run's result (`seed`, `model`, `method`, `mask`, `data`, `optim`, `init`) stands apart from what must
not (`kernels`, `engine`, `loader`, `checkpoint`, `monitor`, `probe`, `run`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo, model_validator

from .config_messages import explain
from .consistency import contradiction
from .efficiency_settings import Checkpoint, Engine, LoaderSection, Monitor, Probe, Run
from .errors import UserError
from .setting_types import Beta, Count, Fraction, Positive, Range, Section, pair, sorted_terms
from .task_settings import ClassifierSection, DetectorSection, MapsSection, SegmenterSection

RECIPES = Path(__file__).resolve().parent.parent / "configs"
# Methods that are trained on labels, from a pre-trained encoder, and the command of each.
TASKS = {"classify": "finetune", "segment": "segment", "detect": "detect"}
RESULT_SECTIONS = ("seed", "model", "method", "mask", "data", "optim", "init")
# Another machine, the same pictures.
MAY_MOVE = (
    "data.path", "data.val_path", "data.source", "data.on_error", "data.max_corrupt", "data.annotations", "data.images",
    "data.val_annotations", "data.val_images",
)  # fmt: skip

_STORED = {"stored": True}

SHORT_NAMES = {"optim.blr": "optim.base_lr"}  # as the released MAE and AdPE call it


class RelativeSection(Section):
    """Relative positions (image RPE) of MAE+ in encoder and decoder, beside the absolute ones."""

    # What gets a relative term; letters in any order.
    terms: Annotated[Literal["none", "k", "q", "v", "qk", "qv", "kv", "qkv"], BeforeValidator(sorted_terms)] = "none"
    lookup: Literal["hard", "interpolated", "published"] = "hard"  # buckets, or a table read between them
    method: Literal["product", "cross", "euclidean", "quantised"] = "product"
    mode: Literal["contextual", "bias"] = "contextual"
    shared: bool = True  # one table for all heads of a layer
    ratio: Positive = 1.9
    scaled_queries: bool = True  # False: as in the released fine-tuning


class Model(Section):
    """The encoder: a named size, or that size with some numbers replaced."""

    size: Literal["nano", "micro", "tiny", "small", "base", "large", "huge", "giant"] = "base"
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    mlp_ratio: Positive | None = None
    patch_size: Count = 16
    image_size: Annotated[tuple[Count, Count], BeforeValidator(pair)] = (224, 224)
    channels: Count = 3
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the last block; rises to it from 0
    positions: Literal["sincos", "learned"] = "sincos"
    class_token: bool | None = None  # None: as the method has it (jepa none, the others one)
    relative: RelativeSection = RelativeSection()
    norm: Literal["torch", "apex"] = "torch"
    norm_eps: Positive = 1e-6  # of the encoder's layer norms; other projects' weights may have another
    init: Literal["normal", "xavier"] = "normal"
    init_std: Positive = 0.02  # of every Linear (normal); narrow encoders want more, e.g. 0.55 / sqrt(width)
    depth_scaled_init: bool = True


class PredictorSection(Section):
    width: Count = 384
    depth: Count = 6
    heads: Count | None = None  # the encoder's
    positions: Literal["sincos", "learned", "low_resolution"] = "sincos"


class StopSection(Section):
    """Stochastic positions; `std` is a standard deviation, as in the released code that calls it `var`."""

    where: Literal["none", "targets", "context", "both"] = "targets"
    std: Annotated[float, Field(ge=0)] = 0.25
    covariance: Literal["tied", "fixed"] = "tied"


class Teacher(Section):
    momentum: Fraction = 0.996
    final_momentum: Fraction = 1.0
    layers: Count = 1


class DecoderSection(Section):
    width: Count = 512
    depth: Count = 8
    heads: Count = 16


class AdversarySection(Section):
    """Adversarial positions (AdPE) of MAE+: what moves the masked patches' positions up the loss, and its bound."""

    mode: Literal["none", "embedding", "coordinate"] = "none"
    where: Literal["keys", "queries"] = "keys"  # relative embedding: masked keys, or masked queries (published)
    per: Literal["table", "bucket"] = "table"  # relative embedding: one vector, or one for every bucket
    norm: Literal["none", "l2", "linf"] = "none"
    epsilon: Positive | None = None  # the bound: patches for a coordinate
    base_lr: Annotated[float, Field(ge=0)] = 1.5e-4  # per 256 images, as optim.base_lr
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class Method(Section):
    """What is trained: I-JEPA (with StoP), MAE, MAE+ (with AdPE), or a task; each has settings of its own."""

    kind: Literal["jepa", "mae", "mae_plus", "classify", "segment", "detect"] = "jepa"
    mask_token: Literal["learned", "projection_bias", "none", "adversary"] = "learned"
    # jepa
    predictor: PredictorSection = PredictorSection()
    stop: StopSection = StopSection()
    teacher: Teacher = Teacher()
    pairing: Literal["paired", "published"] = "paired"
    # mae, mae_plus
    decoder: DecoderSection = DecoderSection()
    normalise_pixels: bool = True
    # mae_plus
    adversary: AdversarySection = AdversarySection()
    # classify
    classifier: ClassifierSection = ClassifierSection()
    # segment
    segmenter: SegmenterSection = SegmenterSection()
    # detect
    detector: DetectorSection = DetectorSection()


class Mask(Section):
    """Block masks for jepa; for mae and mae_plus a share `ratio` of the patches, drawn at random."""

    ratio: Fraction = 0.75
    setting: Literal["recommended", "published"] = "recommended"
    context_blocks: Count = 1
    target_blocks: Count = 4
    context_scale: Range = (0.85, 1.0)
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)
    min_keep: Count = 10  # published
    context_keep: Count | None = None  # recommended; 54 of 196 patches by default


class WeightedPath(Section):
    """One of several places of images, and its share of the samples."""

    path: str
    weight: Positive = 1.0


class Data(Section):
    path: str | list[str | WeightedPath] | None = None
    val_path: str | list[str] | None = None
    source: Literal["auto", "images", "shards", "webdataset", "ffcv"] = "auto"
    samples: Count | None = None  # webdataset: of an epoch, where the shards have no manifest
    streams: Count | None = None  # webdataset: sequences of shards that are read side by side
    shuffle_buffer: Count = 1000  # webdataset: images of a shard that are shuffled
    holdout: Fraction = 0.1
    on_error: Literal["stop", "skip"] = "stop"
    max_corrupt: Annotated[int, Field(ge=0)] | None = None  # with skip: images of an epoch that may be unreadable
    remainder: Literal["carry", "drop"] = "carry"  # of an epoch that the batch does not divide: into the next, or not
    mean: list[float] | None = None  # ImageNet's for three channels, else 0.5
    std: list[Positive] | None = None  # ImageNet's for three channels, else 0.25
    views: Count = 1  # crops of each image, from one decode
    crop_scale: Range = (0.3, 1.0)
    crop_aspect: Range = (0.75, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    flip: Fraction = 0.5
    blur: Fraction = 0.5
    grayscale: Fraction = 0.2
    colour_jitter: Annotated[float, Field(ge=0)] = 0.0
    # classify, by timm
    rand_augment: str | None = None  # e.g. rand-m9-mstd0.5-inc1
    erase: Fraction = 0.0  # random erasing of pixels
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Fraction = 0.0
    # segment
    maps: MapsSection = MapsSection()
    # detect: COCO JSON files and folders of images, where they are not in COCO's layout below path
    annotations: str | None = None
    images: str | None = None
    val_annotations: str | None = None  # none: nothing is measured
    val_images: str | None = None
    jitter: Range = (1.0, 1.0)  # scale of an image, in units of what fits
    without_boxes: Literal["keep", "drop"] = "keep"  # training images on which nothing is

    def places(self) -> tuple[list[str], list[float] | None]:
        """The paths, and their weights where some has one."""
        given = [] if self.path is None else [self.path] if isinstance(self.path, str) else self.path
        paths = [one if isinstance(one, str) else one.path for one in given]
        if all(isinstance(one, str) for one in given):
            return paths, None
        return paths, [1.0 if isinstance(one, str) else one.weight for one in given]


class FreezeSection(Section):
    epoch: Annotated[float, Field(ge=0)]
    strategy: Literal["const", "linear"] = "const"


class Optim(Section):
    kind: Literal["adamw", "apex_adamw"] = "adamw"
    batch_size: Count = 2048  # images per optimiser step over all ranks
    epochs: Count = 600
    steps: Count | None = None  # in place of epochs
    lr: Positive | None = 8e-4
    base_lr: Positive | None = None  # in place of lr: per 256 images of batch_size
    schedule: Literal["stop", "mae", "mae_micro", "poly"] = "stop"  # step 0 counts as 1, 0, 0 with micro-batches, 0
    power: Positive = 1.0  # poly: (1 - progress) ** power
    start_lr: Annotated[float, Field(ge=0)] = 2e-4
    final_lr: Annotated[float, Field(ge=0)] = 1e-4
    warmup_epochs: Annotated[float, Field(ge=0)] = 15
    warmup_steps: Annotated[int, Field(ge=0)] | None = None  # in place of warmup_epochs
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    final_weight_decay: Annotated[float, Field(ge=0)] = 0.4
    drops: list[Fraction] = Field(
        default_factory=list
    )  # of training, after which the rate is a tenth of what it was; no cosine then
    stretch: Positive = 1.0
    freeze_lr: FreezeSection | None = None
    freeze_weight_decay: FreezeSection | None = None
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    decay_all: bool = False  # also tokens and relative tables, as the released AdPE (fine-tuning: the tables)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the learning rate, a layer further from the end
    clip_grad: Annotated[float, Field(ge=0)] = 0.0
    clip_scope: Literal["all", "encoder"] = "all"

    @model_validator(mode="after")
    def _one_rate(self) -> Optim:
        if "base_lr" in self.model_fields_set and "lr" not in self.model_fields_set:
            self.lr = None
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError(
                "optim.lr and optim.base_lr (per 256 images) say the same thing twice; set the other to null"
                if self.lr else "there is no learning rate; set optim.lr, or optim.base_lr per 256 images"
            )  # fmt: skip
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * self.batch_size / 256


class Init(Section):
    from_: str | None = Field(default=None, alias="from")
    allow: list[str] = Field(default_factory=list)  # tensors that may be missing there or left over, by name or pattern
    which: Literal["teacher", "student"] = "teacher"
    resample: Literal["exact", "bicubic"] = "exact"  # tasks: how positions get onto another grid; published: bicubic


class Config(Section):
    """A resolved recipe."""

    about: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: Model = Model()
    method: Method = Method()
    mask: Mask = Mask()
    data: Data = Data()
    optim: Optim = Optim()
    init: Init = Init()
    kernels: Literal["auto", "reference", "triton"] = "auto"  # what computes noise and relative attention
    engine: Engine = Engine()
    loader: LoaderSection = LoaderSection()
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()
    probe: Probe = Probe()
    run: Run = Run()

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Config:
        complaint = None if info.context == _STORED else contradiction(self)
        if complaint:
            raise ValueError(complaint)
        return self

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> Config:
        """The configuration that a run wrote down whole; raises ValidationError for settings that are not known.

        It trained, so its settings fit together; what it does not use may have had another default then.
        """
        return cls.model_validate(values, context=_STORED)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, with the names that YAML uses."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def refuse_task(config: Config, what: str) -> None:
    """Raise UserError for a task's recipe where `what` knows pre-training alone."""
    if config.method.kind in TASKS:
        raise UserError(
            f"{what} is for pre-training, and this recipe trains a task (method.kind={config.method.kind}): name "
            "another recipe; `elsewhere configs` lists them."
        )


def recipe_names() -> list[str]:
    """Names of the packaged recipes, e.g. `demo` and `published/stop_vit_b16`."""
    paths = sorted(RECIPES.rglob("*.yaml"), key=lambda p: (len(p.parts), p))
    return [p.relative_to(RECIPES).with_suffix("").as_posix() for p in paths]


def load_config(recipe: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """The configuration of a recipe (a packaged name or a YAML file) with `key=value` overrides.

    Raises UserError for an unknown recipe, key or value.
    """
    config = overridden(_read(recipe, None, ()), overrides, f"of {recipe}", Config.model_validate)
    if config.run.dir is None:
        config.run.dir = str(Path("runs") / (recipe if recipe in recipe_names() else Path(recipe).stem))
    return config


def overridden(
    values: Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any],
    whose: str = "of the checkpoint",
    validate: Callable[[Mapping[str, Any]], Config] = Config.stored,
) -> Config:
    """The configuration of nested `values`, by default stored ones, with `key=value` overrides.

    Raises UserError for an unknown key or value.
    """
    merged, what = OmegaConf.create(dict(values)), f"The overrides {whose}"
    try:
        if isinstance(overrides, Mapping):
            for key, value in overrides.items():
                key = SHORT_NAMES.get(key, key)
                OmegaConf.update(merged, key.replace("__", "."), str(value) if isinstance(value, Path) else value)
        else:
            for item in overrides:
                what = f"The override {item}"
                if "=" not in item or item.startswith("="):
                    raise UserError(f"{item!r} is not an override; write key=value, e.g. optim.lr=1e-3.")
                key, _, value = item.partition("=")
                merged.merge_with_dotlist([f"{SHORT_NAMES.get(key, key)}={value}"])
            what = f"The overrides {whose}"
        found = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{what} cannot be read: {_first_line(error)}.") from error
    assert isinstance(found, dict)
    try:
        return validate(found)  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        raise UserError(explain(error, list(setting_names()))) from error


def _read(recipe: str, beside: Path | None, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The recipe's values over those of its `base` (a recipe, or a list of them, later ones winning)."""
    path = _find(recipe, beside)
    if path in seen:
        raise UserError(f"The recipe {path} is its own base; take the loop of `base:` lines apart.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"The recipe {path} cannot be read: {_first_line(error)}.") from error
    if not isinstance(values, dict):
        raise UserError(f"The recipe {path} must hold `key: value` lines.")
    bases = values.pop("base", None) or []
    merged = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        merged = OmegaConf.merge(merged, _read(base, path.parent, (*seen, path)))
    # Through the loader of OmegaConf, which reads 1e-3 as a number where plain YAML reads a word.
    merged = OmegaConf.merge(merged, OmegaConf.create(yaml.safe_dump(values)))
    out = OmegaConf.to_container(merged)
    assert isinstance(out, dict)
    return out  # pyright: ignore


def _find(recipe: str, beside: Path | None) -> Path:
    for folder in (beside, None):
        if recipe.endswith((".yaml", ".yml")):
            path = Path(recipe) if folder is None else folder / recipe
            if path.is_file():
                return path.resolve()
    path = RECIPES / f"{recipe}.yaml"
    if path.is_file():
        return path.resolve()
    near = difflib.get_close_matches(recipe, recipe_names(), 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else "`elsewhere configs` lists them."
    raise UserError(f"There is no recipe or file called {recipe}; {hint}")


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, {error.problem or error.context}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def setting_names(schema: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted setting of the schema."""
    for name, field in schema.model_fields.items():
        path = prefix + (field.alias or name)
        yield path
        nested = [field.annotation, *get_args(field.annotation)]
        for kind in nested:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from setting_names(kind, path + ".")


def result_settings(config: Config) -> dict[str, Any]:
    """The settings that change a run's result, flat and by dotted name."""
    values = config.to_dict()
    flat = dict(flatten({section: values[section] for section in RESULT_SECTIONS}))
    # Where images are may change, but not how often each place is drawn from.
    kept = {key: value for key, value in flat.items() if key not in MAY_MOVE}
    return kept | {"weights in data.path": config.data.places()[1]}


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by their dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line per setting that differs, e.g. `optim.lr: 0.001 -> 0.002`."""
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
