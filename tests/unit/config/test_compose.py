import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from minitron_megatron.config.compose import (
    compose,
    read_settings,
    resolve_stages,
    sweep,
    to_plain,
    to_yaml,
)
from minitron_megatron.config.schema import (
    CompressConfig,
    DataConfig,
    DistillConfig,
    DType,
    ImportConfig,
    ParallelConfig,
    ScoreConfig,
    TargetConfig,
)
from minitron_megatron.config.text import as_value
from minitron_megatron.errors import ConfigError

pytestmark = pytest.mark.oldest

SCORE = ["checkpoint=c", "output=o"]
DEMO = ["+experiment=smollm2_135m"]


def problems(verb, *overrides):
    with pytest.raises(ConfigError) as raised:
        compose(verb, list(overrides))
    return raised.value.problems


def test_overrides_reach_the_object_with_their_types():
    found = compose("score", [*SCORE, "dtype=fp32", "num_samples=8", "data.text=[a.txt,b]", "data.heldout_pct=2"])
    assert found == ScoreConfig(
        "c", "o", num_samples=8, dtype=DType.FP32, data=DataConfig(text=["a.txt", "b"], heldout_pct=2.0)
    )
    assert isinstance(found.data.heldout_pct, float) and type(found.data.text) is list


def test_a_plus_before_a_key_changes_nothing():
    assert compose("score", [*SCORE, "+num_samples=8"]) == compose("score", [*SCORE, "num_samples=8"])


def test_missing_values_are_all_named():
    assert problems("distill") == [f"{name} is missing: give {name}=VALUE" for name in ("teacher", "student", "output")]


def test_an_empty_mandatory_value_is_missing():
    """As an unset shell variable leaves it: `output=$OUT`."""
    assert problems("score", "checkpoint=c", "output=") == ["output is missing: give output=VALUE"]


def test_null_counts_as_given_where_the_schema_allows_it():
    assert compose("distill", ["teacher=null", "student=s", "output=o", "loss={kd_logits_weight:0,lm_weight:1}"])


@pytest.mark.parametrize(
    "override, expected",
    [
        ("num_sample=3", "num_sample is not a setting: did you mean num_samples?"),
        ("tensor=2", "tensor is not a setting: did you mean parallel.tensor?"),
        ("parallel.tensr=2", "parallel.tensr is not a setting: did you mean parallel.tensor?"),
        (
            "data.zzz=2",
            "data.zzz is not a setting: there are text, cache_dir, sequence_length, heldout_pct, seed, weights, "
            "text_field, document_mask, on_bad_row, workers",
        ),
        ("num_samples=many", "num_samples = 'many': must be a whole number"),
        ("num_samples=2.5", "num_samples = 2.5: must be a whole number"),
        ("num_samples=null", "num_samples = null: must be a whole number"),
        ("parallel.data=x", "parallel.data = 'x': must be a whole number or null"),
        ("data.heldout_pct=nan", "data.heldout_pct = nan: must be a number"),
        ("parallel.sequence=perhaps", "parallel.sequence = 'perhaps': must be true or false"),
        (
            "data.weights=[1,2]",
            "data.weights has 2 numbers for the 1 sources of data.text: give one for each",
        ),
        ("data.weights=[0]", "data.weights = [0.0]: must be numbers above 0"),
        ("data.weights=[nan]", "data.weights = [nan]: must be numbers above 0"),
        ("data.weights=3", "data.weights = 3: must be a list, as in [a,b] or null"),
        ("data.text_field=", "data.text_field is empty: name the field that holds the text"),
        ("data.workers=0", "data.workers = 0: must be at least 1"),
        ("data.text=a.txt", "data.text = 'a.txt': must be a list, as in [a,b]"),
        ("dtype=int8", "dtype = 'int8': must be one of bf16, fp16, fp32"),
        ("parallel=2", "parallel = 2: must be settings, given one by one as in parallel.tensor=VALUE"),
        ("micro_batch=0", "micro_batch = 0: must be at least 1"),
        ("dtype=${nope}", "dtype = ${nope}: Interpolation key 'nope' not found"),
        ("num_samples", "'num_samples' cannot be read: write key=value, and quote special characters: 'key=\"a=b\"'"),
        ("steps=a=b", "'steps=a=b' cannot be read: write key=value, and quote special characters: 'key=\"a=b\"'"),
        (
            "data.text=a,b",
            "'data.text=a,b' is several values: give one, or a list in brackets, as in data.text=[a,b]",
        ),
        ("hydra.run.dir=x", "'hydra.run.dir=x' sets nothing that is read here: write key=value"),
        ("~nope", "Could not delete from config. 'nope' does not exist."),
    ],
)
def test_each_kind_of_bad_override_gives_one_sentence(override, expected):
    assert problems("score", *SCORE, override) == [expected]


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["global_batch=10"], "global_batch = 10 is not a multiple of micro_batch = 4: set it to 8 or 12"),
        (["global_batch=3"], "global_batch = 3 is not a multiple of micro_batch = 4: set it to 4"),
        (["steps=40"], "optimizer.warmup_steps = 40 must be below steps = 40: set it to 4"),
    ],
)
def test_settings_that_do_not_go_together_come_with_values_that_do(overrides, expected):
    assert problems("distill", "teacher=t", "student=s", "output=o", *overrides) == [expected]


