import pytest
import torch

from minitron_megatron.evaluation.sampling import Sampler, SamplingParams, StopCriteria

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -3.0])


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def shares(params, number=0):
    """How often each token is drawn."""
    draws = Sampler(params, [], number, torch.device("cpu"))(LOGITS.expand(20000, -1).clone(), 0)
    return draws.bincount(minlength=5) / len(draws)


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.75}, [0, 1]),  # 0.58 and 0.21
        ({"min_p": 0.2}, [0, 1, 2]),  # of the likeliest: 0.37, 0.22, 0.14
        ({"temperature": 0.5, "top_k": 3}, [0, 1, 2]),
    ],
)
def test_tokens_are_drawn_from_what_is_left_as_often_as_they_are_likely(settings, kept):
    expected = torch.zeros(5)
    expected[kept] = (LOGITS[kept] / settings.get("temperature", 1.0)).softmax(0)
    torch.testing.assert_close(shares(SamplingParams(1, sample=True, **settings)), expected, atol=0.015, rtol=0)


def test_draws_repeat_and_differ_between_batches():
    params = SamplingParams(1, sample=True)
    assert torch.equal(shares(params), shares(params))
    assert not torch.equal(shares(params), shares(params, number=1))


def test_without_drawing_it_is_the_likeliest_that_may_be():
    choose = Sampler(SamplingParams(5, min_new_tokens=2), [0], 0, torch.device("cpu"))
    assert [choose(LOGITS[None].clone(), made).item() for made in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "text, end", [("no end", None), ("end\n\nmore", 5), ("a Q: b", 4), ("stop \u00e4", 7), ("x" * 30, 20)]
)
def test_a_text_ends_where_the_first_stop_text_is_complete(text, end):
    ends = StopCriteria(SamplingParams(20, stop=["\n\n", "Q:", "\u00e4", ""]), [0], Bytes())
    tokens = list(text.encode())
    lengths = [n for n in range(1, len(tokens) + 1) if ends(tokens[:n])]
    assert (lengths[0] if lengths else None) == end


def test_an_end_token_ends():
    assert StopCriteria(SamplingParams(20), [7, 8], Bytes())([1, 8]) and not StopCriteria(
        SamplingParams(20), [7], Bytes()
    )([7, 8])
