"""The README and docs/ are true: commands and Python run, names, options and links exist, what is shown is what ships.

A block in ``sh`` is one test; its commands run in one folder, one after the other, on data and checkpoints as the text
describes them, but small. A command that nothing here knows how to run is a failure.
"""

from __future__ import annotations

import argparse
import configparser
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import adfq
from adfq import adfq_vit
from adfq.registry import find_method
from baselines.ptq4vit import PTQ4ViT
from benchmarks import plan
from benchmarks.cli import main as cli
from benchmarks.cli.figure import pictures
from benchmarks.plan import Selection, Table
from benchmarks.run import measuring
from benchmarks.run.executors import local
from benchmarks.run.executors.local import InProcess
from benchmarks.tasks import coco
from benchmarks.tasks.packages import PACKAGES, PREFIX, find_package_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXAMPLE = ROOT / "examples" / "pow2_channels"
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}

#: Languages of blocks; those without one are for reading.
LANGUAGES = {"sh", "python", "toml", ""}

# Models that are small for their kind; of a table that has one of them, it is the one that is measured.
_SMALLEST = ("deit_tiny_patch16_224.fb_in1k", "mask_rcnn_swin_tiny", "mobile_sam")

_FULL_SIZE = re.compile(r"--profile (?!bundled)|_patch16_224|mobile_sam|vit_[blh]\b|mask_rcnn_swin")
_LONG = re.compile(
    r"--executor ray|regress|adfq report|adfq figure|adfq export|pip install \./examples|-e tables$|-e encoders",
    re.MULTILINE,
)

_optimize_units = adfq_vit.optimize_units
_choose_part = plan.choose_part


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{NAMES[self.page]}:{self.line}"


def _blocks(page: Path) -> Iterator[Block]:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    for number, line in lines:
        if line.startswith("```"):
            text = [inner for _, inner in itertools.takewhile(lambda item: item[1] != "```", lines)]
            yield Block(page, number, line.removeprefix("```"), "\n".join(text) + "\n")


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _commands(text: str) -> list[list[str]]:
    """The commands of a block, in words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(command, comments=True) for line in lines for command in line.split("&&") if command.strip()]


# --- what the text speaks of ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes, once, what stands behind a ``/path/to/…``."""
    write = {"imagenet": _write_imagenet, "coco": _write_coco, "scenes": _write_scenes, "weights": _write_weights}
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            write[name](folder)
            made[name] = folder
        return made[name]

    return find


def _write_imagenet(root: Path) -> None:
    """Its layout with one picture a class."""
    picture = Image.effect_noise((64, 60), 80).convert("RGB")
    for split, index in itertools.product(("train", "val"), range(1000)):
        folder = root / split / f"n{index:08d}"
        folder.mkdir(parents=True)
        picture.save(folder / "picture.jpg")


def _write_scenes(root: Path) -> None:
    from benchmarks.bundled.coco import write_coco

    write_coco(root, {"train2017": 2, "val2017": 2})


def _write_coco(root: Path) -> None:
    """Scenes under the names of COCO's categories."""
    from benchmarks.tasks.detection.models import mmdetection

    with mmdetection():
        from mmdet.datasets import CocoDataset

    _write_scenes(root)
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(CocoDataset.METAINFO["classes"], 1)]
        file.write_text(json.dumps(content))


def _write_weights(root: Path) -> None:
    """Random weights of the smallest model of each kind, in the official layouts."""
    from benchmarks.tasks.detection.models import build_detector, open_config
    from benchmarks.tasks.segmentation.models import create_mobile_sam

    classifier, detector, sam = _SMALLEST
    torch.save(timm.create_model(classifier).state_dict(), root / f"{classifier}.pth")
    state = build_detector(open_config(detector)).state_dict()
    torch.save({"meta": {"epoch": 36}, "state_dict": state}, root / f"{detector}.pth")
    torch.save(create_mobile_sam().state_dict(), root / f"{sam}.pt")


