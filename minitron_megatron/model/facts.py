"""Formats the sizes and switches of a network for people."""

from minitron_megatron.model.axes import HIDDEN, VOCAB
from minitron_megatron.model.checks import plain_values
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.network import Network


def network_facts(network: Network, switches: bool = False) -> dict[str, str]:
    """Returns counts and sizes by name. Sizes that differ by layer are a range.

    Args:
        network: the network.
        switches: add all other fields too.
    """
    facts = {
        "parameters": f"{num_parameters(network):,}",
        "without embeddings": f"{num_parameters(network, embeddings=False):,}",
        "layers": str(len(network.layers)),
        HIDDEN.name: f"{network.hidden_size:,}",
        VOCAB.name: f"{network.vocab_size:,}",
    }
    for kind in network.kinds:
        own = [plain_values(network.sublayers[position]) for position in network.positions(kind)]
        if len(own) != len(network.layers):
            facts[f"{kind.title} sublayers"] = str(len(own))
        for name in own[0]:
            values = [row[name] for row in own]
            if switches or type(values[0]) is int:
                facts[f"{kind.name}.{name}"] = _shown(values)
    if switches:
        if len({len(layer) for layer in network.layers}) > 1:
            facts["pattern"] = network.pattern
        others = network.to_dict()
        for name in ("padded_vocab_size", "max_positions", "norm", "norm_eps", "norm_zero_centered", "rotary_base"):
            facts[name] = _shown([others[name]])
        for name in ("rotary_fraction", "rotary_scaling", "tie_embeddings"):
            facts[name] = _shown([others[name]])
    return facts


def _shown(values: list) -> str:
    if type(values[0]) is int and min(values) != max(values):
        return f"{min(values):,} to {max(values):,}"
    different = list(dict.fromkeys(map(str, values)))
    if len(different) > 1:
        return ", ".join(different)
    return (
        f"{values[0]:,}"
        if type(values[0]) is int
        else f"{values[0]:g}"
        if isinstance(values[0], float)
        else different[0]
    )
