"""The scores of one site's classified cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import DataError


@dataclass(frozen=True)
class ClassificationScores:
    """How well the cases of one site were classified.

    Attributes:
        num_cases: Cases with a label; all the numbers below are about these.
        num_cases_per_class: In label order, zeros included.
        accuracy: Proportion of cases classified rightly; NaN without cases.
        balanced_accuracy: Mean recall of the classes that have cases.
        roc_auc: Area under the ROC curve, or NaN.
        roc_auc_reason: Why `roc_auc` is NaN; "" if it is a number.
    """

    num_cases: int
    num_cases_per_class: tuple[int, ...]
    accuracy: float
    balanced_accuracy: float
    roc_auc: float
    roc_auc_reason: str


def score_classification(
    probabilities_BL: np.ndarray,
    labels_B: np.ndarray,
    *,
    class_names: Mapping[int, str],
) -> ClassificationScores:
    """Score the predictions for all cases of one site.

    The ROC area is that of class 1 if there are two classes, and else the unweighted
    mean over classes of one class against the rest. It needs cases inside and outside
    each class. A site where a class has no cases, or all, has no such area: it is NaN,
    with the reason. A mean over fewer classes would be another quantity.

    Args:
        probabilities_BL: Class probabilities, float; columns in label order.
        labels_B: Class indices, integer; `UNKNOWN_LABEL` = not labelled, left out.
        class_names: Label value -> name, for the labels 0 to L - 1.

    Returns:
        The scores.

    Raises:
        DataError: If shapes do not fit, a probability is not finite, or a label is no
            class.

    Example:
        >>> scores = score_classification(
        ...     np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]),
        ...     class_names={0: "healthy", 1: "diseased"},
        ... )
        >>> scores.accuracy, scores.roc_auc, scores.roc_auc_reason
        (0.5, nan, 'no case of class 1 (diseased)')
    """
    _check(probabilities_BL, labels_B, class_names)
    is_labelled = labels_B != UNKNOWN_LABEL
    probabilities_BL, labels_B = probabilities_BL[is_labelled], labels_B[is_labelled]
    count_L = np.bincount(labels_B, minlength=len(class_names))
    is_right = probabilities_BL.argmax(axis=1) == labels_B
    # With no class missing, each class and its rest have cases: every area exists.
    missing = [index for index in sorted(class_names) if count_L[index] == 0]
    reason = ", ".join(f"no case of class {i} ({class_names[i]})" for i in missing)
    return ClassificationScores(
        num_cases=len(labels_B),
        num_cases_per_class=tuple(count_L.tolist()),
        accuracy=float(is_right.mean()) if len(is_right) else float("nan"),
        balanced_accuracy=balanced_accuracy(is_right, labels_B),
        roc_auc=float("nan") if missing else roc_auc(probabilities_BL, labels_B),
        roc_auc_reason=reason,
    )


def balanced_accuracy(is_right_B: np.ndarray, labels_B: np.ndarray) -> float:
    """Average the recall over the classes that have cases; NaN without cases.

    Args:
        is_right_B: Whether each case was classified rightly, bool.
        labels_B: Class indices.
    """
    recalls = [is_right_B[labels_B == index].mean() for index in np.unique(labels_B)]
    return float(np.mean(recalls)) if recalls else float("nan")


def roc_auc(probabilities_BL: np.ndarray, labels_B: np.ndarray) -> float:
    """Area under the ROC curve, of class 1 or the mean of one class against the rest.

    Args:
        probabilities_BL: Class probabilities, columns in label order.
        labels_B: Class indices; every class and its rest must have a case.
    """
    # Here, because a run that is no classification never needs scikit-learn.
    from sklearn.metrics import roc_auc_score

    num_classes = probabilities_BL.shape[1]
    areas = [
        roc_auc_score(labels_B == index, probabilities_BL[:, index])
        for index in (range(num_classes) if num_classes > 2 else (1,))
    ]
    return float(np.mean(areas))


def _check(
    probabilities_BL: np.ndarray, labels_B: np.ndarray, class_names: Mapping[int, str]
) -> None:
    num_classes = len(class_names)
    expected = (len(labels_B), num_classes)
    if probabilities_BL.shape != expected or sorted(class_names) != [
        *range(num_classes)
    ]:
        raise DataError(
            f"The probabilities have shape {probabilities_BL.shape} for "
            f"{len(labels_B)} labels and the classes {sorted(class_names)}.",
            hint="Expected one row per case and one column per class 0 to L - 1.",
        )
    if not np.isfinite(probabilities_BL).all():
        raise DataError(
            "A predicted probability is not finite.",
            hint="The model has diverged; look at the training loss of this site.",
        )
    strange = set(np.unique(labels_B).tolist()) - {*class_names, UNKNOWN_LABEL}
    if strange:
        raise DataError(
            f"Labels {sorted(strange)[:5]} are none of the classes "
            f"{sorted(class_names)}.",
            hint=f"Name every class in the card; {UNKNOWN_LABEL} means not labelled.",
        )
