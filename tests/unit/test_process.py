"""What is set for the whole process."""

import gc
import subprocess
import sys

import torch

from minitron_megatron.process import import_heavy

# What a verb loads, and whether everything is as before.
LOADED = """
import gc, sys
from minitron_megatron.config.verbs import verb_function
verb_function("distill")
import torch
print([name for name in ("torch._inductor.compile_fx", "transformers") if name in sys.modules])
print(gc.isenabled(), torch.compile.__module__, torch.compile.__name__)
"""


def test_a_verb_loads_neither_the_compiler_nor_transformers_and_leaves_all_as_it_was():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True torch compile"]


def test_what_is_not_megatrons_is_compiled(tmp_path, monkeypatch):
    (tmp_path / "own_kernels.py").write_text("import torch\n\n@torch.compile\ndef double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert hasattr(import_heavy("own_kernels").double, "_torchdynamo_orig_callable")
    assert torch.compile.__module__ == "torch"


def test_what_a_process_makes_later_is_not_kept_for_ever():
    import_heavy("minitron_megatron.errors")
    before = gc.get_freeze_count()
    kept = [[] for _ in range(1000)]
    import_heavy("minitron_megatron.errors")
    assert gc.get_freeze_count() <= before and len(kept) == 1000  # fewer if something frozen is gone
