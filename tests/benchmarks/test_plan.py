"""Tables as data, selections of them, and plans; tables of one's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import benchmarks.tasks
from adfq.errors import AdfqError
from benchmarks.plan import TABLES, Selection, Table, choose_part, first_table, load_table, make_plan, table_names
from benchmarks.run.executors import local
from benchmarks.tasks.interface import Task

OWN = """
task = "classification"
data = "bundled"

[[models]]
name = "bundled_vit"
"""


def choose(name: str, **selection: Any) -> Table:
    return choose_part(load_table(name, "bundled"), Selection(**selection))


def rows(table: Table) -> list[str]:
    return [row.key for row in table.rows]


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_importing_a_plan_imports_neither_argparse_nor_torch() -> None:
    code = "import sys, benchmarks.plan; assert not {'argparse', 'torch'} & set(sys.modules), sorted(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_methods_stand_beside_a_tables_own() -> None:
    own = rows(choose("4"))
    assert "ppoq" in own
    assert rows(choose("4", also=["repq_vit", "base_ptq"])) == [*own, "repq_vit", "base_ptq"]
    assert rows(choose("1", methods=["adfq_vit"], also=["base_ptq"])) == ["adfq_vit", "base_ptq"]
    assert rows(choose("4", methods=["base_ptq"], also=["ppoq"])) == ["base_ptq", "ppoq"]


def test_a_method_beside_a_tables_own_has_the_tables_settings() -> None:
    table = choose("1", methods=["base_ptq"], also=["adfq_vit"])
    assert table.rows == choose("1", methods=["base_ptq", "adfq_vit"]).rows
    assert table.rows[1].arguments["iterations"] == 50
    assert choose("4", also=["repq_vit"], calibration_size=7).rows[-1].calibration_size == 7


def test_images_in_one_pass_of_calibration(tmp_path: Path) -> None:
    text = """
    task = "classification"
    data = "bundled"
    methods = ["base_ptq", "repq_vit"]
    calibration_size = 32
    calibration_batch_size = 8
    settings = { repq_vit = { calibration_batch_size = 4 } }
    rows = [{ key = "own", method = "repq_vit", calibration_batch_size = 2 }]
    models = [{ name = "bundled_vit" }]
    """
    file = write(tmp_path, text)

    def sizes(**selection: Any) -> list[int | None]:
        return [cell.calibration_batch_size for cell in make_plan([file], Selection(**selection)).cells]

    assert sizes() == [None, 8, 4, 2]
    assert sizes(calibration_size=4) == [None, None, None, 2]  # the first two are equal cells
    assert sizes(calibration_batch_size=3) == [None, 3, 3]
    assert sizes(calibration_batch_size=32) == [None, None, None]
    assert {row.calibration_batch_size for row in load_table("1").rows} == {None}


def test_settings_of_a_row_go_before_those_of_its_method(tmp_path: Path) -> None:
    text = """
    task = "classification"
    methods = ["adfq_vit"]
    settings = { adfq_vit = { iterations = 7, calibration_size = 64 }, own = { iterations = 9 } }
    rows = [{ key = "own", method = "adfq_vit" }]
    models = [{ name = "bundled_vit" }]
    """
    found = load_table(write(tmp_path, text)).rows
    assert [(row.arguments["iterations"], row.calibration_size) for row in found] == [(7, 64), (9, 64)]


def test_no_row_is_there_twice() -> None:
    assert rows(choose("1", also=["repq_vit", "full_precision"])) == rows(choose("1"))
    assert rows(choose("4", also=["base_ptq", "base_ptq", "ppoq"])) == [*rows(choose("4")), "base_ptq"]
    assert rows(choose("1", methods=["base_ptq", "base_ptq"])) == ["base_ptq"]


def test_one_seed_unless_those_of_committed_results_are_asked_for() -> None:
    for name in table_names("bundled"):
        assert list(choose(name).seeds) == [0]
    assert list(choose("1", seeds="recorded").seeds) == [0, 1, 2]
    assert list(choose("2", seeds="recorded").seeds) == [0]
    assert list(choose("1", seeds=[4, 3, 4]).seeds) == [4, 3]


def test_the_methods_of_the_paper_and_settings_of_small_models_are_in_one_place() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in TABLES.glob("*.toml")}
    for text in ('"base_ptq", "ptq4vit"', "rounding_learning_rate = 4e-2", "iterations = 50"):
        assert [name for name, content in texts.items() if text in content] == ["defaults"]
    assert "defaults" not in table_names()
    arguments = {
        (name, profile): next(row.arguments for row in load_table(name, profile).rows if row.method == "adfq_vit")
        for name, profile in (("1", "bundled"), ("1", "full"), ("3", "mobile"))
    }
    assert arguments["1", "full"] == {}
    assert arguments["3", "mobile"] == {**arguments["1", "bundled"], "optimize_batch_size": 1}


def test_a_plan_has_each_cell_once() -> None:
    plan = make_plan(["1", "4", "5"], Selection(models=["bundled_vit"], bits=["W3A3"]))
    entries = [entry.cell for planned in plan.tables for entry in planned.entries]
    assert len(plan.cells) == len(set(plan.cells)) < len(entries)
    assert plan.cells == list(dict.fromkeys(entries))
    assert plan.cell_memory == 2
    assert [planned.table.name for planned in make_plan().tables] == table_names("bundled")


def test_a_cell_takes_as_much_memory_as_the_largest_table_says(tmp_path: Path) -> None:
    own = write(tmp_path, OWN)
    assert make_plan([own]).cell_memory is None
    assert make_plan(["1", own]).cell_memory is None


@pytest.mark.parametrize(
    ("names", "selection", "message"),
    [
        (["9"], {}, "unknown table '9'; there are 1, 2, 3, 4, 5"),
        (["1"], {"profile": "huge"}, "table 1 has no profile 'huge'; there are bundled, full"),
        ([], {"profile": "huge"}, "no table has a profile 'huge'; there are bundled, full, mobile"),
        (["1"], {"profile": "full"}, "the full profile needs --data, folder:/path/to/imagenet for example"),
        (["1", "2"], {"data": "x"}, "tables of different tasks need different data"),
        (["1"], {"data": "folder:nowhere"}, "there are no data in nowhere"),
        (["2"], {"data": "nowhere"}, "there are no data in nowhere"),
        (["1"], {"checkpoints": "nowhere"}, "there is no nowhere/bundled_vit.safetensors"),
        (["1"], {"models": ["vgg"]}, "unknown model 'vgg'; there are bundled_vit, bundled_swin"),
        (["1"], {"methods": ["magic"]}, "unknown method 'magic'; there are full_precision, adalog"),
        (["1"], {"also": ["magic"]}, "unknown method 'magic'"),
        (["1"], {"bits": ["W9A9"]}, "from 2 to 8"),
        (["2"], {"task_arguments": {"class_map": "names.txt"}}, "detection has no --class-map"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    names: Sequence[str], selection: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdfqError) as caught:
        make_plan(names, Selection(**selection))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bit_width_counts_once_however_it_is_written() -> None:
    plan = make_plan(["1"], Selection(models=["bundled_vit"], methods=["base_ptq"], bits=["W4A4", "W4/A4", "w4a4"]))
    assert [entry.cell.bits for entry in plan.tables[0].entries] == ["W32/A32", "W4/A4"]


def test_a_missing_library_is_found_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    known = benchmarks.tasks.find_task

    def find_task(name: str) -> Task:
        return replace(known(name), libraries=("mmdet", "no_library")) if name == "detection" else known(name)

    monkeypatch.setattr(benchmarks.tasks, "find_task", find_task)
    with pytest.raises(AdfqError) as caught:
        make_plan(["1", "2"])
    assert str(caught.value) == "detection needs no_library: pip install 'adfq[detection]'"
    make_plan(["1", "3"])
    make_plan(["1", "2"], check_files=False)


def test_reading_needs_neither_data_nor_checkpoints(tmp_path: Path) -> None:
    there, elsewhere = tmp_path / "imagenet", "imagenet"
    there.mkdir()
    selection = {"profile": "full", "models": ["deit_tiny"], "checkpoints": str(tmp_path)}
    (tmp_path / "deit_tiny_patch16_224.fb_in1k.safetensors").touch()
    measured = make_plan(["1"], Selection(data=f"folder:{there}", **selection))
    selection["checkpoints"] = "none"
    read = make_plan(["1"], Selection(data=elsewhere, **selection), check_files=False)
    assert [cell.model for cell in read.cells] == [cell.model for cell in measured.cells]


# --- tables of one's own --------------------------------------------------------------------------------------------


def test_a_short_file_is_a_table(tmp_path: Path) -> None:
    (planned,) = make_plan([write(tmp_path, OWN)]).tables
    table = planned.table
    assert (table.name, table.slug, table.title, table.profile) == ("mine", "mine", "mine", "")
    assert rows(table) == rows(load_table("1"))  # the paper's methods
    assert (list(table.metrics), list(table.bits)) == (["top1"], ["W4/A4"])
    assert [row.calibration_size for row in table.rows][:2] == [32, 32]  # the methods' own
    assert {entry.cell.model for entry in planned.entries} == {"bundled_vit"}
    assert not any(entry.cell.pretrained for entry in planned.entries)


def test_models_of_ones_own_have_weights_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").touch()
    (tmp_path / "images").mkdir()
    text = f"""
    task = "classification"
    data = "folder:{tmp_path}/images"
    methods = ["base_ptq"]
    preset = "small"

    [[rows]]
    method = "adfq_vit"
    arguments = {{ iterations = 3 }}

    [[models]]
    name = "vit_tiny_patch16_224"
    arguments = {{ num_classes = 2 }}
    checkpoint = "{tmp_path}/mine.safetensors"

    [[models]]
    key = "pretrained"
    label = "ViT-Ti"
    name = "vit_tiny_patch16_224"
    """
    (planned,) = make_plan([write(tmp_path, text)]).tables
    assert [(row.method, row.arguments.get("iterations")) for row in planned.table.rows] == [
        ("base_ptq", None),
        ("adfq_vit", 3),
    ]
    assert planned.table.rows[1].arguments["optimize_batch_size"] == 16
    own, other = (entry.cell for entry in planned.entries if entry.cell.method == "full_precision")
    assert own.model_arguments == (("num_classes", 2),)
    assert (own.checkpoint is not None, own.pretrained) == (True, False)
    assert (other.checkpoint, other.pretrained) == (None, True)


def test_a_table_has_a_limit_and_its_tasks_options(tmp_path: Path) -> None:
    text = """
    task = "encoders"
    data = "bundled"
    limit = 40
    task_arguments = { head = "knn", head_images = 20 }
    methods = []

    [[models]]
    name = "vit_tiny_patch16_224"
    """
    file = write(tmp_path, text)
    (cell,) = make_plan([file]).cells
    assert (cell.limit, cell.task_arguments) == (40, (("head", "knn"), ("head_images", 20)))
    (cell,) = make_plan([file], Selection(limit=3, task_arguments={"head_images": 5})).cells
    assert (cell.limit, cell.task_arguments) == (3, (("head", "knn"), ("head_images", 5)))


def test_a_table_that_ships_is_named_by_number_or_word() -> None:
    numbered, named = load_table("1"), load_table("encoders", "real")
    assert (numbered.slug, numbered.heading) == ("table1-bundled", "Table 1. Image classification")
    assert (named.slug, named.heading) == ("encoders-real", "Encoders")
    assert first_table("encoders") == named


def test_a_models_preprocessing_may_have_lists(tmp_path: Path) -> None:
    (full_precision, *_) = make_plan([write(tmp_path, f"{OWN}\npreprocessing = {{ mean = [0.5, 0.5, 0.5] }}")]).cells
    assert full_precision.preprocessing == (("mean", (0.5, 0.5, 0.5)),)


def test_profiles_of_a_file(tmp_path: Path) -> None:
    text = OWN + '[profiles.bundled]\nbits = ["W3/A3"]\n[profiles.quick]\nbits = ["W8/A8"]\n'
    file = write(tmp_path, text)
    assert load_table(file).slug == "mine-bundled"
    assert list(load_table(file, "quick").bits) == ["W8/A8"]
    with pytest.raises(AdfqError, match=r"mine.toml has no profile 'full'; there are bundled, quick"):
        load_table(file, "full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = ", "mine.toml is not TOML: "),
        ("title = 'x'", "mine.toml: task is missing"),
        ("task = 'classification'", "mine.toml: models is missing"),
        ("task = 'dancing'\nmodels = [{ name = 'x' }]", "unknown task 'dancing'; there are classification"),
        (f"metric = ['top1']\n{OWN}", "mine.toml: unknown key 'metric'; there are title, caption, task"),
        (f"metrics = ['charm']\n{OWN}", "unknown metric 'charm'; there are top1"),
        (f"metrics = 'top1'\n{OWN}", "mine.toml: metrics must be a list of texts, at least one, got 'top1'"),
        (f"bits = []\n{OWN}", "mine.toml: bits must be a list of texts, at least one, got []"),
        (f"bits = ['W1/A4']\n{OWN}", "bits must be a whole number from 2 to 8"),
        (f"seeds = [0.5]\n{OWN}", "mine.toml: seeds must be a list of whole numbers, at least one, got [0.5]"),
        (f"calibration_size = 0\n{OWN}", "mine.toml: calibration_size must be a whole number from 1, got 0"),
        (f"calibration_batch_size = 0\n{OWN}", "calibration_batch_size must be a whole number from 1, got 0"),
        (f"cost = 1\n{OWN}", "mine.toml: cost must be true or false, got 1"),
        (f"methods = ['magic']\n{OWN}", "unknown method 'magic'"),
        (f"limit = 0\n{OWN}", "mine.toml: limit must be a whole number from 1, got 0"),
        (f"task_arguments = {{ wings = 2 }}\n{OWN}", "classification has no --wings"),
        (f"preset = 'huge'\n{OWN}", "mine.toml: unknown preset 'huge'; there are small"),
        (f"settings = {{ base_ptq = 3 }}\n{OWN}", "mine.toml: settings.base_ptq must be a table of keys, got 3"),
        (f"settings = {{ base_ptq = {{ wings = 2 }} }}\n{OWN}", "base_ptq has no option 'wings'"),
        (f"settings = {{ base_ptqq = {{ range = 'mse' }} }}\n{OWN}", "unknown method 'base_ptqq'; there are"),
        (f"settings = {{ base_ptq = {{ calibration_size = '4' }} }}\n{OWN}", "calibration_size must be a whole number"),
        (f"metrics = ['mask_ap']\n{OWN}", "mine.toml: classification has no metric 'mask_ap'"),
        (f"metrics = ['top1', 'top1']\n{OWN}", "mine.toml: two metrics are 'top1'"),
        (f"published = 'nonsense'\n{OWN}", "mine.toml: published: unknown 'nonsense'; there are imagenet, coco"),
        (f"cell_memory = 0\n{OWN}", "mine.toml: cell_memory must be a number above 0, got 0"),
        (f"cell_memory = nan\n{OWN}", "mine.toml: cell_memory must be a number above 0, got nan"),
        (f"full_precision_tolerance = inf\n{OWN}", "full_precision_tolerance must be a number from 0, got inf"),
        (f"digits = 9999999999\n{OWN}", "mine.toml: digits must be a whole number from 0 to 9"),
        (f"seeds = [99999999999999999999]\n{OWN}", "seed must have at most 64 bits"),
        (f"{OWN}\narguments = {{ drop_rate = 2020-01-01 }}", "drop_rate must be a number, a text or a list of these"),
        (
            f"{OWN}\n[[models]]\nname = 'bundled_swin'\nlabel = 'bundled_vit'",
            "two columns have the heading 'bundled_vit'",
        ),
        (f"{OWN}\nlabel = 'Method'", "mine.toml: two columns have the heading 'Method'"),
        (f"profiles = 3\n{OWN}", "mine.toml: profiles must be a table of keys, got 3"),
        ("task = 'classification'\nmodels = []", "mine.toml: models must be a list of tables of keys, at least one"),
        ("task = 'classification'\nmodels = ['x']", "mine.toml: models must be a list of tables of keys"),
        ("task = 'classification'\nmodels = [{ key = 'x' }]", "mine.toml: model 1: name is missing"),
        (f"{OWN}\nlayers = 3", "mine.toml: model 1: unknown key 'layers'; there are key, label, name"),
        (f"{OWN}\n[[models]]\nname = 'bundled_vit'", "mine.toml: two models have the key 'bundled_vit'"),
        (f"rows = [{{ key = 'x' }}]\n{OWN}", "mine.toml: row 5: method is missing"),
        (f"rows = [{{ method = 'base_ptq' }}]\n{OWN}", "mine.toml: two rows have the key 'base_ptq'"),
        (f"{OWN}\ncheckpoint = 'none.pth'", "there is no checkpoint none.pth of bundled_vit"),
    ],
)
def test_each_mistake_in_a_file_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdfqError) as caught:
        make_plan([write(tmp_path, text)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff")
    (tmp_path / "b.toml").mkdir()
    for name, message in (("a", "it is not UTF-8 text"), ("b", "Is a directory"), ("c", "No such file")):
        with pytest.raises(AdfqError, match=f"cannot read .*{name}.toml: {message}"):
            make_plan([tmp_path / f"{name}.toml"])
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(AdfqError, match="two tables have the same name"):
        make_plan([write(tmp_path, OWN), write(other, OWN)])


def test_four_lines_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local.loky, "cpu_count", lambda: 1)  # one process imports torch
    chosen = {"models": ["bundled_vit"], "bits": ["W4/A4"], "methods": ["base_ptq"], "limit": 20, "calibration_size": 4}
    plan = benchmarks.make_plan(["1"], benchmarks.Selection(**chosen))
    for table in benchmarks.run_plan(plan, store="runs"):
        frame = table.to_frame()
        assert list(frame["method"]) == ["full_precision", "base_ptq"]
        assert (frame["images"] == 20).all()
        assert frame["top1"].between(0, 100).all()
    (again,) = benchmarks.read_plan(plan, "runs")
    assert again.to_frame().equals(frame)
    assert again.render().startswith("**Table 1. Image classification** (bundled profile)\n")
