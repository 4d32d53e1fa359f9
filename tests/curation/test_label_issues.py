"""Out-of-fold probabilities against a plain loop, the ranking by hand, and flips found again."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from seewhy.curation import label_issues


def clouds(seed: int, n: int = 400, classes: int = 4, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8) vectors around a mean for each class, and their labels."""
    rng = np.random.default_rng(seed)
    means = 3 * rng.normal(size=(classes, 8))
    truth = rng.integers(0, classes, n)
    return (means[truth] + spread * rng.normal(size=(n, 8))).astype(np.float32), truth


def test_no_image_is_judged_by_who_has_seen_its_group() -> None:
    """Vectors that say nothing but which group they are of: out of fold, no better than guessing."""
    rng = np.random.default_rng(0)
    groups = np.arange(300) // 3
    truth = rng.integers(0, 2, 100)[groups]
    vectors = (rng.normal(size=(100, 90))[groups] + 0.01 * rng.normal(size=(300, 90))).astype(np.float32)
    seen = label_issues.out_of_fold(vectors, truth, np.arange(300)).argmax(axis=1)
    unseen = label_issues.out_of_fold(vectors, truth, groups).argmax(axis=1)
    assert np.mean(seen == truth) > 0.7
    assert np.mean(unseen == truth) < 0.62


def test_each_fold_is_a_discriminant_of_the_others() -> None:
    vectors, truth = clouds(1)
    groups = np.arange(len(truth))
    probs = np.exp(label_issues.out_of_fold(vectors, truth, groups, folds=3, seed=5))
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-9)
    from sklearn.model_selection import StratifiedGroupKFold

    train, rest = next(StratifiedGroupKFold(3, shuffle=True, random_state=5).split(vectors, truth, groups))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(vectors[train], truth[train])
    np.testing.assert_allclose(probs[rest], theirs.predict_proba(vectors[rest]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("truth", [[0, 1], [0, 0, 1], [0, 1, 2, 0, 1]])
def test_sets_of_a_few_images_have_an_answer(truth: list[int]) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(truth), 6)).astype(np.float32)
    found = label_issues.rank_label_issues(np.array(truth), label_issues.out_of_fold(vectors, np.array(truth), np.arange(len(truth))))
    assert sorted(found.order.tolist()) == list(range(len(truth)))
    assert not np.isnan(found.log_odds).any()


def test_ranking_by_hand() -> None:
    probs = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    with np.errstate(divide="ignore"):
        found = label_issues.rank_label_issues(np.array([0, 0, 0]), np.log(probs))
    assert found.order.tolist() == [2, 1, 0]
    np.testing.assert_allclose(found.log_odds, np.log([0.1 / 0.8, 0.2 / 0.5, 0.9 / 0.1]))
    assert found.suggested.tolist() == [2, 1, 1]


def test_nobody_doubts_a_class_that_nobody_knew() -> None:
    found = label_issues.rank_label_issues(np.array([0, 1, 1]), np.array([[-np.inf, 0.0], [-0.05, -3.0], [-np.inf, -np.inf]]))
    assert found.order.tolist() == [1, 0, 2]
    assert found.log_odds.tolist() == [-2.95, np.inf, np.inf]
    vectors, truth = clouds(0, 60, 3)
    groups = np.where(truth == 2, 1000, np.arange(60))  # the third class is one group
    issues = label_issues.rank_label_issues(truth, label_issues.out_of_fold(vectors, truth, groups))
    assert (truth[issues.order[-(truth == 2).sum() :]] == 2).all()


def test_two_classes_are_ranked_alike_on_both_sides() -> None:
    """Far on the wrong side, scikit-learn's own log-probabilities end at -87 for one class and go on for the other."""
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], 100)
    vectors = (rng.normal(size=(200, 5)) + 6 * truth[:, None]).astype(np.float32)
    moved = truth.copy()
    moved[[0, 199]] = [1, 0]
    found = label_issues.rank_label_issues(moved, label_issues.out_of_fold(vectors, moved, np.arange(200)))
    assert set(found.order[:2].tolist()) == {0, 199}
    assert found.log_odds[0] == pytest.approx(found.log_odds[1], rel=0.5)
    assert found.log_odds[0] < -20


@pytest.mark.parametrize("seed", range(3))
def test_flipped_labels_come_first(seed: int) -> None:
    vectors, truth = clouds(seed, 600)
    rng = np.random.default_rng(seed)
    wrong = np.zeros(600, dtype=bool)
    wrong[rng.permutation(600)[:30]] = True
    moved = np.where(wrong, (truth + rng.integers(1, 4, 600)) % 4, truth)
    found = label_issues.rank_label_issues(moved, label_issues.out_of_fold(vectors, moved, np.arange(600)))
    assert wrong[found.order[: wrong.sum()]].mean() >= 0.8
