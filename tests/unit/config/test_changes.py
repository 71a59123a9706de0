"""Which settings a result depends on. The names are spelled out, so that a field that is marked by mistake shows."""

import pytest

from minitron_megatron.config.changes import content, differences, flat
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.schema import SCHEMAS

OF_TEXT = {"data.cache_dir", "data.workers"}
CHANGES_NO_RESULT = {
    "import": {"output", "workers", "plugins"},
    "score": {"output", "micro_batch", "save_rounds", "save_every", "depth.choices", "plugins", *OF_TEXT},
    "prune": {"output", "workers", "dry_run", "plugins"},
    "distill": {
        *("output", "micro_batch", "recompute", "save_every", "validate_every", "validate_batches"),
        *("keep_checkpoints", "max_skipped_steps", "loss.chunk_tokens", "optimizer.overlap", "plugins"),
        *OF_TEXT,
    },
    "evaluate": {"output", "micro_batch", "plugins", *OF_TEXT},
    "export": {"output", "workers", "plugins"},
}
SECTIONS = ("parallel.", "tracking.")
"""Whole sections that change none."""


@pytest.mark.parametrize("verb", CHANGES_NO_RESULT)
def test_what_a_result_depends_on(verb):
    settings = to_plain(SCHEMAS[verb]())
    ignored = flat(settings).keys() - content(SCHEMAS[verb], settings).keys()
    assert {name for name in ignored if not name.startswith(SECTIONS)} == CHANGES_NO_RESULT[verb]
    assert ignored - CHANGES_NO_RESULT[verb] == {name for name in flat(settings) if name.startswith(SECTIONS)}


def test_a_setting_that_only_begins_like_one_that_changes_nothing_counts():
    settings = {"output": "o", "outputs": 1, "parallel": {"tensor": 2}, "data": {"workers": 3, "worker": 4}}
    assert content(SCHEMAS["score"], settings) == {"outputs": 1, "data.worker": 4}
    assert content(None, settings) == flat(settings)


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ({"a": 1}, {"a": 1, "new": 0, "x": False, "y": None, "z": ""}, []),
        ({"a": 1, "gone": []}, {"a": 1}, []),
        ({"a": 0}, {"a": None}, [("a", 0, None)]),
        ({"a": 1}, {"a": 1, "new": 0.5}, [("new", None, 0.5)]),
        ({"a": 1, "gone": ["b"]}, {"a": 2}, [("a", 1, 2), ("gone", ["b"], None)]),
    ],
)
def test_a_setting_that_one_side_has_not_counts_while_it_is_on(before, after, expected):
    assert differences(before, after) == expected
