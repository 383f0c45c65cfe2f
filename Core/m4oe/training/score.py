"""How a model scores on cases that training never saw, routed as any volume is whose header tells the modality.

Images come with the modality of their plan; volumes of other formats than DICOM may leave the choice to the gate alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..evaluation import Score, as_annotated, evaluate_case
from ..package import load_model, save_model
from ..predictor import Predictor
from .cache import CaseSource, Failure, load_or_fail


@dataclass(frozen=True)
class CaseResult:
    """What came of a case.

    Attributes:
        case: Its name.
        expert: The name of its modality's expert.
        gate: What the gate said by itself: a probability of each expert; empty where there is no image gate.
        scores: By structure.
        chose_weights: Whether it is a validation case: training did not learn from it, but kept the weights that were
            best on it.
    """

    case: str
    expert: str
    gate: Mapping[str, float]
    scores: tuple[Score, ...]
    chose_weights: bool = False

    @property
    def dice(self) -> dict[str, float]:
        """Dice of the structures that the truth has."""
        return {score.structure: score.dice for score in self.scores if score.counted and score.dice is not None}


def score_model(
    model: Path,
    sources: Sequence[CaseSource],
    emit: Callable[[dict[str, Any]], None],
    device: str = "auto",
    validation: Sequence[CaseSource] = (),
) -> list[CaseResult]:
    """Scores a model on cases and writes its mean Dice per expert and structure, and their number, into its file.

    Scores of experts that have no case here stay; the experts whose scores are of `validation` are told in the model's
    training as "scored_on_validation". A case that cannot be read is told as an event and left out.
    """
    results = []
    chose = {source.name for source in validation}
    for result in _results(Predictor(model, device), sources, emit, chose):
        results.append(result)
        dice = {key: round(value, 4) for key, value in result.dice.items()}
        emit({"event": "scored", "case": result.case, "expert": result.expert, "gate": result.gate, "dice": dice})
    means = mean_dice(results)
    emit({"event": "scores", "dice": means})
    network, spec = load_model(model)
    counts = {**spec.training.get("scored_cases", {}), **Counter(result.expert for result in results)}
    scored = {result.expert for result in results}
    earlier = set(spec.training.get("scored_on_validation", ())) - scored
    chosen = sorted(earlier | {result.expert for result in results if result.chose_weights})
    training = {**spec.training, "scored_cases": counts}
    training |= {"scored_on_validation": chosen} if chosen or earlier else {}
    save_model(model, network, replace(spec, scores={**spec.scores, **means}, training=training))
    return results


def mean_dice(results: Iterable[CaseResult]) -> dict[str, dict[str, float]]:
    """Mean Dice by expert and structure."""
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        by_structure = found.setdefault(result.expert, {})
        for key, value in result.dice.items():
            by_structure.setdefault(key, []).append(value)
    return {expert: {key: round(fmean(dice), 3) for key, dice in by.items()} for expert, by in found.items()}


def _results(
    predictor: Predictor,
    sources: Sequence[CaseSource],
    emit: Callable[[dict[str, Any]], None],
    chose: Set[str] = frozenset(),
) -> Iterator[CaseResult]:
    keys, experts = predictor.spec.label_keys, predictor.spec.expert_names
    for source in sources:
        loaded = load_or_fail(source)
        if isinstance(loaded, Failure):
            emit({"event": "left out", "case": loaded.name, "reason": loaded.reason})
            continue
        image, truth = loaded
        assert truth is not None  # cases are held back with their labels
        labels, report = predictor(image)
        counted = as_annotated(keys, source.annotated)
        scores = evaluate_case(labels, truth, keys, counted, source.annotated, case=source.name)
        yield CaseResult(source.name, experts[source.expert], report.gate, tuple(scores), source.name in chose)
