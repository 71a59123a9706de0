import pytest


@pytest.fixture(scope="session")
def metric_lines():
    """Lines of a run that minimises the divergence alone: total and kd_logits are equal."""

    def make(num_steps=6, start=4.0):
        lines = []
        for step in range(1, num_steps + 1):
            kd = start / step
            line = {"progress/step": step, "progress/tokens": 1000 * step, "optim/lr": 1e-3 / step}
            line |= {"loss/total": kd, "loss/lm": kd + 2, "loss/kd_logits": kd}
            if step % 3 == 0:
                line |= {"val/total": kd + 0.1, "val/lm": kd + 2.1, "val/kd_logits": kd + 0.1}
            lines.append(line)
        return lines

    return make
