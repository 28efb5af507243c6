"""Text from outside (names of files, prompts, messages about them) on its way to a terminal, a page or a table.

A file name may hold any byte. What is no UTF-8 is a lone surrogate in Python's strings, as `os.fsdecode` makes it, and
goes back to the same byte; in front of people it is written as `\\xe9`, like characters that steer a terminal.
"""

import re

# Control characters but tab and line feed; line and paragraph separators; what turns the direction of writing around;
# surrogates; the two that XML has not.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
# What a spreadsheet takes for the start of a formula, wide forms included.
_FORMULA = "[=+\\-@\t\r\uff1d\uff0b\uff0d\uff20]"
_STARTS_FORMULA, _STARTS_QUOTED_FORMULA = re.compile(f"'*{_FORMULA}"), re.compile(f"'+{_FORMULA}")


def is_text(text: str) -> bool:
    """Whether a string holds whole characters only, so that it can be encoded."""
    return _SURROGATES.search(text) is None


def printable(text: str) -> str:
    """Write out the characters that would not be shown but obeyed; lines stay lines."""
    return _UNPRINTABLE.sub(_escape, text)


def printable_name(name: str) -> str:
    """`printable`, in one line."""
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def json_text(encoded: str) -> str:
    """JSON of which strings are not ASCII alone, with the surrogates escaped: then it is UTF-8 whatever is in it."""
    return _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", encoded)


def csv_cell(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would compute; `text_of_csv_cell` takes it off."""
    return f"'{text}" if _STARTS_FORMULA.match(text) else text


def text_of_csv_cell(cell: str) -> str:
    """The inverse of `csv_cell`."""
    return cell[1:] if _STARTS_QUOTED_FORMULA.match(cell) else cell


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    # Bytes that are no UTF-8 are these.
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
