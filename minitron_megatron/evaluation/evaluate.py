"""The verb `evaluate`: held-out loss, generation and tasks, of a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.artifacts.manifest import EVALUATION, QUESTIONS, Manifest, Parent
from minitron_megatron.artifacts.output import is_done, writing
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.hf_assets import read_config
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.recognise import adapter_in, merge_first
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.schema import EvaluateConfig
from minitron_megatron.data.corpus import text_parents
from minitron_megatron.data.encoding import load_tokenizer
from minitron_megatron.data.samples import Samples, heldout_samples, rank_batches, require_tokens
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.distillation.objectives import CrossEntropy, Entry
from minitron_megatron.distillation.result import combine
from minitron_megatron.distillation.step import DistillationStep
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.evaluation.inference import Inference
from minitron_megatron.evaluation.rank0 import Call, run_on_rank0
from minitron_megatron.evaluation.sampling import SamplingParams
from minitron_megatron.evaluation.tasks import Tasks, exp, task_problems, task_table
from minitron_megatron.files import write_atomically, write_json
from minitron_megatron.model.build import TORCH_DTYPES, build_model, build_problems
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.positions import warn_of_positions
from minitron_megatron.parallel.collectives import rank0_first
from minitron_megatron.parallel.context import ParallelContext, parallel_context
from minitron_megatron.parallel.schedule import Batch, group_microbatches, to_device
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

_PROMPT_TOKENS = 32
_GENERATION_REPEATS = 3


@sole_writer
def evaluate(config: EvaluateConfig) -> Path:
    """Measures a model on held-out text and on tasks.

    A Megatron checkpoint runs under Megatron-Core in the layout of the settings, a Hugging Face folder under
    transformers on one rank. Inference needs neither virtual pipeline stages nor sequence parallelism.

    Returns:
        the folder with `evaluation.json`.

    Raises:
        CheckpointError: the model is neither of these, or not whole.
        ConfigError: the layout does not fit the model, or a task does not exist.
        DataError: the held-out text or the data of a task is missing, or no token of the text counts.
    """
    path, output = Path(config.model), Path(config.output)
    is_folder = (path / "config.json").is_file()
    checkpoint = None if is_folder else Checkpoint(path)
    if is_folder and (adapter := adapter_in(path)):
        raise CheckpointError(f"model = {path}: {merge_first(adapter)}")
    problems = task_problems(config)
    raise_if_any(problems + (build_problems(checkpoint.network, config.parallel, "model") if checkpoint else []))
    positions = checkpoint.network.max_positions if checkpoint else read_config(path).get("max_position_embeddings")
    warn_of_positions(positions, config.data.sequence_length, "the model")
    parents = [Parent.of("model", checkpoint.root if checkpoint else path)]
    parents += text_parents(config.data.text)
    parents += [Parent.of("task_dir", Path(config.task_dir))] if config.task_dir else []
    network = checkpoint.network.to_dict() if checkpoint else None
    manifest = Manifest("evaluation", network, parents, to_plain(config), verb="evaluate")
    if is_done(output, manifest):
        return output
    with parallel_context(config.parallel) as ctx:
        if is_folder and ctx.layout.world_size > 1:
            raise CheckpointError(f"model = {path} is a Hugging Face folder, which runs on one rank: import it first")
        hf_assets = checkpoint.huggingface_folder if checkpoint else path
        tasks = _on_main(lambda: Tasks(config, hf_assets)) if config.tasks else None
        corpus = rank0_first(lambda: prepare_corpus(config.data, hf_assets))
        samples = heldout_samples(corpus, config.data, config.num_samples)
        require_tokens(samples, "held-out")
        if checkpoint:
            measured = _measure_checkpoint(checkpoint, samples, tasks, config, ctx)
        else:
            measured = _measure_folder(path, samples, tasks, config, ctx)
        if ctx.is_main:
            result = {"model": str(path), "name": path.name, **measured}
            questions = {name: task.pop("questions") for name, task in measured["tasks"].items()}
            with writing(output, manifest) as folder:
                write_json(folder / EVALUATION, result)
                if questions:
                    write_atomically(folder / QUESTIONS, json.dumps(questions))
            if measured["tasks"]:
                # A file has no width, and wrapped lines cannot be searched.
                Console(width=None if sys.stdout.isatty() else 200).print(task_table(measured["tasks"]))
    return output


def _measure_checkpoint(
    checkpoint: Checkpoint, samples: Samples, tasks: Tasks | None, config: EvaluateConfig, ctx: ParallelContext
) -> dict:
    """Returns the content of `evaluation.json` for a checkpoint, in the layout of the settings."""
    model_chunks = build_model(checkpoint.network, ctx, config.dtype)
    load_weights(model_chunks, checkpoint, ctx)
    measured = _results(
        num_parameters(checkpoint.network),
        num_parameters(checkpoint.network, embeddings=False),
        *_megatron_loss(model_chunks, checkpoint.network.vocab_size, samples, config, ctx),
    )
    tokenizer = load_tokenizer(checkpoint.huggingface_folder)
    defaults = generation_defaults(checkpoint.huggingface_folder)
    inference = Inference(
        model_chunks,
        ctx,
        checkpoint.network,
        tokenizer,
        _end_tokens(defaults, tokenizer),
        config.micro_batch,
    )

    def run_tasks(call: Call) -> dict:
        from minitron_megatron.evaluation.lm import MegatronLM

        assert tasks is not None, "the first rank has them"
        return tasks.run(MegatronLM(call, tokenizer, checkpoint.network.max_positions, defaults))

    if config.generate_tokens:
        params = SamplingParams(config.generate_tokens, min_new_tokens=config.generate_tokens)
        measured["generation"] = _generation(lambda p: inference.generate([p], params)[0], tokenizer, samples, config)
    if config.tasks:
        measured["tasks"] = run_on_rank0(inference, run_tasks)
    return measured


def _measure_folder(
    folder: Path, samples: Samples, tasks: Tasks | None, config: EvaluateConfig, ctx: ParallelContext
) -> dict:
    """Returns the content of `evaluation.json` for a Hugging Face folder, on this rank alone."""
    from transformers import AutoModelForCausalLM

    dtype = TORCH_DTYPES[config.dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    model = model.eval().to(ctx.device)
    total = model.num_parameters()
    ends = {id(e.weight): e.weight.numel() for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    measured = _results(total, total - sum(ends.values()), *_transformers_loss(model, samples, config))
    tokenizer = load_tokenizer(folder)

    def generate(prompt: list[int]) -> list[int]:
        tokens = torch.tensor([prompt], device=model.device)
        options = dict(min_new_tokens=config.generate_tokens, max_new_tokens=config.generate_tokens)
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            **options,
        )
        return made[0, len(prompt) :].tolist()

    if config.generate_tokens:
        measured["generation"] = _generation(generate, tokenizer, samples, config)
    if tasks:
        from lm_eval.models.huggingface import HFLM

        # In half precision the log-probabilities of likely tokens would round to the same number.
        lm = HFLM(model, "causal", tokenizer=tokenizer, batch_size=config.micro_batch, softmax_dtype="float32")
        measured["tasks"] = tasks.run(lm)
    return measured


def _results(parameters: int, body: int, loss: float, num_tokens: int) -> dict:
    return {
        "parameters": parameters,
        "parameters_without_embeddings": body,
        "heldout": {"loss": loss, "perplexity": exp(loss), "num_tokens": num_tokens},
        "generation": None,
        "tasks": {},
    }


def _megatron_loss(
    model_chunks: list[torch.nn.Module], vocab: int, samples: Samples, config: EvaluateConfig, ctx: ParallelContext
) -> tuple[float, int]:
    """Returns the mean cross-entropy per held-out token, in nats, and the number of tokens."""
    step = DistillationStep(model_chunks, [Entry(None, CrossEntropy())], ctx, vocab)
    batches = rank_batches(samples, 0, len(samples), config.micro_batch, ctx.data_rank, ctx.layout.replicas)
    results = []
    num_batches = -(-len(samples) // (config.micro_batch * ctx.layout.replicas))
    with watchdog(ctx.timeout_min) as heartbeat, progress("evaluate", num_batches) as advance:
        for call in group_microbatches(batches, ctx):
            results.append(step.evaluate(to_device(call, ctx.device)))
            heartbeat()
            advance(len(call))
    result = combine(results)
    return result.losses[CrossEntropy.name], result.num_tokens


def _transformers_loss(model: PreTrainedModel, samples: Samples, config: EvaluateConfig) -> tuple[float, int]:
    """Returns the same for a transformers model."""
    total, num_tokens = 0.0, 0
    with torch.no_grad(), progress("evaluate", -(-len(samples) // config.micro_batch)) as advance:
        for batch in rank_batches(samples, 0, len(samples), config.micro_batch, 0, 1):
            [batch] = to_device([batch], model.device)
            logits = model(batch["tokens"], **_documents(batch)).logits
            # One sequence at a time: float32 logits of a whole batch would take gigabytes.
            for row, labels, mask in zip(logits, batch["labels"], batch["loss_mask"], strict=True):
                loss = torch.nn.functional.cross_entropy(row.float(), labels, reduction="none")
                total += float((loss * mask).sum(dtype=torch.float64))
                num_tokens += int(mask.sum())
            advance()
    return total / num_tokens, num_tokens


def _documents(batch: Batch) -> dict[str, Tensor]:
    """Returns mask and positions that keep documents apart in a transformers model."""
    if "document_ids" not in batch:
        return {}
    documents = batch["document_ids"]
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    return {"attention_mask": mask, "position_ids": batch["position_ids"]}


def generation_defaults(folder: Path) -> GenerationConfig:
    """Loads the generation config of a model: end tokens and sampling defaults."""
    from transformers import AutoConfig, GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    )


def _end_tokens(defaults: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens = defaults.eos_token_id if defaults.eos_token_id is not None else tokenizer.eos_token_id
    return tokens if isinstance(tokens, list) else [tokens]


def _generation(
    generate: Callable[[list[int]], list[int]],
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    config: EvaluateConfig,
) -> dict:
    """Generates greedily from one held-out prompt; returns the median speed, prompt included, and the text."""
    prompt = samples[0]["tokens"][:_PROMPT_TOKENS].tolist()
    seconds = []
    for _ in range(_GENERATION_REPEATS):
        started = time.perf_counter()
        tokens = generate(prompt)
        seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_s": config.generate_tokens / statistics.median(seconds),
        "num_tokens": config.generate_tokens,
        "prompt": tokenizer.decode(prompt),
        "text": tokenizer.decode(tokens),
    }


def _on_main(work: Callable[[], T]) -> T | None:
    """Returns the result of `work` on rank 0, and None elsewhere; its error reaches every rank."""
    kept: list[T] = []
    rank0_first(lambda: kept.append(work()))
    return kept[0] if kept else None
