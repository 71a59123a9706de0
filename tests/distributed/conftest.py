"""Tiny checkpoints and texts to distil with, and a run that is interrupted."""

from contextlib import contextmanager

import pytest

from minitron_megatron.training import saver
from tests.tiny import LLAMA, hf_model, import_hf, literate


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    import_hf(folder, literate(hf_model(**LLAMA)))
    import_hf(folder / "narrow", hf_model(seed=1, **{**LLAMA, "hidden_size": 36, "num_hidden_layers": 2}))
    import_hf(folder / "deep", hf_model(seed=1, **{**LLAMA, "hidden_size": 36}))
    import_hf(folder / "tied", hf_model(seed=1, **{**LLAMA, "hidden_size": 36, "tie_word_embeddings": True}))
    for number in range(20):
        (folder / f"{number}.txt").write_text("abcdefgh"[number % 8] * (50 + number))
    return folder


@pytest.fixture
def stop_after_saving(monkeypatch):
    """A run that is interrupted after its first checkpoint."""

    @contextmanager
    def stopping():
        save = saver.save_state

        def save_and_stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(saver, "save_state", save_and_stop)
            yield

    return stopping
