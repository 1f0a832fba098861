"""Reads a recording that somebody saved as a text table: .csv, or .tsv with tabs.

Each row is a time step, each column a feature. The first line may be a header with the columns' names.
"""

import csv
import warnings
from pathlib import Path

import numpy as np

from cli import UserError, one_line


def read_table(path):
    """The numbers of a text table as (n_steps, n_features) float64; an empty cell is NaN.

    Columns are separated by tabs in a .tsv file, by commas in a .csv file, or by semicolons where its first line has
    these and no comma. Raises UserError, with line and column counted from 1, where a cell is no number or a line has
    another number of cells than the first one.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first_line = file.readline()
        delimiter = ";" if ";" in first_line and "," not in first_line else ","
        delimiter = "\t" if path.suffix.lower() == ".tsv" else delimiter
        cells = next(csv.reader([first_line], delimiter=delimiter), [])
        has_header = any(cell.strip() and not is_number(cell) for cell in cells)
        counted = cells[1:] == [str(number) for number in range(len(cells) - 1)]  # pandas numbers nameless columns
        if (has_header or counted) and len(cells) > 1 and not cells[0].strip():
            raise UserError(f"{path}: its first column has no name, as where pandas writes the number of each row; "
                            "save it without that column (index=False)")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy warns of an empty file, which is refused below
                return np.loadtxt(path, delimiter=delimiter, skiprows=int(has_header), ndmin=2, comments=None,
                                  quotechar='"', encoding="utf-8-sig")
        except ValueError:
            return read_slowly(path, delimiter, has_header)
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a text table ({one_line(error)[:160]}); save it as UTF-8 text with "
                        "one row per time step") from None


def read_slowly(path, delimiter, has_header):
    """`read_table` cell by cell, where the fast reader met an empty cell or something that is no number."""
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        if has_header:
            next(reader)
        for cells in reader:
            if not cells:
                continue
            for column, cell in enumerate(cells, 1):
                if cell.strip() and not is_number(cell):
                    raise UserError(f"{path}: line {reader.line_num}, column {column} holds {cell[:40]!r}, which is no "
                                    "number; every column must be a feature in numbers")
            if rows and len(cells) != len(rows[0]):
                raise UserError(f"{path}: line {reader.line_num} has {len(cells)} cells and the lines before it "
                                f"{len(rows[0])}; every time step needs a number for every feature")
            rows.append([float(cell) if cell.strip() else np.nan for cell in cells])
    return np.array(rows, dtype=np.float64, ndmin=2)


def is_number(cell):
    try:
        float(cell)
        return "_" not in cell  # Python reads 1_000 as a number; no table means that
    except ValueError:
        return False
