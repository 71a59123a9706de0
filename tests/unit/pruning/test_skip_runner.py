"""What leaving out layers does, against a transformers model from which they are removed."""

import itertools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minitron_megatron.config.schema import Criterion, DepthCriterion, DepthSearch, ParallelConfig, TargetConfig, Unit
from minitron_megatron.data.choices import ChoiceSamples, Question
from minitron_megatron.errors import ConfigError
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.score_model import score_model
from tests.tiny import FAMILIES, hf_model, save_hf
from tests.unit.pruning.direct import build_ours, direct_effects, run_without, samples_for, score_config

LAYERS = 4
ON_TEXT = [c for c in DepthCriterion if c is not DepthCriterion.ACCURACY]


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request):
    return hf_model(**FAMILIES[request.param])


@pytest.fixture(scope="module")
def ctx():
    with parallel_context(ParallelConfig()) as ctx:
        yield ctx


@pytest.fixture(scope="module")
def ours(theirs, ctx):
    return build_ours(theirs, ctx)


@pytest.fixture(scope="module")
def samples(theirs):
    return samples_for(theirs)


@pytest.fixture
def score(ours, ctx, samples):
    """Scores by depth; of width nothing is asked, which needs no look at activations."""

    def score(target=None, choices=None, **settings):
        model_chunks, network = ours
        config = score_config(**{"criteria": ON_TEXT, "criterion": Criterion.WEIGHT, **settings})
        config.target = TargetConfig(**target or {})
        return score_model(model_chunks, network, ctx, samples, config, choices)

    return score


def positions(unit, number, length=1):
    """Of the sublayers of a unit, or of a block of them."""
    return tuple(range(2 * number, 2 * (number + length))) if unit is Unit.LAYER else (number,)


