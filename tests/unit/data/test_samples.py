import dataclasses
import re
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.samples import heldout_samples, rank_batches, training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import DataError
from tests.ranks import run_on_ranks

SEQUENCE = 24


@pytest.fixture
def config(tmp_path, write_documents, stories):
    return DataConfig(
        [str(write_documents(stories))], str(tmp_path / "cache"), sequence_length=SEQUENCE, heldout_pct=20
    )


@pytest.fixture
def corpus(config, tokenizer_dir):
    return prepare_corpus(config, tokenizer_dir)


def stored_tokens(prefix):
    dataset = IndexedDataset(prefix)  # its arrays must not be read after it is gone
    return np.concatenate([dataset[index] for index in range(len(dataset))])


def all_tokens(dataset, num_samples):
    return torch.stack([dataset[index]["tokens"] for index in range(num_samples)])


def assert_sample(sample, sequence_length):
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "tokens": (torch.int64, (sequence_length,)),
        "labels": (torch.int64, (sequence_length,)),
        "loss_mask": (torch.float32, (sequence_length,)),
        "position_ids": (torch.int64, (sequence_length,)),
    }
    assert sample["position_ids"].tolist() == list(range(sequence_length))


def test_an_epoch_of_training_samples_is_the_training_text(corpus, config, tokenizer_dir):
    num_samples = (corpus.num_train_tokens - 1) // SEQUENCE
    dataset = training_samples(corpus, config, num_samples)
    assert len(dataset) == num_samples
    samples = [dataset[index] for index in range(num_samples)]
    for sample in samples:
        assert_sample(sample, SEQUENCE)
        assert sample["loss_mask"].all()
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    # No token is lost or given twice, but for the remainder that fills no sample.
    given = np.bincount(torch.cat([sample["tokens"] for sample in samples]), minlength=300)
    stored = np.bincount(stored_tokens(corpus.train[0].prefix), minlength=300)
    assert (given <= stored).all() and (stored - given).sum() <= SEQUENCE
    # Nothing that was held out is trained on, read as text.
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    named = [
        set(re.findall(r"<\d+>", tokenizer.decode(part)))
        for part in (
            torch.cat([sample["tokens"] for sample in samples]),
            stored_tokens(corpus.heldout[0].prefix),
        )
    ]
    assert len(named[1]) == corpus.heldout[0].num_documents
    assert len(named[0]) > 25
    assert not named[0] & named[1]


def test_training_order_follows_the_seed_and_goes_on_over_epochs(corpus, config):
    per_epoch = (corpus.num_train_tokens - 1) // SEQUENCE
    tokens = all_tokens(training_samples(corpus, config, 3 * per_epoch), 3 * per_epoch)
    again = all_tokens(training_samples(corpus, config, 3 * per_epoch), 3 * per_epoch)
    assert torch.equal(tokens, again)
    reseeded = training_samples(corpus, dataclasses.replace(config, seed=2), 3 * per_epoch)
    assert not torch.equal(tokens, all_tokens(reseeded, 3 * per_epoch))


