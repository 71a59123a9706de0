"""Tasks for lm-eval whose data are local files: one of multiple choice, one that generates, one of perplexity."""

import json
import random
from pathlib import Path

import yaml

LETTERS = "abcdefgh"
TASKS = ["letter_choice", "letter_writing", "letter_text"]

# Counts what a model writes, so that different texts have different scores.
_SCORER = """def score(doc, results):
    return {"lower": float(sum(map(str.islower, results[0]))), "length": float(len(results[0]))}
"""


def write_tasks(folder: Path) -> Path:
    """The YAML files, and the data beside them."""
    folder.mkdir()
    choose = random.Random(0)

    def word(low, high):
        return "".join(choose.choice(LETTERS) for _ in range(choose.randint(low, high)))

    def questions(number):
        # Answers of one letter, which lm-eval's own backend scores together, and longer ones.
        lengths = [(1, 1) if choose.random() < 0.5 else (1, 4) for _ in range(number)]
        return [
            {"question": word(3, 12), "choices": [word(*of) + end for end in "abc"], "answer": choose.randrange(3)}
            for of in lengths
        ]

    files = {
        "train": questions(6),
        "test": questions(14),
        "prompts": [{"question": word(1, 25)} for _ in range(9)],
        # Longer than the model's 64 positions, some of them.
        "texts": [{"text": word(5, 150)} for _ in range(7)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scorer.py").write_text(_SCORER)

    def task(name, kind, metrics, data, **settings):
        paths = {split: str(folder / f"{file}.jsonl") for split, file in data.items()}
        values = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": paths, "cache_dir": str(folder / "cache")},
            "output_type": kind,
            "test_split": "test",
            "metric_list": [{"metric": metric} | options for metric, options in metrics.items()],
            "metadata": {"version": 1.0},
            **settings,
        }
        text = yaml.safe_dump(values, sort_keys=False).replace("'!score'", "!function scorer.score")
        (folder / f"{name}.yaml").write_text(text)

    mean = {"aggregation": "mean", "higher_is_better": True}
    task(
        "letter_choice",
        "multiple_choice",
        {"acc": mean, "acc_norm": mean},
        {"train": "train", "test": "test"},
        fewshot_split="train",
        num_fewshot=2,
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        target_delimiter="",
        fewshot_delimiter="h",
    )
    task(
        "letter_writing",
        "generate_until",
        {"lower": mean, "length": mean},
        {"test": "prompts"},
        doc_to_text="{{question}}",
        doc_to_target="",
        process_results="!score",
        generation_kwargs={"until": ["h"], "max_gen_toks": 20, "do_sample": False},
    )
    task(
        "letter_text",
        "loglikelihood_rolling",
        {name: {} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
        {"test": "texts"},
        doc_to_text="",
        doc_to_target="{{text}}",
    )
    return folder
