"""A cached teacher: the same cache from any layout, the live teacher's losses from it, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minitron_megatron.artifacts.fingerprint import fingerprint
from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.config.cache import CacheConfig, CacheForm
from minitron_megatron.config.cluster import ClusterConfig
from minitron_megatron.config.loss import Divergence, HiddenConfig, LogitsConfig, LossConfig
from minitron_megatron.config.parallel import InferenceParallelConfig
from minitron_megatron.config.schema import (
    DataConfig,
    DistillConfig,
    DType,
    InspectConfig,
    OptimizerConfig,
    ParallelConfig,
)
from minitron_megatron.distillation.prediction_cache import (
    INDEX,
    CacheIndex,
    PredictionCache,
    Split,
    pack,
    pack_ids,
    shard_path,
    unpack_ids,
    write_shard,
)
from minitron_megatron.distillation.sparse_predictions import SampledPredictions, TopPredictions
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.fit_check import check_fit
from minitron_megatron.launch.jobs import jobs_of
from minitron_megatron.report.inspect import inspect
from minitron_megatron.tracking.metrics import read_metrics
from minitron_megatron.training import cache, distill
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf, literate

STEPS, GLOBAL_BATCH = 3, 8
FORMS = {
    "sampled": dict(form=CacheForm.SAMPLED, draws=7),
    "tempered": dict(form=CacheForm.SAMPLED, draws=300, temperature=2.0),
    "top_k": dict(form=CacheForm.TOP_K, top_k=6),
    "hidden": dict(form=CacheForm.HIDDEN),
}
LOSSES = {
    "sampled": LossConfig(lm_weight=0.3),
    "tempered": LossConfig(lm_weight=0.3, logits=LogitsConfig(temperature=2.0)),
    "top_k": LossConfig(logits=LogitsConfig(Divergence.REVERSE_KL, top_k=6, tail=True)),
    "hidden": LossConfig(lm_weight=0.3, logits=LogitsConfig(Divergence.JENSEN_SHANNON, temperature=2.0)),
}
LAYOUTS = {
    "tp2_sp": ParallelConfig(tensor=2, sequence=True),
    "pp2_vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "dp2": ParallelConfig(data=2),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a teacher, a student, a text of short documents, and a cache of each form by one rank."""
    folder = tmp_path_factory.mktemp("cached")
    import_hf(folder / "teacher", literate(hf_model(**LLAMA)))
    import_hf(folder / "student", literate(hf_model(seed=1, **{**LLAMA, "intermediate_size": 32})))
    generator = np.random.default_rng(0)
    documents = ("".join(generator.choice(list("abcdefgh"), 25)) for _ in range(100))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    run_on_ranks(1, make_all, folder, folder / "caches", InferenceParallelConfig())
    return folder


def data_of(inputs, **changes):
    settings = dict(cache_dir=str(inputs / "corpora"), sequence_length=16, heldout_pct=20.0, document_mask=True)
    return DataConfig([str(inputs / "text.jsonl")], **{**settings, **changes})


def cache_settings(inputs, output, name, **changes):
    settings = dict(
        num_samples=STEPS * GLOBAL_BATCH,
        heldout_samples=GLOBAL_BATCH,
        shard_samples=5,
        micro_batch=2,
        chunk_tokens=7,
        data=data_of(inputs),
        **FORMS[name],
    )
    return CacheConfig(str(inputs / "teacher" / "checkpoint"), str(output), **{**settings, **changes})


def make_all(inputs, folder, parallel):
    torch.distributed.init_process_group("gloo")  # once: the verbs use a world that there is
    for name in FORMS:
        cache.cache(cache_settings(inputs, folder / name, name, parallel=parallel))


def settings(inputs, output, name, **changes):
    own = dict(
        steps=STEPS,
        global_batch=GLOBAL_BATCH,
        micro_batch=2,
        validate_every=2,
        validate_batches=1,
        dtype=DType.FP32,
        loss=LOSSES[name],
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0),
        data=data_of(inputs),
    )
    teacher, student = inputs / "caches" / name, inputs / "student" / "checkpoint"
    return DistillConfig(str(teacher), str(student), str(output), **{**own, **changes})


