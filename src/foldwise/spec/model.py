"""The sections of an experiment file: one frozen, strict pydantic model each.

Defaults live here and nowhere else; a builder takes its section, not the whole spec.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

# The name of an experiment, and so of its file, its folder in `oof/` and its W&B group.
EXPERIMENT_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,79}")
# `identity`, `hflip`, `zoom_1.1`, `shift`, `rotate_10`, `multicrop`; `shift+hflip`
VIEW_NAME = re.compile(
    r"hflip|(identity|shift|multicrop|zoom_(?P<zoom>\d+(\.\d+)?)|rotate_(?P<rotate>\d+(\.\d+)?))(?P<mirrored>\+hflip)?"
)
WEIGHTS = re.compile(r"none|pretrained|run:[a-z0-9][a-z0-9_.-]{0,79}")
# How timm's arguments begin that bring weights, past every check of what those saw.
_OF_WEIGHTS = ("checkpoint_path", "pretrained", "cache_dir")

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent conversion (an int is fine for a float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class HeadSpec(Section):
    """A classifier of several layers in place of the network's own: dropout, linear, activation, ..., linear."""

    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field(
        (), description="Widths of the hidden layers; none is one linear layer."
    )
    dropout: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (), description="Dropout before each linear layer, one more than `hidden`; [] is none at all."
    )
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="After each hidden layer.")

    @model_validator(mode="after")
    def _one_dropout_a_layer(self) -> Self:
        if self.dropout and len(self.dropout) != len(self.hidden) + 1:
            raise ValueError(
                f"`dropout` needs one value before each of the {len(self.hidden) + 1} linear layers, but got "
                f"{list(self.dropout)}"
            )
        return self


class ModelSpec(Section):
    """Which network, from which weights, on which input."""

    arch: str = Field(description="A timm model name, with its pretrained tag if it has one, or one of Foldwise's own.")
    weights: str = Field(
        "none", description="`pretrained` (timm's hub weights), `none`, or `run:<exp>` (another experiment's weights)."
    )
    image_size: int = Field(48, ge=16, le=1024, description="Side of the square that the network sees, px.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the classifier.")
    head: HeadSpec | None = Field(None, description="A classifier of several layers; null: the network's own.")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Stochastic depth; ViT, ConvNeXt and the like.")
    normalize: Literal["imagenet", "half", "unit", "dataset"] = Field(
        "dataset",
        description="`imagenet` mean and deviation, `half` for [-1, 1], `unit` for [0, 1], or the `dataset`'s own.",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="How pixels come to `image_size`.")
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Further keyword arguments of the model's constructor; none of weights."
    )

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, value: str) -> str:
        if not WEIGHTS.fullmatch(value):
            raise ValueError(f"expected `pretrained`, `none` or `run:<experiment>`, but got {value!r}")
        return value

    @field_validator("options")
    @classmethod
    def _without_weights(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key.startswith(_OF_WEIGHTS):
                raise ValueError(f"`{key}` brings weights of which nothing is known; they are named by `model.weights`")
        return value

    @model_validator(mode="after")
    def _one_dropout(self) -> Self:
        if self.head is not None and self.dropout:
            raise ValueError("`dropout` belongs to the network's own classifier: with `head`, give `head.dropout`")
        return self


class MixSpec(Section):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019); both alphas 0 means no mixing."""

    mixup_alpha: float = Field(0.0, ge=0, description="Beta(a, a) of mixup; 0 is off.")
    cutmix_alpha: float = Field(0.0, ge=0, description="Beta(a, a) of CutMix; 0 is off.")
    prob: Share = Field(1.0, description="Share of batches that are mixed.")
    switch_prob: Share = Field(0.5, description="Share of mixed batches that take CutMix where both are on.")
    off_epochs: int = Field(0, ge=0, description="The last so many epochs train unmixed.")


class LossSpec(Section):
    """The loss, on soft targets."""

    name: Literal["cross_entropy", "focal"] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Mass moved from the target to all classes, once.")
    class_weights: Literal["none", "balanced", "sqrt"] = Field(
        "none", description="`balanced` weighs a class by N / (C N_class), `sqrt` by its root; mean weight 1 a sample."
    )
    gamma: float = Field(2.0, ge=0, description="Focusing parameter of the focal loss (Lin et al. 2017).")


class OptimSpec(Section):
    """The optimizer, by timm's factory names."""

    name: str = Field("adamw", description="A timm optimizer: adamw, adam, sgd, lamb, nadamw, ...")
    lr: Positive = Field(description="Peak learning rate of the head, and of the backbone times `backbone_lr_scale`.")
    backbone_lr_scale: float = Field(1.0, gt=0, le=1, description="Learning rate of all but the head, as a ratio.")
    layer_decay: float | None = Field(None, gt=0, le=1, description="Learning rate ratio of a layer to the one above.")
    weight_decay: float = Field(0.05, ge=0, description="Not applied to biases, norms and position embeddings.")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum; Adam's first beta.")
    clip_grad_norm: Positive | None = Field(None, description="Largest gradient norm; longer ones are scaled to it.")


