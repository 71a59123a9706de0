"""Several teachers: each teaches in its own steps with its own weight, and is in memory only then."""

import re
import shutil
import weakref
from dataclasses import replace

import pytest
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.convert import import_checkpoint
from minitron_megatron.config.loss import HiddenConfig, LossConfig
from minitron_megatron.config.schedule import Schedule
from minitron_megatron.config.schema import ImportConfig, ParallelConfig
from minitron_megatron.config.teachers import TeacherConfig
from minitron_megatron.distillation.step import DistillationStep
from minitron_megatron.errors import ConfigError
from minitron_megatron.tracking.metrics import read_metrics
from minitron_megatron.training import distill, setup
from tests.distributed.distilling import run_in, settings, weights_of
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf, literate, save_hf

STEPS = 4
LAYOUTS = {
    "tp2_sp": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
}


@pytest.fixture(scope="module")
def inputs(inputs):
    """With a second teacher that is better than chance."""
    import_hf(inputs / "small", literate(hf_model(seed=2, **{**LLAMA, "num_hidden_layers": 2})))
    return inputs


MORE = 8  # rows in the tables of a model, for which its tokenizer has no token


@pytest.fixture(scope="module")
def tables(inputs):
    """Models with larger tables, and the same with the tables cut, all with one tokenizer."""
    for name, seed in (("teacher", 3), ("student", 4)):
        wide = literate(hf_model(seed=seed, **{**LLAMA, "vocab_size": LLAMA["vocab_size"] + MORE}))
        cut = hf_model(**LLAMA)
        with torch.no_grad():
            for parameter, other in zip(cut.parameters(), wide.parameters(), strict=True):
                parameter.copy_(other[: len(parameter)])
        cut_folder = save_hf(inputs / f"cut_{name}" / "hf", cut)
        wide_folder = save_hf(inputs / f"wide_{name}" / "hf", wide)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(cut_folder / file, wide_folder / file)
        for folder in (cut_folder, wide_folder):
            import_checkpoint(ImportConfig(str(folder), str(folder.parent / "checkpoint")))
    return inputs


@pytest.mark.parametrize("teacher, student", [("wide", "cut"), ("cut", "wide"), ("wide", "wide")])
@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(tensor=2, sequence=True)], ids=["1x1", "tp2"])
def test_tables_of_other_sizes_are_compared_on_the_tokens_that_both_have(teacher, student, layout, tables, tmp_path):
    def first_losses(teacher, student, layout):
        run = tmp_path / f"{teacher}_{student}_{layout.tensor}"
        models = dict(
            teacher=str(tables / f"{teacher}_teacher/checkpoint"), student=str(tables / f"{student}_student/checkpoint")
        )
        config = several(tables, run, teachers={}, steps=1, loss=LossConfig(0.5, 0.2), **models)
        run_on_ranks(layout.tensor, run_in, config, layout)
        return losses(run)[0]

    expected = first_losses("cut", "cut", ParallelConfig())
    found = first_losses(teacher, student, layout)
    assert (found["loss/kd_logits"] == pytest.approx(expected["loss/kd_logits"], rel=1e-5)) == (teacher != student)
    assert (found["loss/lm"] == pytest.approx(expected["loss/lm"], rel=1e-5)) == (student == "cut")  # of all its tokens


def ladder(inputs):
    return {
        "large": TeacherConfig(str(inputs / "checkpoint"), 0.7, last_step=2),
        "small": TeacherConfig(str(inputs / "small/checkpoint"), 0.4, first_step=2),
    }


def several(inputs, output, **changes):
    config = settings(inputs, output, loss=LossConfig(0.5, 0.2, {"lm_weight": Schedule([[1, 0.2], [4, 0.1]])}))
    own = dict(teacher=None, teachers=ladder(inputs), student=str(inputs / "narrow/checkpoint"), steps=STEPS)
    return replace(config, micro_batch=2, save_every=1, **{**own, **changes})


def losses(run):
    return [{key: own for key, own in line.items() if key.startswith("loss/")} for line in read_metrics(run)]


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    run_on_ranks(1, run_in, several(inputs, folder / "run"), ParallelConfig())
    return folder / "run"


