import json
import sys
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitron_megatron.data import tables
from minitron_megatron.data.corpus import documents
from minitron_megatron.errors import DataError

TEXTS = [f"Document {n} is ä story" for n in range(700)]


def contents(*sources, **options):
    return [document.content for document in documents(list(map(str, sources)), **options)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_files_of_any_row_groups(tmp_path, kind):
    table = pa.table({"id": range(700), "body": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    assert contents(tmp_path / "a.parquet", text_field="body") == TEXTS


def test_a_dataset_saved_to_disk(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(700))})
    dataset.save_to_disk(tmp_path / "plain", num_shards=3)
    dataset.select(range(5, 300, 2)).save_to_disk(tmp_path / "part")
    assert contents(tmp_path / "plain") == TEXTS
    assert contents(tmp_path / "part") == TEXTS[5:300:2]
    (tmp_path / "more.txt").write_text("More")
    assert contents(tmp_path) == ["More", *TEXTS[5:300:2], *TEXTS]


def test_conversations_come_as_they_would_from_json(tmp_path):
    rows = [[{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}] for n in range(5)]
    rows[2][0]["name"] = "Ada"
    dataset = datasets.Dataset.from_list([{"messages": row} for row in rows])
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "chat.parquet")
    assert contents(tmp_path / "saved") == contents(tmp_path / "chat.parquet") == rows


def test_one_split_has_to_be_named(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS[:4]})
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"both is a dataset of several splits \(test, train\): name one, as in"):
        contents(tmp_path / "both")
    assert contents(tmp_path / "both" / "train") == TEXTS[:4]


def test_no_code_of_a_dataset_runs(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    for name in ("saved.py", "__init__.py", "dataset.py"):
        (tmp_path / "saved" / name).write_text("raise SystemExit('it ran')")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    assert contents(tmp_path / "saved") == ["a", "b"]
    state["_data_files"] = [{"filename": "../saved/data-00000-of-00001.arrow"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="which is not a file in its folder"):
        contents(tmp_path / "saved")


def test_rows_are_read_a_few_at_a_time(tmp_path):
    """Both files have all rows in one piece."""
    table = pa.table({"text": [text * 100 for text in TEXTS] * 20})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "saved" / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        most = max(pa.total_allocated_bytes() - before for _ in documents([str(source)]))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most + peak < table.nbytes / 4, source


@pytest.mark.parametrize("cut", [0, 10, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.parquet", "data.arrow"])
def test_damaged_files_are_named(tmp_path, name, cut):
    folder = tmp_path / "saved"
    folder.mkdir()
    table = pa.table({"text": TEXTS})
    if name == "a.parquet":
        pq.write_table(table, folder / name)
    else:
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table)
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(cut * len(whole)) if cut < 1 else cut])
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        contents(folder)


@pytest.mark.parametrize("column", [{"body": ["x"]}, {"text": [3]}, {"text": [None]}, {"text": [["x"]]}])
def test_rows_that_are_no_documents_are_named(tmp_path, column):
    pq.write_table(pa.table(column), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 0: not a document .*data\.text_field says"):
        contents(tmp_path)


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"a\.parquet is read with pyarrow, which is not installed: pip install"):
        list(tables.read_parquet(tmp_path / "a.parquet", ["text"]))
