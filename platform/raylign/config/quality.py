"""Knobs of quality: what is measured, and what is judged.

A threshold rejects what is beyond it; a value equal to the threshold passes. `null` turns a single
rule off, and a section that is not given turns its whole family off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from raylign.config.section import Count, Section, Share

Number = float | None
Whole = int | None


def _at_least_zero(default: float | None) -> Any:
    return Field(default=default, ge=0)


class GopherRules(Section):
    """MassiveText's quality rules (Rae et al. 2021, "Gopher", section A.1.1)."""

    min_words: Whole = _at_least_zero(50)
    """Fewest words."""
    max_words: Whole = _at_least_zero(100_000)
    """Most words."""
    min_mean_word_chars: Number = _at_least_zero(3.0)
    """Shortest mean word."""
    max_mean_word_chars: Number = _at_least_zero(10.0)
    """Longest mean word."""
    max_hash_word_ratio: Number = _at_least_zero(0.1)
    """Most hash signs a word."""
    max_ellipsis_word_ratio: Number = _at_least_zero(0.1)
    """Most ellipses a word."""
    max_bullet_line_share: Share | None = 0.9
    """Largest share of lines that start with a bullet."""
    max_ellipsis_line_share: Share | None = 0.3
    """Largest share of lines that end with an ellipsis."""
    min_alpha_word_share: Share | None = 0.8
    """Least share of words with a letter."""
    min_stop_words: Whole = _at_least_zero(2)
    """Fewest different words of `signals.stop_words`."""


class RepetitionRules(Section):
    """MassiveText's repetition rules (Rae et al. 2021, "Gopher", table A1)."""

    max_duplicate_line_share: Share | None = 0.3
    """Largest share of lines that repeat an earlier one."""
    max_duplicate_line_char_share: Share | None = 0.2
    """Largest share of characters in such lines."""
    max_duplicate_paragraph_share: Share | None = 0.3
    """Largest share of paragraphs that repeat an earlier one."""
    max_duplicate_paragraph_char_share: Share | None = 0.2
    """Largest share of characters in such paragraphs."""
    max_top_2gram_char_share: Number = _at_least_zero(0.20)
    """Largest share of characters in the most frequent 2 words in a row."""
    max_top_3gram_char_share: Number = _at_least_zero(0.18)
    """The same for 3 words."""
    max_top_4gram_char_share: Number = _at_least_zero(0.16)
    """The same for 4 words."""
    max_duplicate_5gram_char_share: Share | None = 0.15
    """Largest share of characters in 5 words that occurred before."""
    max_duplicate_6gram_char_share: Share | None = 0.14
    """The same for 6 words."""
    max_duplicate_7gram_char_share: Share | None = 0.13
    """The same for 7 words."""
    max_duplicate_8gram_char_share: Share | None = 0.12
    """The same for 8 words."""
    max_duplicate_9gram_char_share: Share | None = 0.11
    """The same for 9 words."""
    max_duplicate_10gram_char_share: Share | None = 0.10
    """The same for 10 words."""


class C4Rules(Section):
    """C4's rules for whole pages (Raffel et al. 2020, section 2.2).

    C4 also removes lines; here text stays as it is, and what those lines amount to is a share that
    can be limited. The word list of C4 is the section `blocklist`.
    """

    min_sentences: Whole = _at_least_zero(5)
    """Fewest sentences in the lines that C4 would keep."""
    max_lorem_ipsum: Whole = _at_least_zero(0)
    """Most occurrences of "lorem ipsum"."""
    max_curly_brackets: Whole = _at_least_zero(0)
    """Most opening curly brackets."""
    min_terminal_line_share: Share | None = None
    """Least share of lines that end like a sentence; not published, off."""
    max_javascript_line_share: Share | None = None
    """Largest share of lines with the word "javascript"; not published, off."""
    max_policy_line_share: Share | None = None
    """Largest share of lines about cookies and terms of use; not published, off."""


