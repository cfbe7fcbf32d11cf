"""Figures and GIFs of a run."""

import io
import math
import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.runs.checkpoint import write_atomically


def save_image(path: Path, image: np.ndarray) -> None:
    """Writes an (H, W, 3) uint8 picture as PNG."""
    from PIL import Image

    write_atomically(path, lambda file: Image.fromarray(image).save(file, format="PNG"))


def fit_image(image, shape: tuple[int, int]) -> np.ndarray:
    """A picture of Pillow's -> (H, W, 3) uint8: its middle, cut to the shape's ratio and then scaled."""
    height, width = shape
    scale = min(image.width / width, image.height / height)
    cut = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (image.width - cut[0]) // 2, (image.height - cut[1]) // 2
    image = image.crop((left, top, left + cut[0], top + cut[1])).convert("RGB")  # first: scaling looks beyond the edge of a cut
    return np.asarray(image.resize((width, height), 2), np.uint8)  # bilinear: no ringing


def write_gif(file: BinaryIO, frames: np.ndarray, fps: int) -> None:
    """Writes (T, H, W, 3) uint8 frames as a looping GIF."""
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=1000 // fps, loop=0)


def save_gif(path: Path, frames: np.ndarray, fps: int = 12) -> None:
    """Writes (T, H, W, 3) uint8 frames as a looping GIF; a still end is cut to one second."""
    moving = np.flatnonzero((frames[1:] != frames[:-1]).any(axis=(1, 2, 3)))
    frames = frames[: (moving[-1] + 2 if len(moving) else 1) + fps]
    write_atomically(path, lambda file: write_gif(file, frames, fps))


def _save_figure(path: Path, figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def figure_type():
    """matplotlib's Figure, which draws without a screen. A notebook's MPLBACKEND, which may name what is not installed here, is not
    read: matplotlib would refuse to be imported."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure


def save_curves(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]], x_label: str) -> None:
    """Small multiples of name -> (x (P,), values (num_seeds, P)): a line per seed, the mean, a band of one standard error."""
    Figure = figure_type()

    columns = 4
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * rows), layout="constrained")
    for place, (name, (x, values)) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
        axes.plot(x, values.T, color="C0", alpha=0.25, linewidth=0.7)
        axes.plot(x, mean, color="C0", linewidth=1.6)
        axes.fill_between(x, mean - error, mean + error, color="C0", alpha=0.2)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if place >= len(curves) - columns:
            axes.set_xlabel(x_label, fontsize=8)
    _save_figure(path, figure)


def save_comparison(path: Path, curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]], x_label: str) -> None:
    """A panel per metric: of every name in it x (P,), values (num_seeds, P), the mean and a band of one standard error."""
    Figure = figure_type()

    num_lines = max(len(lines) for lines in curves.values())
    figure = Figure(figsize=(4.5 * len(curves), 3.2 + 0.16 * num_lines), layout="constrained")
    for axes, (metric, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for place, (name, (x, values)) in enumerate(lines.items()):
            mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
            colour = f"C{place % 10}"
            axes.plot(x, mean, color=colour, linewidth=1.4, linestyle=("-", "--", ":")[place // 10 % 3], label=name)
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15)
        axes.set_title(metric, fontsize=9)
        axes.set_xlabel(x_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=7, ncols=2)
    _save_figure(path, figure)


def save_strips(path: Path, images: dict[int, np.ndarray], title: str) -> None:
    """Pictures through time under one another, each labelled with its update; at most eight, evenly spaced."""
    Figure = figure_type()

    updates = sorted(images)
    chosen = [updates[i] for i in np.unique(np.linspace(0, len(updates) - 1, min(8, len(updates))).round().astype(int))]
    height, width = images[chosen[0]].shape[:2]
    figure = Figure(figsize=(12, 0.6 + len(chosen) * (11 * height / width + 0.1)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for place, update in enumerate(chosen):
        axes = figure.add_subplot(len(chosen), 1, place + 1)
        axes.imshow(images[update], interpolation="nearest")
        axes.set_ylabel(f"update {update}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    _save_figure(path, figure)


def read_strips(folder: Path) -> dict[int, np.ndarray]:
    """The pictures that `save_image` wrote as folder/UPDATE.png."""
    from PIL import Image

    paths = [path for path in folder.glob("*.png") if re.fullmatch(r"[0-9]{8,}", path.stem)]
    return {int(path.stem): np.asarray(Image.open(path)) for path in paths}
