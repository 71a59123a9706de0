"""Whatever a file holds: one of our errors or what was written, within seconds and in bounded memory; nothing in it is
run. Weights in safetensors and values in JSON have no checksum, so that a changed one may be read.
"""

import subprocess
import sys
from collections import Counter, defaultdict
from importlib.util import find_spec

import pytest

# Kind of result, and the least part of its cases that has to be refused.
KINDS = {"huggingface": 0.7, "checkpoint": 0.6, "scores": 0.8, "tokens": 0.4, "gguf": 0.5}
LEAST_CASES = 2000


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of every case, by kind; in a process of its own, which may crash."""
    folder = tmp_path_factory.mktemp("damaged")
    kinds = [kind for kind in KINDS if _is_there(kind)]
    for kind in kinds:
        (folder / kind).mkdir()
    command = [sys.executable, "-m", "tests.damaged", str(folder), *kinds]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
    found = defaultdict(dict)
    for line in process.stdout.splitlines():
        kind, name, outcome = line.split("\t")
        found[kind][name] = outcome or f"ended the process: {process.returncode}"
    assert process.returncode == 0, (process.stdout.splitlines()[-1:], process.stderr[-3000:])
    return found


def _is_there(kind):
    needed = {"gguf": "gguf", "tokens": "minitron_megatron.data.indexed"}
    return kind not in needed or find_spec(needed[kind]) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_refused_or_read_as_it_was_written(kind, outcomes):
    if not _is_there(kind):
        pytest.skip("what reads these files is not installed")
    wrong = {name: outcome for name, outcome in outcomes[kind].items() if outcome not in ("refused", "read")}
    assert not wrong, f"{len(wrong)} of {len(outcomes[kind])} cases: {dict(list(wrong.items())[:10])}"
    assert all(outcome == "read" for name, outcome in outcomes[kind].items() if name.endswith(", undamaged"))
    count = Counter(outcomes[kind].values())
    assert count["refused"] >= KINDS[kind] * count.total(), count


def test_there_are_thousands_of_cases(outcomes):
    assert sum(map(len, outcomes.values())) >= LEAST_CASES
