"""Scores of texts against values worked out by hand."""

from __future__ import annotations

import pytest

from lilliput.tasks.scores import _meteor, _NoSynonyms, scores

for library in ("sacrebleu", "nltk", "rouge_score"):
    pytest.importorskip(library)


def test_bleu_is_the_geometric_mean_of_its_precisions() -> None:
    found = scores(["the cat sat on the mat today"], [["the cat sat on the mat", "no word alike"]])
    # One word too many: n-gram precisions 6/7, 5/6, 4/5, 3/4, and no penalty for brevity.
    assert found["bleu"] == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)


def test_bleu_counts_over_the_corpus_and_references_may_differ_in_number() -> None:
    said = ["the cat sat on the mat", "a dog barks at night"]
    found = scores(said, [["a cat sat on the mat", "the cat sat on a mat"], ["a dog barks at night"]])
    # Each reference has one "the", the text two: 10 of 11 words count.  All pairs, triples and quadruples stand in some
    # reference.
    assert found["bleu"] == pytest.approx(100 * (10 / 11) ** 0.25)


def test_nist_is_information_per_word() -> None:
    # Two words, each log2(2 / 1) = 1 bit; the pair adds log2(1 / 1) = 0.  Unigrams: 2 bits over 2 words; pairs: 0.
    assert scores(["a b"], [["A B"]])["nist"] == pytest.approx(1)
    assert scores([""], [["a b"]])["nist"] == 0


def test_meteor_matches_words_and_stems() -> None:
    # Two words in one chunk: precision and recall 1, penalty 0.5 (1/2)^3.
    whole = 100 * (1 - 0.5 * (1 / 2) ** 3)
    for said in ("cats sat", "cat sat"):
        assert _meteor([said.split()], [[["cat", "sat"]]], _NoSynonyms()) == pytest.approx(whole)
    # One word of two: precision and recall 1/2, one chunk of one match.
    assert _meteor([["kitten", "sat"]], [[["cat", "sat"]]], _NoSynonyms()) == pytest.approx(100 * 0.5 * 0.5)


def test_the_name_says_whether_synonyms_count() -> None:
    assert len({"meteor", "meteor_without_synonyms"} & scores(["a"], [["a"]]).keys()) == 1


@pytest.mark.parametrize("said, share", [("police killed the gunman", 3 / 4), ("the gunman kill police", 2 / 4)])
def test_rouge_l_is_the_longest_common_subsequence(said: str, share: float) -> None:
    """The example of Lin (2004), section 3.1."""
    found = scores([said], [["nothing", "police kill the gunman"]])
    assert found["rouge_l"] == pytest.approx(100 * share)


@pytest.mark.parametrize("said, targets", [([], []), (["a"], []), (["a"], [[]])])
def test_a_text_without_reference_is_refused(said: list[str], targets: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        scores(said, targets)