class FineWebRules(Section):
    """FineWeb's own rules (Penedo et al. 2024, section 3.5)."""

    min_punctuated_line_share: Share | None = 0.12
    """Least share of lines that end with a sentence's punctuation."""
    max_short_line_share: Share | None = 0.67
    """Largest share of lines of at most `signals.short_line_chars` characters."""
    max_duplicate_line_char_share: Share | None = 0.01
    """Largest share of characters (line ends left out) in lines that repeat an earlier one."""
    max_newline_word_ratio: Number = _at_least_zero(0.3)
    """Most line ends a word."""


class CodeRules(Section):
    """Rules for source code (Chen et al. 2021, "Codex", section 3.1; Lozhkov et al. 2024, "The
    Stack v2", section 2)."""

    max_mean_line_chars: Number = _at_least_zero(100.0)
    """Longest mean line."""
    max_line_chars: Whole = _at_least_zero(1000)
    """Longest line."""
    min_alphanumeric_share: Share | None = 0.25
    """Least share of letters and digits among all characters."""
    max_autogenerated: Whole = _at_least_zero(0)
    """Most marks of generated code among the first lines."""
    max_encoded_share: Share | None = 0.5
    """Largest share of characters in long runs of base64 or lists of hexadecimal bytes."""
    max_encoded_chars: Whole = _at_least_zero(1024)
    """Longest such run."""
    max_comment_line_share: Share | None = None
    """Largest share of lines that start like a comment; not published, off."""


class MathsRules(Section):
    """Rules for mathematical text; thresholds of our own, after the idea of OpenWebMath (Paster et
    al. 2023, section 3.1) to look for LaTeX and symbols."""

    min_symbol_word_ratio: Number = _at_least_zero(0.01)
    """Fewest LaTeX commands and mathematical symbols a word."""
    max_digit_share: Share | None = 0.5
    """Largest share of digits among non-space characters: longer ones are tables."""


LANGUAGES = (
    "af am ar as az be bg bn br bs ca cs cy da de el en eo es et eu fa fi fr fy ga gd gl gu ha he "
    "hi hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky la lg ln lo lt lv mg mk ml mn mr ms my "
    "ne nl no om or pa pl ps pt qu ro ru sa si sk sl so sq sr sv sw ta te th tl tr ug uk ur uz vi "
    "xh yo zh zu zxx ace bcl dz ext gcf gom grc gug hbo kik nso pcm rw se sn st an ary crh fo fuv "
    "gcr guw kab lb lij ltg uzs wa sdh arz ba mt nn oc tg tk tt vec vo wuu yue und"
)
"""Codes of the languages that are told apart: ISO 639-1, or 639-3 where there is none; `zxx` is no
language, `und` is nothing to go by."""


class LanguageRules(Section):
    """Which languages are kept; needs `signals.language`."""

    allowed: tuple[str, ...] = ()
    """ISO 639 codes of the languages to keep; all when empty."""
    min_confidence: Share | None = 0.65
    """Least probability of the language (FineWeb's threshold; Penedo et al. 2024, section 3.2)."""

    @model_validator(mode="after")
    def _check_allowed(self) -> LanguageRules:
        known = LANGUAGES.split()
        for code in self.allowed:
            if code not in known:
                near = [other for other in known if other[0] == code[:1].lower()]
                raise ValueError(
                    f"allowed: {code!r} is no language that is told apart; with that letter "
                    f"there are {', '.join(near) or 'none'}"
                )
        return self


class BlocklistRules(Section):
    """What the lists of `signals.bad_words` and `signals.blocked_urls` reject."""

    max_bad_words: Whole = _at_least_zero(0)
    """Most bad words in a document (C4 allows none)."""
    max_bad_word_share: Share | None = None
    """Largest share of bad words among the words."""
    max_blocked_urls: Whole = _at_least_zero(0)
    """0 rejects a document whose address or domain is listed; `null` keeps it."""


class EducationRules(Section):
    """What the classifier of `signals.classifier` rejects."""

    min_score: Number = 3.0
    """Least score (Penedo et al. 2024, section 4: 3 of 5 for FineWeb-Edu)."""


