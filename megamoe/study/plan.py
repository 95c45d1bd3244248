"""What a study is: its file, read strictly, and every arm's configuration, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, StringConstraints

from megamoe.common.errors import ConfigError
from megamoe.config.base import Section
from megamoe.config.load import load_config
from megamoe.config.problems import Problem, raise_all
from megamoe.config.rules import check_world_size
from megamoe.config.run import RunConfig
from megamoe.config.section_file import read_section
from megamoe.config.sources import Source
from megamoe.training.finetune_config import load_finetune_config

Measure = Literal[
    "validation_loss",
    "exact_match",
    "processed",
    "drop_share",
    "unserved_share",
    "step_time",
    "sent_bytes",
    "max_load",
    "router_entropy",
    "broadcast_share",
    "sensitivity",
    "calinski_harabasz",
]
"""A column of the table, or a few that belong together."""
Judge = Literal["validation_loss", "exact_match"]
"""What decides whether an arm is better than the baseline."""
MEASURES: tuple[Measure, ...] = (
    "validation_loss",
    "processed",
    "drop_share",
    "step_time",
    "sent_bytes",
    "max_load",
    "calinski_harabasz",
)
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Words = Annotated[tuple[str, ...], Strict(False)]
"""A list in YAML."""


class ArmPlan(Section):
    """One arm: what it changes, and why it is there."""

    label: str = Field(description="Name in tables and plots.")
    set: Words = Field((), description="Overrides `section.field=value` that make this arm.")
    why: str = Field("", description="One sentence for the reader of the results.")


class CostPlan(Section):
    """How step time and bytes are measured: all arms in one group of processes, in turns, at the trained state."""

    ranks: int = Field(2, ge=1, description="Processes.")
    set: Words = Field((), description="Overrides for this measurement, over those of the arm.")
    steps: int = Field(2, ge=1, description="Optimizer steps of one turn.")
    rounds: int = Field(10, ge=1, description="Turns of each arm that are timed.")
    patience: float = Field(0.0, ge=0, description="Seconds to wait before a round for a quiet machine.")


class StartPlan(Section):
    """A model that is pretrained for every seed; all arms then fine-tune it."""

    config: Words = Field(description="Configuration files, later ones over earlier ones.")
    set: Words = Field((), description="Overrides.")


class StudyPlan(Section):
    """The file of a study. Paths in it are relative to its folder."""

    title: str
    question: str = Field(description="What the study is to answer.")
    config: Words = Field(description="Configuration files of all arms, later ones over earlier ones.")
    set: Words = Field((), description="Overrides for all arms.")
    start: StartPlan | None = Field(
        None, description="What the arms fine-tune (launch/finetune.py); null: the arms pretrain (launch/pretrain.py)."
    )
    baseline: str = Field(description="The arm that all others are compared with.")
    judge: Judge = Field("validation_loss", description="What the verdicts are about.")
    arms: dict[Name, ArmPlan] = Field(min_length=1)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False)] = Field(min_length=1)
    measures: Annotated[tuple[Measure, ...], Strict(False)] = Field(MEASURES, description="Columns of the table.")
    curves: Words = Field((), description="Metrics of the layers to plot over steps, for the arms that report them.")
    cost: CostPlan | None = Field(None, description="Measurement of step time and bytes; null: none.")


@dataclass(frozen=True)
class Arm:
    """An arm and its checked configuration, still without seed and folder."""

    name: str
    plan: ArmPlan
    overrides: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class Study:
    """A plan with everything it refers to."""

    path: Path
    plan: StudyPlan
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    """From the command line."""
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    start: RunConfig | None = None
    """Of the models that the arms fine-tune; None where they pretrain."""

    @property
    def baseline(self) -> Arm:
        """What the others are compared with."""
        return self.arms[self.plan.baseline]


def load_study(
    path: str | Path,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    num_seeds: int | None = None,
    more: Sequence[str | Path] = (),
) -> Study:
    """Read a study's file and check every arm.

    Args:
        overrides: `section.field=value` for all arms; an arm's own settings win over them.
        only: leave out the arms that are not named; the baseline stays.
        num_seeds: the first so many; None: all.
        more: configuration files over those of the study, for another setting of the same arms.

    Raises:
        ConfigError: the file, an arm's configuration, or the choice of arms or seeds is wrong.
    """
    path = Path(path)
    plan = read_plan(path)
    raise_all(_reserved("", overrides), todo="leave it out", title="Of the overrides, the study cannot use:")
    _check_choice(plan, only, num_seeds)
    files = (*(path.parent / name for name in plan.config), *map(Path, more))
    chosen = [name for name in plan.arms if not only or name in only or name == plan.baseline]
    start = load_config(start_files(plan, path), plan.start.set) if plan.start is not None else None
    arms = {name: _load_arm(plan, name, files, tuple(overrides), start) for name in chosen}
    _check_equal_tokens(arms, plan.baseline)
    return Study(path, plan, files, tuple(overrides), arms, plan.seeds[:num_seeds], start)


def start_files(plan: StudyPlan, path: Path) -> tuple[Path, ...]:
    """Configuration files of the models that the arms fine-tune."""
    return tuple(path.parent / name for name in (plan.start.config if plan.start is not None else ()))


def load_arm(files: Sequence[Path], words: Sequence[str], start: RunConfig | None) -> RunConfig:
    """The configuration of one arm's run."""
    return load_config(files, words) if start is None else load_finetune_config(files, words, start)


