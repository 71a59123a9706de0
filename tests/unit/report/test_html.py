import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.report.html import duration, write_report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, and in order."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.attributes, self.texts = [], [], [], []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    @property
    def images(self):
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


@pytest.fixture(scope="module")
def page(shared_run):
    run, stages = shared_run
    return Page(write_report(run, "A <title> & more", stages))


def test_it_has_every_number_of_the_evaluations(page):
    expected = ["7,654,321", "6,543,219", "4,321,987", "3,219,876", "2.5000", "5.5000", "3.5000", "23,456"]
    expected += [f"{math.exp(loss):,.2f}" for loss in (2.5, 5.5, 3.5)] + ["31.5", "32.5", "33.5", "66.7%"]
    assert not [number for number in expected if number not in page.text]


def test_the_headline_sums_it_up(page):
    assert (
        "From 7.654M to 4.322M parameters (56%): held-out loss in nats per token 2.500 for teacher, 5.500 for pruned, "
        "3.500 for distilled, which closes 67% of the gap."
    ) in page.text


def test_it_has_every_stage_with_its_time_and_origin(page, shared_run):
    run, stages = shared_run
    rows = re.findall(r"<tr>\s*<td>(\w+)</td>\s*<td>(\w+)</td>\s*<td>([^<]*)</td>", page.source)
    assert rows == [(s.name, s.verb, duration(s.seconds)) for s in stages]
    assert "done before" in page.text and "6 min 42 s" in page.text and "3 h 7 min" in page.text
    first = Manifest.read(run / "distilled").parents[0]
    assert f"student: pruned {first.fingerprint[:12]}" in page.text
    assert f"source: {run.parent / 'model.gguf'}" in page.text  # made by no stage, so by its path


def test_it_has_the_settings_of_every_stage(page, shared_run):
    assert page.tags.count("details") == len(shared_run[1])
    assert "num_samples: 9" in page.text and "hidden: 8" in page.text and "steps: 6" in page.text


def test_its_figures_are_in_it_and_in_the_folder(page, shared_run):
    run, _ = shared_run
    files = {path.name: path.read_bytes() for path in (run / "figures").iterdir()}
    assert set(files) == {
        *("before_after.png", "loss.png", "pruned_kept.png"),
        *(f"pruned_{axis}.png" for axis in ("ffn", "heads", "groups", "hidden", "layers")),
    }
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.images]
    assert sorted(embedded) == sorted(files.values())
    assert page.tags.count("figcaption") == len(files)
    assert all(value for tag, name, value in page.attributes if name == "alt")


def test_it_needs_nothing_else(page):
    """No script, link or style sheet, and no address that a browser would ask for."""
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and 'name="viewport"' in page.source


def test_text_of_models_and_users_stays_text(page):
    assert "A <title> & more" in page.text
    for number in (1, 2, 3):
        assert f"Prompt {number} <b>&amp; and <script>alert({number})</script> 'it'\n so" in page.text
    assert "b" not in page.tags


def test_a_second_report_replaces_the_first(finished_run):
    run, stages = finished_run
    write_report(run, "old", stages[4:])
    assert "old" not in Page(write_report(run, "new", stages[4:])).text.split()


@pytest.mark.parametrize(
    "gone, figures",
    [
        ("scores", {"before_after", "loss", "pruned_kept"}),
        (
            "pruned",
            {"before_after", "loss"} | {f"scores_{axis}" for axis in ("ffn", "heads", "groups", "hidden", "layers")},
        ),
        (
            "distilled",
            {"before_after"} | {f"pruned_{part}" for part in ("kept", "ffn", "heads", "groups", "hidden", "layers")},
        ),
        ("evaluate", {"loss"} | {f"pruned_{part}" for part in ("kept", "ffn", "heads", "groups", "hidden", "layers")}),
    ],
)
@pytest.mark.parametrize("stage_too", [False, True], ids=["folder", "stage"])
def test_what_is_missing_is_left_out(finished_run, gone, figures, stage_too):
    run, stages = finished_run
    shutil.rmtree(run / gone)
    if stage_too:
        stages = [s for s in stages if gone not in s.output.relative_to(run).parts[:1]]
    page = Page(write_report(run, "title", stages))
    assert {path.stem for path in (run / "figures").iterdir()} == figures
    assert len(page.images) == len(figures)
    assert ("Before and after" in page.text) == (gone != "evaluate")


def test_a_plan_of_unknown_scores_is_shown_by_itself(finished_run):
    run, stages = finished_run
    (run / "pruned" / "manifest.json").unlink()
    write_report(run, "title", stages[2:3])
    assert [path.stem for path in (run / "figures").iterdir()] == ["pruned_kept"]


def test_without_evaluations_the_headline_has_the_sizes_of_the_plan(finished_run):
    run, stages = finished_run
    page = Page(write_report(run, "title", stages[:4]))
    # Counted by hand, per layer of the original: norms 24, qkv 12 * 20, proj 12 * 12, fc1 12 * 20, fc2 12 * 10;
    # and once: embedding 12 * 7, final norm 12, output 12 * 7. The target: 3 layers of 16 + 8 * 16 + 8 * 8 + 8 * 18.
    before = 5 * (24 + 12 * 20 + 12 * 12 + 12 * 20 + 12 * 10) + 12 * (7 + 1 + 7)
    after = 3 * (16 + 8 * 16 + 8 * 8 + 8 * 12 + 8 * 6) + 8 * (7 + 1 + 7)
    assert f"From {before / 1000:.4g}K to {after / 1000:.4g}K parameters ({after / before:.0%})." in page.text


def test_a_run_of_nothing_is_a_page_too(tmp_path):
    page = Page(write_report(tmp_path, "Nothing yet", []))
    assert "Nothing yet" in page.text and not page.images
    assert not any(css in page.tags for css in ("figure", "details"))


def test_models_that_generated_nothing_have_no_sample(finished_run):
    run, stages = finished_run
    for stage in stages[4:]:
        path = stage.output / "evaluation.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "generation": None}))
    assert "What they write" not in Page(write_report(run, "title", stages)).text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (None, "done before"),
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (3599.6, "1 h 0 min"),
        (11220, "3 h 7 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
