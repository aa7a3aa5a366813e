import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Collection

import pytest
from tests.cluster.local_site import alive
from tests.waiting import LIMIT_S, eventually

from hasten.cluster.local import processes
from hasten.cluster.local.processes import MARK, environment_of, kill_all, lives, members, start_of

LEAVES = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"


def test_members_are_found_by_mark_and_by_session() -> None:
    uid = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES], env={**os.environ, MARK: f"{uid}/one"}, start_new_session=True
    )
    unmarked = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True)
    stranger = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: f"{uid}/one-more"}, start_new_session=True)
    try:
        start = start_of(process.pid)
        assert lives(process.pid, start)
        assert not lives(process.pid, (start or 0) + 1)
        eventually(lambda: len(members(f"{uid}/one", [])) == 2, lambda: "not found")
        found = members(f"{uid}/one", [])
        assert process.pid in found
        assert len(members(f"{uid}/", [])) == 3
        session = (unmarked.pid, start_of(unmarked.pid) or 0)
        eventually(lambda: len(members("none/none", [session])) == 2, lambda: "not found")
        assert members("none/none", [(unmarked.pid, session[1] - 1)]) == []  # a number that is another's now
        assert environment_of(process.pid)[MARK] == f"{uid}/one"
        assert kill_all(lambda: members(f"{uid}/one", [])) == []
        assert not any(alive(pid) for pid in found)
        assert alive(stranger.pid)
    finally:
        for each in (process, stranger, unmarked):
            os.killpg(each.pid, signal.SIGKILL)
            each.wait()
    assert start_of(process.pid) is None


def test_descendants_of_marked_processes_are_members_before_a_record_names_their_leader() -> None:
    uid = uuid.uuid4().hex
    with subprocess.Popen(
        ["sh", "-c", "env -i setsid sleep 60 & wait"], env={**os.environ, MARK: f"{uid}/one"}, start_new_session=True
    ) as leader:
        try:
            eventually(lambda: len(members(f"{uid}/one", [])) == 2, lambda: "not found")
            (left,) = (pid for pid in members(f"{uid}/", []) if pid != leader.pid)
            eventually(lambda: MARK not in environment_of(left), lambda: "it still has its parent's environment")
            assert sorted(members(f"{uid}/", [])) == sorted([leader.pid, left])
        finally:
            assert kill_all(lambda: members(f"{uid}/", [])) == []
    assert not alive(left)


def test_what_is_killed_has_ended_though_it_is_found_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a parent ends before its child: nothing then shows whose the child is."""
    sent: list[Collection[int]] = []
    send = processes.send

    def send_late(pids: Collection[int], kind: signal.Signals) -> None:
        sent.append(pids)
        if len(sent) == 3:
            send(pids, kind)

    monkeypatch.setattr(processes, "send", send_late)
    with subprocess.Popen(["sleep", "600"]) as process:
        found = iter([[process.pid]])
        try:
            assert kill_all(lambda: next(found, []), seconds=60) == []
            assert not alive(process.pid)
        finally:
            process.kill()
    assert len(sent) >= 3


def test_a_process_that_is_not_buried_does_not_live() -> None:
    process = subprocess.Popen(["true"])
    start = start_of(process.pid)
    eventually(lambda: not alive(process.pid), lambda: "it lives")
    assert start_of(process.pid) == start
    assert not lives(process.pid, start)
    process.wait()


ADOPTS = """
import os, subprocess
from hasten.cluster.local.processes import adopt_orphans, kill_all, orphans, reap_orphans
from tests.waiting import LIMIT_S, eventually
adopt_orphans()
own = subprocess.Popen(["sleep", "60"])
parent = subprocess.Popen(["sh", "-c", "env -i setsid sh -c 'sleep 60 & wait' &"])
assert parent.wait() == 0
def shells():  # of two orphans: the last process is one, too, until it runs its program
    found = orphans({own.pid})
    return [pid for pid in found if len(found) == 2 and b"wait" in open(f"/proc/{pid}/cmdline", "rb").read()]
eventually(lambda: len(shells()) == 1, lambda: str(orphans({own.pid})))
assert own.pid not in orphans({own.pid})
(adopted,) = shells()
assert kill_all(lambda: orphans({own.pid})) == []
assert open(f"/proc/{adopted}/stat").read().rpartition(")")[2].split()[0] == "Z"
reap_orphans({own.pid})
eventually(lambda: not os.path.exists(f"/proc/{adopted}"), lambda: "not reaped")
own.kill()
eventually(lambda: open(f"/proc/{own.pid}/stat").read().rpartition(")")[2].split()[0] == "Z", lambda: "it lives")
reap_orphans({own.pid})
assert own.wait() == -9
reap_orphans(set())
"""


def test_orphans_are_adopted_killed_and_reaped() -> None:
    """In a process of its own: all of this one's are its tests' own business."""
    done = subprocess.run([sys.executable, "-c", ADOPTS], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
