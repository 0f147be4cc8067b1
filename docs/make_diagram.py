"""Draws docs/pipeline.svg, the diagram of the README: from a trained network to a smaller one.

python docs/make_diagram.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "pipeline", "svg.fonttype": "path", "font.family": "sans-serif"})
from matplotlib import pyplot as plt  # noqa: E402

STAGES = [
    ("trace", "which filters must\ngo together", "surgery/"),
    ("score", "what removing a unit\ncosts, orders 1 to 3", "scoring/"),
    ("select", "the cheapest units\nfor the budget", "selection/"),
    ("cut", "remove the filters,\ncheck the outputs", "surgery/"),
    ("repair", "refit the layers behind\nin closed form", "repair/"),
    ("fine-tune", "train, keep the\nbest epoch", "training/"),
]


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(11, 1.9))
    axes.set(xlim=(0, 11.1), ylim=(0.1, 2.0))
    axes.axis("off")
    width, gap = 1.62, 0.22
    for number, (name, text, folder) in enumerate(STAGES):
        left = 0.05 + number * (width + gap)
        colour = "#dbe9f6" if number in (1, 2, 3, 4) else "#eeeeee"
        axes.add_patch(plt.Rectangle((left, 0.75), width, 1.2, facecolor=colour, edgecolor="#335577"))
        axes.text(left + width / 2, 1.75, name, ha="center", va="center", weight="bold", size=11)
        axes.text(left + width / 2, 1.33, text, ha="center", va="center", size=7.5)
        axes.text(
            left + width / 2, 0.88, folder, ha="center", va="center", size=7.5, color="#555555", family="monospace"
        )
        if number + 1 < len(STAGES):
            axes.annotate("", (left + width + gap, 1.35), (left + width, 1.35), arrowprops={"arrowstyle": "->"})
    first, last = 0.05 + (width + gap) + width / 2, 0.05 + 4 * (width + gap) + width / 2
    back = {"arrowstyle": "->", "connectionstyle": "angle,angleA=90,angleB=0,rad=6", "color": "#335577"}
    axes.plot([last, last, first], [0.75, 0.35, 0.35], color="#335577", linewidth=1)
    axes.annotate("", (first, 0.75), (first, 0.33), arrowprops={**back, "connectionstyle": "arc3"})
    axes.text((first + last) / 2, 0.18, "every round (--rounds): score the smaller network again", ha="center", size=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("pipeline.svg"))
