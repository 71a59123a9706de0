"""The verb `evaluate`: held-out loss and perplexity, and generation speed, of a checkpoint or a Hugging Face folder."""

import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from minitron_megatron.checkpoint.convert import as_transformers_model
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.manifest import Manifest, Parent, is_done, write_atomically, writing
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.schema import EvaluateConfig
from minitron_megatron.data.samples import Samples, heldout_samples, rank_batches
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.distillation.step import TeacherStudent, mean_of
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.model.build import TORCH_DTYPES, build_model, build_problems
from minitron_megatron.model.count import num_parameters
from minitron_megatron.parallel.collectives import main_first
from minitron_megatron.parallel.groups import Groups, process_groups
from minitron_megatron.parallel.schedule import Batch, in_calls
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress

FILE = "evaluation.json"
_PROMPT_TOKENS = 32
_GENERATION_REPEATS = 3


def evaluate(config: EvaluateConfig) -> Path:
    """Measure a model on text that neither calibration nor training has seen.

    A Megatron checkpoint runs under Megatron-Core in the layout of the settings, a Hugging Face folder under
    transformers. Generation runs under transformers for both, on the first rank.

    Returns:
        the folder with `evaluation.json`.

    Raises:
        CheckpointError: the model is neither, or not whole.
        DataError: there is no held-out text.
    """
    path, output = Path(config.model), Path(config.output)
    is_folder = (path / "config.json").is_file()
    checkpoint = None if is_folder else Checkpoint(path)
    if checkpoint:
        problems = build_problems(checkpoint.shape, config.parallel, "model")
        raise_if_any(problems + _generation_problems(checkpoint, config))
    parents = [Parent.of("model", checkpoint.root if checkpoint else path)]
    parents += Parent.of_text(config.data.text)
    shape = checkpoint.shape.to_dict() if checkpoint else None
    manifest = Manifest("evaluation", shape, parents, to_plain(config))
    if is_done(output, manifest):
        return output
    tokenizer = checkpoint.huggingface_folder if checkpoint else path
    with process_groups(config.parallel) as groups:
        if is_folder and groups.layout.world_size > 1:
            raise CheckpointError(f"model = {path} is a Hugging Face folder, which runs on one rank: import it first")
        corpus = main_first(lambda: prepare_corpus(config.data, tokenizer))
        samples = heldout_samples(corpus, config.data, config.num_samples)
        if checkpoint:
            loss, num_tokens = _megatron_loss(checkpoint, samples, config, groups)
        if groups.is_main:
            model = None
            if is_folder or config.generate_tokens:
                model = _transformers_model(checkpoint, path, config)
            if is_folder:
                loss, num_tokens = _transformers_loss(model, samples, config)
            result = {
                "model": str(path),
                "name": path.name,
                **_counts(checkpoint, model),
                "heldout": {"loss": loss, "perplexity": math.exp(loss), "num_tokens": num_tokens},
                "generation": _generation(model, tokenizer, samples, config) if config.generate_tokens else None,
            }
            with writing(output, manifest) as folder:
                write_atomically(folder / FILE, json.dumps(result, indent=2) + "\n")
    return output


def _megatron_loss(
    checkpoint: Checkpoint, samples: Samples, config: EvaluateConfig, groups: Groups
) -> tuple[float, int]:
    """Mean cross-entropy per held-out token, in nats, and the number of tokens."""
    chunks = build_model(checkpoint.shape, groups, config.dtype)
    load_weights(chunks, checkpoint, groups)
    model = TeacherStudent(chunks, None, groups, LossConfig(0.0, 1.0), checkpoint.shape.vocab)
    batches = rank_batches(samples, 0, len(samples), config.micro_batch, groups.data_rank, groups.layout.data)
    results = []
    num_batches = -(-len(samples) // (config.micro_batch * groups.layout.data))
    with watchdog(config.parallel.timeout_min) as moved, progress("evaluate", num_batches) as advance:
        for call in in_calls(batches, groups):
            results.append(model.evaluate([{k: v.to(groups.device) for k, v in batch.items()} for batch in call]))
            moved()
            advance(len(call))
    result = mean_of(results)
    return result.lm, result.num_tokens


def _transformers_loss(model, samples: Samples, config: EvaluateConfig) -> tuple[float, int]:
    """The same mean, from a transformers model."""
    total, num_tokens = 0.0, 0
    with torch.no_grad(), progress("evaluate", -(-len(samples) // config.micro_batch)) as advance:
        for batch in rank_batches(samples, 0, len(samples), config.micro_batch, 0, 1):
            batch = {key: value.to(model.device) for key, value in batch.items()}
            logits = model(batch["tokens"], **_documents(batch)).logits
            # A sequence at a time: float32 logits of a whole batch would be gigabytes.
            for row, labels, mask in zip(logits, batch["labels"], batch["loss_mask"], strict=True):
                loss = torch.nn.functional.cross_entropy(row.float(), labels, reduction="none")
                total += float((loss * mask).sum(dtype=torch.float64))
                num_tokens += int(mask.sum())
            advance()
    return total / num_tokens, num_tokens


def _documents(batch: Batch) -> dict[str, Tensor]:
    """What tells a transformers model that documents are apart."""
    if "document_ids" not in batch:
        return {}
    documents = batch["document_ids"]
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    return {"attention_mask": mask, "position_ids": batch["position_ids"]}


def _transformers_model(checkpoint: Checkpoint | None, path: Path, config: EvaluateConfig):
    from transformers import AutoModelForCausalLM

    dtype = TORCH_DTYPES[config.dtype]
    device = torch.device(torch.cuda.current_device())
    if checkpoint:
        return as_transformers_model(checkpoint).to(dtype).to(device)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).eval().to(device)


def _counts(checkpoint: Checkpoint | None, model) -> dict[str, int]:
    if checkpoint:
        total, body = num_parameters(checkpoint.shape), num_parameters(checkpoint.shape, embeddings=False)
    else:
        total = model.num_parameters()
        ends = {id(e.weight): e.weight.numel() for e in (model.get_input_embeddings(), model.get_output_embeddings())}
        body = total - sum(ends.values())
    return {"parameters": total, "parameters_without_embeddings": body}


def _generation_problems(checkpoint: Checkpoint, config: EvaluateConfig) -> list[str]:
    if checkpoint.shape.is_uniform or not config.generate_tokens:
        return []
    return [
        f"generate_tokens = {config.generate_tokens} takes a Hugging Face model, and there is none of model.pattern = "
        f"{checkpoint.shape.pattern!r}: set generate_tokens=0"
    ]


def _generation(model, tokenizer_folder: Path, samples: Samples, config: EvaluateConfig) -> dict:
    """Greedy generation for one prompt of held-out text: median speed, prompt included, and the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    prompt = samples[0]["tokens"][None, :_PROMPT_TOKENS].to(model.device)
    count = config.generate_tokens
    seconds = []
    for _ in range(_GENERATION_REPEATS):
        started = time.perf_counter()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=tokenizer.eos_token_id,
        )
        seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_s": count / statistics.median(seconds),
        "num_tokens": count,
        "prompt": tokenizer.decode(prompt[0]),
        "text": tokenizer.decode(tokens[0, prompt.size(1) :]),
    }