def test_an_unknown_experiment_is_the_only_problem_reported():
    [found] = problems("compress", "experiment=smollm")
    assert found.startswith("experiment = smollm: not in ") and found.endswith("; did you mean smollm2_135m?")


def test_problems_of_every_kind_are_listed_together():
    found = problems("score", "checkpoint=c", "stray", "num_sample=3", "dtype=int8")
    assert [line.split(" ")[0] for line in found] == ["'stray'", "output", "num_sample", "dtype"]
    assert problems("score", "checkpoint=c", "num_samples=0", "data.sequence_length=1") == [
        "output is missing: give output=VALUE",
        "num_samples = 0: must be at least 1",
        "data.sequence_length = 1: must be at least 2",
    ]


def test_stages_start_from_the_recipe_and_keep_what_they_say_themselves():
    of_stages = ["stages.distilled.data.sequence_length=64", "stages.scores.dtype=fp32"]
    recipe = compose("compress", [*DEMO, *of_stages, "data.seed=7", "parallel.tensor=2"])
    stages = resolve_stages(recipe)
    assert stages["distilled"][1].data == DataConfig(cache_dir="runs/smollm2_135m/corpora", sequence_length=64, seed=7)
    # An override of one stage must not leak into the recipe or the others.
    assert recipe.data.sequence_length == stages["scores"][1].data.sequence_length == 512
    assert stages["scores"][1].dtype is DType.FP32
    assert stages["evaluate_teacher"][1].dtype is DType.BF16
    assert stages["pruned"][1].target == TargetConfig(hidden=448, ffn=1152)
    assert {stages[name][1].parallel.tensor for name in ("scores", "pruned", "distilled")} == {2}


def test_stages_of_a_null_or_deleted_name_are_left_out():
    whole = list(resolve_stages(compose("compress", DEMO)))
    fewer = list(resolve_stages(compose("compress", [*DEMO, "stages.exported=null", "~stages.evaluate_pruned"])))
    assert fewer == [name for name in whole if name not in ("exported", "evaluate_pruned")]


def test_a_stage_can_be_added():
    recipe = compose("compress", [*DEMO, "stages.look={verb:inspect,path:'${run_dir}/teacher'}"])
    assert resolve_stages(recipe)["look"][1].path == "runs/smollm2_135m/teacher"


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "stages.scores.num_sample=3",
            "stages.scores.num_sample is not a setting: did you mean stages.scores.num_samples?",
        ),
        ("stages.scores.num_samples=0", "stages.scores.num_samples = 0: must be at least 1"),
        ("stages.scores.dtype=int8", "stages.scores.dtype = 'int8': must be one of bf16, fp16, fp32"),
        (
            "stages.distiled.steps=3",
            "stages.distiled.verb is missing: give stages.distiled.verb=VERB; did you mean distilled?",
        ),
        ("stages.pruned.verb=prun", "stages.pruned.verb = 'prun' is not a verb of a stage: did you mean prune?"),
        ("stages.teacher=3", "stages.teacher = 3: must be a verb and its settings, or null"),
        ("~stages.teacher.output", "stages.teacher.output is missing: give stages.teacher.output=VALUE"),
        ("stages=null", "stages = null: must be settings by name"),
        # Once, and not again for each of the five stages that take it over:
        ("data.sequence_length=1", "data.sequence_length = 1: must be at least 2"),
        ("data.sequence_length=x", "data.sequence_length = 'x': must be a whole number"),
        ("run_dir=", "run_dir is missing: give run_dir=VALUE"),
    ],
)
def test_each_kind_of_bad_stage_gives_one_sentence(override, expected):
    assert problems("compress", *DEMO, override) == [expected]


