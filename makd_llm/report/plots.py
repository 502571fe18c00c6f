"""A factorization in pictures: what every matrix got and lost, and what each step is worth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from makd_llm.files import replacing
from makd_llm.report.table import kept_share, steps_of


def factorization_plot(report: Mapping[str, Any], path: Path) -> None:
    """Writes heat maps, layer by role, of the share kept and of the residual, as a PNG; of a
    layer's experts the mean.

    The residual is that on held-out text where it was measured, else what calibration predicts.
    Beside them, where measured, how far the layers' outputs have come from the teacher's.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    matrices, held_out = report["matrices"], report.get("held_out")
    in_layers = [m for m in matrices if m["layer"] is not None]
    roles = list(dict.fromkeys(m["role"] for m in in_layers))
    n_layers = 1 + max(m["layer"] for m in in_layers)
    residuals = held_out["matrix_residuals"] if held_out else [m["residual"] for m in matrices]
    panels = {
        "share of parameters kept": [kept_share(m) for m in matrices],
        "residual on held-out text" if held_out else "residual predicted": residuals,
    }
    figure, axes = plt.subplots(
        1, 3 if held_out else 2, figsize=(12, 1.5 + 0.22 * n_layers), layout="constrained"
    )
    for axis, (title, values) in zip(axes, panels.items(), strict=False):
        found: dict[tuple[int, int], list[float]] = {}
        for matrix, value in zip(matrices, values, strict=True):
            if value is not None and matrix["layer"] is not None:
                place = (matrix["layer"], roles.index(matrix["role"]))
                found.setdefault(place, []).append(value)
        cells = np.full((n_layers, len(roles)), np.nan)
        for place, of_experts in found.items():
            cells[place] = np.mean(of_experts)
        image = axis.imshow(cells, aspect="auto", cmap="viridis", vmin=0)
        axis.set(title=title, ylabel="layer", xticks=range(len(roles)), xticklabels=roles)
        figure.colorbar(image, ax=axis)
    if held_out:
        axes[2].plot(held_out["layer_residuals"], range(n_layers), marker="o")
        axes[2].invert_yaxis()
        axes[2].set(title="|h_student - h_teacher| / |h_teacher|", ylabel="layer")
        axes[2].grid(alpha=0.3)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110)
    plt.close(figure)


def stages_plot(stages: Mapping[str, float], path: Path) -> None:
    """Writes bars of what each student's mean nats per token are above the teacher's, as a PNG."""
    import matplotlib.pyplot as plt

    students = steps_of(stages)[1:]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.5 * len(students)), layout="constrained")
    bars = axis.barh([s.stage for s in students], [s.above_teacher for s in students])
    axis.bar_label(bars, [f"{s.above_teacher:.2f}" for s in students], padding=3)
    axis.invert_yaxis()
    axis.set(xlabel="nats per token above the teacher")
    axis.margins(x=0.12)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110)
    plt.close(figure)
