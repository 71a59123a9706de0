"""Pruning a checkpoint of Llama 3.1 8B's network: seconds and memory, beside plain file copies of as many bytes.

The checkpoint is in the chunks in which 4 tensor-parallel x 2 pipeline ranks of Megatron write it. It is pruned to
Minitron's 4B-Width network (hidden 4096 to 3072, FFN 14336 to 9216) and 4B-Depth network (32 layers to 16), by random
scores, with `minitron prune`. Plain copies read the bytes that the pruned network is made of: all, or those of the
layers that stay.
"""

from pathlib import Path

from large import Case, RandomModel, require_disk, run

LEAST_FREE_GB = 40


def make_cases(work: Path, layers: int) -> dict[str, Case]:
    """Write the checkpoint `source` and the folder `scores`."""
    import torch

    from minitron_megatron.artifacts.manifest import Manifest
    from minitron_megatron.config.schema import ParallelConfig, PruneConfig, TargetConfig
    from minitron_megatron.model.count import num_parameters
    from minitron_megatron.pruning.scores import Scores
    from minitron_megatron.pruning.target import resolve_target

    model = RandomModel(layers)
    network = model.network
    targets = {"4B-Width": TargetConfig(hidden=3072, ffn=9216), "4B-Depth": TargetConfig(layers=layers // 2)}
    results = [resolve_target(network, target, ParallelConfig()).network_of(network) for target in targets.values()]
    num_bytes = 2 * (num_parameters(network) + max(map(num_parameters, results)))
    require_disk(work, num_bytes, LEAST_FREE_GB)

    from minitron_megatron.checkpoint import dist_writer

    dist_writer.CHUNK_BYTES = num_bytes  # Megatron has no largest chunk: a rank's part of a tensor is one
    dist_writer.write_checkpoint(work / "source", model, torch.bfloat16, Manifest("checkpoint"), None, tensor_ranks=4)
    generator = torch.Generator().manual_seed(0)
    hidden, ffn, heads, depth = (
        torch.rand(size, generator=generator) for size in [(4096,), (layers, 14336), (layers, 8, 4), (layers,)]
    )
    scores = Scores(network, hidden, {"ffn": list(ffn), "heads": list(heads)}, {"loss": depth})
    (work / "scores").mkdir()
    scores.write(work / "scores")
    Manifest("scores").write(work / "scores")
    folders = [str(work / name) for name in ("source", "result", "scores")]
    return {
        name: Case(
            "prune", PruneConfig(*folders, target=target), work / "source", needed(work / "source", scores, target)
        )
        for name, target in targets.items()
    }


def needed(source: Path, scores, target) -> list[tuple[Path, int, int]]:
    """File, first byte and length of the chunks that the result is made of, in the order in which they lie there."""
    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.pruning.make_plan import make_plan

    kept = {position // 2 for position in make_plan(scores, target).sublayers}
    return sorted(
        (chunk.path, chunk.position, chunk.length)
        for key, tensor in Checkpoint(source).tensors.items()
        for chunk in tensor.chunks
        if not key.startswith("decoder.layers.") or chunk.offsets[0] in kept
    )


if __name__ == "__main__":
    run("prune_large", __doc__, "Pruning a checkpoint of Llama 3.1 8B's shape", make_cases)
