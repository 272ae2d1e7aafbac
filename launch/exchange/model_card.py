"""The model card of exported weights: README.md in the form of the Hugging Face hub."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ...models.vit import SIZES, Encoder
from ...models.zoo_out import timm_settings
from ..config import RESULT_SECTIONS, Config, flatten
from ..encoder_weights import EncoderWeights, encoder_weights, find_checkpoint
from ..errors import UserError

_LIBRARY = {"timm": "timm", "hf": "transformers", "detectron2": "detectron2", "mmseg": "mmsegmentation"}
_METHODS = {"jepa": "I-JEPA", "mae": "MAE", "mae_plus": "MAE+", "classify": "fine-tuning", "segment": "segmentation",
            "detect": "detection"}  # fmt: skip
_LICENCES = {"CC-BY-NC 4.0": "cc-by-nc-4.0"}
_TASKS = {"classify": "image-classification", "segment": "image-segmentation", "detect": "object-detection"}
_LOCAL = ("data.path", "data.val_path", "init.from", "run.dir")  # of the machine that trained


def model_card(
    weights: EncoderWeights,
    encoder: Encoder,
    config: Config,
    target: str,
    checkpoint: str | Path,
    file: str,
) -> str:
    """The card of `weights`, read from `checkpoint` and exported for `target` as `file`."""
    about, results = _training(checkpoint), _results(checkpoint)
    origin = _origin(weights, config)
    rows = _figures(results)
    name = f"{_title(encoder, config, weights)}"
    header = _header(name, config, weights, target, rows, origin)
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"The encoder of a vision transformer, {weights.what.removeprefix('the ')}, exported by elsewhere "
        f"{version('elsewhere')} for {target}."
        + (f" {config.about[0].upper()}{config.about[1:]}." if config.about and weights.foreign is None else ""),
        "## Architecture\n\n" + _architecture(encoder),
        "## How to load it\n\n" + _loading(encoder, target, file),
        "## Training\n\n" + _recipe(config, weights, about),
        "## Figures\n\n" + _table(rows),
        "## Versions\n\n" + _versions(about),
        "## Licence\n\n" + origin["text"],
    ]
    return "\n\n".join(parts) + "\n"


def _size_name(encoder: Encoder) -> str:
    size = encoder.size
    for name, one in SIZES.items():
        if (one.width, one.depth, one.heads) == (size.width, size.depth, size.heads):
            letter = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}.get(name, name)
            return f"ViT-{letter}/{encoder.patch_size}"
    return f"ViT {size.width}x{size.depth}/{encoder.patch_size}"


def _method(config: Config) -> str:
    """The method by its published name: StoP and AdPE where positions are stochastic or attacked."""
    method = config.method
    if method.kind == "jepa" and method.stop.where != "none":
        return "StoP"
    if method.kind == "mae_plus" and method.adversary.mode != "none":
        return "AdPE"
    return _METHODS[method.kind]


def _title(encoder: Encoder, config: Config, weights: EncoderWeights) -> str:
    if weights.origin is not None:
        return f"{weights.origin.method} {_size_name(encoder)}"
    if weights.foreign is not None:
        return f"{weights.foreign.kind} {_size_name(encoder)}".replace("ViT ViT", "ViT")
    task = {"classify": "Fine-tuned", "segment": "Segmentation", "detect": "Detection"}.get(config.method.kind)
    return f"{task or _method(config)} {_size_name(encoder)}"


def _training(checkpoint: str | Path) -> dict[str, Any]:
    """What the checkpoint says of its training, or the metadata of a consolidated file; empty where nothing does."""
    path = Path(checkpoint)
    if path.is_dir():
        saved = find_checkpoint(path)
        return dict(saved.about) if saved else {}
    if path.suffix == ".safetensors" and path.is_file():
        from ..safetensors_file import read_header

        step = read_header(path)[0].get("elsewhere.step")
        return {"step": int(step)} if step else {}
    return {}


def _results(checkpoint: str | Path) -> dict[str, Any]:
    """`results.json` of the run that a run or checkpoint folder belongs to; empty where there is none."""
    path = Path(checkpoint)
    for folder in (path, path.parent.parent):
        file = folder / "results.json"
        if path.is_dir() and file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{file} cannot be read as JSON ({error}); mend it, or move it away.") from error
            return found if isinstance(found, dict) else {}
    return {}


def _figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each measured accuracy: what was measured, on what, its value in per cent and how sure it is."""
    rows: list[dict[str, Any]] = []
    for entry in results.get("evaluations", []):
        data = entry.get("val_data") or entry.get("data") or "unnamed images"
        data = data if isinstance(data, str) else ", ".join(data)
        for one in entry.get("best", []):
            rows.append(_row(f"{entry.get('probe')}, {one.get('setting')}", data, one, entry.get("val_images")))
    after = results.get("after") or {}
    for key, name in (("knn", "k-NN"), ("linear", "linear probe")):
        if key in after:
            labels = f", {after['labels_per_class']} labels per class" if after.get("labels_per_class") else ""
            one = {"top1": after[key], "std": after.get(f"{key}_std")}
            rows.append(_row(name + labels, "held-out training images", one, after.get("val_images")))
    if "top1" in after:
        rows.append(
            _row("fine-tuning", "validation images", {**after, "interval": after.get("top1_interval")},
                 after.get("images"))
        )  # fmt: skip
    return rows


