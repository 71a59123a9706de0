"""The training loop: batches in, weights and metrics out, and nothing lost when it is killed."""

import time
from pathlib import Path

import torch

from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.data.samples import Samples, rank_batches
from minitron_megatron.distillation.step import StepResult, TeacherStudent, mean_of
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.parallel.schedule import in_calls
from minitron_megatron.progress import progress
from minitron_megatron.training.metrics import Metrics, memory_gib
from minitron_megatron.training.optimizer import Optimization
from minitron_megatron.training.state import save_state


def train(
    config: DistillConfig,
    pair: TeacherStudent,
    training: Optimization,
    samples: Samples,
    heldout: Samples,
    groups: Groups,
    first_step: int,
    checkpoints: Path,
    metrics: Metrics | None,
    flops_per_token: float,
) -> None:
    """Train from `first_step` to the end.

    Args:
        config: settings of the run.
        pair: student and teacher.
        training: the student's optimiser.
        samples: of the whole run; step i takes sequences i * global_batch and on, whatever the layout.
        heldout: for validation.
        groups: this rank's place.
        first_step: steps done already.
        checkpoints: folder for checkpoints.
        metrics: where to log, on rank 0; None elsewhere.
        flops_per_token: of a step of student and teacher, for the throughput.
    """
    tokens_per_step = config.global_batch * config.data.sequence_length
    with progress("distill" if pair.teacher else "train", config.steps) as advance:
        advance(first_step)
        for step in range(first_step + 1, config.steps + 1):
            started = time.perf_counter()
            batches = _batches(samples, (step - 1) * config.global_batch, config, groups)
            data_s = time.perf_counter() - started
            training.zero_grad()
            pair.loss = config.loss.at(step, config.steps)
            result = pair.train(batches)
            lr, grad_norm = training.step()
            step_s = time.perf_counter() - started
            values = {
                "progress/step": step,
                "progress/tokens": step * tokens_per_step,
                **_losses("loss", result, pair.loss),
                "optim/lr": lr,
                "optim/grad_norm": grad_norm,
                **_throughput(result.num_tokens / step_s, flops_per_token, groups),
                "time/step_s": step_s,
                "time/data_s": data_s,
                "time/teacher_s": result.teacher_s,
                **memory_gib(groups.device),
            }
            last = step == config.steps
            if config.validate_every and (step % config.validate_every == 0 or last):
                values |= _losses("val", validate(pair, heldout, config, groups), pair.loss)
            if metrics:
                metrics.log(values)
            advance(1, f"loss {values['loss/total']:.3f}  {values['throughput/tokens_per_s']:.0f} tokens/s")
            if last or (config.save_every and step % config.save_every == 0):
                save_state(checkpoints, step, training, pair)


def validate(pair: TeacherStudent, heldout: Samples, config: DistillConfig, groups: Groups) -> StepResult:
    """Mean losses per token over the first `validate_batches` global batches of held-out text."""
    count = min(len(heldout), config.validate_batches * config.global_batch)
    batches = rank_batches(heldout, 0, count, config.micro_batch, groups.data_rank, groups.layout.data)
    return mean_of([pair.evaluate(_to(call, groups)) for call in in_calls(batches, groups)])


def _batches(samples: Samples, first: int, config: DistillConfig, groups: Groups) -> list:
    count, data = config.global_batch, groups.layout.data
    return _to(list(rank_batches(samples, first, count, config.micro_batch, groups.data_rank, data)), groups)


def _to(batches: list, groups: Groups) -> list:
    return [{key: value.to(groups.device, non_blocking=True) for key, value in batch.items()} for batch in batches]


def _losses(where: str, result: StepResult, loss: LossConfig) -> dict[str, float]:
    found = {f"{where}/total": result.total(loss), f"{where}/lm": result.lm}
    if loss.kd_logits_weight:
        found[f"{where}/kd_logits"] = result.kd_logits
    if result.of_pairs:
        found |= {f"{where}/kd_hidden": result.kd_hidden, f"{where}/alpha": result.alpha}
        found |= {f"{where}/kd_hidden/{name}": distance for name, distance in result.of_pairs.items()}
    return found


# Dense bf16 peak in TFLOP/s by CUDA's name of the device, from NVIDIA's data sheets. PCIe and NVL parts of the same
# family have other peaks.
_PEAK_TFLOPS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
}


def _throughput(tokens_per_s: float, flops_per_token: float, groups: Groups) -> dict[str, float]:
    ranks = groups.layout.world_size
    tflops = tokens_per_s * flops_per_token / ranks / 1e12
    found = {
        "throughput/tokens_per_s": tokens_per_s,
        "throughput/tokens_per_s_per_rank": tokens_per_s / ranks,
        "throughput/tflops_per_rank": tflops,
    }
    if groups.device.type == "cuda":
        peak = _PEAK_TFLOPS.get(torch.cuda.get_device_name())
        if peak:
            found["throughput/mfu_pct"] = 100 * tflops / peak
    return found