def test_a_recipe_without_its_mandatory_settings_names_only_those():
    found = problems("compress", "target.ffn=8")
    assert found == ["run_dir is missing: give run_dir=VALUE", "source is missing: give source=VALUE"]


def test_a_recipe_made_in_python_is_checked_as_strictly():
    recipe = CompressConfig("r", "s", parallel=ParallelConfig(tensor=2))
    recipe.stages = {"a": {"verb": "score", "checkpoint": "c", "output": "o", "dtype": DType.FP16}, "b": None}
    [(name, (verb, stage))] = resolve_stages(recipe).items()
    assert (name, verb) == ("a", "score")
    assert stage == ScoreConfig("c", "o", dtype=DType.FP16, parallel=ParallelConfig(tensor=2))
    export = {"verb": "export", "checkpoint": "c", "output": "o", "max_shard_gb": 0}
    recipe.stages = {"a": {"verb": "score"}, "b": export}
    with pytest.raises(ConfigError) as raised:
        resolve_stages(recipe)
    assert raised.value.problems == [
        "stages.a.checkpoint is missing: give stages.a.checkpoint=VALUE",
        "stages.a.output is missing: give stages.a.output=VALUE",
        "stages.b.max_shard_gb = 0.0: must be above 0",
    ]


def test_settings_are_written_as_plain_values_in_order():
    recipe = compose("compress", DEMO)
    assert to_plain(recipe)["stages"]["scores"] == {
        "verb": "score",
        "checkpoint": "runs/smollm2_135m/teacher",
        "output": "runs/smollm2_135m/scores",
        "num_samples": 64,
    }
    assert (
        to_yaml(ImportConfig("s", "ö", DType.FP16))
        == "source: s\noutput: ö\ndtype: fp16\nworkers: 1\nmax_positions: null\nplugins: []\n"
    )


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1), st.lists(st.text(), min_size=1), st.floats(1e-12, 1))
@example("\x85", ["a\u2028b"], 1e-8)
@example("0", ["0E0", "-1e5", "1_0e-3", "4.e3", ".5e6"], 1e-8)
@example('C:\\a "b\\', ["x,y=[1]", "null", "", "a b", "\\\\'"], 1e-8)
def test_a_file_of_settings_is_read_back_as_the_same_settings(tmp_path_factory, path, texts, lr):
    assume(path != "???" and "${" not in "".join([path, *texts]))  # which mean something to OmegaConf
    settings = DistillConfig(None, path, "o", data=DataConfig(text=texts))
    settings.optimizer.lr, settings.optimizer.min_lr = lr, 0.0
    settings.loss.kd_logits_weight, settings.loss.lm_weight = 0.0, 1.0
    file = tmp_path_factory.mktemp("settings") / "distill.yaml"
    file.write_text(to_yaml(settings))
    assert read_settings("distill", file) == settings


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_can_be_the_value_of_an_override(text):
    assume("${" not in text and text != "???")
    assert compose("inspect", [f"path={as_value(text)}"]).path == text


def test_a_sweep_is_every_combination():
    assert sweep(["a=1", "b=x,y", "c=[1,2],[3]"]) == [
        ["a=1", f"b={b}", f"c={c}"] for b in "xy" for c in ("[1,2]", "[3]")
    ]


@pytest.mark.parametrize("overrides, problem", [(["a=1"], "--multirun takes"), (["a=1,2", "b=[1"], "cannot be read")])
def test_a_sweep_needs_several_values(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        sweep(overrides)


@pytest.mark.parametrize(
    "text, problem",
    [
        (None, "cannot be read"),
        ("- a", "holds no settings"),
        ("path: p\nfigure: x", "figure is not a setting"),
        ("figures: x", "path is missing"),
    ],
)
def test_a_file_of_settings_that_is_wrong(tmp_path, text, problem):
    file = tmp_path / "inspect.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_settings("inspect", file)
