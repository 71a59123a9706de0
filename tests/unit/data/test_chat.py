import dataclasses
import json

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.chat import render_chat
from minitron_megatron.data.samples import heldout_samples, training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import DataError

TURNS = (
    "{%% for message in messages %%}[{{ message['role'] }}]{%% if message['role'] == 'assistant' %%}"
    "%s{{ message['content'] }}<eos>{%% %s %%}{%% else %%}{{ message['content'] }}<eos>{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}[assistant]{%% endif %%}"
)
MARKED = TURNS % ("{% generation %}", "endgeneration")
PLAIN = TURNS.replace("{%% %s %%}", "") % ""
# As some templates of reasoning models do, which drop earlier thoughts.
FORGETFUL = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{{ message['content'] if loop.last or message['role'] != 'assistant' else '...' }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def conversation(number):
    turns = [("system", "You know the story"), ("user", f"Which number <{number}>?"), ("assistant", f"It is {number}")]
    if number % 3 == 0:
        turns += [("user", "And the document?"), ("assistant", f"The document number {number} is ä story")]
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def with_template(tokenizer_dir, tmp_path):
    def make(template):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.chat_template = template
        folder = tmp_path / "tokenizer"
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("template", [MARKED, PLAIN])
@pytest.mark.parametrize("number", [1, 3])
def test_what_the_assistant_says_is_what_transformers_says(with_template, template, number):
    tokenizer = AutoTokenizer.from_pretrained(with_template(template))
    expected = tokenizer.apply_chat_template(
        conversation(number), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    found = render_chat(tokenizer, conversation(number), "here")
    assert found == (expected["input_ids"], expected["assistant_masks"])
    assert tokenizer.decode([t for t, learned in zip(*found) if learned]).count("<eos>") == 1 + (number == 3)


def test_a_template_that_changes_what_it_said_is_refused(with_template):
    tokenizer = AutoTokenizer.from_pretrained(with_template(FORGETFUL))
    render_chat(tokenizer, conversation(1), "here")
    with pytest.raises(DataError, match=r"here: message 2 cannot be told apart: .* with \{% generation %\} around"):
        render_chat(tokenizer, conversation(3), "here")


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (None, conversation(1), "here is a conversation, and the tokenizer has no chat template"),
        (MARKED, conversation(1)[:2], "here: no token is an assistant's answer"),
        (PLAIN, conversation(1)[:2], "here: no token is an assistant's answer"),
        ("{{ raise_exception('roles must alternate') }}", conversation(1), "here: .*roles must alternate"),
        ("{{ messages[0]['content'] + 'x' }}", [{"role": "user", "content": ["a"]}], "here: the chat template cannot"),
    ],
)
def test_what_cannot_be_rendered_is_named(with_template, template, messages, message):
    tokenizer = AutoTokenizer.from_pretrained(with_template(template))
    with pytest.raises(DataError, match=message):
        render_chat(tokenizer, messages, "here")


@pytest.fixture
def config(tmp_path):
    lines = [{"messages": conversation(number)} for number in range(40)] + [{"text": "A story of the document"}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataConfig([str(tmp_path / "chat.jsonl")], str(tmp_path / "cache"), 24, heldout_pct=20)


@pytest.mark.parametrize("after", ["", "!"])
def test_samples_learn_the_answers_alone(config, with_template, after):
    folder = with_template(MARKED + after)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = prepare_corpus(config, folder)
    expected = {}
    for number in range(40):
        found = tokenizer.apply_chat_template(conversation(number), return_dict=True, return_assistant_tokens_mask=True)
        # What does not end is closed, by a token that nobody has said.
        end = [1] if after else []
        expected[(*found["input_ids"], *end)] = [*found["assistant_masks"], *[0] * len(end)]
    text = (*tokenizer("A story of the document", add_special_tokens=False)["input_ids"], 1)
    expected[text] = [1] * len(text)

    dataset = IndexedDataset(corpus.heldout[0].prefix)
    rows = [dataset[index].copy() for index in range(len(dataset))]
    tokens = [tuple((row * (row >= 0) + ~row * (row < 0)).tolist()) for row in rows]
    masks = [bit for row in tokens for bit in expected[row]]
    stream = [token for row in tokens for token in row]
    samples = list(heldout_samples(corpus, config))
    labels, mask = (torch.cat([sample[key] for sample in samples]).tolist() for key in ("labels", "loss_mask"))
    assert labels[: len(stream) - 1] == stream[1:]
    assert mask == [*masks[1:], *[0] * (len(mask) - len(masks) + 1)]

    answers, samples = 0, training_samples(corpus, config, 60)
    for sample in map(samples.__getitem__, range(60)):
        assert sample["tokens"].min() >= 0 and sample["labels"].min() >= 0
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        said = tokenizer.decode(sample["labels"][sample["loss_mask"].bool()])
        assert "[user]" not in said and "You know" not in said and "Which" not in said
        answers += said.count("It is")
    assert answers > 10


def test_token_zero_is_masked_like_any_other(config, with_template, tmp_path):
    """Its complement is -1, which Megatron-Core takes for padding."""
    folder = with_template(MARKED.replace("[{{", "<bos>[{{"))
    config = dataclasses.replace(config, sequence_length=8)
    tokens = prepare_corpus(config, folder)
    samples = training_samples(tokens, config, 200)
    seen = [sample for sample in map(samples.__getitem__, range(200)) if (sample["labels"] == 0).any()]
    assert seen and not any(sample["loss_mask"][sample["labels"] == 0].any() for sample in seen)
    assert all((sample["tokens"] >= 0).all() for sample in seen)


def test_the_template_is_part_of_what_a_corpus_is(config, with_template):
    one, other = (prepare_corpus(config, with_template(template)) for template in (MARKED, "Chat " + MARKED))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("messages", [[], "text", [{"content": "x"}], ["x"], [{"role": 3, "content": "x"}], None])
def test_messages_that_are_none_are_named(tmp_path, with_template, messages):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: messages must be a list"):
        prepare_corpus(DataConfig([str(tmp_path / "bad.jsonl")], str(tmp_path / "cache")), with_template(MARKED))
