"""Run by an interpreter that has vLLM: what it says of folders that are named on standard input, as JSON.

In: `{"folders": {folder: dtype}, "prompts": [[token, ...], ...], "new_tokens": n}`. Into the file that the argument
names goes, by folder and prompt, the log-probability of each of its tokens but the first, and the greedy tokens with
their text.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

from vllm import LLM, SamplingParams


def serve(folder: str, dtype: str, prompts: list[list[int]], new_tokens: int) -> list[dict]:
    llm = LLM(folder, dtype=dtype, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, prompt_logprobs=0, ignore_eos=True)
    served = []
    for request in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
        rows = zip(request.prompt_logprobs[1:], request.prompt_token_ids[1:], strict=True)
        [generated] = request.outputs
        served.append(
            {
                "logprobs": [row[token].logprob for row, token in rows],
                "tokens": list(generated.token_ids),
                "text": generated.text,
            }
        )
    return served


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    rest = asked["prompts"], asked["new_tokens"]
    served = {folder: serve(folder, dtype, *rest) for folder, dtype in asked["folders"].items()}
    Path(sys.argv[1]).write_text(json.dumps(served))
