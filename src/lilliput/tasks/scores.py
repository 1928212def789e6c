"""Scores of generated texts against references, from maintained libraries: BLEU, NIST, METEOR and ROUGE-L.

Published tables of E2E and WebNLG come from the challenges' own scripts, which split texts into words differently, so
compare only numbers of the same script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from lilliput.core.sources import needs


def scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of the texts against their references, over the whole corpus.

    bleu:    sacrebleu's, 0 to 100; words are split as by mteval 13a, and case counts.
    nist:    nltk's, up to 5-grams, of lower-case words split the same way.
    meteor:  nltk's, 0 to 100, the mean over texts of the best reference.  Without WordNet's data (`nltk.download`),
             words match exactly or by stem but not as synonyms, and the name is `meteor_without_synonyms`.
    rouge_l: rouge-score's F1, 0 to 100, the mean over texts of the best reference.
    Raises ValueError if a text has no reference, or a library is missing.
    """
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        counts = f"{len(hypotheses)} texts and {len(references)} lists of references"
        raise ValueError(f"there are {counts}; every text needs at least one reference")
    sacrebleu = needs("sacrebleu", "sacrebleu", "hf")
    streams = [[*stream] for stream in zip_longest(*references)]
    cut = needs("sacrebleu.tokenizers.tokenizer_13a", "sacrebleu", "hf").Tokenizer13a()
    words = [cut(text).split() for text in hypotheses]
    targets = [[cut(text).split() for text in texts] for texts in references]
    synonyms = _wordnet()
    return {
        "bleu": sacrebleu.corpus_bleu([*hypotheses], streams).score,
        "nist": _nist(words, targets),
        "meteor" if synonyms else "meteor_without_synonyms": _meteor(words, targets, synonyms or _NoSynonyms()),
        "rouge_l": _rouge(hypotheses, references),
    }


def _nist(words: Sequence[list[str]], targets: Sequence[list[list[str]]]) -> float:
    library = needs("nltk.translate.nist_score", "nltk", "hf")
    order = min(5, max(map(len, words)))  # n-grams longer than every text would divide by zero
    if order == 0:
        return 0.0
    low = [[word.lower() for word in text] for text in words]
    return library.corpus_nist([[[w.lower() for w in t] for t in texts] for texts in targets], low, order)


def _meteor(words: Sequence[list[str]], targets: Sequence[list[list[str]]], synonyms: Any) -> float:
    library = needs("nltk.translate.meteor_score", "nltk", "hf")
    return 100 * _mean(library.meteor_score(t, w, wordnet=synonyms) for w, t in zip(words, targets, strict=True))


def _rouge(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    scorer = needs("rouge_score.rouge_scorer", "rouge-score", "hf").RougeScorer(["rougeL"])
    pairs = zip(references, hypotheses, strict=True)
    return 100 * _mean(scorer.score_multi(texts, said)["rougeL"].fmeasure for texts, said in pairs)


class _NoSynonyms:
    """Replaces WordNet if its data are missing."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _wordnet() -> Any:
    """nltk's WordNet, or None if its data are not installed."""
    corpus = needs("nltk.corpus", "nltk", "hf").wordnet
    try:
        corpus.ensure_loaded()
    except LookupError:
        return None
    return corpus


def _mean(values: Iterable[float]) -> float:
    seen = list(values)
    return sum(seen) / len(seen)
