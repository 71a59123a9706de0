"""Writes the report of a recipe: one self-contained HTML file, and its figures as PNG files."""

import base64
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minitron_megatron import __version__
from minitron_megatron.artifacts.manifest import MANIFEST, Manifest
from minitron_megatron.files import write_atomically
from minitron_megatron.model.count import num_parameters
from minitron_megatron.plotting import FIGURES, short
from minitron_megatron.pruning import plan as plans
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.report.compare import header, task_measures
from minitron_megatron.report.gallery import gallery, write_pictures
from minitron_megatron.report.results import (
    Evaluation,
    Stage,
    find_result,
    find_teacher,
    find_worst_pruned,
    read_evaluations,
    recoveries,
    stage_of,
)
from minitron_megatron.report.table import COLUMNS, cells

FILE = "report.html"
_TEMPLATE = "template.html.j2"


def write_report(run_dir: Path, title: str, stages: list[Stage]) -> Path:
    """Writes `report.html` and `figures/*.png` into a run's folder, from whatever the stages left there.

    Args:
        run_dir: folder of the recipe's run.
        title: headline of the report.
        stages: all stages that have run, in order.

    Returns:
        path of the HTML file.
    """
    evaluations = read_evaluations(stages)
    pictures = gallery(stages, evaluations)
    files = write_pictures(pictures, run_dir / FIGURES)
    embedded = [
        (picture.figure.get_suptitle(), picture.caption, base64.b64encode(file.read_bytes()).decode())
        for picture, file in zip(pictures, files, strict=True)
    ]
    manifests = {s.name: Manifest.read(s.output) for s in stages if (s.output / MANIFEST).is_file()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(_TEMPLATE).render(
        title=title,
        headline=headline(evaluations, stages),
        columns=COLUMNS,
        rows=cells(evaluations),
        task_columns=header(evaluations),
        task_rows=[measure.cells for measure in task_measures(evaluations, find_teacher(evaluations))],
        num_tokens=sorted({f"{e.num_tokens:,}" for e in evaluations}),
        pictures=embedded,
        samples=[e for e in evaluations if e.generation],
        stages=[(s, duration(s.seconds), _parents(manifests.get(s.name), stages)) for s in stages],
        settings={name: yaml.safe_dump(m.config, sort_keys=False, width=120) for name, m in manifests.items()},
        version=__version__,
    )
    path = run_dir / FILE
    write_atomically(path, html)
    return path


def headline(evaluations: list[Evaluation], stages: list[Stage]) -> str:
    """Returns one sentence with the numbers that matter, as far as they are known."""
    teacher, pruned, result = (find(evaluations) for find in (find_teacher, find_worst_pruned, find_result))
    cuts = [Plan.read(s.output) for s in stages if s.verb == "prune" and (s.output / plans.FILE).is_file()]
    parts = []
    if teacher and (smaller := result or pruned):
        parts.append(_sizes(teacher.parameters, smaller.parameters))
    elif cuts:
        parts.append(_sizes(num_parameters(cuts[0].source), num_parameters(cuts[-1].target)))
    if losses := [f"{e.loss:.3f} for {e.name}" for e in (teacher, pruned, result) if e]:
        parts.append(f"held-out loss in nats per token {', '.join(losses)}")
    for evaluation, recovery in zip(evaluations, recoveries(evaluations), strict=True):
        if evaluation is result and recovery is not None:
            parts[-1] += f", which closes {recovery:.0%} of the gap"
    sentence = ": ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}"


def _sizes(before: int, after: int) -> str:
    return f"From {short(before)} to {short(after)} parameters ({after / before:.0%})"


def duration(seconds: float | None) -> str:
    """Formats a duration: `3 min 12 s`."""
    if seconds is None:
        return "done before"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _parents(manifest: Manifest | None, stages: list[Stage]) -> list[tuple[str, str, str]]:
    """Returns role, name (that of the stage that made it, if any) and fingerprint of every input of a result."""
    parents = []
    for parent in manifest.parents if manifest else []:
        maker = stage_of(Path(parent.path), stages)
        parents.append((parent.role, maker.name if maker else parent.path, parent.fingerprint[:12]))
    return parents
