"""The cases of `equality.py`: which networks it runs, in which layouts, with which settings."""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

SMOLLM2 = "smollm2"
VERBS = ("score", "prune", "distill", "evaluate", "export")

LAYOUTS = {
    "1x1": [],
    "tp2_sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "pp2_vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "dp2": ["parallel.data=2"],
}
# SmolLM2 has three query groups, which two tensor ranks cannot share.
SMOLLM2_LAYOUTS = {
    "1x1": LAYOUTS["1x1"],
    "tp3_sp": ["parallel.tensor=3", "parallel.sequence=true"],
    "pp2_vpp2": LAYOUTS["pp2_vpp2"],
    "dp2": LAYOUTS["dp2"],
}

SETTINGS = {
    "score": ["dtype=fp32", "depth.criteria=[block_influence,loss,kl,logits]"],
    "distill": ["dtype=fp32", "steps=10", "loss.lm_weight=0.2", "optimizer.warmup_steps=2", "optimizer.lr=1e-3"],
    "evaluate": ["dtype=fp32", "generate_tokens=8"],
}
SMOLLM2_SETTINGS = {
    "score": ["num_samples=2", "micro_batch=1"],
    "prune": ["target.hidden=448", "target.ffn=1152", "target.heads=6", "target.layers=24"],
    "distill": ["global_batch=2", "micro_batch=1"],
    "evaluate": ["num_samples=2", "micro_batch=1"],
}
# Two pipeline ranks of two stages each need at least four layers, also of what is left.
TINY_LAYERS = 6
WIDTH = ["target.hidden=40", "target.ffn=36", "target.heads=4"]
TINY_SETTINGS = {
    "score": ["num_samples=10", "micro_batch=3"],
    "prune": [*WIDTH, "target.layers=5"],
    "distill": ["global_batch=8", "micro_batch=2", "loss.chunk_tokens=24"],
    "evaluate": ["micro_batch=2"],
}
# Families differ in what they are scored by as well, which takes no more time.
FAMILY_SETTINGS = {
    "llama": {},
    "mistral": {
        "score": ["criterion=weight"],
        "distill": [
            "loss.hidden.weight=0.5",
            "loss.hidden.projection=per_pair",
            "loss.hidden.points=[layer,attention,mlp,embedding]",
        ],
    },
    "nemotron": {"score": ["criterion=activation_weight"]},
    "qwen2": {"score": ["neurons=before", "sequence_aggregation=l2"]},
    "qwen3": {},
    "seed_oss": {"score": ["sequence_aggregation=variance", "batch_aggregation=mean"]},
}
SUBLAYERS = {
    "score": ["depth.unit=sublayer"],
    "prune": ["target.layers=null", "target.attention=4", "target.mlp=5"],
}
# In one process, and no further than the pruned checkpoint.
SEARCHES = {
    "greedy": {
        "score": ["depth.search=greedy", "target.layers=4"],
        "prune": ["target.layers=4"],
    },
    "block": {
        "score": ["depth.search=block", "target.layers=4"],
        "prune": ["target.groups=1", "target.heads=2", "target.layers=4"],
    },
    "two_rounds": {
        "score": ["rounds=2", *WIDTH, "target.layers=4"],
        "prune": ["target.layers=4"],
    },
    "merged_heads": {"prune": ["merge_heads=true", "depth_criterion=kl"]},
}


@dataclass(frozen=True)
class Case:
    """What one row of the table is about.

    Attributes:
        network: its name.
        name: of the layout, and of what else is special.
        layout: settings of the layout.
        settings: of each verb, beside those of the layout. Later ones win.
        verbs: what is run, in this order.
    """

    network: str
    name: str
    layout: list[str]
    settings: dict[str, list[str]]
    verbs: tuple[str, ...] = VERBS

    @property
    def full_name(self) -> str:
        return f"{self.network}/{self.name}"


def all_cases() -> Iterator[Case]:
    """The cases, those that take longest first."""
    for name, layout in SMOLLM2_LAYOUTS.items():
        yield Case(SMOLLM2, name, layout, _merged(SETTINGS, SMOLLM2_SETTINGS))
    tiny = _merged(SETTINGS, TINY_SETTINGS)
    for family, settings in FAMILY_SETTINGS.items():
        for name, layout in LAYOUTS.items():
            yield Case(family, name, layout, _merged(tiny, settings))
    # A network that lost single sublayers is built by newer releases of Megatron-Core, and exported by none.
    verbs = VERBS[:4] if find_spec("megatron.core.models.hybrid") else VERBS[:1]
    for name, layout in LAYOUTS.items():
        yield Case("qwen3", f"{name}_sublayers", layout, _merged(tiny, SUBLAYERS), verbs)
    for name, settings in SEARCHES.items():
        yield Case("llama", f"1x1_{name}", [], _merged(tiny, settings), VERBS[:2])


def _merged(first: dict[str, list[str]], second: dict[str, list[str]]) -> dict[str, list[str]]:
    return {verb: [*first.get(verb, []), *second.get(verb, [])] for verb in {**first, **second}}


def make_inputs(folder: Path) -> dict[str, str]:
    """Make the tiny networks in Hugging Face's format and a text for them, the same ones every time.

    Returns:
        what to import, by network.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.tiny import FAMILIES, hf_model, literate, save_hf

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    for family in FAMILY_SETTINGS:
        save_hf(folder / family, literate(hf_model(**{**FAMILIES[family], "num_hidden_layers": TINY_LAYERS})))
    generator = random.Random(0)
    texts = ["".join(generator.choice("abcdefgh") for _ in range(80)) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {SMOLLM2: "builtin:smollm2-135m"} | {family: str(folder / family) for family in FAMILY_SETTINGS}


def data_settings(network: str, inputs: Path) -> list[str]:
    """Settings of a network's text."""
    if network == SMOLLM2:
        return ["data.text=[builtin]", "data.cache_dir=../corpora", "data.sequence_length=96"]
    text = f"data.text=[{inputs / 'text.jsonl'}]"
    return [text, "data.cache_dir=../corpora", "data.sequence_length=32", "data.heldout_pct=20"]
