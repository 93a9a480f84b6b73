"""The comparison as one self-contained HTML page: no script, nothing loaded, light and dark.

Every piece of text passes through `markup.plain`; no document is trusted to be markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from raylign.evaluation.report.figures import show_count, show_percent
from raylign.evaluation.report.markup import color, element, plain, text
from raylign.tokenization.chart import Line, draw_compression
from raylign.tokenization.compare import Comparison, Scores, cost_embedding
from raylign.tokenization.pieces import Piece

COLORS = ("rl", "base", "sft", "learn", "sync", "generate", "score", "data")
HUES = 5
FOOTER = (
    "Drawn by Raylign. This page is one file: it loads nothing and runs no script. Speeds are "
    "printed where they are measured and are not part of it."
)
HEAD = (
    "Tokenizer",
    "Entries",
    "Bytes a token",
    "Characters a token",
    "Tokens a word",
    "Words in one token",
    "Unknown",
    "Restored",
    "Entries seen",
    "Embedding",
)


@dataclass(frozen=True, slots=True)
class Findings:
    """What is shown."""

    comparisons: Sequence[Comparison]
    """The run's own tokenizer first."""
    curves: Mapping[str, Sequence[tuple[int, float]]]
    """By name: vocabulary size and bytes per token."""
    paragraph: str
    pieces: Mapping[str, Sequence[Piece]]
    """By name: `paragraph` in tokens."""
    hidden_size: int
    layers: int
    held_out: bool = True
    """The documents were kept from training."""


