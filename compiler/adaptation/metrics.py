"""How good answers are: beside references, beside the teacher's answers, and by themselves."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

Tokens = Sequence[int]

NEEDS = {"sacrebleu": ("BLEU", "chrF++"), "rouge_score": ("ROUGE-L",)}
"""The packages that metrics come from; the extra `adapt` installs them."""


def agreement(answers: Sequence[Tokens], wanted: Sequence[Tokens]) -> float:
    """The share of places at which answers hold the same token as the wanted ones."""
    places = same = 0
    for answer, other in zip(answers, wanted, strict=True):
        length = max(len(answer), len(other))
        places += length
        same += sum(a == b for a, b in zip(answer, other, strict=False))
    return same / places if places else 0.0


def distinct(answers: Sequence[Tokens], n: int) -> float:
    """Distinct-n (Li et al., NAACL 2016): different n-grams as a share of all, over all answers."""
    grams = [
        tuple(answer[place : place + n])
        for answer in answers
        for place in range(len(answer) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def missing() -> list[str]:
    """The packages of `NEEDS` that are not installed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


def wordnet() -> Any | None:
    """nltk's WordNet, which tells METEOR words of one meaning; None where nltk or it is missing."""
    if importlib.util.find_spec("nltk") is None:
        return None
    from nltk.corpus import wordnet as found

    try:
        found.ensure_loaded()
    except LookupError:
        return None
    return found


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, chrF++, ROUGE-L and METEOR, 0 to 100, of texts, each with one reference or several.

    BLEU and chrF++ by sacrebleu, over the corpus; ROUGE-L by rouge-score, the F measure with the
    best reference of each text, in the mean; METEOR by nltk, with its defaults, over words and
    marks of punctuation, likewise. Scores whose package or data is missing are left out.
    """
    scores: dict[str, float] = {}
    absent = missing()
    if "sacrebleu" not in absent:
        import sacrebleu

        most = max(map(len, references))
        # sacrebleu takes the first references of all texts, then the second ones, and so on.
        columns: Any = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
        scores["BLEU"] = sacrebleu.corpus_bleu(list(texts), columns).score
        scores["chrF++"] = sacrebleu.corpus_chrf(list(texts), columns, word_order=2).score
    if "rouge_score" not in absent:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        found = [
            scorer.score_multi(list(given), text)["rougeL"].fmeasure
            for text, given in zip(texts, references, strict=True)
        ]
        scores["ROUGE-L"] = 100 * sum(found) / len(found)
    meanings = wordnet()
    if meanings is not None:
        from nltk.translate.meteor_score import meteor_score

        found = [
            meteor_score([_words(each) for each in given], _words(text), wordnet=meanings)
            for text, given in zip(texts, references, strict=True)
        ]
        scores["METEOR"] = 100 * sum(found) / len(found)
    return scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)
