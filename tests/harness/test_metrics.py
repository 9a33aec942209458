from __future__ import annotations

import math

import numpy as np
import pytest

from harness import datasets, metrics
from harness.errors import OrreryError

#: Six samples: two right of label 1, one right of label 0, two taken for 1 that are 0, one the other way round.
OUTPUTS = np.array([[0, 1], [0, 1], [1, 0], [0, 1], [0, 1], [1, 0]], dtype=float)
LABELS = np.array([1, 1, 0, 0, 0, 1])


def measured(dataset: str, outputs: object, labels: object) -> float:
    return metrics.measure(datasets.spec(dataset).metric, np.asarray(outputs, float), np.asarray(labels))


def test_every_data_set_has_a_metric_that_is_known() -> None:
    assert {datasets.spec(name).metric for name in datasets.names()} == {*metrics.METRICS}
    with pytest.raises(OrreryError, match=r"no metric called 'accurate'.*Did you mean accuracy"):
        metrics.measure("accurate", OUTPUTS, LABELS)


def test_accuracy_and_f1_by_hand() -> None:
    """3 of 6 are right. Precision 2/4, recall 2/3: F1 = 2 * 2 / (2 * 2 + 2 + 1) = 4/7."""
    assert measured("sst2", OUTPUTS, LABELS) == pytest.approx(50)
    assert measured("mrpc", OUTPUTS, LABELS) == pytest.approx((50 + 400 / 7) / 2)
    assert measured("mrpc", np.eye(2)[LABELS], LABELS) == 100
    assert measured("mrpc", np.tile([1, 0], (6, 1)), LABELS) == pytest.approx(25), "no F1 where nothing is found"
    assert measured("digits", np.eye(10)[[3, 1, 4, 1]], [3, 1, 4, 5]) == 75


def test_correlations_by_hand() -> None:
    """Of x = 0, 1, 2, 9 with y = 0, 1, 3, 2: ranks are 1 2 3 4 and 1 2 4 3, so that Spearman's is 1 - 6 * 2 / 60."""
    x, y = np.array([0.0, 1, 2, 9]), np.array([0.0, 1, 3, 2])
    a, b = x - 3, y - 1.5
    pearson = (a @ b) / math.sqrt((a @ a) * (b @ b))
    assert measured("stsb", x[:, None], y) == pytest.approx(100 * (pearson + 0.8) / 2)
    assert measured("stsb", -7 * y[:, None] + 2, y) == pytest.approx(-100)


def test_what_has_no_number() -> None:
    assert measured("stsb", np.full((3, 1), 2.5), [1, 2, 3]) == 0, "constant outputs order nothing"
    assert measured("stsb", [[1], [2], [3]], [4, 4, 4]) == 0
    for wrong in (math.nan, math.inf):
        with pytest.raises(OrreryError, match="not finite"):
            measured("sst2", [[0, wrong]], [0])
