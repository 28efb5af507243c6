"""Escape untrusted text (file names, prompts, messages about them) for terminals, pages and tables.

A file name may contain any byte. `os.fsdecode` represents bytes that are not valid UTF-8 as lone surrogates, and
`os.fsencode` restores them. In output they are written as `\\xe9`, as are terminal control characters.
"""

import re

# Control characters except tab and line feed; line and paragraph separators; bidirectional controls; surrogates; the
# two noncharacters that XML forbids.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
# Characters at which spreadsheet programs start a formula, including full-width forms.
_FORMULA = "[=+\\-@\t\r\uff1d\uff0b\uff0d\uff20]"
_STARTS_FORMULA, _STARTS_QUOTED_FORMULA = re.compile(f"'*{_FORMULA}"), re.compile(f"'+{_FORMULA}")


def is_text(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8, that is, contains no lone surrogates."""
    return _SURROGATES.search(text) is None


def printable(text: str) -> str:
    """Escape control characters; keep line breaks and tabs."""
    return _UNPRINTABLE.sub(_escape, text)


def printable_name(name: str) -> str:
    """Escape control characters, line breaks and tabs."""
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def json_text(encoded: str) -> str:
    """Escape lone surrogates in JSON text with non-ASCII strings, so that it can be encoded as UTF-8."""
    return _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", encoded)


def csv_cell(text: str) -> str:
    """Prefix an apostrophe to text that a spreadsheet would evaluate; `text_of_csv_cell` removes it."""
    return f"'{text}" if _STARTS_FORMULA.match(text) else text


def text_of_csv_cell(cell: str) -> str:
    """Return the original text of a cell that `csv_cell` wrote."""
    return cell[1:] if _STARTS_QUOTED_FORMULA.match(cell) else cell


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    # These code points represent bytes that are not valid UTF-8.
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