class ScheduleSpec(Section):
    """The learning rate over time, as a multiplier of every group's own base rate."""

    name: Literal["constant", "cosine", "plateau", "step", "one_cycle"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0, description="Linear warm-up from near 0; not for one_cycle.")
    min_lr_ratio: float = Field(0.0, ge=0, lt=1, description="cosine, one_cycle and plateau end or stop at this ratio.")
    factor: float = Field(0.1, gt=0, lt=1, description="plateau, step: ratio at each drop.")
    patience: int = Field(10, ge=0, description="plateau: epochs without a better watched figure before a drop.")
    step_epochs: int = Field(10, ge=1, description="step: epochs between drops.")
    warm_share: float = Field(0.3, gt=0, lt=1, description="one_cycle: share of the steps in which the rate rises.")


class TrainSpec(Section):
    """How long, how much at a time, and what is kept."""

    epochs: int = Field(ge=1, le=10_000)
    batch_size: int = Field(64, ge=1, description="Images a forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes an optimizer step.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the device is fast in it, fp16 on MPS and older GPUs, else fp32."
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Average of weights and buffers, which is then what is scored; 0.99 to 0.998."
    )
    keep: Literal["last", "best"] = Field("last", description="Score the last epoch's weights, or the best watched.")
    early_stop_patience: int | None = Field(None, ge=1, description="Epochs without a better watched figure, then end.")
    watch: Literal["inner", "scored"] = Field(
        "inner",
        description="What plateau, early stopping and `keep: best` look at: an inner slice of the training fold, or "
        "the scored fold itself, which marks the run `optimistic`.",
    )
    watch_figure: Literal["log_loss", "metric"] = Field("metric", description="Which figure of it.")
    inner_share: float = Field(0.1, gt=0, lt=0.5, description="The inner slice, as a share of the training fold.")
    freeze_backbone_epochs: int = Field(0, ge=0, description="The first so many epochs train the head alone.")
    compile: bool = Field(False, description="torch.compile the forward pass.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a unit; null: all cores. Bits depend on it.")


class TeachersSpec(Section):
    """Base of the sections that learn from kept runs: which runs these are."""

    # `from` is a keyword of Python, so that this field cannot be written as the others are.
    __annotations__ = {
        "from": Annotated[
            tuple[str, ...],
            Field(
                min_length=1,
                description="Kept k-fold runs on the same folds and classes, averaged; fold k asks their fold k alone.",
            ),
        ]
    }

    @property
    def teachers(self) -> tuple[str, ...]:
        """The runs under the key `from`."""
        names: tuple[str, ...] = getattr(self, "from")
        return names

    @field_validator("from")
    @classmethod
    def _distinct_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not EXPERIMENT_NAME.fullmatch(name):
                raise ValueError(f"expected names of kept runs, but got {name!r}")
        if len(set(value)) != len(value):
            raise ValueError(f"expected distinct runs, but got {list(value)}")
        return value


class PseudoSpec(TeachersSpec):
    """Pseudo-labels (Lee 2013): the unlabelled images join the training fold with what the teachers say of them."""

    min_confidence: Share = Field(
        0.9, description="Only images to whose likeliest class the teachers' mean gives at least this probability."
    )
    hard: bool = Field(True, description="true: the likeliest class is the label; false: the mean is a soft one.")
    weight: Positive = Field(1.0, description="Weight of such an image in the loss, a labelled one having 1.")


