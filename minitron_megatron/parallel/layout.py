"""How ranks are laid out, in plain integers: what divides what, and which layers a stage holds."""

from dataclasses import dataclass

from minitron_megatron.config.parallel import Builder, InferenceParallelConfig, ParallelConfig
from minitron_megatron.errors import raise_if_any


@dataclass(frozen=True)
class Layout:
    """A checked layout for a world of a given size.

    Attributes:
        tensor, pipeline, data: ranks along each axis; their product is the world.
        virtual_pipeline: model chunks per pipeline rank, 1 for the plain schedule.
        sequence: whether norms and residuals are split over the tensor ranks.
        builder: the class of Megatron-Core that builds networks; None for the one that can.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int = 1
    sequence: bool = False
    builder: Builder | None = None

    @classmethod
    def from_config(cls, config: InferenceParallelConfig, world_size: int) -> "Layout":
        """Fit `config` to a world.

        Raises:
            ConfigError: the world is not tensor x pipeline x data ranks.
        """
        model_ranks = config.tensor * config.pipeline
        data = config.data or max(1, world_size // model_ranks)
        needed = model_ranks * data
        raise_if_any(
            []
            if needed == world_size
            else [
                f"parallel.tensor x pipeline x data = {config.tensor} x {config.pipeline} x {data} = {needed} "
                f"ranks, but the world has {world_size}: start {needed} ranks or change the layout"
            ]
        )
        own = dict(tensor=config.tensor, pipeline=config.pipeline, data=data, builder=config.builder)
        if not isinstance(config, ParallelConfig):
            return cls(**own)
        return cls(**own, virtual_pipeline=config.virtual_pipeline or 1, sequence=config.sequence)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def stages(self) -> int:
        """Parts that the list of layers is cut into, over all pipeline ranks."""
        return self.pipeline * self.virtual_pipeline


def layers_per_stage(num_layers: int, num_stages: int) -> list[int]:
    """How many layers each stage holds, in the order of the network, as even as can be.

    The stages with one layer more stand side by side, just before the last one. So the last stage, which also has
    the output projection, never has more than another, and the first one, which has the embedding, only where all
    but the last have. Interleaved stages go round the ranks, so that the ranks' own sums are as even.
    """
    fewest, more = divmod(num_layers, num_stages)
    return [fewest + (num_stages - 1 - more <= stage < num_stages - 1) for stage in range(num_stages)]
