"""Publishing a kept run on the Hugging Face Hub: its weights, its record and a model card, in one commit.

Ids, labels and predictions of single images stay here, and so do pictures of the competition's images.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from foldwise.data.competition import CompetitionSpec, load_competition
from foldwise.errors import Fault, FoldwiseError, HubError, RecordError
from foldwise.files import atomic_path, atomic_write, pretty_json
from foldwise.learn.device import pick_runtime
from foldwise.learn.models import OWN_ARCHS
from foldwise.metrics import confusion_matrix, per_class_table
from foldwise.records.store import Run, external_words, load_run, shown
from foldwise.runs.kept import KeptModel, kept_models, verify_weights, weight_files
from foldwise.spec.yaml import read_yaml
from foldwise.stats import Z95, wilson

# Of the report only what shows no image of the competition and names none.
_REPORT = ("history.png", "confusion.png", "calibration.png", "classification_report.txt")
# What an earlier publication may have left that a later one lacks.
_OURS = re.compile(r"fold\d+/seed\d+/weights\.safetensors|report/[^/]+|config\.json|metrics\.json")
_OF_A_NEW_REPOSITORY = {".gitattributes", "README.md"}

# The hub's names of metrics, where they differ.
_HUB_METRICS = {"macro_f1": "f1"}
_EXPRESSIONS = {
    "afraid", "anger", "angry", "contempt", "disgust", "disgusted", "fear", "fearful", "happiness", "happy", "neutral",
    "sad", "sadness", "surprise", "surprised",
}  # fmt: skip
_SIGN_IN = "run `hf auth login`, or set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"

_Content = Path | bytes


@dataclass(frozen=True)
class Published:
    """What was published, or would have been.

    Attributes:
        address: Of the repository; of the folder after a dry run.
        sizes: Bytes of each file, by its path in the repository.
        private: Whether only its owner sees the repository; None after a dry run.
        commit: The hub's commit; None after a dry run.
        notes: Lines for the user about what is missing.
    """

    address: str
    sizes: dict[str, int]
    private: bool | None
    commit: str | None
    notes: tuple[str, ...]


def publish(
    root: Path, name: str, repo: str, *, private: bool = False, license_id: str = "other", dry_run: Path | None = None
) -> Published:
    """Push a kept run to the hub, or write to a folder what would be pushed.

    A repository that is not there is made. One that holds an earlier publication gets the new files, and loses those
    that the new one lacks, in the same commit.

        README.md                              model card
        config.json                            how timm finds the first model; for networks that timm knows alone
        fold<k>/seed<s>/weights.safetensors    checked against run.json
        spec.yaml, run.json, metrics.json
        report/                                curves, confusions, calibration, table of classes; where they are made

    Args:
        root: The project's root.
        name: A complete run under `oof/`.
        repo: `owner/name`.
        private: Make the repository a private one; a public one that is there already is then refused.
        license_id: The hub's identifier of the licence, e.g. `mit`.
        dry_run: A folder, new or empty, that gets the files instead of the hub; needs no network and no token.

    Returns:
        What was published, and where.

    Raises:
        RecordError: If the run is not complete or a smoke run, or its weights are not on this machine or not those that
            `run.json` vouches for.
        FoldwiseError: If `repo` is no name, or the folder is not empty.
        HubError: If the hub cannot be reached, or refuses.
    """
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise ValueError("the owner is missing")
    except ValueError as error:
        raise FoldwiseError(f"REPO={repo}: is no name of a repository ({error})\n  fix: REPO=<owner>/<name>") from None
    if dry_run is not None and dry_run.exists() and (not dry_run.is_dir() or any(dry_run.iterdir())):
        raise FoldwiseError(f"{dry_run} is not an empty folder\n  fix: name a new one, or empty it")
    if dry_run is None and get_token() is None:
        raise HubError(f"REPO={repo}: you are not logged in to the Hugging Face Hub\n  fix: {_SIGN_IN}")
    run = load_run(root / "oof" / name)
    if run.info["smoke"]:
        raise RecordError([Fault(shown(run.path), "is a smoke run", f"make exp EXP={name}")])
    files, notes = _gather(run, load_competition(root, run.info["competition"]), repo, license_id)
    sizes = {
        path: len(content) if isinstance(content, bytes) else content.stat().st_size for path, content in files.items()
    }
    if dry_run is not None:
        _write(files, dry_run)
        return Published(str(dry_run), sizes, None, None, tuple(notes))
    with _translated(repo):
        address, is_private, commit = _push(files, repo, private=private, message=f"Publish {name}")
    return Published(address, sizes, is_private, commit, tuple(notes))


def render(published: Published) -> list[str]:
    """What was published, as lines for the terminal."""
    sizes = published.sizes
    weights = [path for path in sizes if path.endswith(".safetensors")]
    total = f"{sum(sizes.values()) / 1e6:,.1f} MB"
    where = "written" if published.commit is None else "pushed"
    models = f"{len(weights)} {'model' if len(weights) == 1 else 'models'}"
    rest = ", ".join(path for path in sizes if path not in weights)
    lines = [f"{where:<12} {len(sizes)} files, {total}: {models}, {rest}"]
    lines += [f"{'note':<12} {note}" for note in published.notes]
    lines.append(f"{'left out':<12} oof.csv and test.csv (ids, labels, predictions), and pictures of the images")
    if published.commit is not None:
        lines.append(f"{'visibility':<12} {'private' if published.private else 'public'}")
        lines.append(f"{'commit':<12} {published.commit}")
    lines.append(f"{'address':<12} {published.address}")
    return lines


def _gather(
    run: Run, competition: CompetitionSpec, repo: str, license_id: str
) -> tuple[dict[str, _Content], list[str]]:
    """The files of a publication by their path in the repository, and notes on what is missing."""
    weights = [path for _, path in sorted(weight_files(run).items())]
    for path in weights:
        verify_weights(run, path)
    first = next(kept_models(run, pick_runtime("cpu", "fp32", torch.get_num_threads())))
    own = first.spec.arch in OWN_ARCHS or first.spec.head is not None
    names = [path.relative_to(run.path).as_posix() for path in weights]
    files: dict[str, _Content] = {}
    if not own:
        files["config.json"] = pretty_json(_timm_config(first, names[0])).encode()
    files |= dict(zip(names, weights, strict=True))
    files |= {name: run.path / name for name in ("spec.yaml", "run.json")}
    notes = []
    if len(run.ids):
        files["metrics.json"] = pretty_json(_metrics(run)).encode()
    report = [f"report/{name}" for name in _REPORT if (run.path / "report" / name).exists()]
    if not report:
        notes.append(f"there is no report, and so no pictures: make report EXP={run.name}, then publish again")
    files |= {name: run.path / name for name in report}
    card = _card(run, competition, first, repo=repo, license_id=license_id, weights=names, report=report, own=own)
    return {"README.md": card.encode(), **files}, notes


def _write(files: Mapping[str, _Content], folder: Path) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            atomic_write(folder / name, content)
        else:
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(content, temporary)


def _push(files: Mapping[str, _Content], repo: str, *, private: bool, message: str) -> tuple[str, bool, str]:
    """Make the repository where need be, and commit: its address, whether it is private, and the commit."""
    api = HfApi(library_name="foldwise")
    # None leaves it to the owner's own setting, which may be stricter than public.
    api.create_repo(repo, private=private or None, exist_ok=True)
    there = api.model_info(repo)
    held = {sibling.rfilename for sibling in there.siblings or ()}
    if private and not there.private:
        raise HubError(
            f"REPO={repo}: is there and public, but PRIVATE=1 was asked for; nothing was uploaded\n"
            f"  fix: make it private at {api.endpoint}/{repo}/settings, or choose another name"
        )
    if (foreign := sorted(held - _OF_A_NEW_REPOSITORY)) and "run.json" not in held:
        raise HubError(
            f"REPO={repo}: holds files that no run left there ({', '.join(foreign[:3])}); nothing was uploaded\n"
            "  fix: choose another name, or empty it"
        )
    stale = sorted(path for path in held - files.keys() if _OURS.fullmatch(path))
    # Not `upload_folder`, which makes several commits where Xet is installed.
    done = api.create_commit(
        repo,
        operations=[
            *(CommitOperationDelete(path) for path in stale),
            *(CommitOperationAdd(path, content) for path, content in files.items()),
        ],
        commit_message=message,
    )
    return f"{api.endpoint}/{repo}", bool(there.private), done.oid


@contextmanager
def _translated(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into what the user can mend."""
    try:
        yield
    # Of the client's HTTP library; not every one is an OSError.
    except (OSError, ValueError, RuntimeError, hub_errors.HTTPError) as error:  # type: ignore[attr-defined]
        # Uploads that fail are a RuntimeError around the cause.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        raise HubError(f"REPO={repo}: {_reason(repo, cause)}") from error


