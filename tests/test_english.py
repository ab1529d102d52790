"""The style rule for English of CONTRIBUTING, as far as ruff's D rules cannot hold it."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("adfq", "baselines", "benchmarks", "examples", "scripts")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

#: Beginnings of sentences that describe a thing in place of its name.
OPENINGS = {"how", "of", "what", "where", "whether", "which"}

#: First words of functions' docstrings. A verb that is missing here can be added.
VERBS = set(
    re.findall(
        r"\w+",
        """
    adapt add adopt answer apply ask assert attach begin bring build calibrate call cast check choose clear close
    collect combine compare complete compute configure convert copy count create cut decide decode define delete derive
    describe detect determine divide do draw drop enable encode end enter evaluate exchange exit expand explain export
    fetch fill find fit fold follow forget format freeze gather generate give group hand have hide hold ignore import
    infer initialize insert join keep label leave let limit list load lock log look lower make map mark match measure
    merge minimize move multiply name normalize note number observe offer open optimize order pack pad paint pair parse
    pass pick place plan plot predict prepare prevent print profile prune put quantize raise read rebuild record reduce
    refuse register remove render reparameterize repeat replace report require rescale reset resolve restore return
    reuse rotate round run sample save say scale score search segment select send serialize set share shift show silence
    skip sort split start stop store strip submit sum switch take tell time trace train translate try turn unpack update
    use validate wait warn weigh wrap write yield
    """,
    )
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, each from its first word on; code, links' addresses and marks of lists are left out."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"(`+)[^`]+?\1", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*+] |\d+\. |#|\|))|\|", text):
        for sentence in re.split(r"(?<=[.!?:])[)\"'*_”]*\s+(?=[\"'(*_“]*[A-Z])", " ".join(block.split())):
            if stripped := re.sub(r"^(?:[-*+#>\"'(_“ ]|\d+\. )+", "", sentence):
                yield stripped


def opening(text: str) -> str:
    """The first word in small letters."""
    return re.split(r"[^\w-]", text, maxsplit=1)[0].lower()


def decoded(text: str, allowed: frozenset[str] = frozenset()) -> list[str]:
    """The sentences that begin with one of `OPENINGS`."""
    return [sentence for sentence in sentences(text) if opening(sentence) in OPENINGS - allowed]


def definitions(source: str) -> Iterator[tuple[Definition, str]]:
    """Classes and functions that have a docstring, with it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Definition):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node, docstring


def is_property(node: Definition) -> bool:
    """True for what reads as an attribute."""
    return any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)


def docstrings(source: str) -> Iterator[str]:
    """All docstrings, a module's first."""
    yield ast.get_docstring(ast.parse(source)) or ""
    yield from (docstring for _, docstring in definitions(source))


def paragraphs(docstring: str) -> Iterator[tuple[str, bool]]:
    """Texts of a docstring, and for each whether it describes an argument or attribute ("name: text")."""
    prose: list[str] = []
    entries: list[str] = []
    section = False
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", line):
            section = True
        elif section and line.startswith("    "):
            entry = re.match(r"    (?! )(?:\*{0,2}[\w.]+(?: \([^)]*\))?: )?(.*)", line)
            if entry:
                entries.append(entry[1])
            elif entries:
                entries[-1] += f" {line.strip()}"
        else:
            section = section and not line
            prose.append(line)
    yield "\n".join(prose), False
    yield from ((entry, True) for entry in entries)


def comments(source: str) -> Iterator[str]:
    """Comments; those of consecutive lines are one."""
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("#!: ")
        whole = token.line.lstrip().startswith("#")
        if block and (not whole or token.start[0] != last + 1):
            yield " ".join(block)
            block = []
        if not re.match(r"(type: ignore|noqa|pragma)", text):
            block.append(text)
            last = token.start[0] if whole else -1
    if block:
        yield " ".join(block)


def help_texts(source: str) -> Iterator[str]:
    """Texts that the command line shows: help, description and epilog of parsers and their arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in ("help", "description", "epilog"):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                yield node.value.value
            elif isinstance(node.value, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "value" for part in node.value.values)
                yield "".join(map(str, parts))


def faults(source: str) -> list[str]:
    """Everything in a Python source that breaks the rule."""
    found = [
        sentence
        for docstring in docstrings(source)
        for text, entry in paragraphs(docstring)
        for sentence in decoded(text, frozenset({"whether"}) if entry else frozenset())
    ]
    found += [sentence for text in (*comments(source), *help_texts(source)) for sentence in decoded(text)]
    for node, docstring in definitions(source):
        first = docstring.splitlines()[0]
        word = opening(first)
        if isinstance(node, ast.ClassDef) or is_property(node):
            third_person = any(word == verb + ending for verb in VERBS for ending in ("s", "es"))
            if third_person and not re.match(r"\w+ (of|on|in|that|under)\b", first):  # these follow a noun
                found.append(f"{node.name}: a noun phrase is wanted in place of {first!r}")
        elif word not in VERBS:
            found.append(f"{node.name}: a verb in the imperative is wanted in place of {first!r}; see VERBS")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_comments_and_help_texts_name_things(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_things(page: Path) -> None:
    assert decoded(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It runs. What it does is plain.", ["What it does is plain."]),
        ("# How it runs\n\nIt runs.", ["How it runs"]),
        ("- one\n- (of two) the other", ["of two) the other"]),
        ("| Which | one |\n| --- | --- |", ["Which"]),
        ("It runs.\n\n[Where it runs](https://example.org/a)", ["Where it runs"]),
        ("It tells what it does, and whether it runs of itself.\n```sh\nWhat\n```\n`What` is a word.", []),
    ],
)
def test_sentences_that_must_be_decoded_are_found(text: str, expected: list[str]) -> None:
    assert decoded(text) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""What it does."""\n',
        'def f():\n    """The sum."""\n',
        'def f():\n    """Returns the sum."""\n',
        'def f(x):\n    """Return x.\n\n    Args:\n        x: what is\n            returned.\n    """\n',
        'class A:\n    """Reads files."""\n',
        "x = 1  # where it begins\n",
        "# It begins.\n# Of all, the first.\nx = 1\n",
        'parser.add_argument("--x", help="how it runs")\n',
        'parser.add_argument("--x", help=f"{x} is it. Which one?")\n',
    ],
)
def test_what_breaks_the_rule_is_found(source: str) -> None:
    assert len(faults(source)) == 1


def test_what_follows_the_rule_is_not_found() -> None:
    source = '''"""The sum."""

# Sums are what is needed.
class Sum:  # type: ignore[misc]
    """Sum of numbers.

    Attributes:
        exact: whether it is exact.
        where: a place.
    """

    @property
    def places(self) -> int:
        """Number of places."""

    def take(self) -> None:
        """Add what is there."""
        parser.add_argument("--x", help="sum, where there is one")
'''
    assert faults(source) == []