def _row(what: str, data: str, one: dict[str, Any], images: int | None) -> dict[str, Any]:
    sure = ""
    if one.get("interval"):
        sure = f"{100 * one['interval'][0]:.2f} to {100 * one['interval'][1]:.2f}"
    elif one.get("std") is not None:
        sure = f"± {100 * one['std']:.2f}"
    return {"what": what, "data": data, "value": round(100 * one["top1"], 2), "sure": sure, "images": images}


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "None were measured where these weights come from."
    lines = ["| what | on | images | top-1 % | 95 % interval or ± |", "|---|---|---|---|---|"]
    lines += [f"| {r['what']} | {r['data']} | {r['images'] or ''} | {r['value']:.2f} | {r['sure']} |" for r in rows]
    return "\n".join(lines)


def _origin(weights: EncoderWeights, config: Config) -> dict[str, Any]:
    """Licence fields and a sentence on whose weights these are, or were at the start."""
    entry, started = weights.origin, config.init.from_ if weights.foreign is None else None
    if entry is None and started and started.startswith("zoo:"):
        from ..foreign import published

        entry = published(started.removeprefix("zoo:").partition("=")[0])
    if entry is not None:
        how = "are" if weights.origin is not None else "were trained from"
        text = f"These weights {how} the published checkpoint {entry.name} of {entry.source}, under {entry.licence}."
        known = _LICENCES.get(entry.licence)
        fields = {"license": known} if known else {
            "license": "other", "license_name": entry.licence.lower().replace(" ", "-"), "license_link": entry.source
        }  # fmt: skip
        return {"text": text, "fields": fields, "datasets": [entry.data.lower()]}
    if weights.foreign is not None or (started and not _own(started)):
        whose = started or weights.what
        text = f"These weights come from another project ({whose}); its licence holds for them, too."
        return {"text": text, "fields": {"license": "other", "license_name": "of-the-origin"}, "datasets": []}
    text = (
        "The owner of these weights has to choose one. elsewhere, which trained them, is under Apache-2.0; the code of "
        "StoP, on whose method it builds, is published under CC-BY-NC 4.0 and AdPE's under MIT for academic use."
    )
    return {"text": text, "fields": {"license": "other", "license_name": "to-be-chosen"}, "datasets": []}


def _own(started: str) -> bool:
    """Whether the weights that a run started from are one of ours; what cannot be read any more counts as foreign."""
    try:
        return not started.startswith("timm:") and encoder_weights(started).foreign is None
    except UserError:
        return False


def _header(
    name: str,
    config: Config,
    weights: EncoderWeights,
    target: str,
    rows: list[dict[str, Any]],
    origin: dict[str, Any],
) -> dict[str, Any]:
    tags = ["vision", "self-supervised-learning", "masked-image-modeling", "vision-transformer"]
    if weights.origin is not None:
        tags.append(weights.origin.method.lower())
    elif weights.foreign is None:
        tags.append(_method(config).lower())
    paths, _ = config.data.places() if weights.foreign is None else ([], None)
    datasets = origin["datasets"] + (["cifar10"] if any(path.partition(":")[0] == "cifar10" for path in paths) else [])
    header: dict[str, Any] = {
        **origin["fields"], "library_name": _LIBRARY.get(target, "elsewhere"),
        "pipeline_tag": _TASKS.get(config.method.kind, "image-feature-extraction"), "tags": tags,
    }  # fmt: skip
    if datasets:
        header["datasets"] = datasets
    if rows:
        header["metrics"] = ["accuracy"]
        header["model-index"] = [{"name": name, "results": [
            {"task": {"type": "image-classification", "name": row["what"]},
             "dataset": {"type": "image-folder", "name": row["data"]},
             "metrics": [{"type": "accuracy", "value": row["value"], "name": "top-1 %"}]}
            for row in rows
        ]}]  # fmt: skip
    return header


def _architecture(encoder: Encoder) -> str:
    size, relative = encoder.size, encoder.relative
    positions = {"sincos": "sine and cosine, fixed", "learned": "learned"}[encoder.positions.kind]
    if relative is not None:
        positions += f"; relative on {relative.terms} ({relative.method}, {relative.lookup})"
    rows = {
        "width, depth, heads": f"{size.width}, {size.depth}, {size.heads}",
        "MLP": f"{int(size.width * size.mlp_ratio)}", "patch": f"{encoder.patch_size} pixels",
        "image": f"{encoder.image_size[0]}x{encoder.image_size[1]}, {encoder.channels} channels",
        "class token": "yes" if encoder.num_prefix_tokens else "no", "positions": positions,
        "numbers": f"{sum(one.numel() for one in encoder.parameters()):,}",
        "pixels": f"in 0…1, less {_short(encoder.pixel_mean)}, by {_short(encoder.pixel_std)}",  # pyright: ignore
    }  # fmt: skip
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {text} |" for name, text in rows.items())


