"""Sparse and quantised checkpoints: masks on disk, cut by `prune`, shown by `inspect`, given to others; bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.companions import mask_of, matrices, pack_mask, read_mask, unpack_mask
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.sparsity_facts import sparsity_facts
from minitron_megatron.config.calibration import Scheme
from minitron_megatron.config.quantize import QuantizeConfig, QuantizeMethod
from minitron_megatron.config.schema import InspectConfig, PruneConfig, TargetConfig
from minitron_megatron.config.sparsify import SparsifyConfig, SparsifyMethod
from minitron_megatron.config.verbs import verb_function
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.parameters import parameters
from minitron_megatron.pruning.prune import prune
from minitron_megatron.report.inspect import inspect
from tests.tiny import LLAMA, hf_model, import_hf, random_scores

MAGNITUDE = dict(method=SparsifyMethod.MAGNITUDE, refit=False)


def sparsify(checkpoint, output, **changes):
    return verb_function("sparsify")(SparsifyConfig(str(checkpoint), str(output), **{**MAGNITUDE, **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    import_hf(folder, hf_model(**LLAMA))
    sparsify(folder / "checkpoint", folder / "sparse")
    return folder


def whole(param):
    return [np.arange(size) for size in param.shape]


@pytest.mark.parametrize("columns", [8, 12, 44, 1])
def test_masks_are_packed_eight_to_a_byte(columns):
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_mask(mask)
    assert packed.dtype is torch.uint8 and packed.shape == (5, -(-columns // 8))
    assert torch.equal(unpack_mask(packed, columns), mask)
    assert packed[0, 0] & 1 == mask[0, 0]


def test_masks_are_beside_their_matrices_and_any_part_can_be_read(folder):
    checkpoint = Checkpoint(folder / "sparse")
    assert len(checkpoint.masks) == 4 * 4
    for param in matrices(checkpoint.network):
        mask = read_mask(checkpoint, param, whole(param))
        weight = checkpoint.read(param, whole(param))
        assert torch.equal(mask, weight != 0) and mask.float().mean() == 0.5
        some = [np.array([0, 3, 4]), np.array([1, 2, 17, 30])]
        assert torch.equal(read_mask(checkpoint, param, some), mask[np.ix_(*some)])


def test_the_manifest_says_what_was_done(folder):
    details = Checkpoint(folder / "sparse").manifest.details
    assert details["pattern"] == "2:4" and details["sparsity"] == 0.5 and details["method"] == "magnitude"


def test_a_second_run_with_the_same_settings_is_skipped(folder):
    before = (folder / "sparse" / "manifest.json").stat().st_mtime_ns
    sparsify(folder / "checkpoint", folder / "sparse")
    assert (folder / "sparse" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="pattern was '2:4' and is '1:4'"):
        sparsify(folder / "checkpoint", folder / "sparse", pattern="1:4")


def test_pruning_cuts_masks_with_their_matrices(folder, tmp_path, caplog):
    sparse = Checkpoint(folder / "sparse")
    random_scores(tmp_path / "scores", sparse.network)
    target = TargetConfig(hidden=40, ffn=32, layers=3)
    prune(PruneConfig(str(folder / "sparse"), str(tmp_path / "small"), str(tmp_path / "scores"), target=target))
    small = Checkpoint(tmp_path / "small")
    assert len(small.masks) == 3 * 4 and small.manifest.details["pattern"] == "unstructured"
    for param in matrices(small.network):
        assert torch.equal(read_mask(small, param, whole(param)), small.read(param, whole(param)) != 0)
    assert "N:M groups are no longer whole" in caplog.text


def test_pruning_leaves_the_scales_of_a_quantised_checkpoint_out(folder, tmp_path, caplog):
    nearest = QuantizeConfig(str(folder / "checkpoint"), str(tmp_path / "q"), method=QuantizeMethod.RTN)
    verb_function("quantize")(nearest)
    random_scores(tmp_path / "scores", Checkpoint(tmp_path / "q").network)
    prune(PruneConfig(str(tmp_path / "q"), str(tmp_path / "s"), str(tmp_path / "scores"), target=TargetConfig(ffn=32)))
    assert not Checkpoint(tmp_path / "s").companions
    assert "its scales are left out" in caplog.text


def test_merged_heads_have_the_masks_of_both(folder, tmp_path):
    random_scores(tmp_path / "scores", Checkpoint(folder / "sparse").network)
    target = TargetConfig(heads=4)
    config = PruneConfig(str(folder / "sparse"), str(tmp_path / "small"), str(tmp_path / "scores"), target=target)
    prune(replace(config, merge_heads=True))
    small = Checkpoint(tmp_path / "small")
    for param in matrices(small.network):
        weight, mask = small.read(param, whole(param)), read_mask(small, param, whole(param))
        assert not weight[~mask].any() and (weight[mask] != 0).float().mean() > 0.99, param.name


def test_masks_of_matrices_that_stay_as_they_are_stay_too(folder, tmp_path):
    config = QuantizeConfig(str(folder / "sparse"), str(tmp_path / "q"), method=QuantizeMethod.RTN)
    verb_function("quantize")(replace(config, ignore=["*.linear_fc2.weight"]))
    found = Checkpoint(tmp_path / "q")
    assert len(found.masks) == 16 and len(found.scales) == 12 and found.manifest.details["pattern"] == "2:4"
    sparsify(folder / "sparse", tmp_path / "again", pattern="1:4", ignore=["*.mlp.*"])
    densities = {own.param.name: own.density for own in sparsity_facts(Checkpoint(tmp_path / "again"))}
    assert densities["mlp.linear_fc1.weight"] == 0.5 and densities["self_attention.linear_qkv.weight"] == 0.25


def test_what_is_ignored_stays_as_it_is(folder, tmp_path):
    sparsify(folder / "checkpoint", tmp_path / "out", ignore=["decoder.layers.0.*", "*.linear_fc2.weight"])
    dense, found = Checkpoint(folder / "checkpoint"), Checkpoint(tmp_path / "out")
    assert len(found.masks) == 3 * 3
    for param in parameters(found.network):
        is_sparse = param.matmul and param.layer not in (None, 0) and not param.name.endswith("linear_fc2.weight")
        same = torch.equal(found.read(param, whole(param)), dense.read(param, whole(param)))
        assert same != is_sparse, param.name


def test_matrices_have_shares_of_their_own(folder, tmp_path):
    shares = {"*.mlp.*": 0.7, "decoder.layers.1.*": 0.25}
    sparsify(folder / "checkpoint", tmp_path / "out", pattern="unstructured", sparsity=0.4, sparsity_of=shares)
    for facts in sparsity_facts(Checkpoint(tmp_path / "out")):
        share = 0.25 if facts.param.layer == 1 else 0.7 if "mlp" in facts.param.name else 0.4
        assert facts.density == pytest.approx(1 - share, abs=1e-3)


def test_inspect_shows_density_and_broken_groups_by_layer(folder, capsys):
    inspect(InspectConfig(str(folder / "sparse")))
    shown = capsys.readouterr().out
    assert "sparse checkpoint" in shown and "50.00% of 16 matrices" in shown
    assert "groups of four with more than two weights  0" in shown
    assert "linear_fc2 zeros" in shown
    facts = list(sparsity_facts(Checkpoint(folder / "sparse")))
    assert [own.density for own in facts] == [0.5] * 16 and {own.broken for own in facts} == {0}


def test_masks_are_given_to_another_checkpoint_and_shuffled(folder, tmp_path):
    import_hf(tmp_path, hf_model(seed=3, **LLAMA))
    other = tmp_path / "checkpoint"
    given = dict(masks_of=str(folder / "sparse"))
    sparsify(other, tmp_path / "given", method=SparsifyMethod.GIVEN, **given)
    sparsify(other, tmp_path / "random", method=SparsifyMethod.RANDOM, **given)
    source, dense = Checkpoint(folder / "sparse"), Checkpoint(other)
    tickets, control = Checkpoint(tmp_path / "given"), Checkpoint(tmp_path / "random")
    assert tickets.manifest.details["pattern"] == "2:4" and control.manifest.details["pattern"] == "unstructured"
    for param in matrices(source.network):
        mask = read_mask(source, param, whole(param))
        assert torch.equal(read_mask(tickets, param, whole(param)), mask)
        assert torch.equal(tickets.read(param, whole(param)), dense.read(param, whole(param)) * mask)
        shuffled = read_mask(control, param, whole(param))
        assert shuffled.sum() == mask.sum() and 0.4 < (shuffled == mask).float().mean() < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pattern="4:2"), "N must be below M"),
        (dict(pattern="half"), "must be N:M, such as 2:4, or unstructured"),
        (dict(pattern="unstructured", sparsity=1.0), "must be above 0 and below 1"),
        (dict(pattern="2:4", sparsity=0.7), r"pattern = 2:4 has 0\.5"),
        (dict(pattern="3:16"), r"linear_fc2\.weight has 44 columns, which is no multiple of 16"),
        (dict(sparsity_of={"*": 0.3}), "pattern = 2:4 has one share of zeros"),
        (dict(pattern="unstructured", sparsity_of={"*": 0}), r"sparsity_of has \*: 0: must be a number above 0"),
        (dict(pattern="unstructured", sparsity_of={"*.fc3": 0.3}), r"sparsity_of = \*\.fc3 matches no matrix"),
        (dict(by_error=True), "by_error = true, and pattern = 2:4 says which share each matrix has"),
        (
            dict(by_error=True, pattern="unstructured", method=SparsifyMethod.RANDOM),
            "by_error = true, and method = random does not choose by errors",
        ),
        (dict(ignore=["*.fc3"]), r"ignore = \*\.fc3 matches no matrix"),
        (dict(ignore=["*"]), "leaves no matrix to work on"),
        (dict(method=SparsifyMethod.GIVEN), "given needs a checkpoint with masks"),
        (dict(masks_of="somewhere"), "no other method has"),
        (dict(masks_of="x", method=SparsifyMethod.RANDOM, pattern="1:4"), "leave out pattern"),
        (dict(damping=0.0), "must be above 0 and below 1; 0.01 and 0.1 are usual"),
        (dict(most_norms=0.5), "must be at least 1"),
        (dict(group_size=32), "leave group_size out"),
    ],
)
def test_bad_settings_are_named(changes, message, folder, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sparsify(folder / "checkpoint", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_masks_of_a_dense_checkpoint_are_refused(folder, tmp_path):
    import_hf(tmp_path, hf_model(**{**LLAMA, "intermediate_size": 52}))
    sparsify(tmp_path / "checkpoint", tmp_path / "wider")
    for other, name in ((folder / "checkpoint", "self_attention"), (tmp_path / "wider", "mlp")):
        with pytest.raises(CheckpointError, match=rf"has no masks of the shape of decoder\.layers\.0\.{name}"):
            given = dict(method=SparsifyMethod.GIVEN, masks_of=str(other))
            sparsify(folder / "checkpoint", tmp_path / "out", **given)


def test_a_quantised_checkpoint_is_not_sparsified(folder, tmp_path):
    config = QuantizeConfig(str(folder / "sparse"), str(tmp_path / "q"), method=QuantizeMethod.RTN)
    verb_function("quantize")(config)
    found = Checkpoint(tmp_path / "q")
    assert len(found.masks) == len(found.scales) == 16
    for param in matrices(found.network):
        mask = read_mask(found, param, whole(param))
        assert torch.equal(mask, read_mask(Checkpoint(folder / "sparse"), param, whole(param)))
        assert not found.read(param, whole(param))[~mask].any()
    with pytest.raises(CheckpointError, match="is quantised: sparsify what it was made of"):
        sparsify(tmp_path / "q", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"group_size = 64, and scheme = fp8 has a scale for each row"):
        verb_function("quantize")(replace(config, scheme=Scheme.FP8, group_size=64))


def test_the_mask_of_a_matrix_lies_in_its_own_layer(folder):
    checkpoint = Checkpoint(folder / "sparse")
    assert checkpoint.stacked
    [first, *_] = matrices(checkpoint.network)
    assert checkpoint.companions["decoder.layers.0.self_attention.linear_qkv.weight_mask"].name == mask_of(first).name
