"""The settings of `minitron evaluate`."""

from dataclasses import dataclass, field

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.common import DataConfig, DType
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.parallel import InferenceParallelConfig
from minitron_megatron.config.plugins import PluginConfig


@dataclass
class EvaluateConfig(PluginConfig):
    """`minitron evaluate`: held-out loss and perplexity, generation speed, and tasks of lm-eval.

    Attributes:
        model: checkpoint or Hugging Face folder.
        output: folder for `evaluation.json`.
        num_samples: held-out sequences; null for all.
        micro_batch: sequences per forward pass and rank; generation decodes up to four times as many at once.
        generate_tokens: tokens to generate greedily to measure speed; 0 for none.
        tasks: tasks and groups of EleutherAI's lm-eval to run, as in [arc_easy,hellaswag].
        task_dir: folder with YAML files of your own tasks.
        num_fewshot: few-shot examples per question; null for the task's own number.
        limit: questions per task; null for all.
        chat_template: format questions with the tokenizer's chat template, with few-shot examples as earlier turns.
        dtype: number format of weights and computation.
    """

    model: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    num_samples: int | None = None
    micro_batch: int = field(default=4, metadata=SAME_RESULT)
    generate_tokens: int = 64
    tasks: list[str] = field(default_factory=list)
    task_dir: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    dtype: DType = DType.BF16
    data: DataConfig = field(default_factory=DataConfig)
    parallel: InferenceParallelConfig = field(default_factory=InferenceParallelConfig, metadata=SAME_RESULT)

    def problems(self, where: str = "") -> list[str]:
        return [
            *at_least(where, "num_samples", self.num_samples, 1),
            *at_least(where, "micro_batch", self.micro_batch, 1),
            *at_least(where, "generate_tokens", self.generate_tokens, 0),
            *at_least(where, "num_fewshot", self.num_fewshot, 0),
            *at_least(where, "limit", self.limit, 1),
            *self._task_problems(where),
            *self.data.problems(f"{where}data."),
            *self.parallel.problems(f"{where}parallel."),
        ]

    def _task_problems(self, where: str) -> list[str]:
        problems = []
        if len(set(self.tasks)) < len(self.tasks):
            problems.append(f"{where}tasks = [{', '.join(self.tasks)}]: name each once")
        for name in ("task_dir", "num_fewshot", "limit", "chat_template"):
            value = getattr(self, name)
            if not self.tasks and value not in (None, False):
                problems.append(f"{where}{name} = {value}, and {where}tasks is empty: set both or neither")
        return problems