def train_all(inputs, folder, parallel):
    torch.distributed.init_process_group("gloo")
    for name in FORMS:
        distill.distill(settings(inputs, folder / name, name, parallel=parallel))


def losses(run):
    """All that was logged of losses and gradients, `[steps, values]`, by name."""
    lines = read_metrics(run)
    names = [name for name in lines[-1] if name.startswith(("loss/", "val/", "optim/grad"))]
    return {name: np.array([line[name] for line in lines if name in line]) for name in names}


@pytest.fixture(scope="module")
def alone(inputs):
    """Training from each cache by one rank."""
    run_on_ranks(1, train_all, inputs, inputs / "1", ParallelConfig())
    return inputs / "1"


@pytest.mark.parametrize("layout", [dict(data=2), dict(tensor=2), dict(pipeline=2)], ids=str)
def test_a_cache_is_the_same_from_any_layout(layout, inputs, tmp_path):
    run_on_ranks(2, make_all, inputs, tmp_path, InferenceParallelConfig(**layout))
    for name in FORMS:
        files = sorted(file.name for file in (inputs / "caches" / name).glob("*.safetensors"))
        assert files == sorted(file.name for file in (tmp_path / name).glob("*.safetensors"))
        assert len(files) == 7 + (name == "hidden")
        assert (tmp_path / name / INDEX).read_text() == (inputs / "caches" / name / INDEX).read_text()
        for file in files:
            expected, found = (load_file(folder / file) for folder in (inputs / "caches" / name, tmp_path / name))
            for key, value in expected.items():
                if layout == dict(data=2) or not value.is_floating_point():
                    assert torch.equal(found[key], value), (file, key)
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_from_a_cache_is_the_same_in_any_layout(layout, inputs, alone, tmp_path):
    run_on_ranks(2, train_all, inputs, tmp_path, LAYOUTS[layout])
    for name in FORMS:
        expected, found = losses(alone / name), losses(tmp_path / name)
        assert expected.keys() == found.keys() and {"loss/kd_logits", "val/kd_logits"} <= expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=f"{name} {key}")


def train_live(inputs, folder):
    torch.distributed.init_process_group("gloo")
    for name in ("top_k", "hidden"):
        live = settings(inputs, folder / name, name)
        distill.distill(replace(live, teacher=str(inputs / "teacher" / "checkpoint")))


def test_top_k_and_hidden_states_give_the_live_teachers_losses(inputs, alone, tmp_path):
    run_on_ranks(1, train_live, inputs, tmp_path)
    for name, within in {"top_k": 3e-3, "hidden": 1e-6}.items():  # log-probabilities are kept in float16
        expected, found = losses(tmp_path / name), losses(alone / name)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=within, atol=within, err_msg=f"{name} {key}")


def test_what_was_drawn_gives_the_teachers_entropy_and_its_probabilities(inputs):
    """Of 300 draws each share is within 1 / 300 of the probability, as evenly spread draws have it, and no mask's."""
    drawn, hidden = (PredictionCache(inputs / "caches" / name) for name in ("tempered", "hidden"))
    exact = (hidden.read([3]).float() @ hidden.output_weight().float().T / 2.0).softmax(1)
    found = drawn.read([3])
    shares = torch.zeros_like(exact).scatter_add_(1, found.ids, found.shares)
    counted = found.shares.sum(1) > 0
    assert 0 < counted.sum() < len(counted)
    torch.testing.assert_close(found.shares.sum(1)[counted], torch.ones(int(counted.sum())))
    assert (shares - exact)[counted].abs().max() < 2 / 300
    torch.testing.assert_close(found.entropy, -(exact * exact.log()).sum(1), rtol=1e-4, atol=1e-5)


def test_ids_are_kept_in_as_few_bytes_as_the_vocabulary_takes():
    for num_bytes, largest in ((1, 255), (2, 65_535), (3, 151_935), (4, 2**31)):
        ids = torch.tensor([[0, 1, largest]])
        packed = pack_ids(ids, num_bytes)
        assert packed.dtype is torch.uint8 and packed.shape == (1, 3, num_bytes)
        assert torch.equal(unpack_ids(packed), ids)


