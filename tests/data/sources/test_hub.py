from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raylign.config import SourceConfig, TextbookConfig, UserError
from raylign.data.sources import hub
from raylign.data.sources.slices import plan_slices, read_slice

datasets = pytest.importorskip("datasets")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(
        {
            "text": [f"text {n}" if n % 7 else None for n in range(2500)],
            "kind": ["odd" if n % 2 else "even" for n in range(2500)],
        }
    )


def read(**keys: Any) -> list[dict[str, Any]]:
    return [
        row
        for part in plan_slices([SourceConfig(kind="huggingface", **keys)], TextbookConfig())
        for table in read_slice(part, TextbookConfig(), 0)
        for row in table.to_pylist()
    ]


def check(rows: list[dict[str, Any]]) -> None:
    assert [row["text"] for row in rows if not row["reason"]] == [
        f"text {n}" for n in range(2500) if n % 7
    ]
    assert {row["reason"] for row in rows} == {None, "not_text"}
    assert rows[4]["domain"] == "even" and len({row["doc_id"] for row in rows}) == 2500


def test_a_saved_dataset_in_any_number_of_slices(
    tmp_path: Path, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.save_to_disk(tmp_path / "saved")
    rows = read(path=tmp_path / "saved", domain_column="kind")
    check(rows)
    monkeypatch.setattr(hub, "ROWS_A_SLICE", 700)
    assert read(path=tmp_path / "saved", domain_column="kind") == rows


def test_splits_of_a_saved_dictionary(tmp_path: Path, data: Any) -> None:
    splits = {"train": data, "test": data.select(range(1, 4))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    assert [row["text"] for row in read(path=tmp_path / "d", split="test")] == [
        "text 1",
        "text 2",
        "text 3",
    ]
    with pytest.raises(UserError, match=r"split=valid: .* has the splits train, test; name one"):
        read(path=tmp_path / "d", split="valid")


def test_shards_of_a_streamed_directory(tmp_path: Path, data: Any) -> None:
    (tmp_path / "files").mkdir()
    data.select(range(900)).to_parquet(tmp_path / "files" / "a.parquet")
    data.select(range(900, 2500)).to_parquet(tmp_path / "files" / "b.parquet")
    source = SourceConfig(kind="huggingface", path=tmp_path / "files")
    parts = plan_slices([source], TextbookConfig())
    assert [part.name for part in parts] == ["train-00000", "train-00001"]
    check(read(path=tmp_path / "files", domain_column="kind"))
    with pytest.raises(UserError, match=r"text_column=txt: .* did you mean 'text'\?"):
        read(path=tmp_path / "files", text_column="txt")


def test_what_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^prepare\.sources\.0\.path=.*cannot be opened") as caught:
        read(path=tmp_path / "empty")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="where the hub cannot be reached"):
        read(path="no-organisation/no-dataset")
