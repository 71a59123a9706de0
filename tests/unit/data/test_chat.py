import dataclasses
import json

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from minitron_megatron.config.common import OnBadRow
from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.chat import render_chat, template_columns
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


ROLES = "{% for m in messages %}"
STRICT = (  # of one user message at least, as Qwen3's; its answers are stripped, and followed by a line
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no user') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
SPACED = (  # the prompt ends in a space, which the tokenizer joins to the answer
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ ' ' if not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ' if messages }}assistant: {% endif %}"
)
TRIMMED = (  # the prompt loses the white space that the whole has there
    "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.role ~ ':\n' ~ m.content ~ '\n' %}"
    "{% endfor %}{% if add_generation_prompt %}{% set ns.t = ns.t ~ 'assistant:\n' %}{% endif %}{{ ns.t | trim }}"
)
FIRST = "{{ messages[0].role }} "  # fails without messages


@pytest.mark.parametrize("template", [STRICT, SPACED, TRIMMED])
@pytest.mark.parametrize("roles", ["ua", "uaua", "sua", "aua", "saua"])
def test_answers_are_told_whatever_white_space_and_whoever_speaks_first(with_template, template, roles):
    tokenizer = AutoTokenizer.from_pretrained(with_template(template))
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = [
        {"role": names[role], "content": f"{'story' if role == 'a' else 'number'} {number}"}
        for number, role in enumerate(roles)
    ]
    if template == STRICT and "u" not in roles[: roles.index("a")]:
        with pytest.raises(DataError, match=r"is the assistant's .* up to it \(no user\)\. Begin with a user"):
            render_chat(tokenizer, messages, "here")
        return
    tokens, mask = render_chat(tokenizer, messages, "here")
    assert tokens == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    learned = tokenizer.decode([token for token, bit in zip(tokens, mask) if bit])
    assert learned.count("story") == roles.count("a") and "number" not in learned and "user" not in learned
    assert all(message["content"] in learned for message in messages if message["role"] == "assistant")


TOOLS = "{% if tools %}Tools {{ tools | tojson }} {% endif %}{% if mood %}Mood {{ mood }} {% endif %}" + PLAIN


@pytest.mark.parametrize("tools", [[{"name": "look"}], '[{"name": "look"}]'])
def test_columns_that_the_template_reads_reach_it(with_template, tmp_path, tools):
    folder = with_template(TOOLS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert template_columns(tokenizer) == ["mood", "tools"]
    rows = [{"messages": conversation(n), "tools": tools, "mood": f"calm {n}", "source": "web"} for n in range(9)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare_corpus(DataConfig([str(tmp_path / "chat.jsonl")], str(tmp_path / "cache")), folder)
    dataset = IndexedDataset(corpus.train[0].prefix)
    for index in range(len(dataset)):
        row = dataset[index].copy()
        text = tokenizer.decode(abs(row + (row < 0)))
        assert text.startswith('Tools [{"name": "look"}] Mood calm ') and "web" not in text


def test_tools_that_the_template_does_not_read_are_said(with_template, tmp_path, caplog):
    rows = [{"messages": conversation(n), "tools": [{"name": "look"}]} for n in range(9)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_corpus(DataConfig([str(tmp_path / "chat.jsonl")], str(tmp_path / "cache")), with_template(PLAIN))
    assert "9 rows have tools, which the tokenizer's chat template does not read" in caplog.text


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (
            PLAIN,
            [{"role": "user", "content": "x"}, {"role": "model", "content": "y"}],
            "roles are user, model, and none",
        ),
        (
            ROLES + "{{ m.content }}{% endfor %}",
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}],
            "messages are empty",
        ),
        (
            ROLES + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "the chat template writes nothing for the assistant's messages",
        ),
        (
            FIRST + ROLES + "{{ m.content }}{% endfor %}",
            [{"role": "assistant", "content": "y"}, {"role": "user", "content": "x"}],
            "message 0 is the assistant's and cannot be told apart: .* Begin with a user's message",
        ),
    ],
)
def test_a_row_without_an_answer_has_its_true_reason(with_template, template, messages, message):
    tokenizer = AutoTokenizer.from_pretrained(with_template(template))
    with pytest.raises(DataError, match=message):
        render_chat(tokenizer, messages, "here")


@pytest.mark.parametrize("workers", [1, 2])
def test_conversations_that_cannot_be_taught_are_skipped_where_asked(with_template, tmp_path, caplog, workers):
    rows = [{"messages": conversation(n)} for n in range(20)] + [{"messages": [{"role": "user", "content": "x"}]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = with_template(PLAIN)
    config = DataConfig([str(tmp_path / "chat.jsonl")], str(tmp_path / "cache"), workers=workers)
    with pytest.raises(DataError, match="line 21: no token is an assistant's answer"):
        prepare_corpus(config, folder)
    corpus = prepare_corpus(dataclasses.replace(config, on_bad_row=OnBadRow.SKIP), folder)
    assert sum(files.num_documents for files in [*corpus.train, *corpus.heldout]) == 20
    assert "data.on_bad_row=skip left out 1 rows, the first: " in caplog.text


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