def test_padding_rows_and_both_splits_are_read(inputs):
    from minitron_megatron.data.samples import FIRST_HELDOUT

    for name, kind in {"sampled": SampledPredictions, "top_k": TopPredictions}.items():
        whole = PredictionCache(inputs / "caches" / name)
        assert len(whole.read([-1, -1])[0]) == 2 * 16  # a replica that has run out of samples
        found = whole.read([7, FIRST_HELDOUT + 4, -1])
        assert isinstance(found, kind) and all(len(values) == 3 * 16 for values in found)
        training, heldout = whole.read([7]), whole.read([FIRST_HELDOUT + 4])
        assert torch.equal(found[-1].view(16, 3)[:, 0], training[-1])
        assert torch.equal(found[-1].view(16, 3)[:, 1], heldout[-1])
        with pytest.raises(CheckpointError, match="no predictions for train sample 24"):
            whole.read([24])


def test_inspect_says_what_a_cache_holds(inputs, capsys):
    inspect(InspectConfig(str(inputs / "caches" / "top_k")))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].endswith("top_k: cache of a teacher's predictions")
    assert {"form top_k, 6 for a position", "samples 24 train, 8 heldout", "tokens of a sample 16"} <= set(lines)


def test_a_run_from_a_cache_goes_on_exactly_where_it_was_interrupted(inputs, tmp_path, stop_after_saving):
    config = settings(inputs, tmp_path / "whole", "sampled", save_every=1, validate_every=None)
    distill.distill(config)
    parts = replace(config, output=str(tmp_path / "parts"))
    with stop_after_saving():
        distill.distill(parts)
    assert len(read_metrics(tmp_path / "parts")) == 1
    distill.distill(parts)
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(found[key], value) and len(value) == STEPS for key, value in expected.items())


def test_a_cache_takes_no_memory_of_a_teacher_where_a_launch_is_checked(inputs):
    """One that is there, and one that an earlier stage makes; where no teacher can be read nothing is said."""

    def gib(teacher):
        many = dict(global_batch=2**20, parallel=ParallelConfig(data=1))  # a teacher keeps a state for each
        config = settings(inputs, inputs / "run", "sampled", **many)
        made = cache_settings(inputs, "later", "sampled", parallel=InferenceParallelConfig(data=1))
        stages = {"cached": ("cache", made), "run": ("distill", replace(config, teacher=teacher))}
        cluster = ClusterConfig(gpu="h100")
        [note], problems = check_fit(stages, jobs_of(stages, cluster, with_report=False), cluster, None)
        assert not problems
        return note

    assert gib(str(inputs / "caches" / "sampled")) == gib("later") != gib(str(inputs / "teacher" / "checkpoint"))
    assert "cannot be read here" in gib("nowhere")


def test_samples_without_a_token_that_counts_are_read_wherever_they_are(tmp_path):
    """Nothing was drawn for them; at the end of a shard, and in one without any draw."""
    index = CacheIndex(CacheForm.SAMPLED, 300, 2, 2, 1.0, 4, {"train": Split("x", 4)})
    drawn = torch.tensor([[299, 5, 0, 0], [7, 0, 0, 0]]), torch.tensor([[3, 1, 0, 0], [4, 0, 0, 0]])
    nothing = torch.zeros_like(drawn[0]), torch.zeros_like(drawn[1])
    packed = [
        pack({"ids": ids, "counts": counts, "entropy": torch.ones(2)}, index)
        for ids, counts in (drawn, nothing, nothing, nothing)
    ]
    for number in (0, 1):
        write_shard(shard_path(tmp_path, "train", number), packed[2 * number : 2 * number + 2])
    index.write(tmp_path)
    files = {file.name: fingerprint(file) for file in index.files(tmp_path)}
    Manifest("cache", details={"files": files}).write(tmp_path)
    cached = PredictionCache(tmp_path)
    ids, shares, _ = cached.read([0])
    assert ids[0, :2].tolist() == [299, 5] and shares[0].tolist() == [0.75, 0.25] and shares[1].tolist() == [1.0, 0.0]
    for number in (1, 2, 3):
        assert not cached.read([number]).shares.any()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(draws=40_000), "draws = 40000: must be at most 32767"),
        (dict(form=CacheForm.HIDDEN, draws=7), "draws = 7 is for form = sampled, and it is hidden"),
        (dict(form=CacheForm.SAMPLED, top_k=7), "top_k = 7 is for form = top_k, and it is sampled"),
        (dict(form=CacheForm.HIDDEN, temperature=2.0), "form = hidden keeps no probabilities"),
        (dict(num_samples=0), "num_samples = 0"),
    ],
)
def test_settings_that_a_form_does_not_have_are_refused(changes, problem):
    [found] = CacheConfig("t", "o", **{**dict(num_samples=8), **changes}).problems()
    assert problem in found


