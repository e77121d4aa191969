"""Draw the README's picture: a two-layer network on handwritten digits, two groups, two rules.

Run ``python -m bench.pictures`` (needs pip install '.[examples]'); it writes history.png here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import numclip as nc
from numclip.examples.data import load_digits


def gradients(params, x, y):
    """Return the gradients of the mean cross entropy of ``tanh(x @ A + a) @ B + b``."""
    hidden = np.tanh(x @ params["A"] + params["a"])
    logits = hidden @ params["B"] + params["b"]
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = (error / error.sum(axis=1, keepdims=True) - y) / len(x)
    back = error @ params["B"].T * (1 - hidden**2)
    return {"A": x.T @ back, "a": back.sum(0), "B": hidden.T @ error, "b": error.sum(0)}


def main() -> None:
    """Train, and write the picture."""
    rng = np.random.default_rng(0)
    digits = load_digits().training
    layers = {
        "hidden": {"A": rng.normal(0, 0.3, (64, 64)), "a": np.zeros(64)},
        "output": {"B": rng.normal(0, 0.3, (64, 10)), "b": np.zeros(10)},
    }
    rules = {"hidden": nc.AutoClip(percentile=50), "output": nc.ByGlobalNorm(0.5)}
    groups = nc.ParamGroups(
        [
            nc.Group(
                name,
                {key: value.astype(np.float32) for key, value in layer.items()},
                clip=rules[name],
                nonfinite="skip",
            )
            for name, layer in layers.items()
        ]
    )
    optimizer = nc.Adam(groups, lr=2e-3)
    for step in range(400):
        rows = rng.integers(0, len(digits.labels), 20)
        images = digits.pixels[rows].copy()
        if step % 130 == 129:
            images[0, 0] = np.nan  # as from a broken record in the data
        targets = np.eye(10, dtype=np.float32)[digits.labels[rows]]
        groups.set_grads(gradients(groups.params, images, targets))
        optimizer.step()
    figure = groups.history.plot(Path(__file__).with_name("history.png"))
    print(groups.history)
    print(f"{len(figure.axes)} panels")


if __name__ == "__main__":
    main()