def save_order(corpus, config, num_samples, folder):
    dist.init_process_group("gloo")
    samples = training_samples(corpus, config, num_samples)
    torch.save(all_tokens(samples, num_samples), folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_two_ranks_see_the_order_of_one_process(corpus, config, tmp_path):
    run_on_ranks(2, save_order, corpus, config, 100, tmp_path)
    written = sorted((corpus.folder / "index").iterdir())
    alone = all_tokens(training_samples(corpus, config, 100), 100)
    assert sorted((corpus.folder / "index").iterdir()) == written
    # The same order again without what the ranks left behind.
    for file in written:
        file.unlink()
    assert torch.equal(all_tokens(training_samples(corpus, config, 100), 100), alone)
    assert torch.equal(torch.load(tmp_path / "0.pt"), alone)
    assert torch.equal(torch.load(tmp_path / "1.pt"), alone)


@pytest.fixture
def blend(tmp_path, write_documents, stories):
    """Three sources whose documents tell where they are from, by what all of their words begin with."""
    sources = [
        str(write_documents([" ".join(name + word for word in text.split()) for text in part], name))
        for name, part in zip("XYZ", (stories[:20], stories[20:36], stories[36:]))
    ]
    return DataConfig(sources, str(tmp_path / "cache"), SEQUENCE, heldout_pct=10, weights=[6, 3, 1])


@contextmanager
def one_rank(folder):
    """Megatron-Core's blending asks for a process group."""
    (folder / "alone").unlink(missing_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/alone", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sources_of(dataset, num_samples, tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    found = [set(re.findall("[XYZ]", tokenizer.decode(dataset[index]["tokens"]))) for index in range(num_samples)]
    assert all(len(names) == 1 for names in found)
    return ["".join(names) for names in found]


def test_a_blend_has_its_weights_and_one_order_for_all_ranks(blend, tokenizer_dir, tmp_path):
    corpus = prepare_corpus(blend, tokenizer_dir)
    assert corpus.weights == [6, 3, 1] and len(corpus.train) == 3
    run_on_ranks(2, save_order, corpus, blend, 200, tmp_path)
    with one_rank(tmp_path):
        dataset = training_samples(corpus, blend, 200)
        tokens = all_tokens(dataset, 200)
    assert torch.equal(torch.load(tmp_path / "0.pt"), tokens) and torch.equal(torch.load(tmp_path / "1.pt"), tokens)
    counts = Counter(sources_of(dataset, 200, tokenizer_dir))
    assert {name: counts[name] for name in "XYZ"} == pytest.approx({"X": 120, "Y": 60, "Z": 20}, abs=1)
    assert set(dataset[0]) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert torch.equal(tokens, all_tokens(dataset.dataset, 200))  # Megatron-Core's own


def test_what_is_held_out_does_not_depend_on_weights(blend, tokenizer_dir):
    weighted = prepare_corpus(blend, tokenizer_dir)
    plain = prepare_corpus(dataclasses.replace(blend, weights=None), tokenizer_dir)
    assert len(plain.train) == 1
    assert stored_tokens(weighted.heldout[0].prefix).tolist() == stored_tokens(plain.heldout[0].prefix).tolist()
    assert weighted.num_train_tokens == plain.num_train_tokens
    reweighted = prepare_corpus(dataclasses.replace(blend, weights=[1, 1, 1]), tokenizer_dir)
    assert reweighted.train == weighted.train  # nothing is tokenised again


def test_as_many_samples_of_a_blend_as_repeat_none(blend, tokenizer_dir, tmp_path):
    corpus = prepare_corpus(blend, tokenizer_dir)
    most = corpus.num_sequences(SEQUENCE)
    limits = [(files.num_tokens - 1) // SEQUENCE / share for files, share in zip(corpus.train, (0.6, 0.3, 0.1))]
    assert most == int(min(limits))
    with one_rank(tmp_path):
        dataset = training_samples(corpus, blend, most).dataset
    for part, files in enumerate(corpus.train):
        own = dataset.dataset_sample_index[:most][dataset.dataset_index[:most] == part]
        places = dataset.datasets[part].shuffle_index[own]
        assert len(set(places)) == len(places) and max(places) < (files.num_tokens - 1) // SEQUENCE


@pytest.mark.parametrize("num_samples", [1, 7, 100])
@pytest.mark.parametrize("weights", [[1000, *[1] * 19], [1] * 20, [0.001, *[7.3] * 19], list(range(1, 21))])
def test_no_part_of_a_blend_runs_out(tmp_path, tokenizer_dir, write_documents, stories, weights, num_samples):
    sources = [str(write_documents([text, text + "!"], str(number))) for number, text in enumerate(stories[:20])]
    config = DataConfig(sources, str(tmp_path / "cache"), 8, heldout_pct=1, weights=weights)
    corpus = prepare_corpus(config, tokenizer_dir)
    with one_rank(tmp_path):
        dataset = training_samples(corpus, config, num_samples)
        assert len(dataset) >= num_samples and all(len(dataset[index]["tokens"]) == 8 for index in range(num_samples))


def test_a_source_that_is_held_out_altogether_is_named(tmp_path, tokenizer_dir, write_documents, stories):
    sources = [str(write_documents(stories[:30], "many")), str(write_documents(stories[30:32], "few"))]
    for seed in range(100):
        config = DataConfig(sources, str(tmp_path / "cache"), 8, heldout_pct=40, seed=seed, weights=[1, 1])
        try:
            prepare_corpus(config, tokenizer_dir)
        except DataError as error:
            assert "few, of which nothing is left to train on" in str(error)
            return
    raise AssertionError("no seed holds both documents out")


def assert_documents(sample):
    """Documents end with the end-of-sequence token, and nowhere else."""
    ids = [0]
    for token in sample["tokens"].tolist()[:-1]:
        ids.append(ids[-1] + (token == 1))
    assert sample["document_ids"].tolist() == ids
    starts = {number: ids.index(number) for number in ids}
    assert sample["position_ids"].tolist() == [place - starts[number] for place, number in enumerate(ids)]
    assert sample["loss_mask"].tolist() == [float(token != 1) for token in sample["tokens"].tolist()]


def test_documents_of_a_training_sample_are_numbered(corpus, config):
    apart = training_samples(corpus, dataclasses.replace(config, document_mask=True), 200)
    together = training_samples(corpus, config, 200)
    for index in range(200):
        assert_documents(apart[index])
        assert torch.equal(apart[index]["tokens"], together[index]["tokens"])
    assert {int(apart[index]["document_ids"].max()) for index in range(200)} >= {0, 1}


def test_documents_of_a_blend_are_numbered(blend, tokenizer_dir, tmp_path):
    blend = dataclasses.replace(blend, document_mask=True)
    with one_rank(tmp_path):
        dataset = training_samples(prepare_corpus(blend, tokenizer_dir), blend, 100)
    for index in range(100):
        assert_documents(dataset[index])


@pytest.mark.parametrize("length", [7, SEQUENCE, 200])
def test_documents_of_a_heldout_sample_are_numbered(corpus, config, length):
    settings = dataclasses.replace(config, sequence_length=length)
    together = heldout_samples(corpus, settings)
    apart = heldout_samples(corpus, dataclasses.replace(settings, document_mask=True))
    for plain, sample in zip(together, apart, strict=True):
        used = int(plain["loss_mask"].sum())
        assert torch.equal(sample["tokens"], plain["tokens"])
        assert_documents({key: value[:used] for key, value in sample.items()})
        assert not sample["loss_mask"][used:].any()
    total = sum(int(sample["loss_mask"].sum()) for sample in apart)
    boundaries = corpus.heldout[0].num_documents - 1
    assert total == corpus.num_heldout_tokens - 1 - boundaries


def test_every_heldout_token_is_predicted_once(corpus, config):
    stream = stored_tokens(corpus.heldout[0].prefix).tolist()
    num_predicted = len(stream) - 1
    # The last two: a single window that ends with the text, and one that leaves a single token to the next.
    for length in (7, SEQUENCE, num_predicted // 2, num_predicted, num_predicted - 1):
        samples = list(heldout_samples(corpus, dataclasses.replace(config, sequence_length=length)))
        for sample in samples:
            assert_sample(sample, length)
        kept = torch.cat([sample["loss_mask"] for sample in samples]).bool()
        assert torch.cat([sample["labels"] for sample in samples])[kept].tolist() == stream[1:]
        assert torch.cat([sample["tokens"] for sample in samples])[kept].tolist() == stream[:-1]
        assert all(sample["loss_mask"].any() for sample in samples)


def test_heldout_samples_can_be_fewer(corpus, config):
    full = heldout_samples(corpus, config)
    part = heldout_samples(corpus, config, 2)
    assert len(list(part)) == len(part) == 2 < len(full) == len(heldout_samples(corpus, config, 10**6))
    assert torch.equal(part[1]["tokens"], full[1]["tokens"])


def test_too_short_a_corpus_is_refused(corpus, config):
    with pytest.raises(DataError, match="held-out tokens"):
        heldout_samples(corpus, dataclasses.replace(config, sequence_length=corpus.num_heldout_tokens))
    with pytest.raises(DataError, match="training tokens"):
        training_samples(corpus, dataclasses.replace(config, sequence_length=corpus.num_train_tokens), 1)


class Numbered:
    """Sample i has the token i + 1 everywhere."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        assert 0 <= index < 50
        tokens = torch.full((4,), index + 1)
        return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(4), "position_ids": torch.arange(4)}


@pytest.mark.parametrize("data_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("first, count", [(0, 40), (7, 12), (7, 1), (40, 30), (49, 60)])
def test_ranks_share_the_samples(first, count, micro_batch, data_size):
    ranks = [list(rank_batches(Numbered(), first, count, micro_batch, rank, data_size)) for rank in range(data_size)]
    end = min(first + count, 50)
    num_micro_batches = -(-(end - first) // (micro_batch * data_size))
    assert [len(batches) for batches in ranks] == [num_micro_batches] * data_size
    seen = []
    for d, batches in enumerate(ranks):
        for m, batch in enumerate(batches):
            ids = batch.pop("sample_ids")
            assert ids.dtype == torch.int64 and ids.shape == (micro_batch,)
            assert all(value.shape == (micro_batch, 4) for value in batch.values())
            for j in range(micro_batch):
                index = first + (m * data_size + d) * micro_batch + j
                assert batch["loss_mask"][j].tolist() == [float(index < end)] * 4
                assert ids[j] == (index if index < end else -1)
                if index < end:
                    assert batch["tokens"][j].tolist() == [index + 1] * 4
                    seen.append(index)
    assert sorted(seen) == list(range(first, end))


def test_samples_are_told_apart_by_what_decides_their_tokens(corpus, config):
    """Equal fingerprints mean equal samples at every index: of another corpus, side, length or order they differ."""
    training = training_samples(corpus, config, 8)
    again = training_samples(corpus, config, 8)
    assert training.fingerprint == again.fingerprint
    assert torch.equal(all_tokens(training, 8), all_tokens(again, 8))
    longer = dataclasses.replace(config, sequence_length=SEQUENCE + 1)
    others = [
        training_samples(corpus, config, 9),
        training_samples(corpus, dataclasses.replace(config, seed=config.seed + 1), 8),
        training_samples(corpus, dataclasses.replace(config, document_mask=not config.document_mask), 8),
        training_samples(corpus, longer, 8),
        training_samples(dataclasses.replace(corpus, fingerprint="another"), config, 8),
        heldout_samples(corpus, config),
        heldout_samples(corpus, longer),
    ]
    fingerprints = {samples.fingerprint for samples in [training, *others]}
    assert len(fingerprints) == 8
    assert heldout_samples(corpus, config, 2).fingerprint == heldout_samples(corpus, config).fingerprint


def test_padding_leaves_the_samples_alone(corpus, config):
    samples = [dict(sample) for sample in heldout_samples(corpus, config, 3)]
    (batch,) = rank_batches(samples, 0, 3, 4, 0, 1)
    assert batch["loss_mask"].dtype == torch.float32 and batch["tokens"].dtype == torch.int64
    assert batch["loss_mask"].sum(dim=1).tolist() == [SEQUENCE] * 3 + [0]
    assert samples[2]["loss_mask"].sum() == SEQUENCE
