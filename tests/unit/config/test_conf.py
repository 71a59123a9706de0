"""The shipped YAML files against the dataclasses, which are the schema."""

import pytest
import yaml
from omegaconf import OmegaConf

from minitron_megatron.config.compose import compose, conf_dir, defaults, resolve_stages, shipped, to_plain
from minitron_megatron.config.describe import describe, summary
from minitron_megatron.config.reader import keys
from minitron_megatron.config.schema import SCHEMAS, CompressConfig, DType

MANDATORY = {
    "import": ["source=s", "output=o"],
    "score": ["checkpoint=c", "output=o"],
    "prune": ["checkpoint=c", "scores=s", "output=o", "target.ffn=8"],
    "sparsify": ["checkpoint=c", "output=o"],
    "quantize": ["checkpoint=c", "output=o"],
    "cache": ["teacher=t", "output=o", "num_samples=8"],
    "distill": ["teacher=t", "student=s", "output=o"],
    "evaluate": ["model=m", "output=o"],
    "export": ["checkpoint=c", "output=o"],
    "compare": ["evaluations=[a,b]"],
    "inspect": ["path=p"],
    "compress": ["run_dir=r", "source=s", "target.ffn=8"],
    "launch": [],
}


@pytest.mark.parametrize("verb", SCHEMAS)
def test_defaults_are_those_of_the_dataclass_in_the_same_order(verb):
    found, expected = defaults(verb), to_plain(SCHEMAS[verb]())
    if verb == "compress":  # whose paths lie in the run's folder, and which has a chain of stages
        assert found.pop("stages") and not expected.pop("stages")
        assert found["data"].pop("cache_dir") == "${run_dir}/corpora"
        del expected["data"]["cache_dir"]
    assert yaml.safe_dump(found, sort_keys=False) == yaml.safe_dump(expected, sort_keys=False)


def test_the_yaml_files_repeat_no_default():
    """A verb has none of its own, and a recipe's gives no setting the value that it has anyway."""
    assert [path.name for path in conf_dir().glob("*.yaml")] == ["recipe.yaml"]
    recipe = OmegaConf.to_container(OmegaConf.load(conf_dir() / "recipe.yaml"))
    assert recipe.pop("defaults") == ["compress", "_self_"]
    stages = recipe.pop("stages")
    settings = [
        (recipe, CompressConfig),
        *((stage, SCHEMAS[stage.pop("verb")]) for stage in filter(None, stages.values())),
    ]
    for given, schema in settings:
        assert given.keys() <= to_plain(schema()).keys()
        assert _same(given, to_plain(schema())) == []


def _same(given: dict, defaults: dict) -> list[str]:
    """Settings that have their default."""
    found = [name for name, value in given.items() if not isinstance(value, dict) and value == defaults[name]]
    sections = [name for name, value in given.items() if isinstance(value, dict)]
    return [*found, *(name for section in sections for name in _same(given[section], defaults[section]))]


# What a recipe reads of another one.
OF_ANOTHER_RECIPE = ["runs/sparse_llama31_8b/distilled"]


@pytest.mark.parametrize("verb", SCHEMAS)
def test_a_verb_composes_once_its_mandatory_settings_are_given(verb):
    settings = compose(verb, MANDATORY[verb])
    assert type(settings) is SCHEMAS[verb]
    assert isinstance(getattr(settings, "dtype", None), DType | None)


@pytest.mark.parametrize("name", shipped("experiment"))
def test_an_experiment_resolves_and_needs_nothing_more(name):
    assert resolve_stages(compose("compress", [f"+experiment={name}"]))


@pytest.mark.parametrize(
    "overrides", [MANDATORY["compress"], *([f"+experiment={name}"] for name in shipped("experiment"))]
)
def test_every_folder_a_stage_reads_is_written_by_an_earlier_one(overrides):
    recipe = compose("compress", overrides)
    writers = {}
    for name, (verb, settings) in resolve_stages(recipe).items():
        for field in ("checkpoint", "scores", "teacher", "student", "model"):
            if path := getattr(settings, field, None):
                kinds = ["score"] if field == "scores" else ["import", "prune", "sparsify", "quantize", "distill"]
                assert path in OF_ANOTHER_RECIPE or writers.get(path) in kinds, f"{name} reads {path}"
        assert settings.output.startswith(f"{recipe.run_dir}/") and settings.output not in writers
        writers[settings.output] = verb


@pytest.mark.parametrize("verb", SCHEMAS)
def test_the_help_text_names_every_setting(verb):
    listed = {line.split("=")[0].strip() for line in describe(verb).splitlines() if "=" in line.split("  ")[1]}
    sections = {key.rpartition(".")[0] for key in keys(SCHEMAS[verb])}
    assert listed == set(keys(SCHEMAS[verb])) - sections
    assert summary(verb)


@pytest.mark.parametrize("verb", SCHEMAS)
def test_the_help_text_says_what_every_setting_means(verb):
    settings = [line for line in describe(verb, width=1000).splitlines() if line.startswith("  ")]
    assert [line for line in settings if len(line.strip().split("  ", 1)) < 2] == []


def test_the_help_text_shows_defaults_meanings_and_choices():
    lines = describe("distill", width=1000).splitlines()
    [steps] = [line for line in lines if line.strip().startswith("steps=")]
    assert steps.split() == ["steps=400", "optimiser", "steps."]
    [trackers] = [line for line in lines if "tracking.trackers" in line]
    assert trackers.split()[0] == "tracking.trackers=[]"
    assert trackers.endswith("  Weights & Biases, TensorBoard, or both. [wandb, tensorboard]")
    [dtype] = [line for line in lines if line.strip().startswith("dtype=")]
    assert dtype.endswith("bf16 has fp32 main weights. [bf16, fp16, fp32]")
    [keep] = [line for line in lines if line.strip().startswith("keep_checkpoints=")]
    assert "the lowest held-out loss is kept as well" in keep  # a meaning of two lines