def _short(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _loading(encoder: Encoder, target: str, file: str) -> str:
    images = f"images = torch.zeros(1, {encoder.channels}, {encoder.image_size[0]}, {encoder.image_size[1]})"
    if target == "timm":
        code = f'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n{images}\n'\
               "tokens = model.forward_features(images)"  # fmt: skip
        return f"```python\nimport timm\nimport torch\n\n{code}\n```"
    if target == "hf":
        note = "" if not encoder.num_prefix_tokens else (
            "\n\nThe pooler of ViTModel is not part of these weights: pass `add_pooling_layer=False`, or leave its "
            "output alone."
        )  # fmt: skip
        code = f'model = AutoModel.from_pretrained("FOLDER").eval()\n{images}\n'\
               "tokens = model(pixel_values=images).last_hidden_state"  # fmt: skip
        return f"```python\nimport torch\nfrom transformers import AutoModel\n\n{code}\n```{note}"
    _, settings = timm_settings(encoder)
    token = bool(encoder.num_prefix_tokens)
    text = {
        "detectron2": f"`train.init_checkpoint={file}` of a ViTDet config whose backbone's `net` has embed_dim="
        f"{settings['embed_dim']}, depth={settings['depth']}, num_heads={settings['num_heads']}, pretrain_img_size="
        f"{encoder.image_size[0]} and pretrain_use_cls_token={token}. detectron2's ViT has no class token and no "
        "last norm, so these are not part of the file.",
        "mmseg": f"`init_cfg=dict(type='Pretrained', checkpoint='{file}')` of a VisionTransformer backbone with "
        f"embed_dims={settings['embed_dim']}, num_layers={settings['depth']}, num_heads={settings['num_heads']}, "
        f"img_size={tuple(encoder.image_size)}, patch_size={encoder.patch_size}, with_cls_token={token}, "
        "final_norm=True and norm_cfg=dict(type='LN', eps=1e-6).",
        "vissl": f"`config.MODEL.WEIGHTS_INIT.PARAMS_FILE={file}`, with the vision_transformer trunk"
        + ("." if token else " without class token of the StoP and I-JEPA authors: VISSL's own always has one.")
        + " VISSL's layer norms have eps 1e-5, and these weights were trained with 1e-6.",
        "ijepa": f"`torch.load('{file}')['target_encoder']`, whose names have the prefix `module.`, as the released "
        "I-JEPA and StoP code reads it.",
        "mae": f"`torch.load('{file}')['model']`, under the names of the released MAE"
        + (" and AdPE." if encoder.relative is not None else "."),
    }[target]  # fmt: skip
    return f"{text}\n\nIn elsewhere itself: `elsewhere.load('{file}')`."


def _recipe(config: Config, weights: EncoderWeights, about: dict[str, Any]) -> str:
    if weights.foreign is not None:
        if weights.origin is not None:
            entry = weights.origin
            published = f" Published: {entry.result}." if entry.result else ""
            return f"{entry.method} on {entry.data}, by its authors: {entry.source}.{published}"
        return "By another project; what is known of it is the architecture."
    optim = config.optim
    method = _method(config)
    facts = [f"{method[0].upper()}{method[1:]} on {_images(config, about)}"]
    if "step" in about:
        epochs = f" ({about['epoch']:.4g} epochs)" if "epoch" in about else ""
        facts.append(f"{about['step']:,} steps{epochs} of {optim.batch_size:,} images")
    facts.append(f"peak learning rate {optim.rate:.4g}, weight decay {optim.weight_decay:g}")
    if "precision" in about:
        facts.append(f"in {about['precision']} on {about.get('ranks', 1)} rank{'s' * (about.get('ranks', 1) != 1)}")
    values = config.to_dict()
    flat = dict(flatten({section: values[section] for section in RESULT_SECTIONS if section != "seed"}))
    settings = {"seed": config.seed} | {name: value for name, value in flat.items() if name not in _LOCAL}
    listed = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"{'; '.join(facts)}.\n\n<details><summary>The whole recipe</summary>\n\n```yaml\n{listed}```\n\n</details>"


def _images(config: Config, about: dict[str, Any]) -> str:
    paths = [] if about.get("images") == "data set" else config.data.places()[0]
    named = ", ".join(Path(path).name if "/" in path else path for path in paths) or "images of one's own"
    return named + (f" ({about['samples']:,} images)" if about.get("samples") else "")


def _versions(about: dict[str, Any]) -> str:
    now = ", ".join(f"{name} {version(name)}" for name in ("elsewhere", "torch", "timm", "safetensors"))
    trained = f" Trained with torch {about['torch']}." if "torch" in about else ""
    return f"Exported with {now}.{trained}"
