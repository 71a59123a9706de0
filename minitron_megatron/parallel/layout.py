"""Which layers a pipeline stage holds."""


def layers_per_stage(num_layers: int, num_stages: int) -> list[int]:
    """How many layers each stage holds, in the order of the network, as even as can be.

    The stages with one layer more stand side by side, just before the last one. So the last stage, which also has
    the output projection, never has more than another, and the first one, which has the embedding, only where all
    but the last have. Interleaved stages go round the ranks, so that the ranks' own sums are as even.
    """
    fewest, more = divmod(num_layers, num_stages)
    return [fewest + (num_stages - 1 - more <= stage < num_stages - 1) for stage in range(num_stages)]
