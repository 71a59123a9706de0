"""Scores and continuations of a Megatron model, against transformers' and one by one."""

import pytest
import torch

from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.evaluation.sampling import SamplingParams
from tests.tiny import LLAMA, NEMOTRON, hf_model, import_hf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {"llama": LLAMA, "partial": NEMOTRON, "llama3": {**LLAMA, "rope_parameters": LLAMA3_ROPE}}
END = 100
LENGTHS = (9, 3, 17, 1, 12, 3, 8)


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 100, (length,), generator=generator).tolist() for length in LENGTHS]


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens):
        return "".join(chr(33 + token) for token in tokens)


def open_inference(checkpoint, ctx, batch=3):
    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.evaluation.inference import Inference
    from minitron_megatron.model.build import build_model

    checkpoint = Checkpoint(checkpoint)
    model_chunks = build_model(checkpoint.network, ctx, DType.FP32)
    load_weights(model_chunks, checkpoint, ctx)
    return Inference(model_chunks, ctx, checkpoint.network, Letters(), [END], batch)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A Megatron model and the transformers model that it was imported from."""
    from minitron_megatron.parallel.context import parallel_context

    model = hf_model(**MODELS[request.param])
    checkpoint = import_hf(tmp_path_factory.mktemp(request.param), model)
    with parallel_context(ParallelConfig()) as ctx:
        yield open_inference(checkpoint, ctx), model


def expected_scores(model, items):
    found = []
    for tokens, count in items:
        with torch.no_grad():
            log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[-count - 1 : -1]
        ends = torch.tensor(tokens[-count:])
        total = log_probs.gather(1, ends[:, None]).sum()
        found.append((float(total), bool((log_probs.argmax(-1) == ends).all())))
    return found


def expected_continuations(model, prompts, **settings):
    return [
        model.generate(
            torch.tensor([p]), attention_mask=torch.ones(1, len(p)), eos_token_id=END, pad_token_id=0, **settings
        )[0, len(p) :].tolist()
        for p in prompts
    ]


def scored(model):
    """Sequences with ends to score, the likeliest ones for some."""
    items = [(tokens, 1 + len(tokens) // 3) for tokens in sequences() if len(tokens) > 1]
    likeliest = expected_continuations(model, [[5, 6, 7]], do_sample=False, max_new_tokens=4)[0]
    return [*items, ([5, 6, 7, *likeliest], len(likeliest))]


def test_scores_are_those_of_transformers_one_by_one(pair):
    ours, model = pair
    items = scored(model)
    found, expected = ours.score(items), expected_scores(model, items)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)
    assert [best for _, best in found] == [best for _, best in expected]
    assert found[-1][1] and not all(best for _, best in found)


@pytest.fixture
def dirty_memory():
    """Memory that nobody has written to is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def test_greedy_continuations_are_those_of_transformers_one_by_one(pair, dirty_memory):
    ours, model = pair
    found = ours.generate(sequences(), SamplingParams(max_new_tokens=25))
    assert found == expected_continuations(model, sequences(), do_sample=False, max_new_tokens=25)


def test_a_batch_gives_what_each_sequence_gives_by_itself(pair):
    ours, model = pair
    items, params = scored(model), SamplingParams(max_new_tokens=10)
    together = ours.score(items), ours.generate(sequences(), params)
    alone = [ours.score([item])[0] for item in items], [ours.generate([p], params)[0] for p in sequences()]
    assert [total for total, _ in together[0]] == pytest.approx([total for total, _ in alone[0]], rel=1e-5)
    assert together[1] == alone[1]


def test_sequences_that_differ_in_their_last_token_are_one_to_the_model(pair, monkeypatch):
    from minitron_megatron.evaluation import inference

    ours, model = pair
    sizes = []
    run = inference.run_forward
    monkeypatch.setattr(
        inference, "run_forward", lambda *a, **k: (sizes.append(len(a[1][0]["tokens"])), run(*a, **k))[1]
    )
    items = [([5, 6, 7, last], 1) for last in (1, 2, 3)] + [([5, 6, 7, 3], 3), ([9, 8], 1)]
    found = ours.score(items)
    assert sizes == [2]
    assert [total for total, _ in found] == pytest.approx(
        [total for total, _ in expected_scores(model, items)], rel=1e-5
    )


def test_cached_hidden_states_are_those_of_the_whole_sequence(pair):
    from minitron_megatron.model.kv_cache import key_value_cache
    from minitron_megatron.parallel.schedule import forward_hidden

    ours, _ = pair
    [chunk] = ours.model_chunks
    whole = torch.tensor([sequences(seed)[2] for seed in (1, 2)])
    positions = torch.arange(whole.size(1)).expand(2, -1)
    chunk.eval()
    with torch.no_grad():
        expected = forward_hidden(chunk, {"tokens": whole, "position_ids": positions})
        lengths = torch.tensor([4, 9])
        with key_value_cache([chunk], ours.network, 2, whole.size(1)) as cursor:
            forward_hidden(chunk, {"tokens": whole[:, :9], "position_ids": positions[:, :9]})
            for _ in range(8):
                cursor.move_to(lengths)
                tokens = whole.gather(1, lengths[:, None])
                found = forward_hidden(chunk, {"tokens": tokens, "position_ids": lengths[:, None]})
                torch.testing.assert_close(found[0], expected[lengths, torch.arange(2)])
                lengths = lengths + 1
        # Nothing of it stays behind.
        torch.testing.assert_close(forward_hidden(chunk, {"tokens": whole, "position_ids": positions}), expected)


def test_a_sequence_ends_with_an_end_token_and_no_sooner_than_asked(pair):
    ours, model = pair
    [free] = ours.generate([[5, 6, 7]], SamplingParams(max_new_tokens=12))
    end = free[4]
    before, ours.end_tokens = ours.end_tokens, [end]
    try:
        first = free.index(end)
        assert ours.generate([[5, 6, 7]], SamplingParams(max_new_tokens=12)) == [free[: first + 1]]
        [longer] = ours.generate([[5, 6, 7]], SamplingParams(max_new_tokens=12, min_new_tokens=12))
    finally:
        ours.end_tokens = before
    assert len(longer) == 12 and end not in longer
    settings = dict(do_sample=False, min_new_tokens=12, max_new_tokens=12)
    expected = model.generate(torch.tensor([[5, 6, 7]]), eos_token_id=end, pad_token_id=0, **settings)
    assert longer == expected[0, 3:].tolist()
