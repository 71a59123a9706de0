"""How a `config.json` says where tokens are: its rotary embedding, and which layers see only a window of them."""

from typing import Any

from minitron_megatron.errors import UnsupportedModelError
from minitron_megatron.model.config_fields import shown
from minitron_megatron.model.network import Llama3RopeScaling


def rotary_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters of the rotary embedding, as transformers puts them together.

    They are `rope_parameters` since transformers 5; earlier `rope_scaling`, with two fields at the top level.

    Raises:
        UnsupportedModelError: both are there and differ, or layers have parameters of their own.
    """
    assumed: dict[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    assumed |= {name: config[name] for name in assumed if config.get(name)}
    given = {name: config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name)}
    for name, values in given.items():
        if any(isinstance(value, dict) for value in values.values()):
            raise UnsupportedModelError(
                f"config.json: {name} = {shown(values)} has parameters by kind of layer, which is not supported for "
                f"this family: choose a model with one rotary embedding"
            )
    if config.get("original_max_position_embeddings"):
        original = {"original_max_position_embeddings": config["original_max_position_embeddings"]}
    else:
        original = {}
    ropes = [{**assumed, **values, **original} for values in given.values()] or [assumed]
    if len({repr((rope["rope_theta"], rope["partial_rotary_factor"], rotary_scaling(rope))) for rope in ropes}) > 1:
        raise UnsupportedModelError(
            f"config.json: rope_scaling = {shown(given['rope_scaling'])} and rope_parameters = "
            f"{shown(given['rope_parameters'])} differ: keep the one that the model was trained with"
        )
    return ropes[0]


def require_no_window(config: dict[str, Any]) -> None:
    """Refuses a sliding window that a sequence can fill."""
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    if window and window < positions:
        raise UnsupportedModelError(
            f"config.json: sliding_window = {window} is not supported, being shorter than max_position_embeddings = "
            f"{positions}: import with max_positions={window} if longer sequences are not needed"
        )


def require_full_attention(config: dict[str, Any]) -> None:
    """Refuses layers with a sliding window, found as Qwen's configs in transformers find them."""
    types, count = config.get("layer_types"), config["num_hidden_layers"]
    if types is None:
        first = config.get("max_window_layers", 28)
        if config.get("use_sliding_window") and first < count:
            require_no_window(config)
    elif len(types) != count:
        raise UnsupportedModelError(
            f"config.json: layer_types names {len(types)} layers, and num_hidden_layers = {count}: make them agree"
        )
    elif others := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UnsupportedModelError(
            f"config.json: layer_types has {', '.join(map(str, others))}, which is not supported for this family: "
            f"choose a model whose layers are all full_attention"
        )
    elif "sliding_attention" in types:
        if not config.get("use_sliding_window") or not config.get("sliding_window"):
            raise UnsupportedModelError(
                "config.json: layer_types has sliding_attention without a sliding_window in use: make them agree"
            )
        require_no_window(config)


def rotary_scaling(scaling: dict[str, Any]) -> Llama3RopeScaling | None:
    """Returns the scaling of a rotary embedding with these parameters; None without any.

    Raises:
        UnsupportedModelError: it is of another kind than Llama 3.1's.
    """
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedModelError(
            f"config.json: rotary scaling {kind!r} is not supported: choose a model with 'llama3' or none"
        )
    return Llama3RopeScaling(
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_max_positions=scaling["original_max_position_embeddings"],
    )