def render(findings: Findings) -> str:
    """The whole page."""
    house = files("raylign.evaluation.report").joinpath("style.css").read_text(encoding="utf-8")
    own = files("raylign.tokenization").joinpath("page.css").read_text(encoding="utf-8")
    head = "\n".join(
        (
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            text("title", "Tokenizers compared"),
            element("style", "\n", house, own),
        )
    )
    body = "\n".join(
        (
            _render_head(findings),
            element(
                "main",
                _render_table(findings),
                _render_chart(findings),
                _render_paragraph(findings),
                _render_groups(findings, "domains", "By domain", "Domain"),
                _render_groups(findings, "languages", "By language", "Language"),
            ),
            element("footer", text("p", FOOTER)),
        )
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _render_head(findings: Findings) -> str:
    own = findings.comparisons[0]
    kept = "which no tokenizer trained here has seen"
    if not findings.held_out:
        kept = "too few to keep some from training, so that these numbers flatter"
    lead = (
        f"Models read tokens, not letters. {own.name} holds {own.scores.bytes_per_token:.2f} bytes "
        f"of text in a token; below, the same {own.scores.documents:,} documents, {kept}, in the "
        "tokens of each."
    )
    return element(
        "header",
        text("p", "Tokenizer", class_="eyebrow"),
        text("h1", "One text, many spellings"),
        text("p", lead, class_="lead"),
    )


def _render_table(findings: Findings) -> str:
    longest = max(c.scores.bytes_per_token for c in findings.comparisons) or 1.0
    rows = []
    for comparison, name in zip(findings.comparisons, _colors(findings), strict=True):
        scores = comparison.scores
        parameters, share = cost_embedding(
            comparison.vocab_size, findings.hidden_size, findings.layers
        )
        bar = element(
            "i",
            style=f"width:{100 * scores.bytes_per_token / longest:.1f}%;background:{color(name)}",
        )
        cells = (
            plain(f"{comparison.vocab_size:,}"),
            f"{scores.bytes_per_token:.2f}" + element("span", bar, class_="bar"),
            f"{scores.characters_per_token:.2f}",
            f"{scores.fertility:.2f}",
            show_percent(scores.single_token_share),
            _tone(show_percent(scores.unknown_rate), scores.unknown_rate > 0),
            _tone(show_percent(scores.round_trip, 0), scores.round_trip < 1),
            show_percent(scores.vocabulary_use),
            show_count(parameters) + text("small", f"{show_percent(share)} of model"),
        )
        title = element("td", _key(comparison.name, name), class_="name")
        rows.append(element("tr", title, *(element("td", cell, class_="num") for cell in cells)))
    width = f"{findings.hidden_size:,} wide, {findings.layers} layers"
    return _section(
        "Which spells best",
        "More bytes in a token mean a shorter text: more of it fits into the same computation. "
        "But every entry costs a row of the embedding.",
        _tabulate(HEAD, rows),
        text(
            "p",
            "A word is what stands between blanks; for the share in one token, a run of letters "
            "and digits, with or without the blank before. Scripts without blanks have long "
            f"words. Embedding: one matrix for input and output of a model {width}.",
            class_="meaning",
        ),
    )


def _render_chart(findings: Findings) -> str:
    lines = [
        Line(
            name=c.name,
            color=name,
            size=c.vocab_size,
            bytes_per_token=c.scores.bytes_per_token,
            curve=tuple(findings.curves.get(c.name, ())),
            lossy=c.scores.unknown_rate > 0,
        )
        for c, name in zip(findings.comparisons, _colors(findings), strict=True)
    ]
    keys = element("div", *(_key(line.name, line.color) for line in lines), class_="keys")
    lead = "Bytes per token. A dot is a tokenizer of the table above"
    lead += "; a line is its kind, trained at other sizes." if findings.curves else "."
    if any(c.scores.unknown_rate > 0 for c in findings.comparisons):
        lead += " Hollow: what it does not know is a token too, so losing text looks like saving."
    figure = element("figure", keys, draw_compression(lines), class_="chart full")
    return _section("What size buys", lead, figure)


def _render_paragraph(findings: Findings) -> str:
    cards = []
    for comparison, name in zip(findings.comparisons, _colors(findings), strict=True):
        pieces = findings.pieces[comparison.name]
        count = sum(piece.id is not None for piece in pieces)
        note = f"{count:,} tokens"
        unknown = sum(piece.kind == "unknown" for piece in pieces)
        note += f", {unknown:,} unknown" if unknown else ""
        title = element(
            "div", _key(comparison.name, name), text("span", note, class_="small"), class_="title"
        )
        shown = element("p", *_render_pieces(pieces), class_="spelling")
        cards.append(element("article", title, shown))
    samples = (
        ("blank", _mark("·")),
        ("line end", _mark("⏎")),
        ("byte of a character", text("span", "E6", class_="t h0 byte")),
        ("unknown", text("span", "?", class_="t unk")),
    )
    hints = (text("span", name, class_="hint") + shown for name, shown in samples)
    legend = element("p", *hints, class_="legend")
    size = len(findings.paragraph)
    return _section(
        "The same paragraph",
        f"{size:,} characters. Each colour is a token; point at one to see its id.",
        legend,
        element("div", *cards, class_="spellings"),
    )


def _render_pieces(pieces: Sequence[Piece]) -> list[str]:
    parts = []
    number = 0
    for piece in pieces:
        if piece.kind == "gap":
            parts.append(element("span", _show(piece.text), class_="gap"))
            continue
        kind = {"unknown": "unk", "bytes": f"h{number % HUES} byte"}.get(
            piece.kind, f"h{number % HUES}"
        )
        number += 1
        title = f"{piece.id}: {piece.text if piece.kind == 'bytes' else repr(piece.text)}"
        parts.append("<wbr>" + element("span", _show(piece.text), class_=f"t {kind}", title=title))
    return parts


def _show(content: str) -> str:
    """Markup of a token's text with blanks made visible."""
    parts = []
    for character in content:
        if character == " ":
            parts.append(_mark("·"))
        elif character == "\n":
            parts.append(_mark("⏎") + "<br>")
        elif character == "\t":
            parts.append(_mark("⇥"))
        elif ord(character) < 0x20:
            parts.append(_mark(chr(0x2400 + ord(character))))
        elif character.isspace() or not character.isprintable():
            parts.append(_mark(f"U+{ord(character):04X}"))
        else:
            parts.append(plain(character))
    return "".join(parts).replace("://", ":&#47;/")  # as `plain` writes what it sees whole


def _mark(content: str) -> str:
    return text("i", content, class_="ws")


def _render_groups(findings: Findings, field: str, title: str, head: str) -> str:
    """Bytes and tokens per word of each group; nothing where there is at most one."""
    groups: list[dict[str, Scores]] = [getattr(c, field) for c in findings.comparisons]
    names = list(groups[0])
    if len(names) < 2:
        return ""
    rows = []
    for name in names:
        best = max(group[name].bytes_per_token for group in groups)
        cells = [text("td", name, class_="name")]
        cells.append(text("td", f"{groups[0][name].documents:,}", class_="num"))
        for group in groups:
            scores = group[name]
            value = f"{scores.bytes_per_token:.2f}"
            value = text("b", value) if scores.bytes_per_token == best else value
            note = text("small", f"{scores.fertility:.2f} a word")
            cells.append(element("td", value, note, class_="num"))
        rows.append(element("tr", *cells))
    heads = (head, "Documents", *(c.name for c in findings.comparisons))
    return _section(
        title,
        "Bytes per token, and below tokens per word. Bold: most bytes.",
        _tabulate(heads, rows),
    )


def _tabulate(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = [text("th", h, class_="num" if i else None) for i, h in enumerate(head)]
    table = element(
        "table",
        element("thead", element("tr", *cells)),
        element("tbody", *rows),
        class_="many",
    )
    return element("div", table, class_="scroll")


def _section(title: str, lead: str, *content: str) -> str:
    return element("section", text("h2", title), text("p", lead, class_="lead"), *content)


def _colors(findings: Findings) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(findings.comparisons))]


def _key(name: str, shade: str) -> str:
    return text("span", name, class_="key", style=f"--c:{color(shade)}")


def _tone(content: str, bad: bool) -> str:
    return text("span", content, class_="bad" if bad else None)
