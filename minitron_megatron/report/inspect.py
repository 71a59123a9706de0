"""The verb `inspect`: prints what a folder is, its size and its lineage."""

import sys
from pathlib import Path

import yaml
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text
from rich.tree import Tree

from minitron_megatron.artifacts.lineage import Origin, State, origins_of
from minitron_megatron.artifacts.manifest import MANIFEST, Manifest
from minitron_megatron.config.schema import InspectConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.report.descriptions import describe
from minitron_megatron.report.differences import open_network
from minitron_megatron.report.gallery import write_pictures
from minitron_megatron.report.network_tables import comparison, fact_table, layer_table, network_table, sparsity_table


def inspect(config: InspectConfig) -> None:
    """Prints what lies at a path: kind, network, counts, origin and settings; writes its figures on request.

    Raises:
        CheckpointError: it is not a result of this project, or not whole, or it and `other` are not networks.
        ConfigError: figures are requested, and it has none.
    """
    path = Path(config.path)
    description = describe(path)
    pair = [open_network(Path(name)) for name in (config.path, config.other)] if config.other else None
    pictures = description.pictures() if config.figures and description.pictures else []
    if config.figures and not pictures:
        raise ConfigError(
            [
                f"figures = {config.figures}: {description.kind} has none; scores, plans, pruned checkpoints and "
                f"training runs have"
            ]
        )
    manifest = _manifest(path if path.is_dir() else path.parent)
    # A file has no width, and wrapped lines cannot be searched.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text(f"{path}: {description.kind}", style="bold"))
    facts = {**description.facts, "on disk": f"{_size(path):,} bytes"}
    if manifest:
        facts |= {"rounded": "\n".join(rounded)} if (rounded := manifest.details.get("rounded")) else {}
        facts["version"] = manifest.version
    _print_section(console, "", fact_table(facts))
    if description.networks:
        _print_section(console, "network", network_table(description.networks, _sequence_length(manifest)))
    for name, network in description.networks.items():
        if not network.has_equal_layers:
            _print_section(console, f"layers {name}".rstrip(), layer_table(network))
    if description.matrices:
        _print_section(console, "sparse and quantised matrices", sparsity_table(description.matrices))
    if manifest:
        _print_section(console, "made from", _lineage(Text(str(path)), origins_of(manifest)))
        settings = yaml.safe_dump(manifest.config, sort_keys=False, width=120)
        _print_section(console, "settings", Text(settings.rstrip()))
    if pair:
        _print_section(console, f"compared with {config.other}", comparison(*pair))
    if config.figures:
        files = write_pictures(pictures, Path(config.figures))
        _print_section(console, "figures", Text("\n".join(map(str, files))))


def _size(path: Path) -> int:
    files = [p for p in path.glob("**/*") if p.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _manifest(folder: Path) -> Manifest | None:
    """Reads the manifest of a folder; an unfinished run has it beside its checkpoints."""
    places = [place for place in (folder, folder / "checkpoints") if (place / MANIFEST).is_file()]
    return Manifest.read(places[0]) if places else None


def _sequence_length(manifest: Manifest | None) -> int | None:
    """Returns the sequence length that a result was made with, if any."""
    return manifest.config.get("data", {}).get("sequence_length") if manifest else None


def _print_section(console: Console, title: str, content: RenderableType) -> None:
    if title:
        console.print()
        console.print(Text(title, style="bold"))
    console.print(Padding(content, (0, 0, 0, 2), expand=False))


def _lineage(label: Text, origins: list[Origin]) -> Tree:
    """Returns the inputs of a result, and theirs, as far as they are still in place."""
    tree = Tree(label)
    for origin in origins:
        parent = origin.parent
        label = Text(f"{parent.role}: {parent.path} ").append(parent.fingerprint[:12], style="dim")
        if origin.state is not State.SAME:
            label.append(f"  {origin.state.value}", style="yellow")
        tree.add(_lineage(label, origin.origins))
    return tree
