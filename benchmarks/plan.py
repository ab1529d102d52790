"""Tables as data, a selection of them, and the plan of cells that it makes."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from adfq.registry import find_method, method_label
from benchmarks.bundled import BUNDLED
from benchmarks.cell import Arguments, Cell
from benchmarks.metrics import Metric, find_metric

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: As `Selection.seeds`: a table's `Table.recorded_seeds`.
RECORDED: Literal["recorded"] = "recorded"

#: Suffixes of checkpoints, in the order in which they are looked for.
CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")

#: Headings of a table's first columns, see `benchmarks.report.tables`.
_HEADINGS = ("Method", "W/A", "Trained", "Images", "Iterations")

_DEFAULTS = "defaults"  # tables/defaults.toml, which is no table


def _find_tables() -> Path:
    # tables/ of the repository is installed as this package. importlib.resources cannot read one that has no
    # Python file from an editable installation.
    spec = find_spec("adfq_tables")
    locations = spec.submodule_search_locations if spec else None
    return next(Path(path) for path in locations or () if Path(path).is_dir())


#: The folder of the tables that ship.
TABLES = _find_tables()


@dataclass(frozen=True)
class Model:
    """A column.

    Attributes:
        key: its name in published.csv and in selections.
        label: its heading.
        name: the task's name of the model.
        preprocessing: overrides of the model's own preprocessing.
        arguments: keyword arguments of the model's factory.
        checkpoint: a weights file; None for bundled or downloaded weights.
    """

    key: str
    label: str
    name: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass(frozen=True)
class Row:
    """A method with its options, at every bit-width of the table.

    Attributes:
        key: its name among the rows.
        label: its heading.
        method: the method's name.
        arguments: the method's options.
        calibration_size: number of calibration images.
        calibration_batch_size: images in one pass of calibration; None for all at once.
    """

    key: str
    label: str
    method: str
    arguments: Mapping[str, Any]
    calibration_size: int
    calibration_batch_size: int | None


@dataclass(frozen=True)
class Entry:
    """The place of a cell in a table."""

    row: Row
    model: Model
    cell: Cell


@dataclass(frozen=True)
class Table:
    """One profile of one table.

    Attributes:
        name: ``"1"`` to ``"5"``, or the stem of a file of one's own.
        profile: the profile's name; empty for a file without profiles.
        title: the heading.
        caption: the subject of the measurement, for the reader of the table.
        task: the task's name.
        metrics: keys of `benchmarks.metrics.METRICS`.
        rows: in the order of the table; full precision, which every table has, is not among them.
        bits: bit-widths of the rows.
        models: in the order of the columns.
        calibration_size: number of calibration images where a method's settings have none; None for the method's own.
        calibration_batch_size: images in one pass of calibration where a method's settings have none; None for all at
            once.
        batch_size: images a batch in evaluation; None for the task's own.
        limit: largest number of evaluation images; None for all.
        task_arguments: options that the task alone has.
        digits: decimals of metrics, measured or published; None for each metric's own.
        seeds: seeds of the quantized cells.
        recorded_seeds: seeds of the quantized cells in committed results.
        cell_memory: memory that one cell takes, in GB, for models so small that one core is enough for each; None for
            models that have the machine for themselves.
        cost: whether the cost of each row stands beside its accuracy.
        training: whether each row says what its method trains, on how many images and in how many iterations.
        settings: by method, ``calibration_size``, ``calibration_batch_size`` and options that all its rows share; those
            by the key of a row go before them.
        data: the task's data spec; None where the user gives it.
        published: the ``task`` in published.csv whose numbers stand beside the measured ones, or None.
        full_precision_tolerance: largest difference, in points, between measured and published full precision of a
            model whose quantized results count; None for no such check.
        own: whether it comes from a file of the user's.
    """

    name: str
    profile: str
    title: str
    caption: str
    task: str
    metrics: Sequence[str]
    rows: Sequence[Row]
    bits: Sequence[str]
    models: Sequence[Model]
    calibration_size: int | None = None
    calibration_batch_size: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    task_arguments: Mapping[str, Any] = field(default_factory=dict)
    digits: int | None = None
    seeds: Sequence[int] = (0,)
    recorded_seeds: Sequence[int] = (0,)
    cell_memory: float | None = None
    cost: bool = False
    training: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: str | None = None
    published: str | None = None
    full_precision_tolerance: float | None = None
    own: bool = False

    @property
    def slug(self) -> str:
        """The stem of the table's files: ``table1-bundled``."""
        stem = f"table{self.name}" if self.name.isdigit() and not self.own else self.name
        return f"{stem}-{self.profile}" if self.profile else stem

    @property
    def heading(self) -> str:
        """The title with the table's number, or with the name of a table of one's own."""
        return f"Table {self.name}. {self.title}" if self.own or self.name.isdigit() else self.title

    def metric(self, key: str) -> Metric:
        """Return one of the table's metrics, with the table's decimals."""
        metric = find_metric(key)
        return metric if self.digits is None else replace(metric, digits=self.digits)

    def row(
        self,
        method: str,
        key: str | None = None,
        label: str | None = None,
        calibration_size: int | None = None,
        calibration_batch_size: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Row:
        """Return a row of this table.

        Args:
            method: the method's name.
            key: None for the method's name.
            label: None for the method's label.
            calibration_size: None for the first that there is of the method's settings, the table, and the method.
            calibration_batch_size: None for the first that there is of the method's settings and the table.
            arguments: options that go before the method's settings.
        """
        shared = {**self.settings.get(method, {}), **self.settings.get(key or method, {})}
        own = find_method(method).calibration_size
        size = _first(calibration_size, shared.pop("calibration_size", None), self.calibration_size, own)
        batch_size = _first(
            calibration_batch_size, shared.pop("calibration_batch_size", None), self.calibration_batch_size
        )
        assert size is not None
        arguments = {**shared, **(arguments or {})}
        return Row(key or method, label or method_label(method), method, arguments, size, batch_size)

    def entries(self, **common: Any) -> list[Entry]:
        """Return the table's cells, model after model, full precision first.

        Args:
            **common: fields that all cells share; ``checkpoint`` may be a function of the model's name, and is used for
                models that have none of their own.
        """
        checkpoint = common.pop("checkpoint", None)
        pretrained = common.pop("pretrained", False)
        entries = []
        for model in self.models:
            file = model.checkpoint or (checkpoint(model.name) if checkpoint else None)
            fields = {
                "task": self.task,
                "model": model.name,
                "model_arguments": tuple(sorted(model.arguments.items())),
                "preprocessing": tuple(sorted(model.preprocessing.items())),
                "checkpoint": file,
                "pretrained": pretrained and file is None,
                **common,
            }
            entries.append(Entry(self.row(FULL_PRECISION), model, Cell.create(method=FULL_PRECISION, **fields)))
            entries += [
                Entry(row, model, _quantized_cell(row, bits, seed, fields))
                for bits in self.bits
                for row in self.rows
                for seed in self.seeds
            ]
        return entries


def _first(*numbers: int | None) -> int | None:
    return next((number for number in numbers if number is not None), None)


def _quantized_cell(row: Row, bits: str, seed: int, fields: Mapping[str, Any]) -> Cell:
    return Cell.create(
        method=row.method,
        method_arguments=tuple(sorted(row.arguments.items())),
        calibration_size=row.calibration_size,
        calibration_batch_size=row.calibration_batch_size,
        bits=bits,
        seed=seed,
        **fields,
    )


@dataclass(frozen=True)
class Selection:
    """The part of tables to measure or read; the default is all of the bundled profile, with one seed.

    Attributes:
        profile: the tables' profile: ``bundled``, ``full`` for the paper's data and models, or another one of theirs.
        data: the task's data spec; None for the profile's own.
        data_name: name of the data set in records; None for that of its folder (`benchmarks.cell.data_set_name`).
        checkpoints: a folder of weights named after models, or None.
        models: keys or names of the columns; None for all.
        methods: methods, or keys of rows; None for all rows. Full precision is always there.
        also: methods beside those rows.
        bits: bit-widths such as ``"W4/A4"`` or ``"W4A4"``; None for the profile's own.
        seeds: seeds of calibration images and methods; None for the profile's own, ``"recorded"`` for those of
            committed results.
        calibration_size: number of calibration images of all rows; None for each row's own.
        calibration_batch_size: images in one pass of calibration of all rows; None for each row's own. A number that is
            not below the number of calibration images takes all at once.
        limit: number of images to evaluate on at most; None for all.
        batch_size: images a batch in evaluation; None for the table's or the task's own.
        task_arguments: options that the task alone has.
    """

    profile: str = BUNDLED
    data: str | None = None
    data_name: str | None = None
    checkpoints: str | Path | None = None
    models: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    also: Sequence[str] | None = None
    bits: Sequence[str] | None = None
    seeds: Sequence[int] | Literal["recorded"] | None = None
    calibration_size: int | None = None
    calibration_batch_size: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    task_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedTable:
    """A table with its cells, in the table's order."""

    table: Table
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Plan:
    """Tables whose cells are known and checked; equal cells of several tables are measured once."""

    tables: Sequence[PlannedTable]

    @property
    def cells(self) -> list[Cell]:
        """Each cell once, in the order of the tables."""
        return list(dict.fromkeys(entry.cell for planned in self.tables for entry in planned.entries))

    @property
    def cell_memory(self) -> float | None:
        """Memory that one cell takes at most, in GB; None where one needs the machine for itself."""
        sizes = [planned.table.cell_memory for planned in self.tables]
        return None if None in sizes else max(size for size in sizes if size is not None)


def make_plan(names: Sequence[str | Path] = (), selection: Selection | None = None, check_files: bool = True) -> Plan:
    """Return the plan of tables, checked: no file is read after it but data and weights.

    Args:
        names: tables that ship, by name, and files of one's own, whose names end in ``.toml``; none for all tables
            that have the profile.
        selection: None for the default one.
        check_files: whether the tasks' libraries, data and checkpoints must be there; reading a store needs none.

    Raises:
        AdfqError: for an unknown table, profile, model, method, option, metric or bit-width, a table file with a
            mistake, missing libraries, data or checkpoints, and tables of different tasks with one `Selection.data`.
    """
    from benchmarks.tasks import find_task

    selection = selection or Selection()
    tables = [
        choose_part(load_table(name, selection.profile), selection)
        for name in dict.fromkeys(names or table_names(selection.profile))
    ]
    if selection.data and len({table.task for table in tables}) > 1:
        raise AdfqError("tables of different tasks need different data: regenerate them one after the other")
    if len({table.slug for table in tables}) < len(tables):
        raise AdfqError("two tables have the same name: rename one's file")
    planned = []
    for table in tables:
        task, data = find_task(table.task), selection.data or table.data
        if data is None:
            raise AdfqError(f"the {table.profile} profile needs --data, {task.data} for example")
        for name in {**table.task_arguments, **selection.task_arguments}:
            if name not in task.arguments:
                raise AdfqError(f"{table.task} has no --{name.replace('_', '-')}")
        entries = table.entries(
            data=data,
            data_name=selection.data_name,
            pretrained=table.data != BUNDLED,
            checkpoint=_checkpoint_finder(selection.checkpoints, check_files),
            limit=selection.limit or table.limit,
            batch_size=selection.batch_size or table.batch_size or task.batch_size,
            task_arguments=task_arguments(task, {**table.task_arguments, **selection.task_arguments}),
        )
        if check_files:
            _check_libraries(table.task, task.libraries)
            _check_data(data, task.data)
            _check_checkpoints(table)
        planned.append(PlannedTable(table, entries))
    return Plan(tuple(planned))


def task_arguments(task: Any, given: Mapping[str, Any]) -> Arguments:
    """Return a task's own options as far as they are given and differ from its defaults, sorted."""
    chosen = {name: given.get(name) for name in task.arguments}
    return tuple(sorted((name, value) for name, value in chosen.items() if value not in (None, task.arguments[name])))


def choose_part(table: Table, selection: Selection) -> Table:
    """Return the part of a table that a selection asks for.

    Raises:
        AdfqError: for a model that the table does not have, an unknown method and unreadable bits.
    """
    if selection.models:
        known = {name: model for model in table.models for name in (model.key, model.name)}
        table = replace(table, models=[_choose_model(name, known) for name in dict.fromkeys(selection.models)])
    rows = _choose_rows(table, selection.methods) if selection.methods else list(table.rows)
    if selection.also:
        there = {row.key for row in rows}
        rows += [row for row in _choose_rows(table, dict.fromkeys(selection.also)) if row.key not in there]
    # These go before what the methods of the table have.
    if selection.calibration_size is not None:
        rows = [replace(row, calibration_size=selection.calibration_size) for row in rows]
    if selection.calibration_batch_size is not None:
        rows = [replace(row, calibration_batch_size=selection.calibration_batch_size) for row in rows]
    seeds = table.recorded_seeds if selection.seeds == RECORDED else selection.seeds or table.seeds
    bits = [str(Bits.parse(text)) for text in selection.bits or table.bits]
    return replace(table, rows=rows, bits=list(dict.fromkeys(bits)), seeds=list(dict.fromkeys(seeds)))


def _choose_model(name: str, known: Mapping[str, Model]) -> Model:
    if name not in known:
        raise AdfqError(f"unknown model {name!r}; there are {', '.join(known)}")
    return known[name]


def _choose_rows(table: Table, names: Iterable[str]) -> list[Row]:
    """Return the table's rows by their names; any other method makes a row of its own."""
    known = {row.key: row for row in table.rows}
    # Full precision is always there: differences are taken to it, and it tells whether a model is the published one.
    return [known.get(name) or table.row(name) for name in dict.fromkeys(names) if name != FULL_PRECISION]


def _checkpoint_finder(directory: str | Path | None, check: bool) -> Callable[[str], str] | None:
    if directory is None:
        return None

    def find(model: str) -> str:
        stem = Path(directory, model)
        for suffix in CHECKPOINT_SUFFIXES:
            path = stem.with_name(f"{stem.name}{suffix}")
            if path.is_file():
                return str(path)
        if not check:
            return str(stem.with_name(f"{stem.name}{CHECKPOINT_SUFFIXES[0]}"))
        raise AdfqError(f"there is no {stem}.safetensors (nor {', '.join(CHECKPOINT_SUFFIXES[1:])})")

    return find


def _check_libraries(task: str, libraries: Sequence[str]) -> None:
    from benchmarks.run.provenance import library_version

    # One on Python's path need not be installed, and one's module need not have its name.
    if missing := [name for name in libraries if library_version(name) is None and find_spec(name) is None]:
        raise AdfqError(f"{task} needs {', '.join(missing)}: pip install 'adfq[{task}]'")


def _check_checkpoints(table: Table) -> None:
    from benchmarks.tasks.packages import find_package_file, is_package

    for model in table.models:
        if model.checkpoint is not None and is_package(model.checkpoint):
            find_package_file(model.checkpoint)
            continue
        if model.checkpoint is not None and not Path(model.checkpoint).is_file():
            raise AdfqError(f"there is no checkpoint {model.checkpoint} of {model.name}")


def _check_data(spec: str, example: str) -> None:
    """Raise AdfqError for data in a folder that is not there.

    Args:
        spec: ``KIND:ROOT``, ``ROOT``, or a name.
        example: the task's example; one without a colon has a folder in it.
    """
    kind, colon, root = spec.partition(":")
    place = root if colon else kind
    if spec != BUNDLED and (colon or ":" not in example) and not Path(place).exists():
        raise AdfqError(f"there are no data in {place}")


# --- files of tables ------------------------------------------------------------------------------------------------


def table_names(profile: str | None = None) -> list[str]:
    """Return the names of the tables that ship.

    Args:
        profile: only tables that have it; None for all.

    Raises:
        AdfqError: for a profile that no table has.
    """
    names = sorted(path.stem for path in TABLES.glob("*.toml") if path.stem != _DEFAULTS)
    if profile is None:
        return names
    profiles = {name: _read(TABLES / f"{name}.toml")["profiles"] for name in names}
    if chosen := [name for name in names if profile in profiles[name]]:
        return chosen
    known = dict.fromkeys(known for each in profiles.values() for known in each)
    raise AdfqError(f"no table has a profile {profile!r}; there are {', '.join(known)}")


def load_table(name: str | Path, profile: str = BUNDLED) -> Table:
    """Return a table.

    Args:
        name: name of a table that ships, or a file whose name ends in ``.toml``.
        profile: one of the table's; of no account for a file without profiles.

    Raises:
        AdfqError: for an unknown table or profile, an unreadable file, and a mistake in it.
    """
    own = str(name).endswith(".toml")
    path = Path(name) if own else TABLES / f"{name}.toml"
    if not own and name not in table_names():
        raise AdfqError(f"unknown table {str(name)!r}; there are {', '.join(table_names())}, and files *.toml")
    spec = _read(path)
    where = str(path) if own else f"table {name}"
    profiles = spec.pop("profiles", None)
    if profiles is not None:
        _check_kind(profiles, _SUBTABLE, f"{where}: profiles")
        if profile not in profiles:
            raise AdfqError(f"{where} has no profile {profile!r}; there are {', '.join(profiles)}")
        _check_kind(profiles[profile], _SUBTABLE, f"{where}: profiles.{profile}")
        spec |= profiles[profile]
    _check_keys(spec, _TABLE_KEYS, ("task", "models"), where)
    return _create_table(spec, path.stem, "" if profiles is None else profile, own, where)


def first_table(task: str, data: str = BUNDLED) -> Table:
    """Return the first table of a task on some data: it has the task's models and its methods' settings.

    Args:
        task: name of the task.
        data: the data spec of one of the table's profiles.

    Raises:
        AdfqError: for a task without such a table.
    """
    for name in table_names():
        for profile in _read(TABLES / f"{name}.toml")["profiles"]:
            table = load_table(name, profile)
            if (table.task, table.data) == (task, data):
                return table
    raise AdfqError(f"no table on {data} data is of {task}")


def _create_table(spec: dict[str, Any], name: str, profile: str, own: bool, where: str) -> Table:
    from benchmarks.tasks import find_task

    defaults = _read(TABLES / f"{_DEFAULTS}.toml")
    preset = spec.pop("preset", None)
    if preset is not None and preset not in defaults["presets"]:
        raise AdfqError(f"{where}: unknown preset {preset!r}; there are {', '.join(defaults['presets'])}")
    shared = defaults["presets"].get(preset, {})
    settings = spec.pop("settings", {})
    for name_of_settings, options in settings.items():
        _check_kind(options, _SUBTABLE, f"{where}: settings.{name_of_settings}")
        for key in _SETTINGS_KEYS.keys() & options.keys():
            _check_kind(options[key], _SETTINGS_KEYS[key], f"{where}: settings.{name_of_settings}.{key}")
    rows = [*({"method": method} for method in spec.pop("methods", defaults["methods"])), *spec.pop("rows", ())]
    for index, row in enumerate(rows, 1):
        _check_keys(row, _ROW_KEYS, ("method",), f"{where}: row {index}")
    models = []
    for index, model in enumerate(spec.pop("models"), 1):
        _check_keys(model, _MODEL_KEYS, ("name",), f"{where}: model {index}")
        models.append(Model(**{"key": model["name"], "label": model["name"], **model}))
    task = find_task(spec["task"])
    spec = {"title": name, "caption": "", "bits": ["W4/A4"], "metrics": list(task.main_metrics), **spec}
    for metric in spec["metrics"]:
        find_metric(metric)
        if metric not in (*task.main_metrics, *task.other_metrics):
            raise AdfqError(f"{where}: {spec['task']} has no metric {metric!r}")
    if "published" in spec and spec["published"] not in (known := _published_tasks()):
        raise AdfqError(f"{where}: published: unknown {spec['published']!r}; there are {', '.join(known)}")
    merged = {method: {**shared.get(method, {}), **settings.get(method, {})} for method in {**shared, **settings}}
    table = Table(name=name, profile=profile, models=models, rows=(), settings=merged, own=own, **spec)
    table = replace(table, rows=[table.row(**row) for row in rows])
    _check_unique([row.key for row in table.rows], f"{where}: two rows have the key")
    _check_unique([model.key for model in models], f"{where}: two models have the key")
    _check_unique([*_HEADINGS, *(model.label for model in models)], f"{where}: two columns have the heading")
    _check_unique(spec["metrics"], f"{where}: two metrics are")
    for name_of_settings in settings.keys() - {row.key for row in table.rows}:
        find_method(name_of_settings)
    return table


def _published_tasks() -> list[str]:
    with open(TABLES / "published.csv", encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(line["task"] for line in csv.DictReader(file)))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdfqError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AdfqError(f"cannot read {path}: it is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise AdfqError(f"{path} is not TOML: {error}") from None


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


_Kind = tuple[str, Callable[[Any], bool]]
_TEXT: _Kind = ("a text", _is_text)
_TEXTS: _Kind = ("a list of texts", _list_of(_is_text))
_SOME_TEXTS: _Kind = ("a list of texts, at least one", lambda value: bool(value) and _list_of(_is_text)(value))
_COUNT: _Kind = ("a whole number from 1", lambda value: _is_integer(value) and value >= 1)
_DIGITS: _Kind = ("a whole number from 0 to 9", lambda value: _is_integer(value) and 0 <= value <= 9)
_SEEDS: _Kind = ("a list of whole numbers, at least one", lambda value: bool(value) and _list_of(_is_integer)(value))
_NUMBER: _Kind = ("a number from 0", lambda value: _is_number(value) and 0 <= value < math.inf)
_SIZE: _Kind = ("a number above 0", lambda value: _is_number(value) and 0 < value < math.inf)
_FLAG: _Kind = ("true or false", lambda value: isinstance(value, bool))
_SUBTABLE: _Kind = ("a table of keys", lambda value: isinstance(value, dict))
_SUBTABLES: _Kind = ("a list of tables of keys", _list_of(lambda value: isinstance(value, dict)))
_SOME_SUBTABLES: _Kind = (
    "a list of tables of keys, at least one",
    lambda value: bool(value) and _SUBTABLES[1](value),
)

_TABLE_KEYS: Mapping[str, _Kind] = {
    **dict.fromkeys(("title", "caption", "task", "data", "published", "preset"), _TEXT),
    **dict.fromkeys(("metrics", "bits"), _SOME_TEXTS),
    **dict.fromkeys(("seeds", "recorded_seeds"), _SEEDS),
    **dict.fromkeys(("calibration_size", "calibration_batch_size", "batch_size", "limit"), _COUNT),
    **{"cell_memory": _SIZE, "full_precision_tolerance": _NUMBER},
    **{"methods": _TEXTS, "digits": _DIGITS, "cost": _FLAG, "training": _FLAG, "settings": _SUBTABLE},
    **{"task_arguments": _SUBTABLE, "rows": _SUBTABLES, "models": _SOME_SUBTABLES},
}
#: Those of a method's settings that are none of its options.
_SETTINGS_KEYS: Mapping[str, _Kind] = {"calibration_size": _COUNT, "calibration_batch_size": _COUNT}
_ROW_KEYS: Mapping[str, _Kind] = {
    **{"key": _TEXT, "label": _TEXT, "method": _TEXT, "arguments": _SUBTABLE},
    **_SETTINGS_KEYS,
}
_MODEL_KEYS: Mapping[str, _Kind] = {
    **{"key": _TEXT, "label": _TEXT, "name": _TEXT, "checkpoint": _TEXT},
    **{"preprocessing": _SUBTABLE, "arguments": _SUBTABLE},
}


def _check_keys(spec: Mapping[str, Any], kinds: Mapping[str, _Kind], required: Sequence[str], where: str) -> None:
    for key, value in spec.items():
        if key not in kinds:
            raise AdfqError(f"{where}: unknown key {key!r}; there are {', '.join(kinds)}")
        _check_kind(value, kinds[key], f"{where}: {key}")
    for key in required:
        if key not in spec:
            raise AdfqError(f"{where}: {key} is missing")


def _check_kind(value: Any, kind: _Kind, where: str) -> None:
    words, check = kind
    if not check(value):
        raise AdfqError(f"{where} must be {words}, got {value!r}")


def _check_unique(keys: Sequence[str], complaint: str) -> None:
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise AdfqError(f"{complaint} {twice!r}")
