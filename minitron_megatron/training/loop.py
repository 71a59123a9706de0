"""The training loop: batches in, weights and metrics out, and nothing lost when it is killed."""

import argparse
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from minitron_megatron.checkpoint.sharded import TRACKER
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.data.samples import Samples, rank_batches
from minitron_megatron.distillation.step import StepResult, TeacherStudent, mean_of
from minitron_megatron.errors import DataError, Preempted, TrainingError
from minitron_megatron.parallel.gpus import peak_tflops
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.parallel.schedule import in_calls, to_device
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress
from minitron_megatron.tracking.metrics import Metrics, memory_gib
from minitron_megatron.training.optimizer import Optimization
from minitron_megatron.training.state import RunState, remove_old, save_state, step_back

logger = logging.getLogger(__name__)


def train(
    config: DistillConfig,
    pair: TeacherStudent,
    models: Mapping[str, Optimization],
    samples: Samples,
    heldout: Samples,
    groups: Groups,
    run: RunState,
    checkpoints: Path,
    metrics: Metrics | None,
    flops_per_token: float,
    asked_to_stop: Callable[[], bool],
    args: argparse.Namespace,
) -> None:
    """Train to the end, or until a signal asks one of the ranks to stop.

    A step whose loss or gradient is not finite changes nothing but the count of such steps.

    Args:
        config: settings of the run.
        pair: student and teacher.
        models: what is trained, by the prefix of its keys in checkpoints; the student, whose prefix is empty, first.
        samples: of the whole run; step i takes sequences i * global_batch and on, whatever the layout.
        heldout: for validation.
        groups: this rank's place.
        run: how far the run has come.
        checkpoints: folder for checkpoints.
        metrics: where to log, on rank 0; None elsewhere.
        flops_per_token: of a step of student and teacher, for the throughput.
        asked_to_stop: whether a signal has come to this rank.

    Raises:
        DataError: the teacher knows no more of the text than chance does.
        Preempted: after the step in which a signal came. The run is saved as it was then.
        TrainingError: too many steps in a row had no finite loss or gradient.
    """
    tokens_per_step = config.global_batch * config.data.sequence_length
    pair.alpha = run.alpha
    title = "distill" if pair.teacher else "train"
    # Whether a loss has come from the last checkpoint's weights, and whether those before it are still to be removed.
    tried, has_older = False, True
    with watchdog(groups.timeout_min) as moved, progress(title, config.steps) as advance:
        advance(run.step)
        while run.step < config.steps:
            moved()
            watch = _Watch()
            first = run.step * config.global_batch
            batches = _batches(samples, first, config, groups)
            watch.lap("data")
            values = {}
            if pair.teacher and run.step == 0:
                values["teacher/first_lm"] = _checked(pair.evaluate_teacher(batches), config, pair.vocab)
                watch.lap("teacher_check")
            run.step += 1
            for training in models.values():
                training.zero_grad()
            pair.loss = config.loss.at(run.step, config.steps)
            result = pair.train(batches)
            watch.lap("student", less=("teacher", result.teacher_s))
            norms = [training.grad_norm() for training in models.values()]
            lrs = [training.optimizer.param_groups[0]["lr"] for training in models.values()]
            tried |= result.is_finite
            if result.is_finite and all(map(math.isfinite, norms)):
                lrs = [training.step() for training in models.values()]
                run.skipped_in_a_row = 0
                if has_older:
                    remove_old(checkpoints, config.keep_checkpoints)
                    has_older = False
            else:
                run.skipped += 1
                run.skipped_in_a_row += 1
            watch.lap("optimizer")
            run.alpha = pair.alpha
            seconds = _largest({**watch.seconds, "step": watch.total, "stop": float(asked_to_stop())}, groups)
            stops = bool(seconds.pop("stop"))
            values |= {
                "progress/step": run.step,
                "progress/tokens": run.step * tokens_per_step,
                "progress/skipped_steps": run.skipped,
                **_losses("loss", result, pair.loss),
                "optim/lr": lrs[0],
                "optim/grad_norm": norms[0],
                **_throughput(result.num_tokens / seconds["step"], flops_per_token, groups),
                **{f"time/{name}_s": value for name, value in seconds.items()},
                **_largest(memory_gib(groups.device), groups),
            }
            if result.teacher_lm is not None:
                values |= {"teacher/lm": result.teacher_lm, "teacher/grad_norm": norms[1], "teacher/lr": lrs[1]}
            last, best, heldout_loss = run.step == config.steps, False, None
            if config.validate_every and (run.step % config.validate_every == 0 or last):
                found = validate(pair, heldout, config, groups, moved)
                values |= _losses("val", found, pair.loss)
                # The weights of a sum may change over the run, and so may a teacher; the text does not.
                follows = pair.loss.kd_logits_weight and config.teacher_lr is None
                heldout_loss = found.kd_logits if follows else found.lm
                stops |= bool(_largest({"stop": float(asked_to_stop())}, groups)["stop"])  # it takes a while
                best = heldout_loss < run.best_loss
                run.best_loss = heldout_loss if best else run.best_loss
            if metrics:
                metrics.log(values)
            advance(1, f"loss {values['loss/total']:.3f}  {values['throughput/tokens_per_s']:.0f} tokens/s")
            if run.skipped_in_a_row >= config.max_skipped_steps:
                if not tried:
                    step_back(checkpoints)
                is_saved = (checkpoints / TRACKER).is_file()
                way_out = f"start a new output from the last checkpoint in {checkpoints}" if is_saved else "begin anew"
                raise TrainingError(
                    f"no finite loss and gradient in the last {run.skipped_in_a_row} steps, which were skipped. In "
                    f"step {run.step}, of sequences {first} to {first + config.global_batch - 1}, the loss was "
                    f"{result.total(pair.loss)} and the gradient's norm {norms[0]}: look at that text, or {way_out}, "
                    f"with a lower optimizer.lr or another dtype"
                )
            # While steps are skipped, the weights may be what is wrong: the checkpoints before stay.
            in_doubt = run.skipped_in_a_row > 0
            if heldout_loss is not None and not math.isfinite(heldout_loss):
                in_doubt, problem = True, f"the loss on held-out text is {heldout_loss} after step {run.step}"
                if last:
                    raise TrainingError(
                        f"{problem}, the last one, which is not saved: look at that text, or begin anew with a lower "
                        f"optimizer.lr or another dtype"
                    )
                logger.warning(problem)
            is_due = config.save_every and run.step % config.save_every == 0 and not in_doubt
            if last or best or stops or is_due:
                moved()
                save_state(checkpoints, run, models, best, args)
                moved()
                tried = heldout_loss is not None
                has_older = in_doubt or not (tried or last)
                if in_doubt:
                    logger.warning("step %d is saved in doubt: the checkpoints before it stay", run.step)
                elif not has_older:
                    remove_old(checkpoints, config.keep_checkpoints)
            if stops and not last:
                raise Preempted(f"a signal asked to stop: {checkpoints} is saved at step {run.step} of {config.steps}")