def assert_close(scores, expected):
    """`expected` has the effects of each unit, None where nothing is left out."""
    assert list(scores.depth) == [criterion.value for criterion in ON_TEXT]
    for name, found in scores.depth.items():
        of_units = torch.tensor([torch.nan if e is None else e[name] for e in expected], dtype=torch.float64)
        assert of_units.nan_to_num(0).abs().max() > 1e-3
        torch.testing.assert_close(found, of_units, rtol=2e-4, atol=2e-5, equal_nan=True, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("unit", Unit)
def test_leaving_out_each_unit_by_itself(theirs, samples, score, unit):
    found = score(unit=unit)
    units = LAYERS if unit is Unit.LAYER else 2 * LAYERS
    assert_close(found, [direct_effects(theirs, samples, (), positions(unit, n)) for n in range(units)])


@pytest.mark.parametrize("length, protect", [(2, (1, 0)), (3, (0, 0))])
def test_leaving_out_each_block(theirs, samples, score, length, protect):
    found = score(
        {"layers": LAYERS - length},
        search=DepthSearch.BLOCK,
        **dict(zip(("protect_first", "protect_last"), protect, strict=True)),
    )
    starts = range(protect[0], LAYERS - length - protect[1] + 1)
    assert_close(
        found,
        [
            direct_effects(theirs, samples, (), positions(Unit.LAYER, n, length)) if n in starts else None
            for n in range(LAYERS)
        ],
    )
    best = int(np.nanargmin(found.depth["block_influence"]))
    kept = make_plan(found, TargetConfig(layers=LAYERS - length)).sublayers
    assert kept == [p for p in range(2 * LAYERS) if p not in positions(Unit.LAYER, best, length)]


def greedy(theirs, samples, unit, criterion, free, surplus):
    """Every way to take the next unit, each time the one that is missed least: the order and the last effects."""
    base, order, effects = (), [], {}
    while any(surplus.values()):
        allowed = [n for n in free if n not in order and surplus[n % 2 if unit is Unit.SUBLAYER else 0] > 0]
        for number in allowed:
            path = tuple(sorted({*base, *positions(unit, number)}))
            effects[number] = direct_effects(theirs, samples, base, path)
        gone = min(allowed, key=lambda number: effects[number][criterion.value])
        order.append(gone)
        surplus[gone % 2 if unit is Unit.SUBLAYER else 0] -= 1
        base = tuple(sorted({*base, *positions(unit, gone)}))
    return order, effects


@pytest.mark.parametrize(
    "criterion, unit, target, protect",
    [
        *((criterion, Unit.LAYER, {"layers": 1}, 0) for criterion in ON_TEXT),
        (DepthCriterion.LOSS, Unit.LAYER, {"layers": 2}, 1),
        (DepthCriterion.BLOCK_INFLUENCE, Unit.SUBLAYER, {"attention": 2, "mlp": 3}, 0),
        (DepthCriterion.KL, Unit.SUBLAYER, {"attention": 1, "mlp": 4}, 0),
    ],
)
def test_a_greedy_search_is_brute_force(theirs, samples, score, criterion, unit, target, protect):
    criteria = [criterion, *(c for c in ON_TEXT if c is not criterion)]
    found = score(
        target, unit=unit, search=DepthSearch.GREEDY, criteria=criteria, protect_first=protect, protect_last=protect
    )
    units = LAYERS if unit is Unit.LAYER else 2 * LAYERS
    free = range(protect, units - protect)
    if unit is Unit.LAYER:
        surplus = {0: LAYERS - target["layers"]}
    else:
        surplus = {0: LAYERS - target["attention"], 1: LAYERS - target["mlp"]}
    drop = sum(surplus.values())
    order, effects = greedy(theirs, samples, unit, criterion, free, surplus)

    rounds = found.rounds["depth"]
    assert [int(rounds[number]) for number in order] == list(range(1, drop + 1))
    assert (rounds == drop + 1).sum() == units - drop
    kept = make_plan(found, TargetConfig(**target), depth_criterion=criterion).sublayers
    found.depth = {criterion.value: found.depth[criterion.value] for criterion in ON_TEXT}
    assert_close(found, [effects.get(number) for number in range(units)])
    gone = {p for number in order for p in positions(unit, number)}
    assert kept == [p for p in range(2 * LAYERS) if p not in gone]


QUESTIONS = [
    Question("abc", ["d", "efgh", "ij"], 1),
    Question("x", ["yz", "ab"], 0),
    Question("hello", ["w", "o"], 1),
    Question("1234567", ["89", "987", "0"], 2),
    Question("qrs", ["tu", "uv"], 0),
    Question("zz", ["top", "a"], 1),
    Question("Q", ["A", "B", "C", "D"], 3),
]


def direct_right(theirs, tokenizer, question, drops):
    """Whether the right choice is the likeliest, a choice at a time and without padding."""
    context = tokenizer(question.context)["input_ids"]
    likelihoods = []
    for choice in question.choices:
        tokens = torch.tensor([context + tokenizer(choice)["input_ids"]])
        logits, _ = run_without(theirs, tokens, drops)
        log_p = logits[0].log_softmax(-1)
        likelihoods.append(sum(float(log_p[i - 1, tokens[0, i]]) for i in range(len(context), tokens.size(1))))
    return int(np.argmax(likelihoods)) == question.answer


def test_accuracy_is_that_of_a_loop_over_choices(theirs, score, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_hf(tmp_path, theirs))
    found = score(choices=ChoiceSamples(QUESTIONS, tokenizer, 1), criteria=[*ON_TEXT, DepthCriterion.ACCURACY])

    def accuracy(drops):
        return np.mean([direct_right(theirs, tokenizer, question, drops) for question in QUESTIONS])

    expected = [accuracy(()) - accuracy(positions(Unit.LAYER, n)) for n in range(LAYERS)]
    assert len(set(expected)) > 1  # or it would say little
    np.testing.assert_allclose(found.depth["accuracy"], expected, atol=1e-12)


def test_a_space_behind_the_context_belongs_to_the_choice(tmp_path):
    """Byte-level tokenizers join it to the word that follows, so that the context alone has a token more."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(
        models.BPE({token: n for n, token in enumerate([*letters, "Ġy", "Ġn"])}, [("Ġ", "y"), ("Ġ", "n")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    behind, before = (
        ChoiceSamples([Question(f"is it?{a}", [f"{b}y", f"{b}no"], 0)], tokenizer, 1) for a, b in ((" ", ""), ("", " "))
    )
    assert behind.rows == before.rows
    assert [len(tokens) - context for tokens, context in before.rows] == [1, 2]


def test_questions_alone_decide_about_accuracy(theirs, score, layer_calls, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_hf(tmp_path, theirs))
    score(choices=ChoiceSamples(QUESTIONS, tokenizer, 1), criteria=[DepthCriterion.ACCURACY])
    num_batches = -(-sum(len(question.choices) for question in QUESTIONS) // 2)
    assert len(layer_calls) == num_batches * (LAYERS + LAYERS * (LAYERS - 1) // 2)


def test_a_greedy_search_may_be_decided_by_accuracy(theirs, score, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_hf(tmp_path, theirs))
    found = score(
        {"layers": 2},
        ChoiceSamples(QUESTIONS, tokenizer, 1),
        criteria=[DepthCriterion.ACCURACY],
        search=DepthSearch.GREEDY,
        protect_first=0,
        protect_last=0,
    )

    def right(layers):
        drops = [p for layer in layers for p in positions(Unit.LAYER, layer)]
        return sum(direct_right(theirs, tokenizer, question, drops) for question in QUESTIONS)

    first = max(range(LAYERS), key=lambda layer: (right([layer]), layer))  # of equal ones the last
    others = (layer for layer in range(LAYERS) if layer != first)
    second = max(others, key=lambda layer: (right([first, layer]), layer))
    assert found.rounds["depth"].tolist() == [{first: 1, second: 2}.get(layer, 3) for layer in range(LAYERS)]


@pytest.fixture
def layer_calls(ours):
    """How often layers of our model ran, over all micro-batches."""
    [model], _ = ours
    calls = []
    hooks = [
        layer.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, layer in enumerate(model.decoder.layers)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "criterion, search, extra",
    [
        # Layer i runs for each of the i earlier ones that may be gone.
        (DepthCriterion.LOSS, DepthSearch.SINGLE, LAYERS * (LAYERS - 1) // 2),
        # It is known right behind the layer.
        (DepthCriterion.BLOCK_INFLUENCE, DepthSearch.SINGLE, 0),
        (DepthCriterion.BLOCK_INFLUENCE, DepthSearch.BLOCK, 0),
        # Blocks of two, from 0, 1 and 2: behind them run two, one and no layers.
        (DepthCriterion.KL, DepthSearch.BLOCK, 3),
    ],
)
def test_paths_share_what_they_have_in_common(score, layer_calls, criterion, search, extra):
    target = {} if search is DepthSearch.SINGLE else {"layers": 2}
    score(target, criteria=[criterion], search=search, protect_first=0, protect_last=0)
    num_batches = 4
    assert len(layer_calls) == num_batches * (LAYERS + extra)


GREEDY = dict(search=DepthSearch.GREEDY, protect_first=0, protect_last=0)


@pytest.mark.parametrize(
    "settings",
    [
        dict(criteria=[], criterion=Criterion.ACTIVATION),
        dict(criteria=[DepthCriterion.KL], criterion=Criterion.ACTIVATION),
        dict(target={"layers": 2}, criteria=[DepthCriterion.KL], **GREEDY),
        dict(target={"layers": 2}, criteria=[DepthCriterion.ACCURACY], **GREEDY),
    ],
    ids=["activations", "single", "greedy", "greedy with questions"],
)
def test_progress_ends_when_all_is_done(score, theirs, tmp_path, caplog, settings):
    choices = None
    if DepthCriterion.ACCURACY in settings["criteria"]:
        choices = ChoiceSamples(QUESTIONS, AutoTokenizer.from_pretrained(save_hf(tmp_path, theirs)), 1)
    with caplog.at_level("INFO"):
        score(choices=choices, **settings)
    shown = [record.getMessage().split() for record in caplog.records if record.name == "minitron_megatron.progress"]
    [total] = {int(line[3]) for line in shown}
    counts = [int(line[1]) for line in shown]
    assert total >= 4 and counts == sorted(set(counts)) and counts[-1] == total


def test_no_sublayer_is_missing_afterwards(ours, score):
    [model], _ = ours
    before = list(itertools.chain(model.named_modules()))
    score(unit=Unit.SUBLAYER)
    assert list(model.named_modules()) == before and model.post_process


@pytest.mark.parametrize(
    "settings, target, message",
    [
        (
            dict(search="block", protect_first=2),
            {"layers": 2},
            "leave 1 of 4 layers, and the target drops 2: protect less",
        ),
        (dict(search="greedy"), {"layers": 1}, "leave 2 of 4 layers, and the target drops 3: protect less"),
        (
            dict(search="greedy", unit="sublayer", protect_last=2),
            {"attention": 2, "mlp": 3},
            "leave 1 of 4 attention sublayers, and the target drops 2: protect less",
        ),
        (dict(search="greedy"), {"hidden": 40}, "depth.search = greedy needs to know how many go: set"),
    ],
)
def test_a_search_that_cannot_end_is_refused_before_it_begins(score, layer_calls, settings, target, message):
    settings = {**settings, "search": DepthSearch(settings["search"]), "unit": Unit(settings.get("unit", "layer"))}
    with pytest.raises(ConfigError, match=message):
        score(target, **settings)
    assert not layer_calls
