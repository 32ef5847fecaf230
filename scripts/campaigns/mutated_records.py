"""Runs whose records say something else, for reports to be made of them, and what such a report must not hold."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from damaged_files import damages_of

FORMATS = ("table", "csv", "parquet", "markdown", "latex", "html")
SUMMARY, METRICS, CONFIG = "summary.json", "metrics.jsonl", "config.yaml"
# Text that is markup, a command, a formula or an escape somewhere.
TEXTS = (
    "x [/nope] y",
    "[bold red]loud",
    "[link=file:///etc/passwd]here[/link]",
    ":skull: [",
    "\x1b[2J\x1b]0;title\x07",
    "a\nb\r\n\tc",
    "abc\n\\input{/etc/passwd}",
    "\u202egnp.exe\u2066",
    "\x7f\x85\u2028\u200b",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "](javascript:alert(1)) ![x](https://example.org/x.png) | `a` *b*",
    "=HYPERLINK(A1)",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1",
    "$\\frac{1}{$",
    "$x$ 50% #1 {_} ~^ & \\",
    "[5cm]",
    "_hidden",
    "\U0001f480 \u6f22\u5b57",
    "x" * 20_000,
    "",
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        2.5,
        10**30,
        -(10**400),
        1e308,
        1e39,
        float("nan"),
        float("-inf"),
        "\ud800",
        "7",
        "nan",
    ),
    *([], {}, [[]], [1, "a"], [True], [None], {"a": {"b": []}}, {"\ud800": 1}, {"median": 1}),
)
# Where summaries hold text that is shown.
_TEXT_FIELDS = (
    ("config", "dataset", "name"),
    ("config", "model", "name"),
    ("config", "compression", "levels"),
    ("config", "training", "optimizer"),
    ("config", "output_dir"),
    ("environment", "git_commit"),
    ("environment", "device_name"),
    ("environment", "torch"),
    ("accuracy", "metric"),
    ("error",),
)
# What the writers of LaTeX and HTML use themselves.
_COMMANDS = {"pm", "textbackslash", "textasciitilde", "textasciicircum"}
_OWN_SCRIPT = files("iexact_runner.report").joinpath("page.js").read_text(encoding="utf-8")
_ELEMENTS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h",
    "div",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "p",
}
Mutation = Callable[[Path, random.Random], str]


def mutate(folder: Path, rng: random.Random) -> str:
    """Changes the records of a completed run in one way; says which."""
    mutation = rng.choice(_MUTATIONS)
    return f"{mutation.__name__.lstrip('_')} {mutation(folder, rng)}"


def live(form: str, text: str) -> list[str]:
    """What of a report in a format would act where it is shown, or breaks its rows."""
    found = [f"{sign!r} in it" for sign in sorted(set(text)) if not sign.isprintable() and sign != "\n"]
    lines = text.splitlines()
    if form == "csv":
        rows = list(csv.reader(io.StringIO(text)))
        cells = [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@")) and not _is_number(cell)]
        found += [f"formula {cell[:20]!r}" for cell in cells]
        found += ["rows of different lengths"] if len({len(row) for row in rows}) > 1 else []
    elif form == "markdown":
        found += ["raw HTML"] if "<" in text else []
        found += ["a link"] if re.search(r"(?<!\\)\]\(|https?://", text) else []
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
        pairs = [(one, two) for one, two in zip(widths, widths[1:], strict=False) if one and two]
        found += ["rows of different lengths"] if any(one != two for one, two in pairs) else []
    elif form == "latex":
        known = r"\\begin\{|\\end\{|  \\caption\{|  \\begin\{|  \\end\{|    \\(top|mid|bottom)rule$|    .* \\\\$|% |$"
        found += [f"line {line[:40]!r}" for line in lines if not re.match(known, line)]
        body = [line for line in lines if line.startswith("    ") and line.endswith(r"\\")]
        found += ["an option"] if any(re.match(r"    [\[*]", line) for line in body) else []
        commands = {command for line in body for command in re.findall(r"\\([a-z]+)", line)}
        found += [f"commands {commands - _COMMANDS}"] if commands - _COMMANDS else []
    elif form == "html":
        text = text.replace(f"<script>{_OWN_SCRIPT}</script>", "")
        elements = set(re.findall(r"<([a-z]+)", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)))
        found += [f"elements {elements - _ELEMENTS}"] if elements - _ELEMENTS else []
        found += ["a script or picture"] if re.search(r"<(script|img|iframe)", text) else []
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text(folder: Path, rng: random.Random) -> str:
    """Leaves a record as whole as it was, with a text in it that acts somewhere."""
    summary = json.loads((folder / SUMMARY).read_text())
    path, text = rng.choice(_TEXT_FIELDS), rng.choice(TEXTS)
    _put(summary, path, text)
    if path == ("error",) or rng.random() < 0.2:
        summary["status"] = "failed"
        summary["error"] = text
    _write(folder, summary)
    return f"{'.'.join(path)}={text[:30]!a}"


def _name(folder: Path, rng: random.Random) -> str:
    """A field of the configuration with a name that acts somewhere, which becomes a column."""
    summary = json.loads((folder / SUMMARY).read_text())
    text = rng.choice(TEXTS)
    summary["config"][text] = rng.choice([*TEXTS, 1, [1], {"a": None}])
    _write(folder, summary)
    return f"{text[:30]!a}"


def _folder_name(folder: Path, rng: random.Random) -> str:
    """A run in a folder whose name acts somewhere; one that is damaged is named."""
    name = rng.choice(["a[b]", "[red]", "\x1b[2J", "a\nb", "=1", "<b>", "_$x$", "\udcff", "\u202e", "--format"])
    if rng.random() < 0.7:
        (folder / SUMMARY).unlink()
    if rng.random() < 0.3:
        (folder / CONFIG).write_text("[" * 10)
    folder.rename(folder.parent / name)
    return f"{name!a}"


def _value(folder: Path, rng: random.Random) -> str:
    """Another value somewhere in the summary, or none."""
    summary = json.loads((folder / SUMMARY).read_text())
    place, path = summary, []
    while True:
        key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        path.append(str(key))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.15:
            break
        place = place[key]
    return _spoil(folder, summary, place, key, path, rng)


def _figure(folder: Path, rng: random.Random) -> str:
    """Another value in place of a number or name that tables and figures are made of."""
    summary = json.loads((folder / SUMMARY).read_text())
    groups = ("accuracy", "memory", "throughput", "fidelity", "distribution")
    place, key = summary, rng.choice([name for name in groups if summary[name]])
    path = [key]
    while place[key] and isinstance(place[key], (dict, list)):
        place = place[key]
        key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        path.append(str(key))
    return _spoil(folder, summary, place, key, path, rng)


def _spoil(folder: Path, summary: Any, place: Any, key: Any, path: list[Any], rng: random.Random) -> str:
    value = rng.choice([*VALUES, *TEXTS])
    if rng.random() < 0.15:
        del place[key]
    else:
        place[key] = value
    _write(folder, summary)
    return f"{'.'.join(map(str, path))}={str(value)[:30]!a}"


def _line(folder: Path, rng: random.Random) -> str:
    """Another value in a line of the metrics."""
    if not (folder / METRICS).exists():  # of a task that has none
        return _value(folder, rng)
    lines = (folder / METRICS).read_text().splitlines()
    row = rng.randrange(len(lines))
    line = json.loads(lines[row])
    key = rng.choice(sorted(line))
    line[key] = rng.choice([*VALUES, *TEXTS])
    lines[row] = json.dumps(line)
    (folder / METRICS).write_text("\n".join(lines) + "\n")
    return f"{key}={str(line[key])[:30]!a}"


def _twice(folder: Path, rng: random.Random) -> str:
    """A name that stands twice in one object."""
    path = folder / SUMMARY
    text = path.read_text()
    name = rng.choice(re.findall(r'"\w+":', text))
    path.write_text(text.replace(name, f"{name} {json.dumps(rng.choice(TEXTS))}, {name}", 1))
    return name


def _unfinished(folder: Path, rng: random.Random) -> str:
    """The configuration of a run without a summary, with what YAML alone can say."""
    (folder / SUMMARY).unlink()
    path = folder / CONFIG
    text = path.read_text()
    extra = rng.choice(
        [
            *(
                "a: .nan\n",
                "a: 2020-01-01\n",
                "1: 2\n",
                "null: 2\n",
                "? [1, 2]\n: 3\n",
                "a: !!int ''\n",
                "<<: {seed: 1}\n",
            ),
            *("a: !!set {x}\n", "a: !!binary aaaa\n", "seed: 1\n", f"a: {'9' * 5000}\n", f"a: {'[' * 200_000}\n"),
            *(f"a: {json.dumps(text)}\n" for text in TEXTS),
        ]
    )
    if rng.random() < 0.3:
        text = re.sub(rng.choice(["seed: .*", "runs: .*", "name: .*", "scheme: .*"]), "seed: [x]", text, count=1)
    path.write_text(text + extra)
    return f"{extra[:30]!a}"


def _file(folder: Path, rng: random.Random) -> str:
    """A file that is cut, flipped, exchanged, or none; a pipe, or one of hundreds of megabytes."""
    path = folder / rng.choice([name for name in (SUMMARY, METRICS, CONFIG) if (folder / name).exists()])
    if path.name == CONFIG:
        (folder / SUMMARY).unlink()
    kind = rng.random()
    if kind < 0.15:
        path.unlink()
        os.mkfifo(path)
        return f"{path.name} a pipe"
    if kind < 0.3:
        os.truncate(path, 2**28)
        return f"{path.name} of 256 MiB"
    damage = rng.choice(damages_of(path))
    damage(path, rng)
    return f"{path.name} {damage.__name__.lstrip('_')}"


_MUTATIONS: tuple[Mutation, ...] = (
    *(_text, _text, _name, _folder_name, _value, _figure, _figure, _line, _twice, _unfinished, _file),
)


def _put(summary: Any, path: tuple[str, ...], value: Any) -> None:
    place = summary
    for name in path[:-1]:
        place[name] = place.get(name) or {}
        place = place[name]
    place[path[-1]] = value


def _write(folder: Path, summary: Any) -> None:
    (folder / SUMMARY).write_text(json.dumps(summary))
