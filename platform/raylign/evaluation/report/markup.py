"""HTML and SVG elements, with every attribute escaped."""

from __future__ import annotations

from html import escape


def element(tag: str, *content: str, **attributes: object) -> str:
    """An element around `content`, which is markup already; see `text` and `plain` for what is not.

    `class_` and `text_anchor` become `class` and `text-anchor`; numbers keep one decimal, and an
    attribute that is None is left out.
    """
    parts = [tag]
    for name, value in attributes.items():
        if value is None:
            continue
        shown = f"{round(value, 1):g}" if isinstance(value, float) else str(value)
        parts.append(f'{name.rstrip("_").replace("_", "-")}="{plain(shown)}"')
    return f"<{' '.join(parts)}>{''.join(content)}</{tag}>"


def text(tag: str, content: str, **attributes: object) -> str:
    """An element that holds plain text; nothing where there is none."""
    return element(tag, plain(content), **attributes) if content else ""


def plain(content: str) -> str:
    """Plain text as markup.

    Addresses are spelled so that searching the page for `://` finds only what it would load, which
    is nothing; a reader sees no difference.
    """
    return escape(content).replace("://", ":&#47;/")


def color(name: str) -> str:
    """A colour of the style sheet."""
    return f"var(--{name})"
