import dataclasses
import itertools
import json
import random
import shutil
from collections import Counter

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from minitron_megatron.config.schema import DataConfig, ParallelConfig
from minitron_megatron.data import tokens
from minitron_megatron.data.encoding import num_workers, tokenizer_fingerprint
from minitron_megatron.data.samples import heldout_samples, training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import DataError
from minitron_megatron.parallel.context import parallel_context


@pytest.fixture
def config(tmp_path, write_documents, stories):
    return DataConfig(text=[str(write_documents(stories))], cache_dir=str(tmp_path / "cache"), heldout_pct=20)


def read(prefix):
    dataset = IndexedDataset(prefix)  # its arrays must not be read after it is gone
    return [tuple(dataset[index].tolist()) for index in range(len(dataset))]


def test_token_files_hold_what_the_tokenizer_says(config, tokenizer_dir, stories):
    corpus = prepare_corpus(config, tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    expected = Counter(
        (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id) for text in stories
    )
    train, heldout = read(corpus.train[0].prefix), read(corpus.heldout[0].prefix)
    assert Counter(train + heldout) == expected
    assert (len(train), len(heldout)) == (corpus.train[0].num_documents, corpus.heldout[0].num_documents) == (32, 8)
    assert sum(map(len, train)) == corpus.num_train_tokens
    assert sum(map(len, heldout)) == corpus.num_heldout_tokens
    # Megatron-Core counts documents and sequences apart: one sequence per document.
    assert IndexedDataset(corpus.train[0].prefix).document_indices.tolist() == list(range(33))


def test_manifest_counts(config, tokenizer_dir, stories):
    corpus = prepare_corpus(config, tokenizer_dir)
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest["kind"] == "corpus"
    details = manifest["details"]
    assert details["fingerprint"] == corpus.fingerprint == corpus.folder.name
    files = details["files"]
    assert files["train"]["bytes"] + files["heldout"]["bytes"] == sum(len(text.encode()) for text in stories)


@pytest.mark.parametrize("seed", range(5))
def test_equal_documents_stay_on_one_side(tmp_path, write_documents, tokenizer_dir, stories, seed):
    texts = stories[:10] * 4
    random.Random(seed).shuffle(texts)
    config = DataConfig([str(write_documents(texts))], str(tmp_path / "cache"), heldout_pct=40, seed=seed)
    corpus = prepare_corpus(config, tokenizer_dir)
    train, heldout = read(corpus.train[0].prefix), read(corpus.heldout[0].prefix)
    assert (len(train), len(heldout)) == (24, 16)
    assert not set(train) & set(heldout)


def test_a_small_share_still_holds_one_document_out(config, tokenizer_dir):
    corpus = prepare_corpus(dataclasses.replace(config, heldout_pct=0.01), tokenizer_dir)
    assert (corpus.train[0].num_documents, corpus.heldout[0].num_documents) == (39, 1)


def test_the_split_follows_the_seed_and_not_the_place_of_the_files(
    config, tmp_path, write_documents, tokenizer_dir, stories
):
    corpus = prepare_corpus(config, tokenizer_dir)
    elsewhere = DataConfig([str(write_documents(stories, "copy"))], str(tmp_path / "other"), heldout_pct=20)
    copy = prepare_corpus(elsewhere, tokenizer_dir)
    assert copy.fingerprint == corpus.fingerprint
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx"):
        assert (copy.folder / name).read_bytes() == (corpus.folder / name).read_bytes()
    reseeded = prepare_corpus(dataclasses.replace(config, seed=1), tokenizer_dir)
    assert set(read(reseeded.heldout[0].prefix)) != set(read(corpus.heldout[0].prefix))


def test_fingerprint_depends_on_everything_that_is_written(config, make_tokenizer, tokenizer_dir, write_documents):
    corpus = prepare_corpus(config, tokenizer_dir)
    changed_text = str(write_documents(["another", "text"], "more"))
    others = [
        prepare_corpus(dataclasses.replace(config, seed=1), tokenizer_dir),
        prepare_corpus(dataclasses.replace(config, heldout_pct=21), tokenizer_dir),
        prepare_corpus(dataclasses.replace(config, text=[*config.text, changed_text]), tokenizer_dir),
        prepare_corpus(config, make_tokenizer(vocab_size=270)),
        prepare_corpus(config, make_tokenizer(eos_token="<bos>")),  # the same tokenizer.json
    ]
    assert len({corpus.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert corpus.tokenizer_fingerprint == others[0].tokenizer_fingerprint == tokenizer_fingerprint(tokenizer_dir)
    assert corpus.tokenizer_fingerprint != others[3].tokenizer_fingerprint


def test_several_processes_write_what_one_does(config, tokenizer_dir, tmp_path, stories):
    lines = [{"text": text} for text in stories * 9]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = dataclasses.replace(config, text=[*config.text, str(tmp_path / "more.jsonl")], workers=1)
    alone = prepare_corpus(config, tokenizer_dir).folder
    shared = dataclasses.replace(config, cache_dir=str(tmp_path / "shared"), workers=2)
    together = prepare_corpus(shared, tokenizer_dir).folder
    assert together.name == alone.name
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx"):
        assert (together / name).read_bytes() == (alone / name).read_bytes()


def test_an_error_in_another_process_is_this_ones(tmp_path, tokenizer_dir):
    line = json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n"
    (tmp_path / "chat.jsonl").write_text('{"text": "good"}\n' + line)
    config = DataConfig([str(tmp_path / "chat.jsonl")], str(tmp_path / "cache"), workers=2)
    with pytest.raises(DataError, match=r"jsonl, line 2 is a conversation, and the tokenizer has no chat template"):
        prepare_corpus(config, tokenizer_dir)
    assert list((tmp_path / "cache").iterdir()) == []


def test_workers_are_as_many_as_the_text_is_worth(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert [num_workers(None, size) for size in (0, 2**24, 2**25, 2**26, 2**40)] == [1, 1, 2, 4, 8]
    assert num_workers(3, 0) == 3


def test_a_corpus_is_made_once_for_all_sequence_lengths(config, tokenizer_dir):
    corpus = prepare_corpus(config, tokenizer_dir)
    before = (corpus.folder / "train.bin").stat()
    assert prepare_corpus(dataclasses.replace(config, sequence_length=64), tokenizer_dir) == corpus
    after = (corpus.folder / "train.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_text_is_read_once_until_it_changes(config, tokenizer_dir, tmp_path, stories, monkeypatch):
    read, documents = [], tokens.documents
    monkeypatch.setattr(tokens, "documents", lambda *args: read.append(args) or documents(*args))
    corpus = prepare_corpus(config, tokenizer_dir)
    assert read
    read.clear()
    assert prepare_corpus(config, tokenizer_dir) == corpus and not read

    file = tmp_path / "text/0007.txt"
    file.write_text(stories[7].replace("End", "Fin"))  # of the same length
    changed = prepare_corpus(config, tokenizer_dir)
    assert changed != corpus and read
    file.write_text(stories[7])
    assert prepare_corpus(config, tokenizer_dir) == corpus

    read.clear()
    shutil.rmtree(corpus.folder)
    assert prepare_corpus(config, tokenizer_dir) == corpus and read
    read.clear()
    assert prepare_corpus(dataclasses.replace(config, text_field="body"), tokenizer_dir) == corpus and read


def test_an_interrupted_run_leaves_nothing_behind(config, tokenizer_dir, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens._Files, "add", interrupt)
        prepare_corpus(config, tokenizer_dir)
    assert list((tmp_path / "cache").iterdir()) == []
    assert prepare_corpus(config, tokenizer_dir).train[0].num_documents == 32


def test_a_process_that_comes_second_takes_the_corpus_of_the_first(config, tokenizer_dir, tmp_path, monkeypatch):
    encode, inodes = tokens.encode, []

    def encode_after_another_process(*args):
        monkeypatch.setattr(tokens, "encode", encode)
        inodes.append(prepare_corpus(config, tokenizer_dir).folder.stat().st_ino)
        return encode(*args)

    monkeypatch.setattr(tokens, "encode", encode_after_another_process)
    assert prepare_corpus(config, tokenizer_dir).train[0].num_documents == 32
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]  # one, and a link to it
    assert {path.stat().st_ino for path in folders} == set(inodes)


TOKEN_FILES = ["train.bin", "train.idx", "heldout.bin", "heldout.idx"]


@pytest.mark.parametrize(
    "name, damage",
    [
        *itertools.product(["manifest.json", *TOKEN_FILES], ["missing", "empty", "cut"]),
        *itertools.product(TOKEN_FILES, ["flipped"]),
    ],
)
def test_a_damaged_folder_is_named_and_made_again(config, tokenizer_dir, caplog, name, damage):
    corpus = prepare_corpus(config, tokenizer_dir)
    whole = {file.name: file.read_bytes() for file in corpus.folder.iterdir()}
    if damage == "missing":
        (corpus.folder / name).unlink()
    else:
        half = len(whole[name]) // 2
        rest = bytes([whole[name][half] ^ 1]) + whole[name][half + 1 :]
        damaged = {"empty": b"", "cut": whole[name][:half], "flipped": whole[name][:half] + rest}
        (corpus.folder / name).write_bytes(damaged[damage])
    assert prepare_corpus(config, tokenizer_dir) == corpus
    assert {file.name: file.read_bytes() for file in corpus.folder.iterdir()} == whole
    assert f"{corpus.folder} is not a whole corpus" in caplog.text and name.removesuffix(".bin") in caplog.text
    assert not list(corpus.folder.parent.glob(".*"))


def test_a_folder_that_cannot_be_made_again_is_named(config, tokenizer_dir, monkeypatch):
    corpus = prepare_corpus(config, tokenizer_dir)
    (corpus.folder / "heldout.idx").unlink()

    def refuse(self, target):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with pytest.raises(DataError, match=r"is not a whole corpus, .*heldout\.idx.*: delete it"):
        prepare_corpus(config, tokenizer_dir)


def test_half_a_sample_order_is_made_again(config, tokenizer_dir, caplog):
    config = dataclasses.replace(config, sequence_length=16)
    with parallel_context(ParallelConfig()):
        before = training_samples(prepare_corpus(config, tokenizer_dir), config, 20)[7]["tokens"].tolist()
        corpus = prepare_corpus(config, tokenizer_dir)
        files = sorted((corpus.folder / "index").glob("*.npy"))
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[:-8])
            samples = training_samples(prepare_corpus(config, tokenizer_dir), config, 20)
            assert samples[7]["tokens"].tolist() == before
            assert f"{file} is damaged" in caplog.text


def test_the_same_tokenizer_in_another_file_is_the_same(config, tokenizer_dir, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(tokenizer_dir, again)
    content = json.loads((again / "tokenizer.json").read_text())
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content["truncation"] = None
    (again / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer_dir)
    assert prepare_corpus(config, again) == prepare_corpus(config, tokenizer_dir)


def prefix_space(content, settings):
    content["pre_tokenizer"]["add_prefix_space"] = True


def lower_case(content, settings):
    content["normalizer"] = {"type": "Lowercase"}


def another_token(content, settings):
    flags = dict.fromkeys(["special", "lstrip", "rstrip", "normalized", "single_word"], False)
    settings["added_tokens_decoder"] = {"300": {"content": "story", **flags}}


def split_special(content, settings):
    settings["split_special_tokens"] = True


@pytest.mark.parametrize("change", [prefix_space, lower_case, another_token, split_special])
def test_whatever_changes_tokens_changes_the_fingerprint(config, tokenizer_dir, tmp_path, change):
    """In whichever file it stands."""
    other = tmp_path / "other"
    shutil.copytree(tokenizer_dir, other)
    files = [other / "tokenizer.json", other / "tokenizer_config.json"]
    content, settings = (json.loads(file.read_text()) for file in files)
    change(content, settings)
    for file, values in zip(files, (content, settings)):
        file.write_text(json.dumps(values))
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer_dir)
    assert prepare_corpus(config, other).fingerprint != prepare_corpus(config, tokenizer_dir).fingerprint


def test_tokenizer_problems(config, make_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"missing/tokenizer\.json does not exist: put the tokenizer there"):
        prepare_corpus(config, tmp_path / "missing")
    with pytest.raises(DataError, match="no end-of-sequence token"):
        prepare_corpus(config, make_tokenizer(eos_token=None))


@pytest.mark.parametrize(
    "texts, message", [([], "has no text"), ([" ", "\n"], "has no text"), (["one"] * 5, "is one document")]
)
def test_too_few_documents(tmp_path, write_documents, tokenizer_dir, texts, message):
    config = DataConfig([str(write_documents(texts))], str(tmp_path / "cache"))
    with pytest.raises(DataError, match=message):
        prepare_corpus(config, tokenizer_dir)


def test_each_side_fills_a_sequence_of_its_own(config, tokenizer_dir):
    corpus = prepare_corpus(config, tokenizer_dir)
    heldout, train = corpus.num_heldout_tokens, corpus.num_train_tokens
    assert len(heldout_samples(corpus, dataclasses.replace(config, sequence_length=heldout - 1))) == 1
    with pytest.raises(DataError, match=f"{heldout} held-out tokens, .* needs {heldout + 1}"):
        heldout_samples(corpus, dataclasses.replace(config, sequence_length=heldout))
    with parallel_context(ParallelConfig()):  # which takes no held-out tokens
        assert training_samples(corpus, dataclasses.replace(config, sequence_length=heldout), 1)
    with pytest.raises(DataError, match=f"{train} training tokens, .* needs {train + 1}"):
        training_samples(corpus, dataclasses.replace(config, sequence_length=train), 1)