def _provide(name: str, places: Callable[[str], Path]) -> None:
    """Puts a file that a command names into the present folder."""
    if name == "deit_small.pth":
        torch.save(timm.create_model("deit_small_patch16_224").state_dict(), name)
    elif name == "mobile_sam.pt":
        Path(name).symlink_to(places("weights") / name)
    elif name in ("my_config.py", "my_weights.pth"):
        pytest.importorskip("mmdet")
        from benchmarks.bundled.detectors import DETECTORS

        shipped = DETECTORS["bundled_mask_rcnn"]
        Path("my_config.py").write_text(f"_base_ = [{str(shipped.config)!r}]\n")
        torch.save({"state_dict": load_file(shipped.checkpoint)}, "my_weights.pth")


@pytest.fixture(scope="session")
def done() -> set[tuple[str, ...]]:
    """Tables that have been measured; several pages name the same ones."""
    return set()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder and this process. Scenes are few; of a table one model, one row and what --also adds are
    measured, at one bit-width with one seed, on one image, whose passes are timed; nothing is optimized, and PTQ4ViT
    searches once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "create_local_executor", lambda device, *_: InProcess(device))
    monkeypatch.setattr(measuring, "_COST_IMAGES", 1)
    monkeypatch.setattr(coco, "COUNTS", {"train2017": 2, "val2017": 2})
    monkeypatch.setattr(adfq_vit, "optimize_units", lambda *_: {})
    monkeypatch.setattr(PTQ4ViT.__init__, "__defaults__", ("hessian", 1, 1, False))

    choose = plan.choose_part

    def smaller(table: Table, selection: Selection) -> Table:
        table = choose(table, selection)
        model = next((model for model in table.models if model.name in _SMALLEST), table.models[0])
        rows = [*table.rows[:1], *(table.rows[-1:] if selection.also else [])]
        return replace(table, models=[model], rows=rows, bits=table.bits[:1], seeds=table.seeds[:1], limit=1)

    for module in (plan, pictures):
        monkeypatch.setattr(module, "choose_part", smaller)
    monkeypatch.syspath_prepend(str(_as_installed(tmp_path)))


def _as_installed(folder: Path) -> Path:
    """The example package as if it were installed; test_example.py installs it."""
    folder = folder / "site-packages"
    information = folder / "pow2_channels-0.1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "pow2_channels.py").write_text((EXAMPLE / "pow2_channels.py").read_text(encoding="utf-8"))
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    points = "".join(f"{name} = {place}\n" for name, place in project["entry-points"]["adfq.methods"].items())
    (information / "entry_points.txt").write_text(f"[adfq.methods]\n{points}")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    return folder


# --- commands -------------------------------------------------------------------------------------------------------


def _parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    actions = cli._parser()._actions
    return next(dict(action.choices) for action in actions if isinstance(action, argparse._SubParsersAction))


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a command and all below it."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(_options, action.choices.values()))
    return found


