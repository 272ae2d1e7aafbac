"""Which settings go together: what a method does not use is refused rather than ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel

    from .config import Config

# What each method reads beside what all of them read.
_OF = {
    "jepa": ("method.predictor", "method.stop", "method.teacher", "method.pairing", "mask.setting",
             "mask.context_blocks", "mask.target_blocks", "mask.context_scale", "mask.target_scale",
             "mask.target_aspect", "mask.min_keep", "mask.context_keep"),
    "mae": ("method.decoder", "method.normalise_pixels", "mask.ratio", "data.views"),
    "mae_plus": ("method.decoder", "method.normalise_pixels", "mask.ratio", "data.views", "method.adversary",
                 "model.relative"),
    "classify": ("method.classifier", "data.rand_augment", "data.erase", "data.mixup", "data.cutmix",
                 "data.label_smoothing", "model.relative", "model.drop_path", "optim.layer_decay", "init.resample"),
    "segment": ("method.segmenter", "data.maps", "optim.power", "model.relative",
                "model.drop_path", "optim.layer_decay", "init.resample"),
    "detect": ("method.detector", "data.annotations", "data.images", "data.val_annotations", "data.val_images",
               "data.jitter", "data.without_boxes", "model.relative", "model.drop_path", "optim.layer_decay",
               "init.resample"),
}  # fmt: skip
_TOKENS = {
    "jepa": ("learned", "projection_bias", "none"),
    "mae": ("learned",),
    "mae_plus": ("learned", "adversary"),
}


def _unset(section: BaseModel, path: str) -> str | None:
    """The first setting at `path` that is not its default, dotted; None if all are."""
    value, default = section, type(section)()
    for name in path.split("."):
        value, default = getattr(value, name), getattr(default, name)
    if value == default:
        return None
    if hasattr(value, "model_fields_set"):
        for name in type(value).model_fields:
            if getattr(value, name) != getattr(default, name):
                return f"{path}.{name}"
    return path


# What switches a group of settings off, and with it all that a base recipe says there.
_SWITCHES = {"method.adversary": "method.adversary.mode", "model.relative": "model.relative.terms"}


def _switched_off(config: Config, path: str) -> bool:
    """Whether the group at `path` was switched off by name; unsaid, `none` was rather forgotten."""
    if path not in _SWITCHES:
        return False
    section, _, group = path.partition(".")
    values, switch = getattr(getattr(config, section), group), _SWITCHES[path].rpartition(".")[2]
    return getattr(values, switch) == "none" and switch in values.model_fields_set


def contradiction(config: Config) -> str | None:
    """One sentence on the first settings that contradict each other, with the way out; None where there are none."""
    kind = config.method.kind
    foreign = {path: owner for owner, paths in _OF.items() for path in paths if path not in _OF[kind]}
    for path in foreign:
        section, _, rest = path.partition(".")
        if _switched_off(config, path):
            continue
        found = _unset(getattr(config, section), rest)
        if found:
            every = [name for name, paths in _OF.items() if path in paths]
            # Whoever pre-trains is not helped by the names of tasks, nor the other way round.
            alike = [name for name in every if (name in _TOKENS) == (kind in _TOKENS)]
            owners = " or ".join(alike or every)
            switch = _SWITCHES.get(path)
            way = f"set {switch}=none as well" if switch else "leave it out"
            return (
                f"{section}.{found} belongs to method.kind={owners}, and this is {kind}; {way}, or start from a recipe "
                f"of {kind}"
            )
    mask = config.mask
    if mask.setting == "recommended" and _unset(mask, "min_keep"):
        return f"mask.min_keep={mask.min_keep} belongs to mask.setting=published; set mask.context_keep instead"
    if mask.setting == "published" and mask.context_keep is not None:
        return f"mask.context_keep={mask.context_keep} belongs to mask.setting=recommended; set it to null"
    if config.method.mask_token not in _TOKENS.get(kind, ("learned",)):
        choices = " or ".join(_TOKENS.get(kind, ("learned",)))
        return f"method.mask_token={config.method.mask_token} is not for method.kind={kind}; choose {choices}"
    if config.model.class_token not in (None, kind != "jepa") and kind in _TOKENS:
        has = "has no" if kind == "jepa" else "has a"
        return f"method.kind={kind} {has} class token; leave model.class_token out"
    if (
        kind in ("mae", "mae_plus")
        and config.method.normalise_pixels
        and config.model.patch_size**2 * config.model.channels == 1
    ):
        return (
            "method.normalise_pixels divides by the deviation within a patch, and a patch of one number has none; set "
            "model.patch_size=2 or more, or method.normalise_pixels=false"
        )
    return _of_relative(config) or _of_adversary(config) or _of_engine(config)


def _of_relative(config: Config) -> str | None:
    relative = config.model.relative
    if relative.terms == "none":
        found = None if _switched_off(config, "model.relative") else _unset(config.model, "relative")
        return f"model.{found} needs relative positions; set model.relative.terms=k as well" if found else None
    if relative.mode == "bias" and "v" in relative.terms:
        return (
            f"model.relative.mode=bias has no term on values (model.relative.terms={relative.terms}); take v out, or "
            "choose contextual"
        )
    if relative.lookup != "hard" and (relative.method != "product" or relative.mode != "contextual"):
        return (
            f"model.relative.lookup={relative.lookup} reads between the buckets of a contextual product table; set "
            "model.relative.method=product and mode=contextual, or without a coordinate attack lookup=hard"
        )
    return None


def _of_adversary(config: Config) -> str | None:
    adversary, relative = config.method.adversary, config.model.relative
    token = config.method.mask_token
    if token == "adversary" and (adversary.mode != "embedding" or relative.terms != "none"):
        return (
            "method.mask_token=adversary is the absolute embedding attack as released; set "
            "method.adversary.mode=embedding and model.relative.terms=none, or method.mask_token=learned"
        )
    if adversary.mode == "none":
        found = None if _switched_off(config, "method.adversary") else _unset(config.method, "adversary")
        return (
            f"method.{found} needs an adversary; set method.adversary.mode=coordinate or embedding" if found else None
        )
    if relative.terms == "none" or adversary.mode == "coordinate":
        for name in ("where", "per"):
            if _unset(adversary, name):
                return (
                    f"method.adversary.{name}={getattr(adversary, name)} says how an embedding attacks relative "
                    "positions, which this attack does not; leave it out"
                )
    if adversary.norm == "none" and adversary.epsilon is not None:
        return (
            f"method.adversary.epsilon={adversary.epsilon:g} bounds nothing without a norm; set "
            "method.adversary.norm=l2 or linf, or epsilon=null"
        )
    if adversary.norm != "none" and adversary.epsilon is None:
        return f"method.adversary.norm={adversary.norm} needs a bound; set method.adversary.epsilon, or norm=none"
    if relative.terms == "none":
        if adversary.mode == "embedding" and token == "learned" and adversary.norm == "none":
            return (
                "method.adversary.mode=embedding needs a bound, or it would only chase the mask token; set "
                "method.adversary.norm=l2 and method.adversary.epsilon"
            )
    elif adversary.mode == "coordinate" and relative.lookup == "hard":
        return (
            "method.adversary.mode=coordinate moves patches between buckets, which model.relative.lookup=hard cannot "
            "read; set model.relative.lookup=interpolated, or method.adversary.mode=none or embedding"
        )
    elif adversary.mode == "embedding" and "k" not in relative.terms:
        return (
            f"method.adversary.mode=embedding acts on the term of keys, and model.relative.terms={relative.terms}; "
            "add k, or choose mode=coordinate"
        )
    elif adversary.mode == "embedding" and (relative.method == "cross" or relative.mode == "bias"):
        return (
            "method.adversary.mode=embedding adds a vector to a contextual table; set model.relative.mode=contextual "
            "and model.relative.method=product, euclidean or quantised"
        )
    return None


_OF_ENGINE = {"deepspeed": "deepspeed", "replicas": "fsdp", "offload": "fsdp"}


def _of_engine(config: Config) -> str | None:
    engine = config.engine
    for name, kind in _OF_ENGINE.items():
        if engine.kind != kind and _unset(engine, name):
            value = str(getattr(engine, name)).lower() if name == "offload" else getattr(engine, name)
            return (
                f"engine.{name}={value} belongs to engine.kind={kind}, and this is {engine.kind}; set "
                f"engine.kind={kind} as well, or leave it out"
            )
    return None
