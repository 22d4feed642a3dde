"""The lock that mirrors, indexes, checkouts and the trust list share."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from xpert.storage import exclusive

HOLDER = "import sys; from pathlib import Path; from xpert.storage import exclusive\n"
HOLDER += "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_another_process_is_kept_out_until_this_one_ends(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "x.lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError, match="stays locked"), exclusive(lock, wait_seconds=0.05):
            pytest.fail("two held it")
        holder.kill()  # a lock of the dead is free
    with exclusive(lock, wait_seconds=0.05):
        assert lock.is_file()


def test_threads_keep_one_another_out(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with exclusive(tmp_path / "lock"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), exclusive(tmp_path / "lock"):
        pytest.fail("it was followed")
    assert not (tmp_path / "elsewhere").exists()