_PRESETS: dict[str, dict[str, Any]] = {
    "web": {"gopher": {}, "repetition": {}, "c4": {}, "fineweb": {}},
    "code": {"code": {}, "max_chars": 1_000_000, "max_line_repeat_share": 1.0},
    "maths": {"maths": {}, "repetition": {}, "max_mean_word_chars": 30.0},
}


class QualityConfig(Section):
    """Heuristic filters; every rejected document keeps all its reasons.

    Presets: `web` switches on gopher, repetition, c4 and fineweb; `code` switches on code, allows
    1,000,000 characters and any number of repeated lines; `maths` switches on maths and repetition
    and allows mean words of 30 characters. A key that is given wins: `gopher: null` beside
    `preset: web` leaves that family off.
    """

    min_chars: int = Field(default=80, ge=0)
    """Shorter documents are dropped."""
    max_chars: int = Field(default=100_000, ge=1)
    """Longer documents are dropped."""
    min_alpha_share: Share = 0.2
    """Least share of letters and digits among non-space characters."""
    max_line_repeat_share: Share = 0.5
    """Largest share of lines that repeat an earlier line."""
    max_mean_word_chars: float = Field(default=15.0, gt=0)
    """Longest mean word length."""
    gopher: GopherRules | None = None
    """Rules for prose."""
    repetition: RepetitionRules | None = None
    """Rules for text that repeats itself."""
    c4: C4Rules | None = None
    """Rules for web pages."""
    fineweb: FineWebRules | None = None
    """Rules for web pages that are lists."""
    code: CodeRules | None = None
    """Rules for source code."""
    maths: MathsRules | None = None
    """Rules for mathematical text."""
    language: LanguageRules | None = None
    """Languages that are kept."""
    blocklist: BlocklistRules | None = None
    """Bad words and blocked addresses."""
    education: EducationRules | None = None
    """Least score of the quality classifier."""
    preset: Literal["web", "code", "maths"] | None = None
    """Families and thresholds that are set where no key is given."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(name := given.get("preset"), str):
            return {**_PRESETS.get(name, {}), **given}
        return given


class SignalsConfig(Section):
    """What is measured of every document, once."""

    language: bool = True
    """Identify the language."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Words of which prose has at least some (Rae et al. 2021); lower case, 64 at most."""
    pii: bool = False
    """Count personal data by kind (it is replaced by the section `pii` of `prepare`)."""
    short_line_chars: Count = 30
    """A line of at most so many characters is short (Penedo et al. 2024)."""
    bad_words: tuple[Path, ...] = ()
    """Text files of bad words or phrases, one a line; `#` starts a comment."""
    blocked_urls: tuple[Path, ...] = ()
    """Text files of blocked domains or addresses, one a line; `#` starts a comment."""
    classifier: Path | None = None
    """Directory of a fitted quality classifier (`python -m jobs.classifier`)."""

    @model_validator(mode="after")
    def _check_stop_words(self) -> SignalsConfig:
        if len(self.stop_words) > 64:
            raise ValueError(f"stop_words holds {len(self.stop_words)} words; 64 at most")
        for word in self.stop_words:
            if not word.isalpha() or word != word.lower():
                raise ValueError(f"stop_words: {word!r} is not one word in lower case")
        return self


class PiiConfig(Section):
    """Personal data that is replaced in the documents that are kept; all off by default."""

    mails: bool = False
    """Replace e-mail addresses."""
    ips: bool = False
    """Replace public IP addresses, versions 4 and 6; private and reserved ones stay."""
    phones: bool = False
    """Replace telephone numbers in international (+...) or US form."""
    secrets: bool = False
    """Replace access keys, tokens and private keys in the forms of well-known services."""
    cards: bool = False
    """Replace credit-card numbers whose check digit is right."""
    replacement: Literal["token", "fake"] = "token"
    """`token`: a fixed mark like <EMAIL>; `fake`: a plausible value that is nobody's."""
