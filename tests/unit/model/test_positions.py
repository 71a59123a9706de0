"""Sequences longer than a network has positions are said, with the way out."""

from minitron_megatron.model.positions import warn_of_positions


def test_sequences_that_are_too_long_are_said(caplog):
    warn_of_positions(64, 64, "the student")
    warn_of_positions(None, 65, "the student")
    assert not caplog.text
    warn_of_positions(64, 65, "the student")
    assert "data.sequence_length = 65 is longer than the 64 positions of the student" in caplog.text
    assert "max_position_embeddings" in caplog.text
