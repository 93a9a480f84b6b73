"""Ways of writing: the built-in ones, and templates of the user's own."""

from __future__ import annotations

import difflib
import string
from collections.abc import Sequence
from dataclasses import dataclass

from raylign.config import UserError
from raylign.config.synthesis import StyleConfig

FIELDS = ("topic", "audience", "seed")

# `<subject>` becomes {topic}, or points at the excerpt when there are no topics.
_BUILT_IN = {
    "textbook": StyleConfig(
        name="textbook",
        instruction=(
            "Write a section of a textbook on <subject> for {audience}. Begin with why the matter "
            "deserves attention, define every term before you use it, and lead from simple cases "
            "to harder ones. Include at least one concrete example that is carried through to the "
            "end, and name a common misunderstanding and what is wrong with it. Write connected "
            "prose, and nothing before or after the section."
        ),
        completion="# <subject>\n\nFrom a textbook for {audience}\n\n",
    ),
    "exercise": StyleConfig(
        name="exercise",
        instruction=(
            "Set {audience} one exercise on <subject> that takes several steps to solve, and solve "
            "it. Put everything that is needed to solve it into the exercise. In the solution give "
            "the reason for each step and check the result. Use exactly this form:\n"
            "Exercise:\n(the exercise)\nSolution:\n(the solution)"
        ),
        completion=(
            "Exercises with solutions on <subject>, for {audience}. Each has the form "
            '"Exercise:", then "Solution:".\n\n'
        ),
        answer="worked",
    ),
    "questions": StyleConfig(
        name="questions",
        instruction=(
            "Write five questions about <subject> as {audience} might ask them, from the plainest "
            "to the most searching, each followed by an answer of several sentences that explains "
            "and does not only assert. Use exactly this form for each:\n"
            "Question: (the question)\nAnswer: (the answer)"
        ),
        completion=(
            "Questions and answers on <subject>, for {audience}. Each has the form "
            '"Question:", then "Answer:".\n\n'
        ),
        answer="questions",
    ),
    "story": StyleConfig(
        name="story",
        instruction=(
            "Tell a short story for {audience} in which somebody has to understand <subject> in "
            "order to get on. What they find out must be correct, explained as they find it out, "
            "and matter to how the story ends. Write only the story."
        ),
        completion="A story for {audience}, in which somebody comes to understand <subject>.\n\n",
    ),
    "python": StyleConfig(
        name="python",
        instruction=(
            "Write a Python exercise about <subject> for {audience} with its solution: a function "
            "with annotations, a docstring that states the task and gives an example, and a body "
            "that solves it with the standard library alone, with a comment where a step is not "
            "obvious. Answer with one block of code and nothing else."
        ),
        completion='"""Exercises about <subject>, for {audience}, with solutions."""\n\n\n',
        answer="python",
    ),
}

_EXCERPT_BELOW = (
    "\n\nDraw on this excerpt for the content, in your own words and without mentioning it:\n\n"
    "{seed}"
)
_EXCERPT_ABOVE = "{seed}\n\n* * *\n\n"


@dataclass(frozen=True, slots=True)
class Style:
    """A way of writing, ready to be filled in."""

    name: str
    template: str
    fields: tuple[str, ...]
    """Which of `FIELDS` the template uses, in their order there."""
    answer: str
    """Form of the output: a key of `raylign.data.synthesis.forms.FORMS`."""
    share: float

    def fill(self, values: dict[str, str]) -> str:
        """The template with its fields replaced, once: values may hold braces."""
        pieces = string.Formatter().parse(self.template)
        return "".join(literal + (values[name] if name else "") for literal, name, _, _ in pieces)


def choose_styles(
    given: Sequence[str | StyleConfig], present: Sequence[str], chat: bool
) -> list[Style]:
    """The styles of a recipe. `present` are the fields that there are values for.

    Raises `UserError` for an unknown or repeated name, a style without a template for chat (or
    completion), and a template with an unknown field or one that has no values.
    """
    styles = [_ready(style, present, chat) for style in given]
    names = [style.name for style in styles]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"synthesise.styles: {name!r} is there twice; rename or drop one")
    return styles


def _ready(given: str | StyleConfig, present: Sequence[str], chat: bool) -> Style:
    config = _complete(given, present, chat) if isinstance(given, str) else given
    place = f"synthesise.styles: {config.name!r}"
    key = "instruction" if chat else "completion"
    template = config.instruction if chat else config.completion
    if not template:
        kind = "has a chat template" if chat else "has no chat template, or is not to use it"
        raise UserError(f"{place} has no {key!r}, and the model {kind}; write one")
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{place}: {key} has a stray brace ({error}); double literal ones"
        ) from None
    used = {name for _, name, _, _ in pieces if name is not None}
    for _, name, form, conversion in pieces:
        if name is not None and (name not in FIELDS or form or conversion):
            raise UserError(
                f"{place}: {key} names {{{name}}}; fields are "
                f"{', '.join(f'{{{f}}}' for f in FIELDS)}, and literal braces are doubled"
            )
        if name is not None and name not in present:
            raise UserError(f"{place}: {key} names {{{name}}}, and synthesise.{name}s has none")
    fields = tuple(name for name in FIELDS if name in used)
    return Style(config.name, template, fields, config.answer, config.share)


def _complete(name: str, present: Sequence[str], chat: bool) -> StyleConfig:
    """A built-in style, with a subject: the topic, the excerpt, or the topic with the excerpt."""
    if name not in _BUILT_IN:
        close = difflib.get_close_matches(name, _BUILT_IN, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"synthesise.styles: {name!r} is no built-in style; {hint}choose from "
            f"{', '.join(_BUILT_IN)}, or give name, instruction and completion"
        )
    if "topic" not in present and "seed" not in present:
        raise UserError(
            "synthesise: built-in styles need something to write about; give synthesise.topics, "
            "synthesise.seeds, or both"
        )
    style = _BUILT_IN[name]
    if "topic" in present:
        subject = "{topic}"
    else:
        subject = "the subject of the excerpt below" if chat else "the subject of the passage above"
    instruction = (style.instruction or "").replace("<subject>", subject)
    completion = (style.completion or "").replace("<subject>", subject)
    if "seed" in present:
        instruction, completion = instruction + _EXCERPT_BELOW, _EXCERPT_ABOVE + completion
    return style.model_copy(update={"instruction": instruction, "completion": completion})
