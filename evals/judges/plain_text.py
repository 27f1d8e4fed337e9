"""An answer without its dress: control tokens, markdown, typography, invisible and look-alike letters."""

from __future__ import annotations

import re
import unicodedata

from evals.judges.base import CONTROL_TOKEN
from evals.thoughts import MARKERS, Thoughts

_THOUGHTS = Thoughts(MARKERS, "", ())  # of all families, as an answer may hold markers that its template does not name
_INVISIBLE = dict.fromkeys(
    map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
)
_QUOTES = {ord(mark): "'" for mark in "‘’‚‛ʼ´`′＇"} | {ord(mark): '"' for mark in "“”„‟«»″＂"}
# Letters of other scripts that look like Latin ones.
_LOOKALIKES = str.maketrans(
    "АВЕЅІЈКМНОРСТХУаесіјорѕухԁһԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧαεικνορτυχ", "ABESIJKMHOPCTXYaecijopsyxdhqwABEZHIKMNOPTYXaeiknoptux"
)
_MIXED = re.compile(r"\w*(?:[A-Za-z]\w*[\u0370-\u052f]|[\u0370-\u052f]\w*[A-Za-z])\w*")
_ROLE = re.compile(r"\A\s*(?:(?:assistant|model|chatbot|ai|bot)\s*(?::|\n)|(?:response|answer)\s*:)\s*", re.IGNORECASE)
_MARKDOWN = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]?|```\w*[ \t]*$|~~~\w*[ \t]*$|[-*_]{3,}[ \t]*$)|\*{1,3}|_{2,3}|~~|`", re.MULTILINE
)


def without_thoughts(text: str) -> str:
    """The text after its thoughts, "" where one does not end and nothing stands before it."""
    return _THOUGHTS.cut(text).answer if _THOUGHTS.are_in(text) else text


def plain(text: str) -> str:
    """The text without thoughts, control tokens, role, markdown and invisible characters, with straight quotes.

    Compatibility characters (full width, ligatures) become the usual ones, runs of spaces one space. Cyrillic and
    Greek letters become the Latin ones they look like in words that mix them with Latin letters, and in all words
    where most letters are Latin. Lines stay.
    """
    text = unicodedata.normalize("NFKC", without_thoughts(text).translate(_QUOTES)).translate(_INVISIBLE)
    text = _MIXED.sub(lambda match: match[0].translate(_LOOKALIKES), text)
    if len(re.findall("[A-Za-z]", text)) > len(re.findall("[\u0370-\u052f]", text)):
        text = text.translate(_LOOKALIKES)
    text = _ROLE.sub("", CONTROL_TOKEN.sub("\n", text))
    lines = (" ".join(line.split()) for line in _MARKDOWN.sub("", text).splitlines())
    return "\n".join(line for line in lines if line)
