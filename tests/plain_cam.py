"""Grad-CAM++ written term by term, for tests to hold against."""

from __future__ import annotations

import numpy as np


def term_by_term(activations: np.ndarray, gradients: np.ndarray, epsilon: float = 0.0) -> np.ndarray:
    """Eq. 19 of arXiv:1710.11063 with the derivatives of exp(logit), and Eq. 5; epsilon as pytorch-grad-cam adds it."""
    weights = np.zeros(activations.shape[:2])
    for n, k in np.ndindex(*weights.shape):
        total = sum(float(a) for a in activations[n, k].flat)
        for g in (float(g) for g in gradients[n, k].flat):
            second, third = g**2, g**3
            denominator = 2 * second + total * third + epsilon
            alpha = second / denominator if denominator != 0 and g != 0 else 0.0
            weights[n, k] += alpha * max(g, 0.0)
    return weights