def _reason(repo: str, error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, hub_errors.HfHubHTTPError):
        status = error.response.status_code
        told = (error.server_message or lines[0]).splitlines()[0]
        if status == 401:
            return f"the hub does not accept the token (401: {told})\n  fix: {_SIGN_IN}"
        if status == 403:
            owner = repo.partition("/")[0]
            return (
                f"the token may not write there (403: {told})\n"
                f"  fix: take a token with write access to `{owner}` (https://huggingface.co/settings/tokens), or a "
                "name of your own"
            )
        return f"the hub refuses ({status}: {told})\n  fix: see https://status.huggingface.co, and try again"
    if isinstance(error, ValueError):
        return (
            f"the hub refuses: {' '.join(lines)}\n"
            "  fix: for a licence, give an identifier of https://huggingface.co/docs/hub/repositories-licenses"
        )
    if not isinstance(error, OSError | hub_errors.HTTPError):  # type: ignore[attr-defined]
        return (
            f"the upload failed ({type(error).__name__}: {lines[0][:160]})\n"
            "  fix: run it again; what is there already is not sent twice"
        )
    return (
        f"the Hugging Face Hub cannot be reached\n  ({type(error).__name__}: {lines[0][:160]})\n"
        f"  fix: go online; or write the files with --dry-run <folder>, and elsewhere `hf upload {repo} <folder>`"
    )