def _kind(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command's kind, where it has kinds."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return next(choice for name, choice in action.choices.items() if name == arguments[1])
    return parser


class _Runner:
    """Runs what a shell would run, in this process and small.

    Args:
        places: makes what stands behind a ``/path/to/…``.
        done: tables that have been measured.
    """

    def __init__(
        self, places: Callable[[str], Path], done: set[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.places, self.done, self.monkeypatch = places, done, monkeypatch

    def run(self, command: Sequence[str]) -> None:
        program, *arguments = command
        folder, _, name = program.rpartition("/")
        assert folder in ("", ".venv/bin", ".tox/adfq/bin"), f"{program} is nowhere"
        known = {
            "adfq": self.adfq,
            "pip": self.pip,
            "pytest": self.pytest,
            "python": self.python,
            "python3": self.python,
            "rm": self.rm,
            "tox": self.tox,
        }
        if name not in known:
            pytest.fail(f"nothing here knows how to run {shlex.join(command)!r}: teach it, or leave the command out")
        known[name](arguments)

    def adfq(self, arguments: Sequence[str]) -> None:
        """A command, made small by options put behind it."""
        parsers = _parsers()
        assert arguments[0] in parsers, f"there is no adfq {arguments[0]}"
        if tuple(arguments) in self.done:
            return
        fewer = {"--limit": "1", "--jobs": "0", "--images": "1", "--repeats": "1"}
        if "--quantized" not in arguments:
            fewer["--calibration-size"] = "1"
        if arguments[0] == "report":
            fewer.pop("--jobs")  # nothing is measured
        if "results/bundled" in arguments and arguments[0] == "figure":
            fewer = {}
            self.monkeypatch.setattr(plan, "choose_part", _choose_part)
            if not Path("results").exists():
                Path("results").symlink_to(ROOT / "results")
        if "encoders" in arguments:
            fewer["--head-images"] = "2"
            for checkpoint in (f"{PREFIX}{name}" for name in PACKAGES):
                try:
                    find_package_file(checkpoint)
                except adfq.AdfqError as error:
                    pytest.skip(str(error))
        if "--executor" in arguments:
            pytest.importorskip("ray")
            fewer.pop("--jobs")
            place = arguments.index("--address")
            arguments = [*arguments[:place], *arguments[place + 2 :]]  # a cluster of this machine alone
        self._prepare(arguments)
        known = _options(_kind(parsers[arguments[0]], arguments))
        behind = [word for option, value in fewer.items() if option in known for word in (option, value)]
        placed = []
        for argument in arguments:
            for name in re.findall(r"/path/to/(\w+)", argument):
                # A config of one's own here is an bundled model's.
                place = "scenes" if name == "coco" and "--config" in arguments else name
                argument = argument.replace(f"/path/to/{name}", str(self.places(place)))
            _provide(argument, self.places)
            placed.append(argument)
        if arguments[:1] == ["bench"] and "--methods" not in arguments:
            behind += ["--methods", "base_ptq", "adfq_vit"]  # the others take a quarter of an hour
        if arguments[:1] == ["regress"]:
            behind += ["--tolerance", "time=1000x"]  # of a single image
        if "reconstruction" in arguments:
            self.monkeypatch.setattr(adfq_vit, "optimize_units", _optimize_units)
            behind += ["--method-arg", "iterations=1", "optimize_batch_size=1"]
        assert cli.main([*placed, *behind]) == 0
        if arguments[0] == "table":
            self.done.add(tuple(arguments))

    def _prepare(self, arguments: Sequence[str]) -> None:
        """Measures what a command reads that reads records."""
        reads = {"results": "runs", "report": "runs", "regress": "results/bundled"}.get(arguments[0])
        if reads is not None and not Path(reads).exists():
            small = ["--limit", "1", "--jobs", "0", "--calibration-size", "1"]
            assert cli.main(["table", "1", *small, "--store", reads]) == 0

    def tox(self, arguments: Sequence[str]) -> None:
        """Run the commands of an environment of tox that are adfq's; the tests' environment has others."""
        tox = configparser.ConfigParser(interpolation=None)
        tox.read(ROOT / "tox.ini")
        assert arguments[:2] == ["run", "-e"], f"tox {arguments}"
        assert f"testenv:{arguments[2]}" in tox, f"there is no {arguments[2]}"
        commands = tox[f"testenv:{arguments[2]}"]["commands"].strip()
        positional = re.search(r"\{posargs:?(.*?)\}", commands)
        assert positional is not None
        assert arguments[3:4] in ([], ["--"])
        if commands.startswith("adfq "):
            self.adfq([*commands.partition("{")[0].split()[1:], *(arguments[4:] or positional[1].split())])
        else:
            assert arguments[2] == "tests"

    def pytest(self, arguments: Sequence[str]) -> None:
        """Run no tests, but know the marker."""
        option, marker = arguments
        assert option == "-m"
        declared = PROJECT["tool"]["pytest"]["ini_options"]["markers"]
        assert marker in [line.partition(":")[0] for line in declared], f"there is no marker {marker}"

    def rm(self, arguments: Sequence[str]) -> None:
        """Remove a folder below the present one."""
        option, folder = arguments
        assert option == "-rf"
        assert (Path.cwd() / folder).is_relative_to(Path.cwd())
        shutil.rmtree(folder, ignore_errors=True)

    def pip(self, arguments: Sequence[str]) -> None:
        """Installs nothing; what it names must exist."""
        parser = argparse.ArgumentParser()
        parser.add_argument("action", choices=["install"])
        parser.add_argument("-c", dest="constraints")
        parser.add_argument("-e", "--editable")
        parser.add_argument("--no-deps", action="store_true")
        parser.add_argument("--no-build-isolation", action="store_true")
        parser.add_argument("packages", nargs="*")
        options, unknown = parser.parse_known_intermixed_args(arguments)
        assert not unknown
        assert options.constraints is None or (ROOT / options.constraints).is_file()
        if options.editable:
            place = re.fullmatch(r"([^\[]+)(?:\[(.*)\])?", options.editable)
            assert place is not None
            assert (ROOT / place[1] / "pyproject.toml").is_file()
            assert set((place[2] or "").split(",")) - {""} <= set(PROJECT["project"]["optional-dependencies"])
        known = ("tox", *(f"{name}=={package.version}" for name, package in PACKAGES.items()))
        for package in options.packages:
            assert package in known or (ROOT / package / "pyproject.toml").is_file(), f"pip install {package}"

    def python(self, arguments: Sequence[str]) -> None:
        if arguments in (["scripts/write_results.py"], ["scripts/explain_encoders.py"]):
            return  # test_results_page.py runs the first, the second takes half an hour
        assert arguments[0] == "-m"
        if arguments[1] == "venv":
            assert arguments[2:] == [".venv"]
            return
        fewer = {"benchmarks.bundled.coco": "1", "benchmarks.bundled.class_folders": "150"}  # some of each class
        assert arguments[1] in fewer, f"python {arguments}"
        count = fewer[arguments[1]]
        self.monkeypatch.setattr(sys, "argv", [*arguments[1:], "--train", count, "--val", count])
        self.monkeypatch.delitem(sys.modules, arguments[1], raising=False)
        runpy.run_module(arguments[1], run_name="__main__")


@pytest.fixture
def runner(
    small: None, places: Callable[[str], Path], done: set[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> _Runner:
    return _Runner(places, done, monkeypatch)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            id=block.name,
            marks=[pytest.mark.slow] if _FULL_SIZE.search(block.text) or _LONG.search(block.text) else [],
        )
        for block in BLOCKS
        if block.language == "sh"
    ],
)
def test_commands_run(block: Block, runner: _Runner) -> None:
    for library, use in (
        ("mmdet", r"-e tables$|detection|table [\d ]*2"),
        ("segment_anything", r"-e tables$|sam|table [\d ]*3"),
        ("onnxscript", r"adfq export"),
    ):
        if re.search(use, block.text, re.MULTILINE):
            pytest.importorskip(library)
    commands = _commands(block.text)
    assert commands
    for command in commands:
        runner.run(command)


@pytest.mark.parametrize(
    "text",
    [
        "make tables",
        "adfq dance",
        "adfq table 1 --dance",
        "adfq table 1 --also magic",
        "pip install magic",
        "pip install -e '.[magic]'",
        "tox run -e magic",
        "python -m magic",
    ],
)
def test_a_command_that_cannot_be_run_fails(text: str, runner: _Runner) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        runner.run(shlex.split(text))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=NAMES.get)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    parsers = _parsers()
    # pip's, and every command's.
    known = {"--editable", "--help", "--no-deps"}.union(*map(_options, parsers.values()))
    for span in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", _prose(page)):
        words = span.split()
        if words[0] in ("adfq", ".tox/adfq/bin/adfq") and len(words) > 1:
            assert set(words[1].split("|")) <= set(parsers), span
            assert {word for word in words if word.startswith("--")} <= _options(parsers[words[1]]), span
        elif words[0].startswith("--"):
            assert words[0] in known, span


# --- Python ---------------------------------------------------------------------------------------------------------


@contextmanager
def _small_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """timm's models are narrow, have two blocks and random weights; nothing is downloaded."""
    create = timm.create_model

    def create_small(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        return create(name, **{"depth": 2, "embed_dim": 48, **arguments})

    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", create_small)
        yield


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in _blocks(page))], ids=NAMES.get
)
def test_python_runs(page: Path, places: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page's blocks, one after the other; `images` is few of what the text says it is."""
    blocks = [block for block in _blocks(page) if block.language == "python"]
    if any("mmdet" in block.text for block in blocks):
        pytest.importorskip("mmdet")
        _provide("my_config.py", places)
    names: dict[str, Any] = {"__name__": "a_page"}
    with _small_models(monkeypatch):
        for block in blocks:
            side = 96 if "init_detector" in block.text else 224
            names["images"] = torch.randn(2, 3, side, side)
            text = re.sub(r"/path/to/(\w+)", lambda found: str(places(found[1])), block.text)
            code = compile("\n" * block.line + text, str(page), "exec", dont_inherit=True)
            exec(code, names)
    if "MyMethod" in names:
        model = timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=48)
        quantized = adfq.quantize(model, names["MyMethod"](base=2**0.5), 4, 4, torch.randn(2, 3, 224, 224))
        assert quantized.blocks[0].attn.context.left_quantizer.base == 2**0.5  # type: ignore[union-attr, index]


