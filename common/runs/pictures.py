"""What evaluations give besides numbers: pictures kept through time, films, arrays; and the figures at a run's end."""

from pathlib import Path

import numpy as np

from common.runs.checkpoint import write_atomically
from common.runs.plot import read_strips, save_curves, save_gif, save_image, save_strips


class Pictures:
    """Of one run's folder: figures/, videos/ and arrays/."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._through_time: set[str] = set()  # names of pictures
        self._drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # the newest evaluation's arrays of one axis

    def keep(self, update: int, results: dict[str, np.ndarray]) -> None:
        """Writes what an evaluation gave, leading axis lanes, each by its type and shape."""
        for name, value in results.items():
            if value.dtype == np.uint8 and value.ndim == 4:
                save_image(self.folder / "figures" / name / f"{update:08d}.png", value[0])
                self._through_time.add(name)
            elif value.dtype == np.uint8 and value.ndim == 5:
                save_gif(self.folder / "videos" / f"{name}.gif", np.concatenate(value, axis=2))
            elif value.ndim > 1:
                write_atomically(self.folder / "arrays" / f"{name}.npy", lambda file, value=value: np.save(file, value))
                if value.ndim == 2:
                    self._drawn[name] = (np.arange(value.shape[1]), value)

    def finish(self, title: str, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes figures/: curves of the metrics and of the newest evaluation, and each picture through training."""
        longer = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
        save_curves(self.folder / "figures" / "curves.png", longer, "update")
        if self._drawn:
            save_curves(self.folder / "figures" / "evaluation.png", self._drawn, "step")
        for name in self._through_time:
            folder = self.folder / "figures" / name
            save_strips(folder.with_suffix(".png"), read_strips(folder), f"{title}: {name} through training")