def _timm_config(model: KeptModel, weights: str) -> dict[str, Any]:
    """What makes `timm.create_model("hf_hub:<repo>", pretrained=True)` load one of the models."""
    size = model.spec.image_size
    return {
        "architecture": model.spec.arch.partition(".")[0],
        "num_classes": len(model.classes),
        "label_names": list(model.classes),
        "model_args": _constructor(model),
        "pretrained_cfg": {
            "hf_hub_filename": weights,
            "input_size": [model.channels, size, size],
            "interpolation": model.spec.interpolation,
            "crop_pct": 1.0,
            "mean": model.prepare.mean.flatten().tolist(),
            "std": model.prepare.std.flatten().tolist(),
            **_timm_names(model.spec.arch),
        },
    }


def _timm_names(arch: str) -> dict[str, Any]:
    """Where timm finds the first layer and the classifier of a network."""
    config = timm.get_pretrained_cfg(arch)
    return {} if config is None else {"first_conv": config.first_conv, "classifier": config.classifier}


def _constructor(model: KeptModel) -> dict[str, Any]:
    """The arguments that timm made the network with."""
    arguments: dict[str, Any] = dict(vars(model.model)["_model_args"])
    return arguments


def _metrics(run: Run) -> dict[str, Any]:
    """The figures of the validated images, without the images."""
    info = run.info
    low, high = _interval(info)
    kept = (
        "metric", "score", "standard_error", "n_scored", "fold_scores", "fold_standard_errors", "seed_scores",
        "seed_std", "score_without_tta", "test_score", "test_standard_error", "marks",
    )  # fmt: skip
    return {
        **{key: info.get(key) for key in kept},
        "interval_95": [low, high],
        "classes": per_class_table(run.labels, run.probs, run.classes),
        "confusion": confusion_matrix(run.labels, run.probs).tolist(),
    }


def _interval(info: Mapping[str, Any]) -> tuple[float, float]:
    """95% interval of the score by its standard error, normal approximation."""
    reach = Z95 * info["standard_error"]
    return info["score"] - reach, info["score"] + reach


