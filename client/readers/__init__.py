"""One reader per file format: files in, cases out. Pixels are loaded later, one case at a time."""

from __future__ import annotations

from client.config import CsvData, Data, Files, MsdData, NpzData, PhantomData, VocData
from client.readers.case import Case, Wanted
from client.readers.csv import read_csv
from client.readers.folder import read_folder
from client.readers.msd import read_msd
from client.readers.npz import read_npz
from client.readers.phantom import read_phantoms
from client.readers.voc import read_voc
from common.errors import DataError

__all__ = ["Case", "Wanted", "read_cases"]


def read_cases(data: Data, wanted: Wanted) -> list[Case]:
    """Every case of a data set, in an order that depends on the files alone.

    Raises:
      DataError: A file or folder is missing, unreadable or not what the study expects.
    """
    if not wanted.images and not isinstance(data, CsvData | PhantomData):
        raise DataError(
            f"data set {data.name}: this study reads a clinical table and no images; set "
            'data.format = "csv"'
        )
    if isinstance(data, NpzData):
        return read_npz(data, wanted)
    if isinstance(data, Files):
        return read_folder(data, wanted)
    if isinstance(data, CsvData):
        return read_csv(data, wanted)
    if isinstance(data, MsdData):
        return read_msd(data, wanted)
    if isinstance(data, VocData):
        return read_voc(data, wanted)
    return read_phantoms(data, wanted)
