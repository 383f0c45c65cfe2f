"""Structure keys for the names that others give: "Left kidney", "LK", "postcava", and tables of label values."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from .labels import catalogue

BACKGROUND = "background"
NOTHING = "-"  # for a label value that means none of the structures that are named
_ABBREVIATIONS = {
    "lk": "left kidney",
    "rk": "right kidney",
    "lag": "left adrenal",
    "rag": "right adrenal",
    "ivc": "inferior vena cava",
    "postcava": "inferior vena cava",
    "svc": "superior vena cava",
    "arota": "aorta",
    "gall bladder": "gallbladder",
    "bladder": "urinary bladder",
    "clear label": BACKGROUND,
}
_WORDS = {
    "l": "left",
    "r": "right",
    "oesophagus": "esophagus",
    "intestine": "bowel",
    "tumour": "tumor",
    "cancer": "tumor",
    "lesion": "tumor",
}
_FILLERS = frozenset({"and", "of", "or", "the", "whole", "gland"})
_VALUE_COLUMNS = ("labelvalue", "label", "index", "id", "value")
_NAME_COLUMNS = ("key", "structure", "name")


def key_of(name: str) -> str | None:
    """The key of the structure that `name` means, whatever its spelling, or None; "background" is one, also as "-"."""
    return BACKGROUND if name.strip() == NOTHING else _index().get(_words(name))


def keys_of(names: Mapping[int, str]) -> tuple[dict[int, str], dict[int, str]]:
    """Keys by label value, and the names that mean no structure.

    A bare "tumour" or "cyst" is that of the only organ that can have one.
    """
    keys = {value: key_of(name) for value, name in names.items()}
    for value, name in names.items():
        lesions = {f"{organ}_{'_'.join(sorted(_words(name)))}" for organ in keys.values()} & set(catalogue())
        if keys[value] is None and len(lesions) == 1:
            keys[value] = lesions.pop()
    known = {value: key for value, key in keys.items() if key and value}
    return known, {value: name for value, name in names.items() if value and value not in known}


def named_values(labels: Mapping[str, Any]) -> dict[int, str]:
    """Names by label value from {"1": "liver"}, {"liver": 1}, or {"whole liver": [1, 2], "tumour": 2} with regions.

    A value in several regions is named by the smallest, so that with an organ and its lesions the organ's own value
    gets the organ's name.

    Raises:
        ValueError: An entry is none of these.
    """
    names: dict[int, tuple[int, str]] = {}
    for left, right in labels.items():
        if isinstance(right, str) and re.fullmatch(r"\d+", left):
            values, name = [int(left)], right
        else:
            values, name = right if isinstance(right, list) else [right], left
            values = [int(value) if str(value).isdecimal() else value for value in values]
        if not values or not all(isinstance(value, int) for value in values):
            raise ValueError(f'the label {left!r}: {right!r} is not understood, expected such as {{"1": "liver"}}')
        for value in values:
            if value not in names or len(values) < names[value][0]:
                names[value] = (len(values), name)
    return {value: name for value, (_, name) in sorted(names.items())}


def named_rows(text: str) -> dict[int, str]:
    """Names by label value from a table, see `read_label_table`; one without rows has none."""
    rows = csv.reader(text.splitlines(), delimiter=delimiter(text))
    header = [column.strip().lower() for column in next(rows, [])]
    value, name = (
        header.index(min({*names} & {*header}, key=names.index)) for names in (_VALUE_COLUMNS, _NAME_COLUMNS)
    )
    return {int(row[value]): row[name].strip() for row in rows if row}


def delimiter(table: str) -> str:
    """What separates the columns of a table, by its header: a tab, a semicolon (as of Excel in German) or a comma."""
    header = table.partition("\n")[0]
    return next((sign for sign in "\t;" if sign in header), ",")


def read_rows(path: Path) -> csv.DictReader[str]:
    """The rows of a table with a header, with or without a byte order mark.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is not in UTF-8.
    """
    text = path.read_text(encoding="utf-8-sig")
    return csv.DictReader(StringIO(text, newline=""), delimiter=delimiter(text), skipinitialspace=True)


def read_meanings(source: Path | str) -> dict[int, str]:
    """Keys by label value, from what `read_label_table` reads.

    Raises:
        ValueError: It cannot be read, or a name is no structure.
    """
    keys = _all_known(source, read_label_table(source))
    return {value: key for value, key in keys.items() if key != BACKGROUND}


def _all_known(source: Path | str, names: Mapping[int, str]) -> dict[int, str]:
    keys, unknown = keys_of(names)
    if unknown:
        named = ", ".join(f"{value} ({name})" for value, name in unknown.items())
        raise ValueError(
            f"{source} names what is no structure: {named}; take English names such as Left kidney, or - for none"
        )
    return keys


def read_label_table(source: Path | str) -> dict[int, str]:
    """Names by label value, from JSON, a CSV or TSV table, or a text such as "1=liver,2=spleen,3-9=-".

    JSON is {"1": "liver"}, {"liver": 1} or a dataset.json. A table has a header with a column LabelValue, label,
    index, id or value, and a column key, structure or name: Slicer's colour tables and those of BIDS do.

    Raises:
        ValueError: The file is missing or holds no such table, or the text is another one or names no structure.
    """
    path = Path(source)
    if "=" in str(source) and not path.exists():
        return _from_text(str(source))
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _from_json(text) if path.suffix.lower() == ".json" else named_rows(text)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); expected a table of label values, or text such as 1=liver"
        ) from error
    except (ValueError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} is not a table of label values, such as a CSV with columns label and name") from error
    if not names:
        raise ValueError(f"{path} holds no label value; expected rows such as 1,liver")
    return names


def _from_text(text: str) -> dict[int, str]:
    pairs = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*=\s*(\S.*?)\s*", item) for item in text.split(",")]
    if not all(pairs):
        raise ValueError(f"the labels {text} are not understood, expected a file or such as 1=liver,2=spleen,3-9=-")
    ranges = [(int(pair[1]), int(pair[2] or pair[1]), pair[3]) for pair in pairs if pair]
    names = {value: name for first, last, name in ranges for value in range(first, last + 1)}
    _all_known(text, names)  # unlike those of a table, they were all meant to be used
    return names


def _from_json(text: str) -> dict[int, str]:
    values = json.loads(text)
    return named_values(values.get("labels", values))


@cache
def _index() -> dict[frozenset[str], str]:
    """Keys by the words of their names and of themselves."""
    index = {_words(text): key for key, entry in catalogue().items() for text in (key, entry.name)}
    return index | {frozenset({BACKGROUND}): BACKGROUND}


def _words(name: str) -> frozenset[str]:
    words = re.findall(r"[a-z]+|\d+", name.lower())
    words = _ABBREVIATIONS.get(" ".join(words), " ".join(words)).split()
    return frozenset(_WORDS.get(word, word) for word in words) - _FILLERS
