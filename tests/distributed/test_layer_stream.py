"""Networks that run one layer at a time: the hidden states of the whole network, loaded in any layout."""

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.data.samples import rank_batches
from minitron_megatron.model.families import network_from_config
from tests.in_memory import StateDict
from tests.ranks import run_on_ranks
from tests.tiny import FAMILIES, LLAMA, Samples, hf_model, unlike

LAYOUTS = {"tp2": ParallelConfig(tensor=2), "pp2": ParallelConfig(pipeline=2)}
SEQUENCE, BATCH = 20, 2


class Large(RandomWeights):
    """Weights far from those that leave the residual stream as it is."""

    def read(self, param, index):
        return (6 if len(param.shape) > 1 else 1) * super().read(param, index)


def sources():
    """Networks with random weights, by name."""
    for family, config in FAMILIES.items():
        yield family, StateDict(network_from_config(config), hf_model(**config).state_dict())
    yield "unlike", Large(unlike(network_from_config(LLAMA)), 5)


def batches_of(network):
    samples = Samples(2 * BATCH, SEQUENCE, network.vocab_size)
    return list(rank_batches(samples, 0, len(samples), BATCH, 0, 1))


def last_states(folder, name):
    """What leaves the last layer of every network, of this rank's part of it."""
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.parallel.schedule import run_forward

    found = {}
    with parallel_context(LAYOUTS[name]) as ctx:
        for family, source in sources():
            chunks = build_model(source.network, ctx, DType.FP32)
            load_weights(chunks, source, ctx)
            states = []
            if ctx.is_last_stage:
                chunks[-1].decoder.layers[-1].register_forward_hook(
                    lambda module, args, output, states=states: states.append(output[0])
                )
            run_forward(chunks, batches_of(source.network), ctx, lambda hidden, batch: None)
            found[family] = states
        torch.save(found, folder / f"{dist.get_rank()}.pt")


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run_on_ranks(2, last_states, folder, request.param)
    return torch.load(folder / "1.pt", weights_only=False)


def test_streamed_states_are_those_of_the_whole_network(whole, tmp_path):
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.sparsity.layer_stream import LayerStream

    with parallel_context(ParallelConfig()) as ctx:
        for family, source in sources():
            for file in (None, tmp_path / family):
                stream = LayerStream(source, batches_of(source.network), ctx, DType.FP32, file)
                for number in range(len(source.network.layers)):
                    stream.run(stream.load(number), advance=True)
                expected = torch.stack(whole[family])
                assert expected.std() > 0.3
                torch.testing.assert_close(
                    stream.states, expected, rtol=1e-5, atol=1e-5, msg=lambda m, f=family: f"{f}: {m}"
                )
