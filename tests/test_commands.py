"""A forked command does what a new interpreter does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import commands

PROGRAMS = {
    "words": "import sys\nsys.exit('words')",
    "status": "import sys\nsys.exit(3)",
    "none": "import sys\nsys.exit(None)",
    "ends": "print('to stdout', end='')",
    "raises": "raise ValueError('wrong')",
    "signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "place": "import os, sys\nprint(sys.argv, os.getcwd(), os.environ['GIVEN'], 'HOME' in os.environ, __file__)",
    "stdin": "import sys\nprint(repr(sys.stdin.read()), sys.stdout.isatty())",
    "folder": "import beside\nprint(beside.__file__)",
    "children": "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', 'exit(5)']).returncode)",
    "late": (
        "import atexit, threading, time\natexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\nprint('main')"
    ),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "beside.py").touch()
    return tmp_path


@pytest.mark.parametrize("name", PROGRAMS)
def test_ends_as_a_new_interpreter_ends(folder, name):
    program = folder / f"program_{name}.py"
    program.write_text(PROGRAMS[name])
    variables = {variable: value for variable, value in os.environ.items() if variable != "HOME"} | {"GIVEN": "1"}
    where = {"cwd": folder / "elsewhere", "env": variables}
    found = commands.run(program, "one", 2, **where)
    command = [sys.executable, str(program), "one", "2"]
    expected = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **where)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    # A traceback has the frames of what forked it too.
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_modules_run_from_the_working_folder(folder):
    (folder / "elsewhere" / "module.py").write_text("import sys\nprint(sys.argv[1:], __name__, __package__ == '')")
    found = commands.run("-m", "module", "-m", cwd=folder / "elsewhere")
    assert (found.returncode, found.stdout) == (0, "['-m'] __main__ True\n"), found.stderr


def test_a_command_can_be_waited_for_and_sent_signals(folder):
    program = folder / "waits.py"
    program.write_text(
        "import pathlib, time\npathlib.Path('began').touch()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n    time.sleep(60)"
    )
    command = commands.start(program, cwd=folder)
    with pytest.raises(subprocess.TimeoutExpired):
        while not (folder / "began").exists():
            assert command.poll() is None
        command.wait(0.2)
    command.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(0.2)
    command.kill()
    assert command.communicate(10) == ("interrupted\n", "")
    command.kill()
    assert command.wait() == command.poll() == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        commands.run(program, cwd=folder, timeout=0.5)
