"""Exports give the tokens of their sources, and what a source's small files lack is known at import."""

import json
import logging

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.convert import export, import_checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.hf_assets import copy_hf_assets
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.schema import ExportConfig, ImportConfig
from minitron_megatron.data.encoding import load_tokenizer
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.families import network_from_config
from tests.tiny import FAMILIES, LLAMA, hf_model, save_hf

CORPUS = ["it's 1234567890 words,  and the naïve Zürich don't\n\nthe end 3.14 there", "the then there 日本語 the"] * 9
NASTY = (
    "  two leading<s>special</s> in</s>the middle 1234567 3.14\n\n\n\ttabs it's WE'LL don’t naïve e\u0301 日本語 "
    "한국어 עברית हिन्दी ไทย 🙂👩‍👩‍👧\u200b\u00a0<b>&amp;</b> trailing  "
)
VOCAB = 340


def byte_level(**options):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def with_spaces_replaced():
    """As the converters of sentencepiece's slow tokenizers make it, with their rule for the first space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rules = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(rules)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return trained(tokenizer, first=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])


def trained(tokenizer, first=("<unk>", "<s>", "</s>"), **options):
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=list(first), show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "spaces replaced": with_spaces_replaced}
CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", None]


def write_tokenizer(folder, kind, name):
    TOKENIZERS[kind]().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    settings |= {"tokenizer_class": name} if name else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "family, width", [*((family, 48) for family in FAMILIES), ("llama", 46), ("qwen2", 46)], ids=str
)
def test_an_export_gives_the_tokens_of_its_source(tmp_path, family, width, kind, name):
    source = tmp_path / "hf"
    source.mkdir()
    config = {**FAMILIES[family], "vocab_size": VOCAB}
    (source / "config.json").write_text(json.dumps(config))
    write_tokenizer(source, kind, name)
    copy_hf_assets(source, tmp_path / "assets")
    network = network_from_config(config).replace(hidden_size=width)
    weights = RandomWeights(network, seed=0)
    write_checkpoint(tmp_path / "c", weights, torch.float32, Manifest("checkpoint"), tmp_path / "assets")
    target = export(ExportConfig(str(tmp_path / "c"), str(tmp_path / "out")))
    before, after = load_tokenizer(source), load_tokenizer(target)
    for text in (NASTY, NASTY[::-1], "", " ", "</s>"):
        for add in (False, True):
            expected = before(text, add_special_tokens=add)["input_ids"]
            assert after(text, add_special_tokens=add)["input_ids"] == expected
            assert after.decode(expected) == before.decode(expected)
    assert (after.eos_token_id, after.bos_token_id) == (before.eos_token_id, before.bos_token_id)


@pytest.fixture
def folder(tmp_path):
    return save_hf(tmp_path / "hf", hf_model(**LLAMA))


def change(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def more_tokens(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def code_of_its_own(folder):
    change(
        folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.Own", None]}
    )
    (folder / "own.py").write_text("raise RuntimeError")


@pytest.mark.parametrize(
    "damage, said",
    [
        (more_tokens, "token '<more>' has id 101, so that it has 102 tokens, and the network vocab_size = 101"),
        (
            lambda f: change(f, "tokenizer_config.json", pad_token="<pad>"),
            "pad_token = '<pad>' is none of the 101 tokens of the tokenizer",
        ),
        (
            lambda f: change(f, "tokenizer_config.json", eos_token=None),
            "no end-of-sequence token: name one as eos_token",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "the model has no fast tokenizer: put tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer cannot be loaded: put tokenizer.json"),
        (code_of_its_own, "tokenizer is a class with code of its own, which is not run"),
        (lambda f: change(f, "config.json", eos_token_id=[2, 101]), "eos_token_id = [2, 101] is not in the vocabulary"),
        (lambda f: (f / "README.md").write_text("---\n[\n---\n"), "README.md cannot be read"),
    ],
    ids=range(8),
)
def test_what_later_verbs_need_is_known_at_import(folder, tmp_path, damage, said):
    damage(folder)
    with pytest.raises(CheckpointError) as raised:
        import_checkpoint(ImportConfig(str(folder), str(tmp_path / "c")))
    assert said in str(raised.value)
    assert not (tmp_path / "c").exists()


def test_a_card_in_another_encoding_travels(folder, tmp_path):
    (folder / "README.md").write_bytes("---\nlicense: mit\n---\nZürich".encode("latin-1"))
    import_checkpoint(ImportConfig(str(folder), str(tmp_path / "c")))
    target = export(ExportConfig(str(tmp_path / "c"), str(tmp_path / "out")))
    assert "license: mit" in (target / "README.md").read_text()


def test_a_pre_tokenizer_of_gguf_that_is_not_known_is_said(tmp_path, caplog):
    from minitron_megatron.checkpoint.gguf_keys import check_keys

    known = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}
    with caplog.at_level(logging.WARNING):
        check_keys(tmp_path / "a.gguf", known, "llama")
        assert not caplog.text
        check_keys(tmp_path / "a.gguf", known | {"tokenizer.ggml.pre": "unheard-of"}, "llama")
    assert "tokenizer.ggml.pre = 'unheard-of' is not known" in caplog.text
