"""Our model beside a transformers one, and what the tests of scores and plans say it should find."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.source import take
from minitron_megatron.config.schema import Aggregation, DepthConfig, DType, ScoreConfig
from minitron_megatron.model import build
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import parameters
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores
from tests.in_memory import StateDict
from tests.tiny import Samples

OVER_LIST = {
    Aggregation.MEAN: lambda x: x.abs().mean(0),
    Aggregation.L2: lambda x: x.square().sum(0).sqrt(),
    Aggregation.VARIANCE: lambda x: x.var(0, correction=0),
}
NUM_SAMPLES, SEQUENCE, MICRO_BATCH = 7, 16, 2  # the last micro-batch is filled up
AXES = ("hidden", "ffn", "heads")


def build_ours(theirs, ctx, recompute=False):
    """A transformers model as one of ours, on this rank."""
    network = network_from_config(theirs.config.to_dict())
    model_chunks = build.build_model(network, ctx, DType.FP32, recompute)
    load_weights(model_chunks, StateDict(network, theirs.state_dict()), ctx)
    return model_chunks, network


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


def assert_same(found: Scores, expected: Scores, tolerance: float = 0.0) -> None:
    """Two scorings by the same settings found the same."""
    for name in ("network", "settings", "checkpoint"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("hidden", "elements", "depth", "rounds", "element_rounds"):
        one, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


class RandomSource:
    """Random weights in memory, by key and layer."""

    dtype = torch.float32

    def __init__(self, network):
        self.network = network
        generator = torch.Generator().manual_seed(2)
        # Larger biases would make tokens alike, and whether a neuron is ever active would hang on them alone.
        self.tensors = {}
        for param in parameters(network):
            scale = 0.02 if param.name.endswith(".bias") else 0.15
            self.tensors[param.name, param.layer] = scale * torch.randn(*param.shape, generator=generator)

    def read(self, param, index):
        return take(self.tensors[param.name, param.layer], index)


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


def direct_effects(model, samples: Samples, base, path, missing=()) -> dict[str, float]:
    """What leaving out `path`, of which `base` is gone already, does to a transformers model, by criterion.

    The whole network is the model without what is missing in any case.
    """
    tokens, labels, valid = samples.tokens[:, :-1], samples.tokens[:, 1:], samples.mask > 0
    whole, _ = run_without(model, tokens, missing)
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


def activations_of(model, samples: Samples) -> dict[str, dict[int, Tensor]]:
    """Everything that is scored, `[sequence, token, element]`, by axis, and then by position of the sublayer; the final
    norm stands behind the last one. `before` has neurons before their activation."""
    seen = {"hidden": {}, "ffn": {}, "before": {}, "heads": {}}
    hooks = []

    def keep_input(module, axis, name, change=lambda x: x):
        hooks.append(module.register_forward_pre_hook(lambda m, args: seen[axis].update({name: change(args[0])})))

    def keep_output(module, axis, name):
        def hook(module, args, output):
            seen[axis][name] = output[0] if isinstance(output, tuple) else output

        hooks.append(module.register_forward_hook(hook))

    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        keep_output(layer.input_layernorm, "hidden", 2 * number)
        keep_output(layer.post_attention_layernorm, "hidden", 2 * number + 1)
        keep_input(attention.o_proj, "heads", 2 * number, lambda x: x.unflatten(-1, (6, 12)).square().sum(-1).sqrt())
        keep_input(mlp.down_proj, "ffn", 2 * number + 1)
        keep_output(mlp.gate_proj if hasattr(mlp, "gate_proj") else mlp.up_proj, "before", 2 * number + 1)
    keep_output(model.model.norm, "hidden", 2 * len(model.model.layers))
    with torch.no_grad():
        model(samples.tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    return {axis: {name: x.double() for name, x in places.items()} for axis, places in seen.items()}


def direct_activations(
    model, samples: Samples, over_tokens: Aggregation, over_sequences: Aggregation
) -> dict[str, dict[int, Tensor]]:
    """Scores by activations, `[element]`, by axis and place as `activations_of` has them."""
    valid = [mask > 0 for mask in samples.mask]

    def score(x: Tensor) -> Tensor:
        of_sequences = [OVER_LIST[over_tokens](row[v]) for row, v in zip(x, valid, strict=True) if v.any()]
        return OVER_LIST[over_sequences](torch.stack(of_sequences))

    seen = activations_of(model, samples)
    return {axis: {place: score(x) for place, x in places.items()} for axis, places in seen.items()}


def norm(*tensors):
    """Over all dimensions but the first, and over the tensors."""
    return sum(t.detach().double().square().flatten(1).sum(1) for t in tensors).sqrt()


def columns(tensor):
    return tensor.detach().unsqueeze(0) if tensor.dim() == 1 else tensor.detach().T.contiguous()


def direct_weights(model, outgoing):
    """Norms of what goes with every channel, neuron and head; of hidden channels per norm of the network."""
    network = model.model
    found = {"hidden": [], "ffn": [], "heads": []}
    for layer in network.layers:
        attention, mlp = layer.self_attn, layer.mlp
        reads = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        firsts = [mlp.gate_proj.weight, mlp.up_proj.weight] if hasattr(mlp, "gate_proj") else [mlp.up_proj.weight]
        writes = [] if outgoing else [attention.o_proj.weight]
        norms = [] if outgoing else [layer.input_layernorm]
        found["hidden"].append(
            norm(*map(columns, reads), *writes, *(p[:, None] for n in norms for p in n.parameters()))
        )
        writes = [] if outgoing else [mlp.down_proj.weight]
        norms = [] if outgoing else [layer.post_attention_layernorm]
        found["hidden"].append(
            norm(*map(columns, firsts), *writes, *(p[:, None] for n in norms for p in n.parameters()))
        )
        found["ffn"].append(norm(mlp.down_proj.weight.T, *([] if outgoing else firsts)))
        by_head = attention.o_proj.weight.T.reshape(6, 12 * 48)
        queries = [] if outgoing else [p.view(6, -1) for p in attention.q_proj.parameters()]  # a bias as well
        found["heads"].append(norm(by_head, *queries))
    last = [columns(model.lm_head.weight)]
    if not outgoing:
        last += [p[:, None] for p in network.norm.parameters()]
        if model.lm_head.weight is not network.embed_tokens.weight:
            last.append(columns(network.embed_tokens.weight))
    found["hidden"].append(norm(*last))
    return {axis: torch.stack(values) for axis, values in found.items()}


def sliced_by_hand(tensors: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """What is left of a Llama's state dict, one kind of tensor after another."""
    hidden = plan.hidden
    left = {name: tensors[name][:, hidden] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    left["model.norm.weight"] = tensors["model.norm.weight"][hidden]
    for number, position in enumerate(plan.sublayers[::2]):
        before, after = f"model.layers.{position // 2}.", f"model.layers.{number}."
        rows, of_groups, attention = [], [], plan.elements[position]
        head_dim, per_group = plan.source.sublayers[position].head_dim, plan.source.sublayers[position].heads_per_group
        for group, heads in zip(attention["groups"], attention["heads"], strict=True):
            of_groups += range(group * head_dim, (group + 1) * head_dim)
            for head in heads:
                first = (group * per_group + head) * head_dim
                rows += range(first, first + head_dim)
        neurons = plan.elements[position + 1]["ffn"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            left[f"{after}{name}.weight"] = tensors[f"{before}{name}.weight"][hidden]
        left[f"{after}self_attn.q_proj.weight"] = tensors[f"{before}self_attn.q_proj.weight"][rows][:, hidden]
        for name in ("k_proj", "v_proj"):
            left[f"{after}self_attn.{name}.weight"] = tensors[f"{before}self_attn.{name}.weight"][of_groups][:, hidden]
        left[f"{after}self_attn.o_proj.weight"] = tensors[f"{before}self_attn.o_proj.weight"][hidden][:, rows]
        for name in ("gate_proj", "up_proj"):
            left[f"{after}mlp.{name}.weight"] = tensors[f"{before}mlp.{name}.weight"][neurons][:, hidden]
        left[f"{after}mlp.down_proj.weight"] = tensors[f"{before}mlp.down_proj.weight"][hidden][:, neurons]
    return left
