import dataclasses
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.corpus import text_parents
from minitron_megatron.data.indexed import is_indexed, read_index
from minitron_megatron.data.samples import heldout_samples, training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import DataError

EOS = 1


def write(prefix, documents, dtype=np.uint16):
    """As Megatron-LM's preprocess_data.py does it; a document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def read(files):
    dataset = IndexedDataset(files.prefix)
    return [tuple(dataset[index].tolist()) for index in range(len(dataset))]


@pytest.fixture
def rows(tokenizer_dir, stories):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in stories]


@pytest.fixture
def config(tmp_path):
    return DataConfig([str(tmp_path / "own")], str(tmp_path / "cache"), sequence_length=24, heldout_pct=20)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_tokenised_corpus_is_split_without_a_copy(tmp_path, config, tokenizer_dir, rows, dtype):
    write(tmp_path / "own", [[row] for row in rows * 2], dtype)
    corpus = prepare_corpus(config, tokenizer_dir)
    [train], [heldout] = map(read, corpus.train), map(read, corpus.heldout)
    assert sorted(train + heldout) == sorted(map(tuple, rows * 2))
    assert (len(train), len(heldout)) == (64, 16) and not set(train) & set(heldout)
    assert corpus.num_train_tokens == sum(map(len, train)) and corpus.num_heldout_tokens == sum(map(len, heldout))
    assert (corpus.folder / "train.bin").is_symlink() and (corpus.folder / "heldout.bin").is_symlink()
    windows = [sample["labels"][sample["loss_mask"].bool()] for sample in heldout_samples(corpus, config)]
    assert torch.cat(windows).tolist() == [token for row in heldout for token in row][1:]


def test_it_is_trained_on_as_the_text_would_be(tmp_path, config, tokenizer_dir, rows, stories, write_documents):
    """The same documents in the same order: that of the training files that were made from text."""
    text = DataConfig([str(write_documents(stories))], str(tmp_path / "text_cache"), 24, 20)
    from_text = prepare_corpus(text, tokenizer_dir)
    [train] = map(read, from_text.train)
    corpus = prepare_corpus(dataclasses.replace(config, text=[write_of(tmp_path, train)]), tokenizer_dir)
    theirs = dataclasses.replace(from_text, train=[dataclasses.replace(corpus.train[0], prefix=str(tmp_path / "own"))])
    ours = training_samples(from_text, text, 30)
    again = training_samples(dataclasses.replace(theirs, folder=corpus.folder), text, 30)
    assert all(torch.equal(ours[index]["tokens"], again[index]["tokens"]) for index in range(30))


def write_of(tmp_path, train):
    return str(write(tmp_path / "own", [[row] for row in train]))


def test_sequences_of_a_document_are_one_and_empty_ones_none(tmp_path, config, tokenizer_dir, rows):
    write(tmp_path / "own", [[row[:3], [], row[3:]] for row in rows] + [[[]]])
    corpus = prepare_corpus(config, tokenizer_dir)
    assert sorted(read(corpus.train[0]) + read(corpus.heldout[0])) == sorted(map(tuple, rows))


def test_it_is_read_once(tmp_path, config, tokenizer_dir, rows, monkeypatch):
    write(tmp_path / "own", [[row] for row in rows])
    corpus = prepare_corpus(config, tokenizer_dir)
    with monkeypatch.context() as patch:
        patch.setattr("minitron_megatron.data.tokens.scan_documents", None)
        assert prepare_corpus(config, tokenizer_dir) == corpus
    write(tmp_path / "own", [[row] for row in rows[1:]])
    assert prepare_corpus(config, tokenizer_dir).fingerprint != corpus.fingerprint


def test_text_and_tokens_together(tmp_path, config, tokenizer_dir, rows, stories, write_documents):
    write(tmp_path / "own", [[row] for row in rows[:20]])
    sources = [str(tmp_path / "own"), str(write_documents(stories[20:]))]
    corpus = prepare_corpus(dataclasses.replace(config, text=sources), tokenizer_dir)
    assert [files.num_documents for files in (*corpus.train, *corpus.heldout)] == [16, 16, 4, 4]
    assert corpus.weights == [files.num_tokens for files in corpus.train]
    everything = [row for files in (*corpus.train, *corpus.heldout) for row in read(files)]
    assert sorted(everything) == sorted(map(tuple, rows))
    stream = [token for files in corpus.heldout for row in read(files) for token in row]
    windows = [sample["labels"][sample["loss_mask"].bool()] for sample in heldout_samples(corpus, config)]
    assert torch.cat(windows).tolist() == stream[1:]


def test_weights_find_their_sources(tmp_path, config, tokenizer_dir, rows, stories, write_documents):
    """Token files come behind all text."""
    write(tmp_path / "own", [[row] for row in rows[:20]])
    sources = [str(tmp_path / "own"), str(write_documents(stories[20:])), str(write_documents(stories[:20], "more"))]
    corpus = prepare_corpus(dataclasses.replace(config, text=sources, weights=[1.0, 2.0, 3.0]), tokenizer_dir)
    assert corpus.weights == [2.0, 3.0, 1.0]
    found = [read(files) for files in corpus.train]
    assert set(found[0]) <= set(map(tuple, rows[20:])) and set(found[1]) | set(found[2]) <= set(map(tuple, rows[:20]))
    assert corpus.train[2].prefix.startswith(str(tmp_path / "cache")) and (tmp_path / "cache").is_dir()


def test_a_run_knows_its_token_files(tmp_path, config, rows):
    write(tmp_path / "own", [[row] for row in rows])
    parents = text_parents(config.text)
    assert [parent.path for parent in parents] == [f"{tmp_path}/own.bin", f"{tmp_path}/own.idx"]
    write(tmp_path / "own", [[row[::-1]] for row in rows])
    assert text_parents(config.text)[0].fingerprint != parents[0].fingerprint


@pytest.mark.parametrize("token", [284, 60000])
def test_a_token_of_another_tokenizer(tmp_path, config, tokenizer_dir, rows, token):
    write(tmp_path / "own", [[row] for row in [*rows[:5], [3, token, EOS], *rows[5:]]])
    with pytest.raises(DataError, match=rf"own, document 5: token {token} is none of the tokenizer, .* end at 283"):
        prepare_corpus(config, tokenizer_dir)
    assert not list((tmp_path / "cache").glob("*"))


def test_the_largest_token_is_fine_and_a_negative_one_is_not(tmp_path, config, tokenizer_dir, rows):
    write(tmp_path / "own", [[row] for row in [*rows, [283, EOS]]])
    prepare_corpus(config, tokenizer_dir)
    write(tmp_path / "own", [[row] for row in [*rows, [-7, EOS]]], np.int32)
    with pytest.raises(DataError, match="document 40: token -7 is none"):
        prepare_corpus(config, tokenizer_dir)


def test_documents_that_do_not_end_are_counted(tmp_path, config, tokenizer_dir, rows, caplog):
    write(tmp_path / "own", [[row] for row in [*rows, [3, 4]]])
    prepare_corpus(config, tokenizer_dir)
    assert "1 of 41 documents do not end with the end-of-sequence token 1" in caplog.text


def test_half_of_a_pair(tmp_path, config, tokenizer_dir, rows):
    write(tmp_path / "own", [[row] for row in rows])
    (tmp_path / "own.bin").unlink()
    assert is_indexed(config.text[0])
    with pytest.raises(DataError, match=r"own needs both a \.bin and an \.idx"):
        prepare_corpus(config, tokenizer_dir)


def header(**changes):
    fields = dict(magic=b"MMIDIDX\0\0", version=1, code=8, sequences=3, documents=4) | changes
    return struct.pack("<9sQBQQ", *fields.values())


BODY = struct.pack("<3i3q4q", 2, 3, 4, 0, 4, 10, 0, 1, 2, 3)


@pytest.mark.parametrize(
    "idx, reason",
    [
        (b"", "it has 0 bytes, fewer than a header"),
        (header()[:20], "fewer than a header"),
        (header() + BODY[:-1], "take 102 bytes, and it has 101"),
        (header() + BODY + b"\0", "take 102 bytes, and it has 103"),
        (header(magic=b"MMIDIDX\0\1") + BODY, "does not begin as version 1"),
        (header(version=2) + BODY, "does not begin as version 1"),
        (header(code=0) + BODY, "dtype code 0 is not that of a whole number"),
        (header(code=7) + BODY, "dtype code 7 is not that of a whole number"),
        (header(code=4) + BODY, "do not follow on each other"),
        (header(sequences=2**64 - 1, documents=2**64 - 1) + BODY, "and it has 102"),
        # As 12 S + 8 D overflows 64 bits to what is right.
        (header(sequences=2**62 + 3, documents=4 + 2**61) + BODY, "and it has 102"),
        (header(sequences=0, documents=1) + struct.pack("<q", 0), "there is no document"),
        (header() + struct.pack("<3i3q4q", -2, 3, 4, 0, 4, 10, 0, 1, 2, 3), "negative length"),
        (header() + struct.pack("<3i3q4q", 2, 3, 4, 0, 6, 10, 0, 1, 2, 3), "sequences do not follow"),
        (header() + struct.pack("<3i3q4q", 2, 3, 4, -4, 4, 10, 0, 1, 2, 3), "sequences do not follow"),
        (header() + struct.pack("<3i3q4q", 2, 3, 5, 0, 4, 10, 0, 1, 2, 3), "take 20 bytes, and .*own.bin has 18"),
        (header() + struct.pack("<3i3q4q", 2, 3, 4, 0, 4, 10, 0, 2, 1, 3), "documents do not follow"),
        (header() + struct.pack("<3i3q4q", 2, 3, 4, 0, 4, 10, 0, 1, 2, 4), "not all of its sequences"),
        (header() + struct.pack("<3i3q4q", 2, 3, 4, 0, 4, 10, -1, 1, 2, 3), "not all of its sequences"),
    ],
)
def test_damaged_indices_are_refused(tmp_path, idx, reason):
    (tmp_path / "own.idx").write_bytes(idx)
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "own.bin")
    with pytest.raises(DataError, match=f"own.idx is damaged, or not of .*own.bin: .*{reason}"):
        read_index(tmp_path / "own")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(tmp_path, data):
    good = header() + BODY
    (tmp_path / "own.idx").write_bytes(good)
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "own.bin")
    assert read_index(tmp_path / "own").lengths.tolist() == [2, 3, 4]
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    (tmp_path / "own.idx").write_bytes(bad)
    with pytest.raises(DataError, match="is damaged"):
        read_index(tmp_path / "own")


def test_what_megatron_writes_is_read_back(tmp_path, rows):
    write(tmp_path / "own", [[row[:2], row[2:]] for row in rows], np.int32)
    ours, theirs = read_index(tmp_path / "own"), IndexedDataset(str(tmp_path / "own"))
    assert ours.dtype == np.int32
    assert ours.lengths.tolist() == theirs.sequence_lengths.tolist()
    assert ours.documents.tolist() == theirs.document_indices.tolist()
    assert ours.tokens().tolist() == [token for row in rows for token in row]
