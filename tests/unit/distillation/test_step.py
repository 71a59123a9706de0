import torch

from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.distillation import step
from minitron_megatron.distillation.step import TeacherStudent
from minitron_megatron.parallel.groups import process_groups


def test_the_teachers_time_is_that_of_its_kernels(monkeypatch):
    """They run on after the calls that start them have returned."""
    model = torch.nn.Identity()
    model.vocab_size = 10
    with process_groups(ParallelConfig()) as groups:
        happened = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("waited"))
        monkeypatch.setattr(step, "run_forward", lambda *arguments, **options: happened.append("ran") or ["states"])
        pair = TeacherStudent([model], [model], groups, LossConfig(), 10)
        assert pair._run_teacher([], training=True)[0] == ["states"]
        assert happened == ["waited", "ran", "waited"]
        assert TeacherStudent([model], None, groups, LossConfig(0.0, 1.0), 10)._run_teacher([], True) == ([], 0.0, None)