def test_each_teaches_in_its_steps_with_its_weight(inputs, alone, tmp_path):
    found = losses(alone)
    names = [sorted(key for key in line if "kd_logits" in key) for line in found]
    large, small = "loss/kd_logits/large", "loss/kd_logits/small"
    assert names == [[large], [large, small], [small], [small]]
    for line, lm_weight in zip(found, (0.2, 0.5 / 3, 0.4 / 3, 0.1), strict=True):
        expected = lm_weight * line["loss/lm"] + 0.5 * (0.7 * line.get(large, 0.0) + 0.4 * line.get(small, 0.0))
        assert line["loss/total"] == pytest.approx(expected)
    # The first steps of runs with one of them, whose weight has no part in it.
    begun = {name: replace(own, first_step=1) for name, own in ladder(inputs).items()}
    run_on_ranks(1, run_in, several(inputs, tmp_path / "both", teachers=begun), ParallelConfig())
    for name, teacher in begun.items():
        single = several(inputs, tmp_path / name, teacher=teacher.teacher, teachers={})
        run_on_ranks(1, run_in, single, ParallelConfig())
        assert losses(tmp_path / name)[0]["loss/kd_logits"] == losses(tmp_path / "both")[0][f"loss/kd_logits/{name}"]
    assert losses(tmp_path / "large")[0]["loss/kd_logits"] == found[0][large]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(layout, inputs, alone, tmp_path):
    run_on_ranks(2, run_in, several(inputs, tmp_path / "run"), LAYOUTS[layout])
    for found, expected in zip(losses(tmp_path / "run"), losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_only_those_that_teach_are_in_memory(inputs, tmp_path, monkeypatch):
    loaded, alive, at_load = {}, [], []
    load, train = setup._load_teacher, DistillationStep.train

    def load_and_watch(config, name, *args):
        at_load.append([name for name, model in loaded.items() if model() is not None])
        teacher = load(config, name, *args)
        loaded[name] = weakref.ref(teacher.model_chunks[0])
        return teacher

    def train_and_look(step, *args, **kwargs):
        result = train(step, *args, **kwargs)
        if step.teachers:  # and not that of a teacher, which measures itself
            alive.append([name for name, model in loaded.items() if model() is not None])
        return result

    monkeypatch.setattr(setup, "_load_teacher", load_and_watch)
    monkeypatch.setattr(DistillationStep, "train", train_and_look)
    distill.distill(several(inputs, tmp_path / "run"))
    assert alive == [["large"], ["large", "small"], ["small"], ["small"]]
    loaded.clear(), alive.clear(), at_load.clear()
    in_turn = {**ladder(inputs), "small": replace(ladder(inputs)["small"], first_step=3)}
    distill.distill(several(inputs, tmp_path / "in_turn", teachers=in_turn))
    assert alive == [["large"], ["large"], ["small"], ["small"]] and at_load == [[], []]  # freed before


def test_an_interrupted_run_goes_on_exactly(inputs, alone, tmp_path, stop_after_saving):
    config = several(inputs, tmp_path / "parts")
    with stop_after_saving():
        distill.distill(config)
    assert len(read_metrics(tmp_path / "parts")) == 1
    distill.distill(config)
    assert losses(tmp_path / "parts") == losses(alone)
    expected, found = weights_of(alone, STEPS), weights_of(tmp_path / "parts", STEPS)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_the_manifest_knows_the_teachers_by_their_content(inputs, alone, tmp_path):
    manifest = Manifest.read(alone)
    assert [parent.role for parent in manifest.parents if "teacher" in parent.role] == [
        "teachers.large.teacher",
        "teachers.small.teacher",
    ]
    moved = ladder(inputs)
    (tmp_path / "elsewhere").symlink_to(inputs / "small/checkpoint")
    moved["small"] = replace(moved["small"], teacher=str(tmp_path / "elsewhere"))
    before = read_metrics(alone)
    run_on_ranks(1, run_in, several(inputs, alone, teachers=moved), ParallelConfig())  # skipped
    assert read_metrics(alone) == before
    moved["small"] = replace(moved["small"], teacher=str(inputs / "checkpoint"))
    with pytest.raises(ConfigError, match="teachers.small.teacher is another one"):
        distill.distill(several(inputs, alone, teachers=moved))


WRONG = {
    "a gap": (dict(small=dict(first_step=4)), "teachers leaves step 3 without a teacher"),
    "an end before the beginning": (dict(small=dict(first_step=3, last_step=2)), "first_step = 3 and .*last_step = 2"),
    "an end after the run": (
        dict(small=dict(last_step=9)),
        "last_step = 9: must be in this order, and at most steps = 4",
    ),
    "no weight": (dict(small=dict(weight=0.0)), "teachers.small.weight = 0.0: must be above 0"),
    "a name": ({"a/b": dict(teacher="x")}, "teachers has the name 'a/b'"),
    "one and several": (dict(teacher="x"), "teacher = x, and teachers names large, small"),
    "a trained one": (dict(teacher_lr=1e-4), "teacher_lr = 0.0001 is for one teacher"),
    "hidden states": (dict(loss=LossConfig(hidden=HiddenConfig(1.0))), "loss.hidden.weight = 1.0 is for one teacher"),
}


@pytest.mark.parametrize("case", WRONG)
def test_teachers_that_cannot_teach_so_are_refused(case, inputs, tmp_path):
    changes, message = WRONG[case]
    teachers, others = ladder(inputs), {}
    for name, value in changes.items():
        if isinstance(value, dict):
            teachers[name] = replace(teachers.get(name, TeacherConfig()), **value)
        else:
            others[name] = value
    problems = several(inputs, tmp_path / "run", **{**others, "teachers": teachers}).problems()
    assert any(re.search(message, problem) for problem in problems), problems