class DistillSpec(TeachersSpec):
    """Distillation (Hinton et al. 2015): also match what the teachers say of the images that are trained on."""

    weight: float = Field(0.7, gt=0, le=1, description="Share of the teachers in the loss; the labels have the rest.")
    temperature: float = Field(
        2.0, ge=1, le=20, description="Softens teachers and student alike before they are compared; 1 leaves them."
    )


class ExternalSpec(Section):
    """Labelled images of another data set that are trained on too, less those that are copies of the competition's."""

    source: str = Field(description="A folder under `inputs/`, taken in by `make data COMP=<source>`.")
    class_map: dict[str, str | None] = Field(
        default_factory=dict,
        description="From the source's classes to the competition's; null leaves a class out, and what is not named "
        "here goes by its own name.",
    )
    weight: Positive = Field(1.0, description="Weight of such an image in the loss, one of the competition having 1.")

    @field_validator("source")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not EXPERIMENT_NAME.fullmatch(value):
            raise ValueError(f"expected the name of a folder under inputs/, but got {value!r}")
        return value


class RangeSpec(Section):
    """Numbers from `low` to `high`, both ends included."""

    low: int | float = Field(description="Smallest value.")
    high: int | float = Field(description="Largest value.")
    log: bool = Field(
        False, description="Draw evenly in the logarithm, so that 1e-4 to 1e-3 gets as much as 1e-3 to 1e-2."
    )
    step: int | float | None = Field(None, description="Only `low`, `low + step`, `low + 2 step`, ...; not with `log`.")
    when: dict[str, tuple[Any, ...]] | None = Field(
        None, description="Other keys of the space with the values for which this one is drawn; else it stays as it is."
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"`low < high` must hold, but got (low={self.low}, high={self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"`log` needs `low` > 0, but got low={self.low}")
        if self.log and self.step is not None:
            raise ValueError(f"`log` takes no `step`, but got step={self.step}")
        # in decimals: as floats, 0.03 - 0.02 is less than 0.01
        low, high = Decimal(str(self.low)), Decimal(str(self.high))
        if self.step is not None and not 0 < Decimal(str(self.step)) <= high - low:
            raise ValueError(f"`0 < step <= high - low` must hold, but got step={self.step}")
        return self


class ChoiceSpec(Section):
    """One of several values: scalars, lists or whole sections."""

    choices: tuple[Any, ...] = Field(min_length=2, description="The values, in no order.")
    when: dict[str, tuple[Any, ...]] | None = Field(
        None, description="Other keys of the space with the values for which this one is drawn; else it stays as it is."
    )

    @field_validator("choices")
    @classmethod
    def _distinct_choices(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        for index, choice in enumerate(value):
            if choice in value[:index]:
                raise ValueError(f"expected distinct choices, but got {list(value)}")
        return value


def _range_or_choice(value: Any) -> str:
    has_choices = "choices" in value if isinstance(value, dict) else isinstance(value, ChoiceSpec)
    return "choice" if has_choices else "range"


SpaceEntry = Annotated[
    Annotated[RangeSpec, Tag("range")] | Annotated[ChoiceSpec, Tag("choice")], Discriminator(_range_or_choice)
]


class FidelitySpec(Section):
    """What a trial does less of than the experiment, so that more trials fit into a night; null: as the experiment."""

    epochs: int | None = Field(
        None, ge=1, description="Epochs of a trial; whatever the spec counts in epochs shrinks by the same ratio."
    )
    folds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="Folds of a trial; null: all."
    )
    image_size: int | None = Field(None, ge=16, le=1024, description="`model.image_size` of a trial, px.")

    @field_validator("folds")
    @classmethod
    def _distinct_folds(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError(f"expected distinct folds, but got {list(value)}")
        return value


class PruneSpec(Section):
    """When a trial ends early."""

    folds: bool = Field(True, description="After each fold, end a trial that the best complete one surely beats.")
    error_rate: float = Field(
        0.05, gt=0, lt=0.5, description="Chance that a trial as good as the best is ended, over all its folds."
    )
    epochs: Literal["none", "median", "hyperband"] = Field(
        "none", description="Also end a trial between epochs, by one of Optuna's pruners."
    )


class TuneSpec(Section):
    """How the experiment's parameters are searched; no part of what one run trains."""

    trials: int = Field(
        30, ge=1, le=100_000, description="Distinct parameter sets, the spec's own values being the first."
    )
    sampler: Literal["tpe", "random", "cmaes", "grid", "gp"] = Field(
        "tpe", description="Optuna's sampler; `grid` tries every set of a finite space once."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of the sampler; the trainings keep `seeds`.")
    space: dict[str, SpaceEntry] = Field(
        min_length=1,
        description="From dotted keys of this file (`optim.lr`, `augment.1.Affine.p`) to what they may be.",
    )
    fidelity: FidelitySpec = FidelitySpec()
    finalists: int = Field(
        2, ge=0, description="So many of the best are run again in full; the best of these wins. 0 names no winner."
    )
    prune: PruneSpec = PruneSpec()


class TunedSpec(Section):
    """Where a spec's parameters come from, written by the study that found them."""

    study: str = Field(description="The experiment that was tuned.")
    trials: int = Field(ge=1, description="Parameter sets among which this one was chosen.")
    folds_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the folds.csv that it was chosen on.")


class ExperimentSpec(Section):
    """One experiment: one YAML file, one name, one `oof/` folder, one W&B group."""

    name: str = Field(description="The file's stem.")
    competition: str = Field(description="A folder under `inputs/`.")
    seeds: tuple[int, ...] = Field((42,), min_length=1, description="One unit a fold and seed; averaged.")
    label_map: dict[str, str] | None = Field(
        None,
        description="From every class of the competition to the class that this experiment learns; classes of one name "
        "merge. The run is scored on its own classes, and never blended with runs of others.",
    )
    external: tuple[ExternalSpec, ...] = Field(
        (), description="Images from elsewhere that join the training side of every fold, and are never validated on."
    )
    clear_of: tuple[str, ...] = Field(
        (),
        description="Other competitions whose images, or copies of them, are not trained on, so that their experiments "
        "may start from this run.",
    )
    model: ModelSpec
    augment: tuple[dict[str, dict[str, Any]], ...] = Field(
        (), description="albumentations transforms by name, with their parameters, applied in order at the native size."
    )
    mix: MixSpec = MixSpec()
    sampler: Literal["none", "balanced", "sqrt"] = Field(
        "none", description="Draw images by weight: `balanced` N / N_class, `sqrt` its square root; N draws an epoch."
    )
    loss: LossSpec = LossSpec()
    optim: OptimSpec
    schedule: ScheduleSpec = ScheduleSpec()
    train: TrainSpec
    pseudo: PseudoSpec | None = Field(
        None, description="Train on the unlabelled images too, labelled by kept runs; marks the run `transductive`."
    )
    distill: DistillSpec | None = Field(None, description="Match the predictions of kept runs, besides the labels.")
    tta: tuple[str, ...] = Field(("identity", "hflip"), min_length=1, description="Views averaged in probability.")
    tune: TuneSpec | None = Field(None, description="How `make tune` searches; a run takes no notice of it.")
    tuned: TunedSpec | None = Field(None, description="Written by `make tune` into the spec of a study's winner.")

    @field_validator("name", "competition")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not EXPERIMENT_NAME.fullmatch(value):
            raise ValueError(f"expected lower-case letters, digits, `_`, `-` and `.`, but got {value!r}")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"expected distinct seeds, but got {list(value)}")
        if any(not 0 <= seed < 2**32 for seed in value):
            raise ValueError(f"expected seeds from 0 to 2**32 - 1, but got {list(value)}")
        return value

    @field_validator("external")
    @classmethod
    def _distinct_sources(cls, value: tuple[ExternalSpec, ...]) -> tuple[ExternalSpec, ...]:
        names = [one.source for one in value]
        if len(set(names)) != len(names):
            raise ValueError(f"expected distinct sources, but got {names}")
        return value

    @field_validator("clear_of")
    @classmethod
    def _distinct_competitions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not EXPERIMENT_NAME.fullmatch(name):
                raise ValueError(f"expected names of folders under inputs/, but got {name!r}")
        if len(set(value)) != len(value):
            raise ValueError(f"expected distinct competitions, but got {list(value)}")
        return value

    @field_validator("label_map")
    @classmethod
    def _two_classes_or_more(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None:
            if any(not label.strip() for label in value.values()):
                raise ValueError("a class must not be blank")
            if len(set(value.values())) < 2:
                raise ValueError(f"expected two classes or more, but all become {', '.join(set(value.values()))!r}")
        return value

    @field_validator("tta")
    @classmethod
    def _known_views(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for view in value:
            match = VIEW_NAME.fullmatch(view)
            if match is None:
                known = "identity, hflip, shift, multicrop, zoom_<factor>, rotate_<degrees>, or one of these and +hflip"
                raise ValueError(f"unknown view {view!r}; known: {known}")
            if (zoom := match["zoom"]) is not None and not 0.5 <= float(zoom) <= 2:
                raise ValueError(f"a zoom must lie between 0.5 and 2, but got {view!r}")
            if (angle := match["rotate"]) is not None and not 0 < float(angle) <= 180:
                raise ValueError(f"a rotation must lie between 0 and 180 degrees, but got {view!r}")
        if len(set(value)) != len(value):
            raise ValueError(f"expected distinct views, but got {list(value)}")
        return value

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.competition in {one.source for one in self.external}:
            raise ValueError(f"`external` names the competition itself: {self.competition!r}")
        if self.competition in self.clear_of:
            raise ValueError(f"`clear_of` names the competition itself: {self.competition!r}")
        if both := sorted({one.source for one in self.external} & set(self.clear_of)):
            raise ValueError(
                f"`external` and `clear_of` both name {both[0]!r}: train on its images, or keep clear of them"
            )
        if self.clear_of and self.watches and self.train.watch == "scored":
            raise ValueError(
                "`clear_of` does not go with `train.watch: scored`: scored images may be copies, and their labels "
                "would choose the weights"
            )
        if self.optim.layer_decay is not None and self.optim.backbone_lr_scale != 1.0:
            raise ValueError("`optim.layer_decay` and `optim.backbone_lr_scale` both set the backbone's rate: give one")
        if self.train.freeze_backbone_epochs >= self.train.epochs:
            raise ValueError(
                f"`train.freeze_backbone_epochs` < `train.epochs` must hold, but got "
                f"({self.train.freeze_backbone_epochs}, {self.train.epochs})"
            )
        if self.schedule.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"`schedule.warmup_epochs` < `train.epochs` must hold, but got "
                f"({self.schedule.warmup_epochs}, {self.train.epochs})"
            )
        return self

    @property
    def watches(self) -> bool:
        """Whether anything looks at a watched figure, so that a slice must be held back for it."""
        return (
            self.schedule.name == "plateau" or self.train.early_stop_patience is not None or self.train.keep == "best"
        )

    @property
    def marks(self) -> list[str]:
        """Marks that follow from the spec alone.

        `optimistic` where the scored fold is watched, `transductive` where unlabelled images are trained on.
        """
        marks = ["optimistic"] if self.watches and self.train.watch == "scored" else []
        return [*marks, "transductive"] if self.pseudo is not None else marks


def mapped_classes(classes: Sequence[str], label_map: Mapping[str, str] | None) -> tuple[tuple[str, ...], list[int]]:
    """The classes that an experiment learns.

    Args:
        classes: The competition's, in the order of their indices.
        label_map: The experiment's; None leaves them as they are.

    Returns:
        The experiment's classes, each where the first of the competition's that become it is; and for each of the
        competition's classes the index of what it becomes.

    Raises:
        KeyError: If a class is not mapped.
    """
    names = [label if label_map is None else label_map[label] for label in classes]
    own = tuple(dict.fromkeys(names))
    return own, [own.index(name) for name in names]


def resolved(spec: ExperimentSpec) -> dict[str, Any]:
    """The spec with every default filled in, as plain JSON types: what `oof/<exp>/spec.yaml` holds and is hashed.

    `tune` is left out: it says how one searches, not what is trained.
    """
    return spec.model_dump(mode="json", exclude={"tune"})
