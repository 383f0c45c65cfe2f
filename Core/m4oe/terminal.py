"""What all commands share: how they speak, and what they check before hours of work."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from .labels import catalogue
from .names import key_of
from .spec import ModelSpec
from .training_run import ERROR

FAILURES = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)  # one sentence each, no traceback
_NO_MEMORY = ("out of memory", "allocate memory", "enough memory", "ALLOC_FAILED")
_NO_GPU = ("CUDA error", "cuDNN error", "NVIDIA driver")


def count(number: int, noun: str) -> str:
    """Such as "1 case" or "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def keys(text: str) -> list[str]:
    """The parts of a list with commas, at least one."""
    return [key.strip() for key in text.split(",") if key.strip()] or [text]


def structures(text: str) -> list[str]:
    """The parts of a list with commas, the names of structures, such as "Left kidney", as their keys."""
    return [key if key in catalogue() else key_of(key) or key for key in keys(text)]


def one_line(error: object) -> str:
    """What an error says, without line breaks, and what to do where the system or a library does not tell."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        file = error.filename2 or error.filename  # of two, the copy
        return f"the disk is full{f', cannot write {file}' if file else ''}; make room and try again"
    text = " ".join(str(error).split())  # whatever a library says
    if not isinstance(error, (RuntimeError, MemoryError)):
        return text
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return f"the memory ran out ({text}); close other programs, crop the volume, or choose another device"
    if any(words in text for words in _NO_GPU):
        line = next(line for line in str(error).splitlines() if any(words in line for words in _NO_GPU))
        return (
            f"the GPU or its driver failed ({line.strip()}); try again, and if that does not help "
            "restart the computer, choose the CPU as device, or see what the Doctor says"
        )
    return text


def say(text: str) -> None:
    """Tells the user; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def say_error(error: object, code: int) -> int:
    """Tells the user an error, and gives back the exit code."""
    say(f"{ERROR}{one_line(error)}")
    return code


def prepare_folder(folder: Path) -> None:
    """Makes the folder and tries it, as hours of work must not end at a folder that cannot be written."""
    if folder.is_file():
        raise ValueError(f"cannot write into {folder}: it is a file; expected a folder for the results")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}); expected a folder with room") from error


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """Yields what shows phase and fraction on a bar; there is none where stderr is no terminal."""
    from tqdm import tqdm

    style = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc=title, bar_format=style, leave=False, disable=None) as bar:

        def show(phase: str, fraction: float) -> None:
            bar.n = fraction
            bar.set_postfix_str(phase)

        yield show


def score_table(spec: ModelSpec) -> str:
    """Dice by structure and expert, as text."""
    if not any(spec.scores.values()):
        return "Not scored."
    width = max(10, *(len(name) + 2 for name in spec.expert_names))
    cases = "computer-made phantoms" if "phantom" in str(spec.training.get("data")) else "cases"
    validated = spec.training.get("scored_on_validation", ())
    seen = "learn from" if validated else "see"
    lines = [f"Scored on {cases} that training did not {seen}:"]
    if validated:
        lines.append(
            f"Of {', '.join(validated)} they are validation cases, which chose the weights: there was no other."
        )
    lines.append("Dice".ljust(24) + "".join(name.rjust(width) for name in spec.expert_names))
    if counts := spec.training.get("scored_cases"):
        lines.append("(cases)".ljust(24) + "".join(str(counts.get(n, "-")).rjust(width) for n in spec.expert_names))
    for key in spec.structures:
        values = [spec.scores.get(name, {}).get(key) for name in spec.expert_names]
        lines.append(key.ljust(24) + "".join(("-" if v is None else f"{v:.3f}").rjust(width) for v in values))
    return "\n".join(lines)
