"""The rows of metrics.csv: one for each lane and each moment at which something was measured."""

import os
from pathlib import Path

import numpy as np

from common.runs.checkpoint import write_atomically


class Rows:
    """Rows held in memory, and what of them is in the file. A lane is a seed, or a variant's seed: {"seed": 0}."""

    def __init__(self, lanes: list[dict]):
        self.lanes, self.all = lanes, []
        self._columns: list[str] = []
        self._in_file = 0  # rows that are known to be in the file

    def add(self, rows: list[dict]) -> None:
        """Adds whole rows: "update", the lane's names, and metrics."""
        self.all += rows
        names = dict.fromkeys([*self._columns, *(name for row in rows for name in row)])
        if len(names) > len(self._columns):
            self._columns, self._in_file = list(names), 0

    def measured(self, update: int, columns: dict[str, np.ndarray]) -> dict[str, list]:
        """Adds a row for each lane: columns name -> (lanes,) -> the same as lists."""
        values = {name: np.asarray(value).tolist() for name, value in columns.items()}
        self.add([{"update": update} | lane | {name: v[i] for name, v in values.items()} for i, lane in enumerate(self.lanes)])
        return values

    def write(self, path: Path) -> None:
        """Adds the new rows to the file; writes all of it where it is new, its columns are, or the run was resumed."""
        new = self.all[self._in_file :]
        text = "".join(",".join(csv_cell(row.get(name)) for name in self._columns) + "\n" for row in new)
        if self._in_file:
            with open(path, "r+b") as file:  # not "a", which would make the file anew where it is gone
                file.seek(0, os.SEEK_END)
                file.write(text.encode())
        else:
            text = ",".join(self._columns) + "\n" + text
            write_atomically(path, lambda file: file.write(text.encode()))
        self._in_file = len(self.all)

    # --- looking back

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column where it has values: updates (P,), values (lanes, P)."""
        points = {}
        for row in self.all:
            if row.get(name) is not None:
                points.setdefault(row["update"], []).append(row[name])
        return np.array(list(points)), np.array(list(points.values()), float).T

    def latest(self, names: tuple[str, ...]) -> dict[str, float]:
        """The newest mean over lanes of each of the metrics named."""
        newest = {}
        for name in names:
            last = next((i for i in range(len(self.all), 0, -1) if self.all[i - 1].get(name) is not None), None)
            if last:
                newest[name] = float(np.mean([row[name] for row in self.all[last - len(self.lanes) : last]]))
        return newest

    def metric_names(self) -> list[str]:
        """The columns that are metrics."""
        return [name for name in self._columns if name not in ("update", *self.lanes[0])]

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The series of every metric but the steps taken."""
        found = {name: self.series(name) for name in self.metric_names() if name != "env_steps"}
        return {name: (x, values) for name, (x, values) in found.items() if len(x)}

    def table(self, title: str):
        """The evaluation at the start and at the end, mean and standard deviation over lanes."""
        from rich.table import Table

        table = Table(title=title)
        for column, justify in (("", "left"), ("start", "right"), (f"update {self.all[-1]['update']}", "right")):
            table.add_column(column, justify=justify)
        for name in self.metric_names():
            updates, values = self.series(name)
            if len(updates) and updates[0] == 0:
                table.add_row(name, *(f"{values[:, i].mean():.3f} ({values[:, i].std():.3f})" for i in (0, -1)))
        return table


def reduce_updates(values: np.ndarray) -> np.ndarray:
    """(lanes, updates) -> (lanes,): the last of a counter, else the mean of what happened (NaN if nothing did)."""
    if np.issubdtype(values.dtype, np.integer):
        return values[:, -1]
    happened = ~np.isnan(values)
    total = np.where(happened, values, 0).sum(1)
    return np.where(happened.any(1), total / np.maximum(happened.sum(1), 1), np.nan)


def csv_cell(value) -> str:
    """A value as metrics.csv has it; nine digits hold a float32 exactly."""
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
