"""Records (see preferences.py) of any file, folder, registered or published data set, with what was set aside."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sources.aside import SetAside
from sources.containers import read_rows
from sources.files import OUR_OUTPUTS, list_files, source_name
from sources.json_rows import fast_json
from sources.preferences import to_record
from sources.turns import Row, Unusable

Record = dict[str, Any]
Convert = Callable[[Row], Record]


@dataclass(frozen=True)
class DataSet:
    """Rows under one name: of a file, or of something else that is opened by `rows`."""

    name: str
    path: Path  # for messages, too
    convert: Convert = to_record
    rows: Callable[[], Iterable[Row]] | None = None
    num_samples: int | None = None  # take at most so many

    def read(self, aside: SetAside) -> Iterator[tuple[Row, Record]]:
        """(row as it stands there, record) of every usable row."""
        numbered = enumerate(self.rows(), 1) if self.rows else read_rows(self.path, aside, True, fast_json)
        for number, row in numbered:
            try:
                record = self.convert(row)
            except Unusable as reason:
                aside.add(self.path, number, str(reason), row)
                continue
            yield row, record


def data_sets(path: Path, skip: Iterable[Path] = ()) -> list[DataSet]:
    """The files of a file or folder, without those to skip; those of one subfolder share a name."""
    return [DataSet(source_name(file, path), file) for file in list_files(path, (*OUR_OUTPUTS, *skip))]


def read_records(path: Path, aside: SetAside) -> Iterator[Record]:
    """Every record of a file or folder, with its "source"."""
    for part in data_sets(path):
        for _, record in part.read(aside):
            yield {**record, "source": part.name}
