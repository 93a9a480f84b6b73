"""Which columns hold what: what the recipe says, before what is known of a published dataset."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raylign.config import SourceConfig, UserError


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns, "" where there is none; `a.b` is the field `b` inside the column `a`."""

    text: str = "text"
    id: str = ""
    url: str = ""
    date: str = ""
    domain: str = ""
    meta: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """All of them, the text's first."""
        single = (self.text, self.id, self.url, self.date, self.domain)
        return tuple(dict.fromkeys(name for name in (*single, *self.meta) if name))

    def kept(self) -> tuple[str, ...]:
        """Those that go into `meta`."""
        return tuple(dict.fromkeys(name for name in (self.id, *self.meta) if name))


PRESETS = {
    "c4": Columns(url="url", date="timestamp"),
    "dolma": Columns(id="id", date="created", domain="source"),
    "fineweb": Columns(
        id="id",
        url="url",
        date="date",
        meta=("dump", "language", "language_score", "token_count"),
    ),
    "fineweb_edu": Columns(
        id="id",
        url="url",
        date="date",
        meta=("dump", "language", "language_score", "token_count", "score", "int_score"),
    ),
    "openwebtext": Columns(),
    "the_pile": Columns(domain="meta.pile_set_name"),
    "the_stack": Columns(
        text="content",
        id="hexsha",
        domain="lang",
        meta=("ext", "max_stars_repo_name", "max_stars_repo_path", "max_stars_repo_licenses"),
    ),
    "wikipedia": Columns(id="id", url="url", meta=("title",)),
}
"""The columns of published datasets, as their cards give them. A column of a preset that a file
lacks is left out (releases differ); the text's is needed."""


def choose_columns(source: SourceConfig) -> Columns:
    """What the recipe says, else what the preset knows, else `text` alone."""
    known = PRESETS[source.preset] if source.preset else Columns()
    return replace(
        known,
        text=source.text_column or known.text,
        id=source.id_column or known.id,
        url=source.url_column or known.url,
        date=source.date_column or known.date,
        domain=source.domain_column or known.domain,
        meta=source.meta_columns or known.meta,
    )


def require_columns(
    source: SourceConfig, present: Iterable[str], place: str, key: str
) -> tuple[str, ...]:
    """Columns of `choose_columns` that are `present` (top-level names) in the file at `place`.

    Raises `UserError` naming the key of the first that the recipe asks for and that is missing.
    """
    names = list(present)
    chosen = choose_columns(source)
    said = {
        "text_column": chosen.text,
        "id_column": source.id_column,
        "url_column": source.url_column,
        "date_column": source.date_column,
        "domain_column": source.domain_column,
    }
    wanted = [(field, name) for field, name in said.items() if name]
    for field, name in [*wanted, *(("meta_columns", name) for name in source.meta_columns)]:
        if name not in names and name.partition(".")[0] not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}"
            raise UserError(f"{key}.{field}={name}: {place} has no such column; {hint}")
    return tuple(n for n in chosen.names() if n in names or n.partition(".")[0] in names)


def pick(record: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of `a.b` inside it; None when there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value
