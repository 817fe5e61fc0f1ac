"""Draw the pictures of docs/bias-gallery.md from the code on that page: python docs/make_gallery.py

Each code block leaves a `bias`; the scores of its first batch entry and head are drawn into the
image the section names. Needs matplotlib.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, List, Tuple

PAGE = Path(__file__).with_name("bias-gallery.md")
SECTION = re.compile(r"!\[[^\]]*\]\((images/bias_\w+\.png)\)\s+```python\n(.*?)```", re.DOTALL)


def sections() -> List[Tuple[str, str]]:
    """(image path relative to docs/, code) of each section."""
    return SECTION.findall(PAGE.read_text(encoding="utf-8"))


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for image, code in sections():
        names: Dict[str, object] = {}
        exec(compile(code, str(PAGE), "exec"), names)
        scores = names["bias"].dense()[0, 0].detach().numpy()  # type: ignore[attr-defined]
        figure, axes = pyplot.subplots(figsize=(5.2, 2.4), dpi=90, layout="constrained")
        shown = axes.imshow(scores, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_xlabel("keys")
        axes.set_ylabel("queries")
        axes.set_facecolor("white")
        figure.colorbar(shown, ax=axes)
        target = PAGE.parent / image
        target.parent.mkdir(exist_ok=True)
        figure.savefig(target)
        pyplot.close(figure)


if __name__ == "__main__":
    draw()