def _checked(result: StepResult, config: DistillConfig, vocab: int) -> float:
    """A teacher's loss per token on the first batch, if it is better than chance."""
    chance, lm = math.log(vocab), result.lm
    if not result.num_tokens:
        raise DataError(
            "the first batch has no token that counts, so that nothing tells whether the teacher is what it should be: "
            "look at that text, or take another data.seed"
        )
    if not lm < chance:
        raise DataError(
            f"teacher = {config.teacher} has a loss of {lm:.3f} nats per token on the first batch, and chance over "
            f"{vocab} tokens has {chance:.3f}: its weights, its tokenizer or the text are not what they should be"
        )
    logger.info("the teacher's loss on the first batch is %.3f nats per token; chance has %.3f", lm, chance)
    return lm


class _Watch:
    """Seconds of a step on this rank, part by part."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._started = self._last = time.perf_counter()

    def lap(self, name: str, less: tuple[str, float] | None = None) -> None:
        """What has passed since the last part is this one, but for what another part inside of it took."""
        now = time.perf_counter()
        other, seconds = less or ("", 0.0)
        if less:
            self.seconds[other] = seconds
        self.seconds[name] = now - self._last - seconds
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._started


def _largest(values: dict[str, float], groups: Groups) -> dict[str, float]:
    """Each value's largest over all ranks. Collective."""
    if groups.layout.world_size == 1:
        return values
    found = torch.tensor(list(values.values()), dtype=torch.float64, device=groups.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return dict(zip(values, found.tolist(), strict=True))


def validate(
    pair: TeacherStudent, heldout: Samples, config: DistillConfig, groups: Groups, moved: Callable[[], None]
) -> StepResult:
    """Mean losses per token over the first `validate_batches` global batches of held-out text.

    Args:
        moved: called after every few micro-batches.
    """
    count = min(len(heldout), config.validate_batches * config.global_batch)
    batches = rank_batches(heldout, 0, count, config.micro_batch, groups.data_rank, groups.layout.data)
    found = []
    for call in in_calls(batches, groups):
        found.append(pair.evaluate(to_device(call, groups.device)))
        moved()
    return mean_of(found)


def _batches(samples: Samples, first: int, config: DistillConfig, groups: Groups) -> list:
    count, data = config.global_batch, groups.layout.data
    batches = rank_batches(samples, first, count, config.micro_batch, groups.data_rank, data)
    return to_device(batches, groups.device)


def _losses(where: str, result: StepResult, loss: LossConfig) -> dict[str, float]:
    found = {f"{where}/total": result.total(loss), f"{where}/lm": result.lm}
    if loss.kd_logits_weight:
        found[f"{where}/kd_logits"] = result.kd_logits
    if result.of_pairs:
        found |= {f"{where}/kd_hidden": result.kd_hidden, f"{where}/alpha": result.alpha}
        found |= {f"{where}/kd_hidden/{name}": distance for name, distance in result.of_pairs.items()}
    return found


def _throughput(tokens_per_s: float, flops_per_token: float, groups: Groups) -> dict[str, float]:
    ranks = groups.layout.world_size
    tflops = tokens_per_s * flops_per_token / ranks / 1e12
    found = {
        "throughput/tokens_per_s": tokens_per_s,
        "throughput/tokens_per_s_per_rank": tokens_per_s / ranks,
        "throughput/tflops_per_rank": tflops,
    }
    if groups.device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name())
        if peak:
            found["throughput/mfu_pct"] = 100 * tflops / peak
    return found
