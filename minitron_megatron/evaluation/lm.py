"""Adapts a Megatron model to EleutherAI's lm-eval harness."""

import json
import logging
from collections.abc import Callable

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import GenerationConfig, PreTrainedTokenizerBase

from minitron_megatron.errors import ConfigError
from minitron_megatron.evaluation.sampling import SamplingParams

logger = logging.getLogger(__name__)

# Default of transformers' GenerationConfig.
_TOP_K = 50


class MegatronLM(TemplateLM):
    """The model interface of lm-eval, on rank 0.

    Tokenises with the code of lm-eval's own transformers backend, so that both see the same tokens.

    Args:
        call: calls a method of `Inference` on every rank; see `run_on_rank0`.
        tokenizer: of transformers.
        max_length: longest sequence, in tokens.
        defaults: sampling settings that a task may override.
    """

    tok_encode = HFLM.tok_encode
    apply_chat_template = HFLM.apply_chat_template
    prefix_token_id = HFLM.prefix_token_id
    tokenizer_name = HFLM.tokenizer_name
    # Attributes that these methods read.
    add_bos_token = custom_prefix_token_id = None

    def __init__(self, call: Callable, tokenizer: PreTrainedTokenizerBase, max_length: int, defaults: GenerationConfig):
        super().__init__()
        self.call, self.tokenizer, self.max_length, self.defaults = call, tokenizer, max_length, defaults
        self.chat_template_args: dict = {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        sequences, num_cut = [], 0
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            num_cut += len(tokens) < len(context) + len(continuation)
            sequences.append((tokens, min(len(continuation), len(tokens) - 1)))
        self._warn_truncated(num_cut, len(requests))
        return self.call("score", sequences)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        of_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            of_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for settings, numbers in of_settings.items():
            params = self._params(json.loads(settings))
            longest = self.max_length - params.max_new_tokens
            whole = [self.tok_encode(requests[number].args[0]) or [self.prefix_token_id] for number in numbers]
            self._warn_truncated(sum(len(prompt) > longest for prompt in whole), len(whole))
            made = self.call("generate", [prompt[-longest:] for prompt in whole], params)
            for number, tokens in zip(numbers, made, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, params.stop, think_end_token=None)
        return texts

    def _params(self, settings: dict) -> SamplingParams:
        """Converts a task's `generation_kwargs`.

        Raises:
            ConfigError: an option is not supported.
        """
        known = normalize_gen_kwargs(settings)
        max_new_tokens, sample = known.pop("max_gen_toks"), known.pop("do_sample")
        temperature = known.pop("temperature", 0.0)
        end = self.tokenizer.decode(self.eot_token_id)
        params = SamplingParams(
            max_new_tokens,
            stop=handle_stop_sequences(known.pop("until"), eos=end),
            sample=sample and temperature > 0,
            temperature=temperature,
            top_k=known.pop("top_k", self.defaults.top_k if self.defaults.top_k is not None else _TOP_K),
            top_p=known.pop("top_p", self.defaults.top_p),
            min_p=known.pop("min_p", self.defaults.min_p),
        )
        if known.pop("num_beams", 1) != 1 or known:
            raise ConfigError(
                [
                    f"generation_kwargs of a task have {settings}: supported are until, max_gen_toks, do_sample, "
                    f"temperature, top_k, top_p and min_p"
                ]
            )
        if max_new_tokens >= self.max_length:
            raise ConfigError(
                [
                    f"max_gen_toks = {max_new_tokens} of a task leaves no room for its questions in the model's "
                    f"{self.max_length} positions: lower it in the task's generation_kwargs"
                ]
            )
        return params

    def _warn_truncated(self, num_cut: int, num_all: int) -> None:
        if num_cut:
            logger.warning(
                "%d of %d texts are longer than the model's %d positions: their beginnings are left out",
                num_cut,
                num_all,
                self.max_length,
            )
