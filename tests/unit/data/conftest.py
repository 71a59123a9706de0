import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
    """Saves a small byte-level tokenizer and returns its folder.

    It would add a beginning-of-sequence token by itself and asks for truncation to 16 tokens, so that a
    corpus which has either shows it.
    """

    def make(vocab_size=300, eos_token="<eos>"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(["the document number of the story is a number"] * 3, trainer)
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
        backend.decoder = decoders.ByteLevel()
        backend.enable_truncation(16)
        folder = tmp_path_factory.mktemp("tokenizer")
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<bos>", eos_token=eos_token, model_max_length=16
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def write_documents(tmp_path):
    """Writes one text file per document and returns the folder."""

    def write(texts, name="text"):
        folder = tmp_path / name
        folder.mkdir()
        for number, text in enumerate(texts):
            (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
        return folder

    return write


@pytest.fixture
def stories():
    """Forty documents of different lengths; document N alone has the word `<N>`."""
    return [f"The story <{n}> " + "is a number of the document. " * (n % 7 + 1) + f"End <{n}>" for n in range(40)]
