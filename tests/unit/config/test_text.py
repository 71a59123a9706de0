"""What is written for a setting that is text is what it is, on the command line and in YAML."""

import shutil

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_megatron.config import compose as composing
from minitron_megatron.config.compose import compose, read_settings
from minitron_megatron.errors import ConfigError

# What YAML 1.1 or Hydra's grammar reads as a number, a boolean or something of its own.
NASTY = [
    *("2024_11_29", "1.10", "1e5", "1e3", "0123", "0x1F", "0o17", "00", "12:00:00", ".5", "-1", "+7", "1_000", "inf"),
    *(
        "nan",
        "true",
        "off",
        "yes",
        "~x",
        "a=b",
        "a:b",
        "(1)",
        "{x",
        "a]b",
        "it's",
        'say "x"',
        "a\\b",
        "a#b",
        "@x",
        "50%",
    ),
    *("modèle", "模型/输出", "a b", "x;y", "*.txt", "!x", "&x", "|", ">", "?", "-", "- a", "%TAG"),
]


@pytest.mark.parametrize("text", NASTY)
def test_text_of_an_override(text):
    assert compose("import", ["source=s", f"output={text}"]).output == text


@pytest.mark.parametrize("text", NASTY)
def test_text_of_a_stage_and_of_a_section(text):
    recipe = compose("compress", ["source=s", "run_dir=r", "target.ffn=9", f"stages.pruned.output={text}"])
    assert recipe.stages["pruned"]["output"] == text
    assert compose("launch", ["cluster=slurm", f"cluster.account={text}"]).cluster.account == text


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
def test_any_text_but_what_has_a_meaning(text):
    """Quotes around all of it, a comma (several values), ${...} and null keep theirs."""
    if "," in text or "$" in text or text.strip() in ("null", "???", "") or text.strip()[0] in "'\"":
        return
    assert compose("import", ["source=s", f"output={text}"]).output == text


def test_items_of_a_list():
    text = compose("score", ["checkpoint=c", "output=o", "data.text=[2024_11,'a,b',1e5, x y ,0123]"]).data.text
    assert text == ["2024_11", "a,b", "1e5", "x y", "0123"]


def test_numbers_stay_numbers():
    own = compose("distill", ["teacher=t", "student=s", "output=1e5", "steps=1_000", "optimizer.lr=1e-3"])
    assert (own.output, own.steps, own.optimizer.lr) == ("1e5", 1000, 1e-3)


def test_quotes_null_and_references_keep_their_meaning():
    own = compose("distill", ["teacher=null", "student='1e5'", 'output="a=b"', "loss={kd_logits_weight:0,lm_weight:1}"])
    assert (own.teacher, own.student, own.output) == (None, "1e5", "a=b")
    assert compose("import", ["source=${output}", "output=0123"]).source == "0123"
    with pytest.raises(ConfigError, match="is several values"):
        compose("import", ["source=a,b", "output=o"])


@pytest.mark.parametrize("text", NASTY)
def test_text_of_a_yaml_file(text, tmp_path):
    """As far as it can stand there without quotes."""
    try:
        if yaml.load(f"- {text}\n- {{output: 1}}\n", yaml.BaseLoader)[0] != text:
            return
    except yaml.YAMLError:
        return
    (tmp_path / "settings.yaml").write_text(
        f"checkpoint: {text}\noutput: o\ndata:\n  text:\n  - {text}\n  - b\n", "utf-8"
    )
    own = read_settings("score", tmp_path / "settings.yaml")
    assert own.checkpoint == text
    assert own.data.text == [text, "b"]


def test_stages_of_a_yaml_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "source: s\ntarget: {ffn: 9}\nrun_dir: 2024_11_29\nstages:\n  a: {verb: import, source: 1e5, output: 0123}\n"
    )
    recipe = read_settings("compress", file)
    assert recipe.run_dir == "2024_11_29"
    assert recipe.stages["a"] == {"verb": "import", "source": "1e5", "output": "0123"}


def test_text_that_hydra_reads_as_something_else_is_refused(tmp_path, monkeypatch):
    """In a file of a group, and within braces."""
    shutil.copytree(composing.conf_dir(), tmp_path / "conf")
    monkeypatch.setattr(composing, "conf_dir", lambda: tmp_path / "conf")
    for name, account in (("quoted", '"0123"'), ("bare", "0123")):
        (tmp_path / f"conf/cluster/{name}.yaml").write_text(f"kind: slurm\naccount: {account}\n")
    assert compose("launch", ["cluster=quoted"]).cluster.account == "0123"
    with pytest.raises(ConfigError, match="cluster.account = 83: must be text: put quotes around it"):
        compose("launch", ["cluster=bare"])
    with pytest.raises(ConfigError, match=r"data.text = \['a', 100000.0\]: must be text: put quotes around it"):
        compose("score", ["checkpoint=c", "output=o", "data={text:[a,1e5]}"])
