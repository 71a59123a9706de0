"""Results of a recipe's stages, in the form that tables and figures need."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from minitron_megatron.artifacts.manifest import EVALUATION, QUESTIONS
from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import read_json

_FIELDS = {"model", "parameters", "parameters_without_embeddings", "heldout", "generation"}

CUTTING = ("prune", "sparsify", "quantize")
"""Verbs that make a model worse, for what follows to recover."""


@dataclass
class Stage:
    """One stage of a recipe that has run.

    Attributes:
        name: of the stage, e.g. `evaluate_teacher`.
        verb: of the stage.
        output: its folder.
        seconds: its duration; None if it was done before.
    """

    name: str
    verb: str
    output: Path
    seconds: float | None = None


@dataclass
class Evaluation:
    """The evaluation of one model.

    Attributes:
        name: short name: `teacher` for the stage `evaluate_teacher`.
        made_by: verb of the stage that made the model; None if no stage did.
        parameters: of the model.
        parameters_without_embeddings: without embedding table and output projection.
        loss: held-out, in nats per token.
        perplexity: held-out.
        num_tokens: number of tokens that the two are a mean over.
        generation: `tokens_per_s`, `num_tokens`, `prompt` and `text`; None if not requested.
        tasks: lm-eval results by task: see `evaluation.tasks.Tasks.run`.
        questions: by task and metric, the number of every question, for metrics that are their mean.
    """

    name: str
    made_by: str | None
    parameters: int
    parameters_without_embeddings: int
    loss: float
    perplexity: float
    num_tokens: int
    generation: dict | None = None
    tasks: dict[str, dict] = field(default_factory=dict)
    questions: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, name: str, made_by: str | None = None) -> "Evaluation":
        """Reads the output of `evaluate`; see `read_evaluation`."""
        values = read_evaluation(folder)
        return cls(
            name=name,
            made_by=made_by,
            parameters=values["parameters"],
            parameters_without_embeddings=values["parameters_without_embeddings"],
            loss=values["heldout"]["loss"],
            perplexity=values["heldout"]["perplexity"],
            num_tokens=values["heldout"]["num_tokens"],
            generation=values["generation"],
            tasks=values["tasks"],
            questions=read_json(questions, "the questions") if (questions := folder / QUESTIONS).is_file() else {},
        )

    def numbers(self) -> dict[str, float]:
        """Returns all numbers by their names in trackers; standard errors end in `_stderr`."""
        numbers = {
            "parameters": self.parameters,
            "parameters_without_embeddings": self.parameters_without_embeddings,
            "heldout/loss": self.loss,
            "heldout/perplexity": self.perplexity,
        }
        if self.generation:
            numbers["generation/tokens_per_s"] = self.generation["tokens_per_s"]
        for task, measured in self.tasks.items():
            for metric, score in measured["metrics"].items():
                numbers[f"{task}/{metric}"] = score["value"]
                if score["stderr"] is not None:
                    numbers[f"{task}/{metric}_stderr"] = score["stderr"]
        return numbers


def read_evaluation(folder: Path) -> dict:
    """Reads a folder's `evaluation.json`.

    Raises:
        CheckpointError: it is missing, not of an evaluation, or not whole.
    """
    path = folder / EVALUATION
    if not path.is_file():
        raise CheckpointError(f"{folder} is not an evaluation: it has no {EVALUATION}; name an output of `evaluate`")
    try:
        # Earlier releases had no tasks.
        values = {"tasks": {}} | json.loads(path.read_text())
    except ValueError as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if missing := _FIELDS - set(values):
        raise CheckpointError(f"{path} is not of an evaluation: it lacks {', '.join(sorted(missing))}")
    return values


def read_evaluations(stages: list[Stage]) -> list[Evaluation]:
    """Reads the results of all stages that evaluated something, in order."""
    evaluations = []
    for stage in stages:
        if stage.verb == "evaluate" and (stage.output / EVALUATION).is_file():
            maker = stage_of(Path(read_evaluation(stage.output)["model"]), stages)
            name = stage.name.removeprefix("evaluate_")
            evaluations.append(Evaluation.read(stage.output, name, maker.verb if maker else None))
    return evaluations


def stage_of(path: Path, stages: list[Stage]) -> Stage | None:
    """Returns the stage whose output is `path` or contains it."""
    path = path.resolve()
    for stage in stages:
        output = stage.output.resolve()
        if output == path or output in path.parents:
            return stage
    return None


def find_teacher(evaluations: list[Evaluation]) -> Evaluation | None:
    """Returns the original model: the largest of those that no stage pruned or trained."""
    originals = [e for e in evaluations if e.made_by in (None, "import")]
    return max(originals, key=lambda e: e.parameters, default=None)


def find_worst_pruned(evaluations: list[Evaluation]) -> Evaluation | None:
    """Returns the pruned, sparsified or quantised model of highest loss that was not trained since."""
    return max((e for e in evaluations if e.made_by in CUTTING), key=lambda e: e.loss, default=None)


def find_result(evaluations: list[Evaluation]) -> Evaluation | None:
    """Returns the final model: the smallest trained one, and the best among equals."""
    trained = [e for e in evaluations if e.made_by == "distill"]
    return min(trained, key=lambda e: (e.parameters, e.loss), default=None)


def recoveries(evaluations: list[Evaluation]) -> list[float | None]:
    """Returns for each model the share of the gap between the worst pruned model and the teacher that it closes.

    None for the teacher, for pruned models, which define the gap, and if either is missing.
    """
    shares: list[float | None] = []
    for i, evaluation in enumerate(evaluations):
        is_end = evaluation.made_by in CUTTING or evaluation is find_teacher(evaluations)
        teacher, pruned = find_teacher(evaluations[:i]), find_worst_pruned(evaluations[:i])
        if is_end or teacher is None or pruned is None:
            shares.append(None)
            continue
        gap = pruned.loss - teacher.loss
        shares.append((pruned.loss - evaluation.loss) / gap if gap > 0 else None)
    return shares