def read_plan(path: Path) -> StudyPlan:
    """The file alone.

    Raises:
        ConfigError: listing everything that is wrong with it.
    """
    return read_section(path, StudyPlan, _contradictions, what="The study", todo=f"correct {path}")


def cost_config(study: Study, arm: Arm) -> RunConfig:
    """The arm's configuration for the measurement of cost."""
    assert study.plan.cost is not None
    config = _load(arm.name, study.files, (*arm.overrides, *study.plan.cost.set), study.start)
    check_world_size(config, study.plan.cost.ranks)
    return config


def _contradictions(plan: StudyPlan, _: Source) -> list[Problem]:
    problems = []
    if plan.start is None and plan.judge == "exact_match":
        problems.append(Problem("judge", "exact_match is of models that fine-tune, which needs start"))
    if plan.start is None and "sensitivity" in plan.measures:
        problems.append(Problem("measures", "sensitivity is of models that fine-tune, which needs start"))
    if plan.start is not None and "start" in plan.arms:
        problems.append(Problem("arms.start", "is where the models lie that the arms fine-tune; choose another name"))
    if plan.baseline not in plan.arms:
        problems.append(Problem("baseline", f"{plan.baseline} is none of the arms: {', '.join(plan.arms)}"))
    for path, values in (("seeds", plan.seeds), ("measures", plan.measures), ("curves", plan.curves)):
        if len(set(values)) < len(values):
            problems.append(Problem(path, "an entry is given twice"))
    places = {"set": plan.set, **{f"arms.{name}.set": arm.set for name, arm in plan.arms.items()}}
    if plan.cost is not None:
        places["cost.set"] = plan.cost.set
    if plan.start is not None:
        places["start.set"] = plan.start.set
    return problems + [problem for path, words in places.items() for problem in _reserved(path, words)]


def _reserved(path: str, words: Sequence[str]) -> list[Problem]:
    given = ("training.seed=", "training.output_dir=", "finetune.checkpoint=")
    taken = [word for word in words if word.startswith(given)]
    return [Problem(path, f"{word}: the study sets this for each run") for word in taken]


def _check_choice(plan: StudyPlan, only: Sequence[str], num_seeds: int | None) -> None:
    unknown = [name for name in only if name not in plan.arms]
    if unknown:
        raise ConfigError(
            "The study has no such arm.", got=", ".join(unknown), expected=f"some of {', '.join(plan.arms)}"
        )
    if num_seeds is not None and not 1 <= num_seeds <= len(plan.seeds):
        raise ConfigError(
            "The study has another number of seeds.", got=str(num_seeds), expected=f"1 to {len(plan.seeds)}"
        )


def _load_arm(
    plan: StudyPlan, name: str, files: Sequence[Path], overrides: tuple[str, ...], start: RunConfig | None
) -> Arm:
    arm = plan.arms[name]
    words = (*plan.set, *overrides, *arm.set)
    config = _load(name, files, words, start)
    check_world_size(config, 1)
    if config.training.validation.batches == 0:
        raise ConfigError(
            f"Arm {name} is never validated.", got="training.validation.batches = 0", expected="at least 1"
        )
    if config.finetune is not None and config.finetune.epochs is not None:
        raise ConfigError(
            f"Arm {name}: the number of steps has to be known before anything starts.",
            got=f"finetune.epochs = {config.finetune.epochs}",
            expected="training.steps",
            todo="set finetune.epochs to null and training.steps to a number",
        )
    return Arm(name, arm, words, config)


def _load(name: str, files: Sequence[Path], words: Sequence[str], start: RunConfig | None) -> RunConfig:
    try:
        return load_arm(files, words, start)
    except ConfigError as error:
        raise ConfigError(
            f"Arm {name}: {error.what}", got=error.got, expected=error.expected, todo=error.todo
        ) from None


def _check_equal_tokens(arms: dict[str, Arm], baseline: str) -> None:
    """All arms read the same samples in the same order, or differences would not be the arms' own."""

    def read(arm: Arm) -> tuple[Any, ...]:
        training = arm.config.training
        batches = training.global_batch_size, training.validation.batches
        return arm.config.data, arm.config.finetune, training.steps, *batches

    for arm in arms.values():
        if read(arm) != read(arms[baseline]):
            raise ConfigError(
                f"Arm {arm.name} does not read the same samples as the baseline {baseline}.",
                expected="equal data, finetune, training.steps, training.global_batch_size and "
                "training.validation.batches",
                todo="set these for all arms",
            )
