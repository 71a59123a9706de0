"""What is wrong is named by every rank, and alike."""

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.errors import DataError
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model
from tests.unit.pruning.direct import build_ours, samples_for, score_config


def score_broken(folder, layout):
    """Score a network with a broken neuron of the second tensor rank, on the first stage of the pipeline."""
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.pruning.score_model import score_model

    model = hf_model(**LLAMA)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[40] = torch.inf
    with parallel_context(layout) as ctx:
        model_chunks, network = build_ours(model, ctx)
        with pytest.raises(DataError) as raised:
            score_model(model_chunks, network, ctx, samples_for(model), score_config())
        (folder / str(dist.get_rank())).write_text(str(raised.value))


def test_every_rank_names_the_first_activation_that_is_not_finite(tmp_path):
    run_on_ranks(4, score_broken, tmp_path, ParallelConfig(tensor=2, pipeline=2))
    assert {path.read_text() for path in tmp_path.iterdir()} == {
        "activations of layer 1 (ffn) are not finite in samples 0 to 1: score in another dtype, or look at that text"
    }