# --- what is shown and what there is --------------------------------------------------------------------------------


def test_the_tutorial_shows_what_ships() -> None:
    shown = [block.text for block in _blocks(ROOT / "docs" / "tutorial.md")]
    for name in ("pyproject.toml", "pow2_channels.py"):
        assert (EXAMPLE / name).read_text(encoding="utf-8") in shown, f"the tutorial does not show {name} as it is"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=lambda block: block.name)
def test_toml_is_read(block: Block, tmp_path: Path) -> None:
    content = tomllib.loads(block.text)
    if "task" in content:
        file = tmp_path / "6.toml"
        file.write_text(block.text, encoding="utf-8")
        for profile in content.get("profiles", [""]):
            assert plan.load_table(file, profile).entries(data="bundled")


def test_every_method_has_a_page() -> None:
    project = PROJECT["project"]["entry-points"]["adfq.methods"]
    assert {page.stem for page in (ROOT / "docs" / "methods").iterdir()} == set(project) - {"full_precision"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "methods"], ids=NAMES.get)
def test_a_methods_options_are_those_of_its_page(page: Path) -> None:
    options = find_method(page.stem).options()
    section = page.read_text(encoding="utf-8").partition("## Options\n")[2].partition("\n## ")[0]
    assert f"Calibration images: {find_method(page.stem).calibration_size:,} by default." in section
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+) \|$", section, re.MULTILINE)
    assert {name: eval(default) for name, default, _ in rows} == options
    assert [name for name, _, _ in rows] == list(options)


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_blocks_have_a_language(page: Path) -> None:
    assert {block.language for block in _blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{NAMES[page]} links to {target}"
        assert place.is_relative_to(ROOT)
        if anchor:
            assert anchor in _anchors(place), f"{NAMES[page]} links to {target}"


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "adfq|baselines|benchmarks|scripts|tables|tests|examples|docs|\\.github"
    for name in re.findall(rf"`((?:{folders})/[\w/.]+)`", _prose(page)):
        assert (ROOT / name).exists(), f"{NAMES[page]} names {name}"


def test_pages_link_to_pages_of_the_site() -> None:
    """A site has no files outside of docs/; the page that names one does not link to it."""
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
                if not target.startswith(("https://", "#")):
                    place = (page.parent / target.partition("#")[0]).resolve()
                    assert place.is_relative_to(ROOT / "docs"), f"{NAMES[page]} links to {target}"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    formulas = (tmp_path / "methods" / "adfq_vit" / "index.html").read_text(encoding="utf-8")
    assert "<math" in formulas
    assert "\\mathrm" not in formulas
