"""The network check and the stand-ins it is tested through."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from iexact_runner.data import preflight
from iexact_runner.errors import DatasetError

CONNECT = preflight.connect


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object]]:
    """Records what the pre-flight would connect to."""
    calls: list[tuple[object, object]] = []

    class Connection:
        def close(self) -> None:
            pass

    def connect(address: object, timeout: object) -> Connection:
        calls.append((address, timeout))
        return Connection()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(preflight, "connect", CONNECT)
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return calls


@pytest.mark.parametrize(
    ("url", "port"), [("http://example.org/a.zip", 80), ("https://example.org/a", 443), ("http://example.org:81/a", 81)]
)
def test_connects_to_the_host_with_a_timeout(url: str, port: int, asked: list[tuple[object, object]]) -> None:
    preflight.require_network([Path("a")], [url, url])
    assert asked == [(("example.org", port), preflight.CONNECT_SECONDS)]


def test_connects_to_the_proxy(asked: list[tuple[object, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example.org:3128")
    preflight.require_network([Path("a")], ["https://example.org/a"])
    assert asked == [(("proxy.example.org", 3128), preflight.CONNECT_SECONDS)]


def test_no_network_is_one_line() -> None:
    with pytest.raises(DatasetError, match=r"^missing a\.npz, and the download failed \(Network is unreachable\)"):
        preflight.require_network([Path("root/raw/a.npz")], ["https://example.org/a.npz"])


def test_stall_limit_is_restored() -> None:
    with preflight.stall_limit():
        assert socket.getdefaulttimeout() == preflight.STALL_SECONDS
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_only_new_files_are_removed(error: BaseException, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")
    with pytest.raises(type(error)), preflight.removed_on_failure([old, new]):
        new.write_text("half")
        raise error
    assert old.exists() and not new.exists()


def test_one_process_at_a_time_prepares_a_dataset(tmp_path: Path) -> None:
    """Four processes add to a file that none may see half-written."""
    code = """
import sys, time
from pathlib import Path
from iexact_runner.data import preflight
folder = Path(sys.argv[1])
with preflight.exclusive(folder):
    file = folder / "count"
    before = int(file.read_text()) if file.exists() else 0
    file.write_text("")
    time.sleep(0.2)
    file.write_text(str(before + 1))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "4"
