"""No verb takes a setting that it has no use for."""

from dataclasses import fields

import pytest

from minitron_megatron.config.cluster import ClusterConfig, ClusterKind, LaunchConfig
from minitron_megatron.config.compose import compose, resolve_stages, to_plain
from minitron_megatron.config.parallel import Builder
from minitron_megatron.config.schema import (
    DepthCriterion,
    DistillConfig,
    DType,
    EvaluateConfig,
    InferenceParallelConfig,
    LossConfig,
    ParallelConfig,
    PruneConfig,
    ScoreConfig,
    TargetConfig,
    TargetParallelConfig,
)
from minitron_megatron.errors import ConfigError

ALL = ["tensor", "pipeline", "data", "virtual_pipeline", "sequence", "builder", "timeout_min"]
LAYOUTS = {
    "score": (["checkpoint=c", "output=o"], ALL),
    "prune": (
        ["checkpoint=c", "output=o", "scores=s", "target.ffn=8"],
        ["tensor", "pipeline", "virtual_pipeline", "builder"],
    ),
    "distill": (["teacher=t", "student=s", "output=o"], ALL),
    "evaluate": (["model=m", "output=o"], ["tensor", "pipeline", "data", "timeout_min", "builder"]),
}


def problems(verb, *overrides):
    with pytest.raises(ConfigError) as raised:
        compose(verb, list(overrides))
    return raised.value.problems


@pytest.mark.parametrize("verb", LAYOUTS)
def test_a_verb_has_the_part_of_a_layout_that_it_uses(verb):
    mandatory, used = LAYOUTS[verb]
    settings = compose(verb, mandatory)
    assert set(to_plain(settings)["parallel"]) == set(used)
    for name in set(ALL) - set(used):
        [told] = problems(verb, *mandatory, f"parallel.{name}=2")
        assert told.startswith(f"parallel.{name} is not a setting: ")


def test_a_layout_is_written_in_the_order_of_its_arguments():
    assert list(to_plain(ParallelConfig())) == ALL
    assert to_plain(ParallelConfig(2, 3, 4, 5, True, timeout_min=6.0, builder=Builder.GPT)) == dict(
        zip(ALL, (2, 3, 4, 5, True, "gpt", 6.0))
    )


def test_what_is_wrong_with_a_layout_is_told_once_and_by_each_that_has_it():
    whole = ParallelConfig(0, 0, 0, 1, True, timeout_min=0)
    told = [problem.split(" ")[0] for problem in whole.problems()]
    assert sorted(told) == sorted(
        [f"parallel.{name}" for name in ALL if name != "builder"] + ["parallel.virtual_pipeline"]
    )
    for kind in (InferenceParallelConfig, TargetParallelConfig):
        part = kind(**{field.name: getattr(whole, field.name) for field in fields(kind)})
        assert set(part.problems()) == {
            problem for problem in whole.problems() if problem.split(" ")[0][9:] in vars(part)
        }


def test_a_recipes_layout_goes_to_each_stage_as_far_as_it_is_used():
    overrides = ["+experiment=smollm2_135m", "parallel.tensor=2", "parallel.data=1", "parallel.sequence=true"]
    stages = {name: stage for name, (_, stage) in resolve_stages(compose("compress", overrides)).items()}
    whole = ParallelConfig(tensor=2, data=1, sequence=True)
    assert stages["scores"].parallel == stages["distilled"].parallel == whole
    assert stages["pruned"].parallel == TargetParallelConfig(tensor=2)
    assert stages["evaluate_teacher"].parallel == InferenceParallelConfig(tensor=2, data=1)
    told = problems("compress", *overrides, "stages.evaluate_teacher.parallel.sequence=true")
    assert told[0].startswith("stages.evaluate_teacher.parallel.sequence is not a setting: there are tensor")


def test_sequence_parallelism_asks_nothing_of_the_length_of_what_is_evaluated():
    overrides = ["+experiment=smollm2_135m", "parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=33"]
    told = problems("compress", *overrides)
    assert [problem.split(".data")[0] for problem in told] == ["stages.scores", "stages.distilled"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            ScoreConfig("c", "o", save_rounds=True),
            "save_rounds = true, and rounds = 1 has none in between: leave it out",
        ),
        (
            PruneConfig("c", "o", "s", target=TargetConfig(keep_layers=[0]), depth_criterion=DepthCriterion.KL),
            "depth_criterion = kl chooses layers, and target.keep_layers names them: leave one out",
        ),
        (
            DistillConfig(None, "s", "o", teacher_fp8=True, loss=LossConfig(0.0, 1.0)),
            "teacher = null, and teacher_fp8 is for a teacher: leave it out, or name one",
        ),
        (
            DistillConfig(None, "s", "o", teacher_dtype=DType.BF16, loss=LossConfig(0.0, 1.0)),
            "teacher = null, and teacher_dtype is for a teacher: leave it out, or name one",
        ),
        (EvaluateConfig("m", "o", limit=3), "limit = 3, and tasks is empty: set both or neither"),
        (
            LaunchConfig(cluster=ClusterConfig(nodes=2, time="1:00:00", modules=["cuda"])),
            "cluster.nodes and cluster.time and cluster.modules are for Slurm, and cluster.kind = local: set "
            "cluster=slurm, or leave them out",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_setting_that_would_be_ignored_is_refused(settings, expected):
    assert settings.problems() == [expected]


def test_what_says_whether_a_layout_fits_is_of_use_without_slurm():
    cluster = ClusterConfig(gpu="h100", gpu_hour_price=2.0, ranks_per_node=4)
    assert LaunchConfig(cluster=cluster).problems() == []
    assert LaunchConfig(cluster=ClusterConfig(ClusterKind.SLURM, nodes=2)).problems() == []