def _card(
    run: Run,
    competition: CompetitionSpec,
    first: KeptModel,
    *,
    repo: str,
    license_id: str,
    weights: Sequence[str],
    report: Sequence[str],
    own: bool,
) -> str:
    """The model card: metadata for the hub, then what a reader must know to use the models and to doubt them."""
    info = run.info
    metric = info["metric"]
    measured = "out of fold" if info["split"]["kind"] == "kfold" else "held out"
    results = []
    if info["score"] is not None:
        results.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=info["competition"],
                dataset_name=competition.title or info["competition"],
                dataset_split=measured,
                metric_type=_HUB_METRICS.get(metric, metric),
                metric_name=f"{metric}, {measured} (standard error {info['standard_error']:.4f})",
                metric_value=round(info["score"], 6),
            )
        )
    data = ModelCardData(
        license=license_id,
        library_name="foldwise" if own else "timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "foldwise", *([] if own else ["timm"]), info["competition"]],
        base_model=_start_weights(run)[1],
        metrics=[_HUB_METRICS.get(metric, metric)] if results else None,
        model_name=run.name,
        eval_results=results or None,
    )
    parts = [
        f"# {run.name}",
        _opening(run, competition, first),
        "## Score",
        *(_score(run, measured) if results else ["Nothing was held out, so nothing is known about how good it is."]),
    ]
    pictures = [name for name in report if name.endswith(".png")]
    if pictures:
        parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    parts += [
        "## Training",
        _training(run, competition),
        "## Use",
        _use(run, repo, own=own),
        f"```python\n{_snippet(competition, first, repo, weights, own=own)}```",
        "## Intended use and limits",
        _limits(run),
        "## Files",
        "- `fold<k>/seed<s>/weights.safetensors`: a model each; its metadata `foldwise` holds network, classes, mean "
        "and standard deviation\n"
        "- `spec.yaml`: the whole recipe; `run.json`: the record, with the sha256 of every file of weights\n"
        + ("- `metrics.json`: the figures above, and the confusion matrix\n" if results else "")
        + "\nIds, labels and predictions of the competition's images are not published, nor are pictures of them.",
        "## Licence",
        f"`{license_id}`" + (": none was stated; ask before you use it." if license_id == "other" else "."),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _opening(run: Run, competition: CompetitionSpec, first: KeptModel) -> str:
    info = run.info
    count = len(info["weights"])
    seeds = f" and {len(info['seeds'])} seeds" if len(info["seeds"]) > 1 else ""
    which = f"{count} models, one for each of {count // len(info['seeds'])} folds{seeds}" if count > 1 else "one model"
    parameters = f", {info['parameters']:,} parameters" if info["parameters"] else ""
    return (
        f"{competition.title or info['competition']}: images into {len(run.classes)} classes "
        f"({', '.join(run.classes)}). `{first.spec.arch}`{parameters}, input {first.spec.image_size} px; {which}. "
        "Trained with Foldwise."
    )


_MARKS = {
    "optimistic": "the scored images themselves chose the epoch or ended the training, so the score is too high",
    "transductive": "the pixels of the unlabelled test images were trained on, with labels by other models",
}


def _score(run: Run, measured: str) -> list[str]:
    info = run.info
    low, high = _interval(info)
    lines = [
        f"**{info['metric']} {info['score']:.4f} ± {info['standard_error']:.4f}** (standard error), 95% interval "
        f"{low:.4f} to {high:.4f}, {measured}, {info['n_scored']:,} images."
    ]
    if info["split"]["kind"] == "kfold":
        how = (
            f"Each image was predicted by models that never saw it: {len(info['fold_scores'])} folds, near-duplicates "
            "within one."
        )
    else:
        how = "The images were kept out of training."
    views = ", ".join(f"`{view}`" for view in info["tta"])
    seeds = f" and the seeds {', '.join(map(str, info['seeds']))}" if len(info["seeds"]) > 1 else ""
    how += f" Probabilities are the mean over the views {views}{seeds}."
    if len(info["seeds"]) == 1:
        how += f" One seed ({info['seeds'][0]}): how much another would change is not in the error."
    how += " The error is by bootstrap over groups of near-duplicates, for the models as they were trained."
    lines.append(how)
    more = []
    if len(info["fold_scores"]) > 1:
        more.append(f"- folds: {', '.join(f'{score:.4f}' for score in info['fold_scores'].values())}")
    if info["seed_std"] is not None:
        seeds = ", ".join(f"{score:.4f}" for score in info["seed_scores"].values())
        more.append(f"- seeds alone: {seeds} (standard deviation {info['seed_std']:.4f})")
    if info["test_score"] is not None:
        more.append(f"- test part: {info['test_score']:.4f} ± {info['test_standard_error']:.4f}")
    more += [f"- marked **{mark}**" + (f": {_MARKS[mark]}" if mark in _MARKS else "") for mark in info["marks"]]
    if more:
        lines.append("\n".join(more))
    rows = ["| class | recall | 95% interval | precision | F1 | images |", "|---|---|---|---|---|---|"]
    for row in per_class_table(run.labels, run.probs, run.classes):
        low, high = wilson(np.array(row["recall"] * row["support"]), np.array(row["support"]))
        figures = f"{row['recall']:.3f} | {low:.3f} to {high:.3f} | {row['precision']:.3f} | {row['f1']:.3f}"
        rows.append(f"| {row['class']} | {figures} | {row['support']:,} |")
    lines.append("\n".join(rows))
    return lines


def _training(run: Run, competition: CompetitionSpec) -> str:
    info = run.info
    told = [
        f"- data: `{info['competition']}`, {competition.image.width}x{competition.image.height} px, "
        f"{'gray' if competition.image.channels == 1 else 'RGB'}; sha256 `{info['hashes']['inputs']}`"
    ]
    told.append(f"- external data: {', '.join(external_words(info['external'])) or 'none'}")
    told.append(f"- starting weights: {_start(run)}")
    if info["git"]:
        told.append(f"- commit: `{info['git']['commit']}`{', with changes on top' if info['git']['dirty'] else ''}")
    if info["command"]:
        told.append(f"- command: `{info['command']}`")
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    told.append(f"- device: {info['device']}" + (f"; {versions}" if versions else ""))
    told.append("- recipe: `spec.yaml`")
    return "\n".join(told)


def _start(run: Run) -> str:
    weights, pretrained = _start_weights(run)
    if pretrained is not None:
        return f"`{pretrained}`, pretrained on other images"
    return "none" if weights == "none" else f"the run `{weights.removeprefix('run:')}`, which is not published here"


def _start_weights(run: Run) -> tuple[str, str | None]:
    """`model.weights` of the spec, and for pretrained ones their repository on the hub, or the network's name."""
    model = read_yaml(run.path / "spec.yaml").value["model"]
    if model["weights"] != "pretrained":
        return model["weights"], None
    config = timm.get_pretrained_cfg(model["arch"])
    return "pretrained", config.hf_hub_id if config is not None and config.hf_hub_id else model["arch"]


def _use(run: Run, repo: str, *, own: bool) -> str:
    if own:
        commit = (run.info["git"] or {}).get("commit")
        text = "The network is made by Foldwise: install that first" + (f" (commit `{commit}`)." if commit else ".")
    else:
        text = (
            f'`timm.create_model("hf_hub:{repo}", pretrained=True)` is the first model alone. All of them, on an image '
            "as in training (`pip install huggingface_hub pillow safetensors timm`):"
        )
    if run.info["precision"] != "fp32":
        text += f" The run computed in {run.info['precision']}, this is fp32: probabilities differ by some thousandths."
    return text


def _limits(run: Run) -> str:
    lines = [
        "- Made for a competition, to compare ways of training. It is measured on that competition's images alone; on "
        "others it may be much worse, and nobody has looked.",
        "- Probabilities are not calibrated unless the report says so. It answers with one of its classes whatever the "
        "image shows.",
        "- Not for decisions about people.",
    ]
    if 2 * len(_EXPRESSIONS.intersection(name.lower() for name in run.classes)) >= len(run.classes):
        lines += [
            "- **An expression is not an emotion.** The labels say what strangers saw in a face, not what its owner "
            "felt; many are doubtful. Do not use it to infer what a person feels, thinks or intends.",
            "- How it does for different ages, genders, skins and cultures was not measured; expect it to differ.",
            "- Not for hiring, schooling, policing, insurance, health or surveillance. In some places the recognition "
            "of emotions at work and at school is forbidden by law.",
        ]
    return "\n".join(lines)


def _snippet(competition: CompetitionSpec, first: KeptModel, repo: str, weights: Sequence[str], *, own: bool) -> str:
    """Code that downloads the models and predicts an image as the run did."""
    image, spec = competition.image, first.spec
    if own:
        imports = "from foldwise.learn.models import build_model\nfrom foldwise.spec.model import ModelSpec\n"
        make = (
            '    spec = ModelSpec.model_validate_json(json.dumps(told["model"] | {"weights": "none"}))\n'
            '    model = build_model(spec, classes=len(told["classes"]), channels=len(told["mean"]))\n'
        )
    else:
        imports = "import timm\n"
        arguments = "".join(f", {key}={value!r}" for key, value in _constructor(first).items())
        make = f'    model = timm.create_model(\n        "{spec.arch}"{arguments}\n    )\n'
    resize = ""
    if (image.height, image.width) != (spec.image_size, spec.image_size):
        antialias = max(image.height, image.width) > spec.image_size
        resize = (
            f"    size = ({spec.image_size}, {spec.image_size})\n"
            f'    x = functional.interpolate(x, size, mode="{spec.interpolation}", align_corners=False, '
            f"antialias={antialias}).clamp(0, 1)\n"
        )
    views, look = _views(first)
    functional = "from torch.nn import functional\n" if resize or look else ""
    listed = "".join(f'    "{name}",\n' for name in weights)
    return (
        "import json\n\nimport numpy as np\n"
        f"{'' if own else imports}"
        "import torch\n"
        f"{imports if own else ''}"
        "from huggingface_hub import hf_hub_download\n"
        "from PIL import Image\n"
        "from safetensors import safe_open\n"
        "from safetensors.torch import load_file\n"
        f"{functional}\n"
        f'REPO = "{repo}"\n'
        f"WEIGHTS = [\n{listed}]\n\n\n"
        "def load(name):\n"
        "    path = hf_hub_download(REPO, name)\n"
        '    with safe_open(path, "pt") as file:\n'
        '        told = json.loads(file.metadata()["foldwise"])\n'
        f"{make}"
        "    model.load_state_dict(load_file(path))\n"
        "    return model.eval(), told\n\n\n"
        "def pixels(file):\n"
        f'    image = Image.open(file).convert("{"L" if image.channels == 1 else "RGB"}")\n'
        f"{_fit(image.fit, image.width, image.height)}"
        f"    x = np.array(image).reshape(1, {image.height}, {image.width}, {image.channels})\n"
        "    x = torch.from_numpy(x).permute(0, 3, 1, 2) / 255\n"
        f"{resize}"
        "    return x\n\n\n"
        f"{look}"
        "@torch.inference_mode()\n"
        "def probabilities(file, weights=WEIGHTS):\n"
        "    total = 0\n"
        "    for name in weights:\n"
        "        model, told = load(name)\n"
        '        mean, std = (torch.tensor(told[key]).view(1, -1, 1, 1) for key in ("mean", "std"))\n'
        "        x = (pixels(file) - mean) / std\n"
        f"{views}"
        '    return dict(zip(told["classes"], (total / len(weights))[0].tolist()))\n\n\n'
        'print(probabilities("image.png"))\n'
    )


def _fit(fit: str, width: int, height: int) -> str:
    """Bring an image to the size of the competition's, as it does; one of that size stays as it is."""
    if fit in ("exact", "squash"):
        return f"    image = image.resize(({width}, {height}), Image.Resampling.BICUBIC)\n"
    choose = "min" if fit == "letterbox" else "max"
    return (
        f"    scale = {choose}({width} / image.width, {height} / image.height)\n"
        "    w, h = max(1, round(image.width * scale)), max(1, round(image.height * scale))\n"
        f"    left, top = (w - {width}) // 2, (h - {height}) // 2\n"
        f"    image = image.resize((w, h), Image.Resampling.BICUBIC)\n"
        f"    image = image.crop((left, top, left + {width}, top + {height}))\n"
    )


def _views(first: KeptModel) -> tuple[str, str]:
    """The lines that average over the views, and the function that they need beyond flipping."""
    simple = {"identity": "x", "hflip": "x.flip(-1)"}
    names = [view.name for view in first.views]
    if set(names) <= simple.keys():
        listed = ", ".join(simple[name] for name in names)
        return (
            f"        views = [{listed}]\n"
            f"        total += sum(model(view).softmax(1) for view in views) / {len(names)}\n",
            "",
        )
    identity = torch.eye(2, 3)
    listed = "".join(
        f"    ({1 / len(names) / len(view.renderings)!r}, {(identity if theta is None else theta).tolist()}),\n"
        for view in first.views
        for theta in view.renderings
    )
    look = (
        f"VIEWS = [  # share, and the map from output to input coordinates: {', '.join(names)}\n{listed}]\n\n\n"
        "def look(x, theta):\n"
        "    grid = functional.affine_grid(torch.tensor([theta]), list(x.shape), align_corners=False)\n"
        '    return functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)\n\n\n'
    )
    return "        total += sum(share * model(look(x, theta)).softmax(1) for share, theta in VIEWS)\n", look
