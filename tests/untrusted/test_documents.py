from __future__ import annotations

import os

import pytest

from iexact_runner.untrusted.documents import MAX_DEPTH, MAX_TEXT, parse_json, parse_yaml, read_bounded


def test_content_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert read_bounded(path, limit=3) == b"abc"
    os.truncate(path, 2**40)  # a hole: nothing of its size may be allocated
    with pytest.raises(ValueError, match="is larger than 1 MiB"):
        read_bounded(path, limit=2**20)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_bounded(tmp_path / "pipe", limit=1)


def test_what_json_has_is_read():
    value = {"a": [1, -2.5, True, None, "caf\u00e9 \U0001f480", {"b": {}}], "n": 2**63 - 1}
    assert (
        parse_json(b'{"a": [1, -2.5, true, null, "caf\\u00e9 \\ud83d\\udc80", {"b": {}}], "n": %d}' % (2**63 - 1))
        == value
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": ', "is not JSON"),
        (b'"\xff"', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 5000, "is not JSON"),
        (b'{"a": NaN}', "is not JSON (NaN is no number of JSON)"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', 'is not JSON (has "b" twice)'),
        (b'{"a": [1, {"b": 1e999}]}', "a[1].b=inf: must be a finite number"),
        (b'{"a": -9223372036854775809}', "a=-9223372036854775809: must be a number of at most 64 bits"),
        (b'{"a": "x\\ud800"}', r'a="x\ud800": must be Unicode text, without half a character'),
        (b'{"\\udfff": 1}', r'="\udfff": must be Unicode text, without half a character'),
        (b'["%s"]' % (b"x" * (MAX_TEXT + 1)), f"must be at most {MAX_TEXT} characters"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"is nested more than {MAX_DEPTH} deep"),
    ],
)
def test_what_no_record_holds_is_refused_in_one_line(text, reason):
    with pytest.raises(ValueError) as error:
        parse_json(text)
    assert reason in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "is not YAML"),
        ("a: &x [1]\nb: *x\n", "has references"),
        ("a: !!int ''\n", "has tags"),
        ("a: !!python/object/apply:os.mkdir [ran]\n", "has tags"),
        ("a: .nan\n", "a=nan: must be a finite number"),
        ("a: 2020-01-01\n", 'a="2020-01-01": must be text, a number, true, false or null'),
        ("a:\n  1: 2\n", "a: has the name 1, which must be text"),
        ("a: {b: 1, b: 2}\n", 'has "b" twice'),
        # libyaml's loader crashes the process on these.
        ("[" * 200_000, f"is nested more than {MAX_DEPTH} deep"),
        ("- " * 200_000, f"is nested more than {MAX_DEPTH} deep"),
    ],
)
def test_yaml_is_held_to_the_same(text, reason):
    with pytest.raises(ValueError) as error:
        parse_yaml(text.encode())
    assert reason in str(error.value) and str(error.value).isprintable()


def test_a_configuration_is_read():
    assert parse_yaml(b"a: {b: [1, 0.5, null, 'x']}\nc: true\n") == {"a": {"b": [1, 0.5, None, "x"]}, "c": True}