def stop_after_two_shards(inputs, output):
    write, count = cache.write_shard, 0

    def write_and_stop(*args):
        nonlocal count
        write(*args)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    cache.write_shard = write_and_stop
    try:
        with pytest.raises(KeyboardInterrupt):
            cache.cache(cache_settings(inputs, output, "sampled"))
    finally:
        cache.write_shard = write


def test_an_interrupted_cache_goes_on_after_its_last_shard(inputs, tmp_path):
    run_on_ranks(1, stop_after_two_shards, inputs, tmp_path / "cache")
    first = shard_path(tmp_path / ".cache.shards", "train", 0)
    written = first.stat().st_mtime_ns
    run_on_ranks(1, cache.cache, cache_settings(inputs, tmp_path / "cache", "sampled"))
    assert not first.exists() and shard_path(tmp_path / "cache", "train", 0).stat().st_mtime_ns == written
    for file in (inputs / "caches" / "sampled").glob("*.safetensors"):
        assert (tmp_path / "cache" / file.name).read_bytes() == file.read_bytes()


def refused(config, match):
    with pytest.raises((ConfigError, CheckpointError), match=match):
        distill.distill(config)


REFUSED = {
    "hidden losses": (
        "sampled",
        dict(loss=LossConfig(hidden=HiddenConfig(weight=1.0))),
        "has no states of inner layers, and loss.hidden.weight = 1.0",
    ),
    "a trained teacher": ("sampled", dict(teacher_lr=1e-4), "teacher_lr = 0.0001 is for a model"),
    "a temperature": ("tempered", dict(loss=LossConfig()), "temperature = 1.0, and .* has predictions at 2.0"),
    "a divergence": (
        "sampled",
        dict(loss=LossConfig(logits=LogitsConfig(Divergence.REVERSE_KL))),
        "divergence = reverse_kl: the drawn tokens .* give forward_kl",
    ),
    "fewer tokens": ("top_k", dict(loss=LossConfig()), "top_k = None, and .* has the 6 most likely tokens"),
    "more steps": ("sampled", dict(steps=4), "24 training samples, up to sample 23, and steps x global_batch = 32"),
    "more validation": ("sampled", dict(validate_batches=2), "8 held-out samples, and ends before sample 8 of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_that_does_not_fit_is_refused(case, inputs, tmp_path):
    name, changes, match = REFUSED[case]
    if case != "more validation":
        changes = {"validate_every": None, **changes}
    run_on_ranks(1, refused, settings(inputs, tmp_path / "run", name, **changes), match)
    assert not (tmp_path / "run").exists()


def test_a_cache_of_other_text_is_refused_with_both_names(inputs, tmp_path):
    lines = (inputs / "text.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(reversed(lines)))
    other = replace(data_of(inputs), text=[str(tmp_path / "other.jsonl")])
    config = settings(inputs, tmp_path / "run", "sampled", data=other)
    run_on_ranks(1, refused, config, "other train samples .*text.jsonl.* than this run's")


@pytest.mark.parametrize("damage", ["damaged", "missing"])
@pytest.mark.parametrize("file", ["train-00003", "output"])
def test_a_damaged_file_is_named(file, damage, inputs, tmp_path):
    shutil.copytree(inputs / "caches" / "hidden", tmp_path / "cache")
    path = tmp_path / "cache" / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content)
    config = replace(settings(inputs, tmp_path / "run", "hidden"), teacher=str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=f"{file}.safetensors is {damage}"):
        distill.distill(config)
