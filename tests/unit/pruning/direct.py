"""Our model beside a transformers one, and what the tests of scores and plans say it should find."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.schema import DepthConfig, DType, ScoreConfig
from minitron_megatron.model import build
from minitron_megatron.model.families import network_from_config
from minitron_megatron.pruning.scores import Scores
from tests.in_memory import StateDict
from tests.tiny import Samples

NUM_SAMPLES, SEQUENCE, MICRO_BATCH = 7, 16, 2  # the last micro-batch is filled up
AXES = ("hidden", "ffn", "heads")


def build_ours(theirs, groups, recompute=False):
    """A transformers model as one of ours, on this rank."""
    network = network_from_config(theirs.config.to_dict())
    chunks = build.build_model(network, groups, DType.FP32, recompute)
    load_weights(chunks, StateDict(network, theirs.state_dict()), groups)
    return chunks, network


def samples_for(theirs) -> Samples:
    return Samples(NUM_SAMPLES, SEQUENCE, theirs.config.vocab_size)


def score_config(**settings) -> ScoreConfig:
    """Settings of a scoring of `samples_for`; those of `DepthConfig` may be among them."""
    depth = {name: settings.pop(name) for name in list(settings) if name in DepthConfig.__dataclass_fields__}
    return ScoreConfig(
        **{"num_samples": NUM_SAMPLES, "micro_batch": MICRO_BATCH, **settings}, depth=DepthConfig(**depth)
    )


def by_axis(scores: Scores) -> dict[str, Tensor]:
    """Scores of channels, neurons and heads, those of all layers in one tensor."""
    return {axis: scores.hidden if axis == "hidden" else torch.stack(scores.elements[axis]) for axis in AXES}


def rounds_by_axis(scores: Scores) -> dict[str, Tensor]:
    """The rounds of the same."""
    return {
        axis: scores.rounds["hidden"] if axis == "hidden" else torch.stack(scores.element_rounds[axis]) for axis in AXES
    }


@contextmanager
def without(model, drops) -> Iterator[None]:
    """A transformers model whose sublayers at these positions add nothing to the residual stream."""
    hooks = []
    for position in drops:
        layer = model.model.layers[position // 2]
        if position % 2 == 0:
            hook = layer.self_attn.register_forward_hook(lambda m, args, output: (torch.zeros_like(output[0]), None))
        else:
            hook = layer.mlp.register_forward_hook(lambda m, args, output: torch.zeros_like(output))
        hooks.append(hook)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_without(model, tokens: Tensor, drops) -> tuple[Tensor, list[Tensor]]:
    """Logits in float64, and the residual stream before each sublayer and behind the last one."""
    stream: dict[int, Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        for position, norm in ((2 * number, layer.input_layernorm), (2 * number + 1, layer.post_attention_layernorm)):
            hooks.append(norm.register_forward_pre_hook(lambda m, args, p=position: stream.update({p: args[0]})))
    last = 2 * len(model.model.layers)
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, args: stream.update({last: args[0]})))
    with torch.no_grad(), without(model, drops):
        logits = model(tokens).logits.double()
    for hook in hooks:
        hook.remove()
    return logits, [stream[position].double() for position in range(last + 1)]


def direct_effects(model, samples: Samples, base, path) -> dict[str, float]:
    """What leaving out `path`, of which `base` is gone already, does to a transformers model, by criterion."""
    tokens, labels, valid = samples.tokens[:, :-1], samples.tokens[:, 1:], samples.mask > 0
    whole, _ = run_without(model, tokens, ())
    logits, _ = run_without(model, tokens, path)
    _, stream = run_without(model, tokens, base)
    q, p = whole[valid].log_softmax(-1), logits[valid].log_softmax(-1)
    rows = labels[valid][:, None]
    new = sorted(set(path) - set(base))
    # What is left out stands in one piece, but for what was gone before.
    before, behind = stream[new[0]][valid], stream[new[-1] + 1][valid]
    return {
        "loss": float((q - p).gather(1, rows).mean()),
        "kl": float((q.exp() * (q - p)).sum(-1).mean()),
        "logits": float((whole - logits)[valid].square().sum() / whole[valid].square().sum()),
        "block_influence": float(1 - torch.nn.functional.cosine_similarity(before, behind, dim=-1).mean()),
    }
