"""What a data set is judged by, from a model's outputs and the true labels. In points: 100 is perfect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import OrreryError, unknown_name

if TYPE_CHECKING:
    from numpy.typing import NDArray


def accuracy(outputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share of samples [samples, labels] whose highest output is their label's."""
    from sklearn.metrics import accuracy_score

    return 100 * float(accuracy_score(labels, outputs.argmax(-1)))


def f1_and_accuracy(outputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean of accuracy and of label 1's F1, which is 0 where nothing is taken for label 1 (as GLUE has it for MRPC)."""
    from sklearn.metrics import f1_score

    f1 = 100 * float(f1_score(labels, outputs.argmax(-1), zero_division=0))
    return (accuracy(outputs, labels) + f1) / 2


def correlation(outputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean of Pearson's and Spearman's correlation of outputs [samples, 1] with scores.

    Where all outputs or all scores are the same no correlation is defined: it is 0 then.
    """
    from scipy.stats import pearsonr, spearmanr

    found = outputs[:, 0].astype(np.float64)
    if np.ptp(found) == 0 or np.ptp(labels) == 0:
        return 0.0
    return 100 * float(pearsonr(found, labels).statistic + spearmanr(found, labels).statistic) / 2


#: By the names that `datasets.toml` has.
METRICS = {
    "accuracy": accuracy,
    "mean of F1 and accuracy": f1_and_accuracy,
    "mean of Pearson and Spearman correlation": correlation,
}


def measure(name: str, outputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """The metric of that name. Raises OrreryError for outputs that are no finite numbers."""
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    if not np.isfinite(outputs).all():
        raise OrreryError(
            "The trained model's outputs are not finite, so that nothing can be measured of them. "
            "Lower --learning-rate."
        )
    return METRICS[name](outputs, labels)
