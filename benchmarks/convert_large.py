"""Importing and exporting a model of Llama 3.1 8B's network: seconds and memory, beside plain copies of as many bytes.

The Hugging Face folder has files of 5 GB at most. It is imported, and the checkpoint that comes of it exported, with
`minitron import` and `minitron export`. Plain copies read everything.
"""

from pathlib import Path

from large import Case, RandomModel, require_disk, run, write_assets

LEAST_FREE_GB = 10


def make_cases(work: Path, layers: int) -> dict[str, Case]:
    """Write the folder `huggingface` and the checkpoint `checkpoint`."""
    from minitron_megatron.artifacts.manifest import Manifest
    from minitron_megatron.checkpoint.convert import import_checkpoint
    from minitron_megatron.checkpoint.huggingface import write_huggingface
    from minitron_megatron.config.schema import ExportConfig, ImportConfig
    from minitron_megatron.model.count import num_parameters

    model = RandomModel(layers)
    require_disk(work, 3 * 2 * num_parameters(model.network), LEAST_FREE_GB)
    huggingface, checkpoint, result = (work / name for name in ("huggingface", "checkpoint", "result"))
    write_huggingface(huggingface, model, write_assets(work / "companions"), 5e9, Manifest("huggingface"), "")
    import_checkpoint(ImportConfig(str(huggingface), str(checkpoint)))
    return {
        "import": Case("import_checkpoint", ImportConfig(str(huggingface), str(result)), huggingface),
        "export": Case("export", ExportConfig(str(checkpoint), str(result)), checkpoint),
    }


if __name__ == "__main__":
    run("convert_large", __doc__, "Converting a model of Llama 3.1 8B's shape", make_cases)
