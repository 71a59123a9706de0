"""Distribution of layers over pipeline stages."""


def layers_per_stage(num_layers: int, num_stages: int) -> list[int]:
    """Returns the number of layers on each stage, in the order of the network, as even as possible.

    The stages with one layer more are adjacent, just before the last one. So the last stage, which also has the output
    projection, never has more than another, and the first stage, which has the embedding, only if all but the last do.
    Interleaved stages go round the ranks, so the ranks' sums are as even.
    """
    fewest, more = divmod(num_layers, num_stages)
    return [fewest + (num_stages - 1 - more <= stage < num_stages - 1) for stage in range(num_stages)]
