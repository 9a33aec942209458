"""Real processes on this machine: the numbers are right, and whatever dies, it is said and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import runner
from harness.errors import OrreryError
from harness.experiment import Request, one
from harness.plan.serial import to_json
from harness.records import Record
from testbeds import emulated, library
from testbeds.emulation import cgroups, leftovers, namespaces
from tests.testbeds.processes import (
    children,
    family,
    lives,
    nothing_left,
    nursery,
    own_folders,
    supervisors,
    wait_for,
    worker,
)

__all__ = ["own_folders"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc"),
    pytest.mark.usefixtures("own_folders"),
]
ROOT = Path(__file__).resolve().parents[2]
Sweep = Callable[..., Iterator[Record]]
WORKLOAD = {"model": "bert-tiny", "dataset": "synthetic", "num_samples": 32, "batch_size": 8, "seq_len": 16}
RUN = {**WORKLOAD, "method": "gpipe", "testbed": "local-2", "mode": "emulated"}
MICRO = {"micro_batch_size": 4}
#: So many that it is killed before it is done.
LONG_STEPS = 20_000
#: A dead worker is reported within a second; and a second for a busy machine.
SOON_S = 2.0
limits = cgroups.available()
needs_rights = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")
needs_groups = pytest.mark.skipif(not (limits.cpu and limits.memory), reason=f"no control groups: {limits.why}")


def request(**changed: Any) -> Request:
    return one({**RUN, **changed}, MICRO)


@pytest.fixture
def swept(own_folders: Path, tmp_path: Path) -> Iterator[Callable[..., Iterator[Record]]]:
    """The records of a sweep, as each comes, while its testbed is open; nothing is left when it is over."""
    with nothing_left(own_folders), contextlib.ExitStack() as sweeps:

        def sweep(*requests: Request) -> Iterator[Record]:
            outcomes = sweeps.enter_context(contextlib.closing(runner.sweep(requests, tmp_path)))
            return (outcome.record for outcome in outcomes)

        yield sweep


# Numbers


@pytest.mark.parametrize("testbed", ["local-2", "local-3"])
def test_a_run_trains_as_one_device_would(testbed: str, own_folders: Path) -> None:
    asked = {**RUN, "testbed": testbed, "steps": 3}
    with nothing_left(own_folders):
        record = harness.run(**asked, options=MICRO, verify=True)
    assert (record.status, record.reason, record.mode) == ("ok", None, "emulated")
    assert record.losses is not None and len(record.losses) == 3
    assert record.max_rel_error is not None and record.max_rel_error < 1e-5
    simulated = harness.run(**{**asked, "mode": "simulated"}, options=MICRO)
    assert record.comm_bytes == simulated.comm_bytes and record.comm_bytes
    assert [phase.comm_bytes for phase in record.phases or ()] == [phase.comm_bytes for phase in simulated.phases or ()]
    assert record.dilation == 1 and record.emulation == {"shaped": False}


def test_unequal_devices_train_as_one_would(own_folders: Path) -> None:
    """Asteroid's groups, with rows by speed inside them: ten updates, the last batch of each epoch a smaller one."""
    testbed = library_file(own_folders / "unequal.toml", medium="loopback", cpu_shares=(1.0, 0.9, 0.2, 0.4, 0.6))
    asked = {**WORKLOAD, "num_samples": 60, "batch_size": 24, "method": "asteroid", "testbed": testbed, "steps": 10}
    options = {"stages": 2, "micro_batch_size": 8}
    with nothing_left(own_folders):
        record = harness.run(**asked, mode="emulated", options=options, verify=True, optimizer="sgd-momentum")
    assert (record.status, record.reason) == ("ok", None)
    assert record.plan is not None and len(record.plan["grouping"]) == 2
    assert any(len(set(rows)) > 1 for rows in record.plan["rows"]), record.plan
    assert record.losses is not None and len(record.losses) == 10
    assert record.max_rel_error is not None and record.max_rel_error <= 1e-5


def test_a_campaign_has_one_nursery_for_all_of_its_runs(swept: Sweep) -> None:
    found, losses = [], []
    for record in swept(request(steps=2), request(steps=2, method="eddl"), request(steps=2, seed=1)):
        assert record.status == "ok", record.reason
        found.append((nursery(os.getpid()), *supervisors(os.getpid())))
        assert [children(pid) for pid in found[-1][1:]] == [[], []], "no worker between runs"
        losses.append(record.losses)
    assert len(set(found)) == 1 and len(found[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != pytest.approx(losses[2], rel=1e-5)


def test_processes_say_what_memory_they_took_and_which_port_is_not_free(own_folders: Path) -> None:
    asked = request(steps=1)
    costs, plan = runner.make_plan(asked)
    with nothing_left(own_folders), emulated.opened(library.load("local-2")) as execute:
        trace = execute(plan, asked.workload, costs).trace
        assert set(trace.process_peak_bytes) == {"device0", "device1"}
        assert all(2**20 < trace.peak_bytes[d] < peak < 2**32 for d, peak in trace.process_peak_bytes.items())
        emulation: Any = execute.__self__  # type: ignore[attr-defined]
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = {"device0": 0, "device1": taken.getsockname()[1]}
            jobs = [
                replace(emulation._job(emulation.machine, None, to_json(plan), asked.workload, d, False), port=port)
                for d, port in ports.items()
            ]
            message = f"device1: device1 can't listen at 127.0.0.1:{ports['device1']}: .* choose another port"
            with pytest.raises(OrreryError, match=message):
                emulation.machine.fleet.run(jobs, 10.0)
        assert execute(plan, asked.workload, costs).losses


@needs_rights
def test_paced_devices_are_what_the_testbed_says(own_folders: Path) -> None:
    """Two as fast as a tenth of a core each, behind a switch: computing as simulated, and the testbed says how near."""
    testbed = library_file(own_folders / "slow.toml", cpu_shares=(0.1, 0.1))
    asked = {**RUN, "testbed": testbed, "steps": 3}
    with nothing_left(own_folders):
        record = harness.run(**asked, options=MICRO)
    assert (record.status, record.reason) == ("ok", None)
    simulated = harness.run(**{**asked, "mode": "simulated"}, options=MICRO)
    assert record.compute_time_s == pytest.approx(simulated.compute_time_s, rel=0.1)
    about: Any = record.emulation
    assert about["shaped"] and about["computing"] == "paced"
    for device in about["devices"].values():
        assert device["cpu_share"] == 0.1 and 0 <= device["late_share"] < 0.1
        assert 85 < device["measured_mbit_per_s"] <= 105


# Deaths


def test_whoever_is_killed_the_row_says_so_and_the_sweep_goes_on(swept: Sweep) -> None:
    """In turn, amid long runs: a worker that has just begun, one at work, a supervisor, and the nursery."""
    victims: list[tuple[Callable[[], int | None], float]] = [
        (lambda: worker(me, 1), 0.0),
        (lambda: worker(me, 0), 1.0),
        (lambda: supervisors(me)[0] if worker(me, 0) else None, 0.5),
        (lambda: nursery(me) if worker(me, 0) else None, 0.5),
    ]
    me = os.getpid()
    asked = [request(seed=number, steps=LONG_STEPS) for number in range(len(victims))]
    records = swept(request(steps=1), *asked, request(steps=1, seed=99))
    assert next(records).status == "ok"
    reasons, ids = [], [processes()]
    for victim, moment_s in victims:
        record, after_s = killed(records, victim, moment_s)
        assert record.status == "failed" and record.reason is not None
        assert after_s < SOON_S, record.reason
        reasons.append(record.reason)
        ids.append(processes())
    assert next(records).status == "ok"
    assert reasons[:3] == [
        "device1: its worker was killed by SIGKILL",
        "device0: its worker was killed by SIGKILL",
        "device0: its supervisor is gone",
    ]
    assert reasons[3] in ("device0: its supervisor is gone", "device1: its supervisor is gone")
    assert ids[0] == ids[1] == ids[2], "who loses but a worker goes on"
    assert not set(ids[0]) & set(processes()), "who loses more begins afresh"


def killed(records: Iterator[Record], victim: Callable[[], int | None], moment_s: float) -> tuple[Record, float]:
    """The next record, of a run whose victim is killed; and how long after that it was there."""
    moments: list[float] = []

    def kill() -> None:
        assert wait_for(victim, 20)
        time.sleep(moment_s)
        os.kill(victim() or 0, signal.SIGKILL)
        moments.append(time.monotonic())

    thread = threading.Thread(target=kill)
    thread.start()
    record = next(records)
    ended = time.monotonic()
    thread.join(30)
    return record, ended - moments[0]


def processes() -> list[int]:
    return [nursery(os.getpid()) or 0, *supervisors(os.getpid())]


# The runner's end


def command(*arguments: str, **asked: object) -> list[str]:
    flags = [word for key, value in asked.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "harness", *arguments, *flags]


def start(out: Path, **asked: object) -> subprocess.Popen[str]:
    """`orrery run` in a process group of its own, as a shell starts it: Ctrl-C ends it, even if it would not end us."""
    line = command("run", "--set", "gpipe.micro_batch_size=4", **asked, out=out)
    return subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs tests in the background ignores it
    )


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("SIGINT", "running"),
        ("SIGKILL", "running"),
        ("SIGINT", "coming-up"),
        *(
            pytest.param(name, moment, marks=pytest.mark.slow)
            for name, moment in (("SIGKILL", "coming-up"), ("SIGTERM", "running"), ("SIGHUP", "coming-up"))
        ),
    ],
)
def test_a_runner_that_is_ended_leaves_nothing(name: str, moment: str, own_folders: Path, tmp_path: Path) -> None:
    with nothing_left(own_folders):
        process = start(tmp_path / "out", **RUN, steps=LONG_STEPS)
        try:
            found = {"coming-up": lambda: nursery(process.pid), "running": lambda: worker(process.pid, 1)}[moment]
            assert wait_for(found, 60)
            time.sleep(0.3)
            all_of_it = family(process.pid)
            assert len(all_of_it) >= {"coming-up": 2, "running": 6}[moment]
            if name == "SIGINT":
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            else:
                process.send_signal(getattr(signal, name))
            output, errors = process.communicate(timeout=15)
        finally:
            process.kill()
            process.communicate(timeout=15)
        assert wait_for(lambda: not any(map(lives, all_of_it)), 5), [pid for pid in all_of_it if lives(pid)]
    # Python ends itself by the signal where it found it amid its own C code: in a shell both are 130.
    allowed = (130, -signal.SIGINT) if name == "SIGINT" else (-getattr(signal, name),)
    assert process.returncode in allowed, errors
    assert output == "" and "Traceback" not in errors
    assert not list((tmp_path / "out" / "runs").glob("*.json"))


@needs_groups
def test_a_killed_runner_leaves_no_namespace_and_no_group(own_folders: Path) -> None:
    """Two shaped and limited devices: their namespaces, links and groups go with the process that wanted them."""
    folder = own_folders / "campaign"
    folder.mkdir()
    program = (
        "import sys, time; from pathlib import Path; from testbeds.emulation.machine import Machine\n"
        f"machine = Machine(['device0', 'device1'], True, True, [Path({str(folder)!r})])\n"
        "machine.ready(); machine.order('shape', 'device0', mbit_per_s=50.0, latency_s=0.0)\n"
        "machine.order('memory', 'device1', limit_bytes=2**28); print('up', flush=True); time.sleep(60)"
    )
    with nothing_left(own_folders):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "up\n":
                pytest.skip("the kernel refuses namespaces here")
            pids = family(process.pid)[1:]
            spaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
            group = cgroups.group_name(pids[0])
            assert len(spaces) == 3 and group_folders(group)
        finally:
            process.kill()
            process.communicate(timeout=5)
        assert wait_for(lambda: not any(map(lives, pids)), 5)
        assert wait_for(lambda: not group_folders(group) and not folder.exists(), 5)


def group_folders(name: str) -> list[str]:
    return [folder for folder, _, _ in os.walk("/sys/fs/cgroup") if Path(folder).name == name]


def test_leftovers_of_the_dead_are_found_and_removed_and_nothing_else(own_folders: Path) -> None:
    """Runner and nursery killed at once: nobody was left to tidy up."""
    program = (
        "import os; from testbeds.emulation import leftovers\n"
        "with leftovers.only_one() as lock, leftovers.folder() as folder:\n"
        "    (folder / 'weights').write_text('x'); print(folder, lock, flush=True); os.kill(os.getpid(), 9)"
    )
    before = leftovers.find()
    dead = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dead.returncode == -signal.SIGKILL
    with leftovers.folder() as mine:
        assert [path for path in leftovers.find() if path not in before] == dead.stdout.split()
        assert set(leftovers.clean()) >= set(dead.stdout.split())
        assert mine.is_dir() and not any(Path(path).exists() for path in dead.stdout.split())
    assert leftovers.find() == []


# What can't be run


def test_a_stale_lock_is_taken_and_a_held_one_is_not(own_folders: Path) -> None:
    stale = own_folders / f"orrery-{os.getuid()}.lock"
    stale.write_text("999999999\n")
    with leftovers.only_one() as lock:
        assert lock == stale and lock.read_text() == f"{os.getpid()}\n"
        errors = refused("local-2")
        assert f"Process {os.getpid()} is emulating a testbed on this machine" in errors and str(lock) in errors
        assert lock.exists(), "the one who was refused leaves it alone"
    assert not lock.exists()


def test_too_many_devices_say_how_slow_they_would_be(own_folders: Path) -> None:
    with nothing_left(own_folders, 0.5):
        assert "local-40 would start 40 processes here, and 32 are the most" in refused("local-40")
        many = library_file(own_folders / "many.toml", count=400)
        assert re.search(r"this machine has \d+: time would have to run \d+ times slower, and the most", refused(many))


def test_without_tc(own_folders: Path) -> None:
    """In a mount namespace where another file lies over it, which can't be called."""
    try:
        hidden = f"mount --bind /dev/null {namespaces.program('tc')}"
    except OrreryError:
        hidden = "true"
    inside(hidden)
    with nothing_left(own_folders):
        errors = refused(library_file(own_folders / "pair.toml", count=2), "unshare", "--mount", *shell(hidden))
    assert "There is no program `tc`. Install it: apt install iproute2" in errors


def test_without_rights(own_folders: Path) -> None:
    """As root of a user namespace in which no further ones may be made, and no network namespace."""
    limit = "echo 0 > /proc/sys/user/max_user_namespaces; echo 0 > /proc/sys/user/max_net_namespaces"
    inside(limit, "--user", "--map-root-user")
    with nothing_left(own_folders):
        pair = library_file(own_folders / "pair.toml", count=2)
        errors = refused(pair, "unshare", "--user", "--map-root-user", *shell(limit))
    assert "The kernel refuses a user namespace to user 0" in errors and "Run as root" in errors


def shell(before: str) -> list[str]:
    """What runs the words after it when `before` is done."""
    return ["sh", "-c", f'{before}; exec "$@"', "sh"]


def inside(before: str, *flags: str) -> None:
    """Skip where this machine does not let us do it."""
    done = subprocess.run(
        ["unshare", *(flags or ["--mount"]), *shell(f"set -e; {before}"), "true"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    if done.returncode:
        pytest.skip(done.stderr.strip())


def refused(testbed: str, *prefix: str) -> str:
    """What the command says of a testbed that it does not run: one paragraph, and exit code 2."""
    asked = {**RUN, "method": "standalone", "testbed": testbed, "steps": 1}
    with tempfile.TemporaryDirectory(prefix="out-") as out:
        line = [*prefix, *command("run", "--json", **asked, out=out)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("orrery: ")
    return said[0]


# Memory


@needs_groups
@pytest.mark.parametrize(("model", "mib"), [("bert-small", 64), pytest.param("bert-base", 300, marks=pytest.mark.slow)])
def test_a_device_over_its_limit_is_out_of_memory_in_both_modes(
    model: str, mib: int, own_folders: Path, tmp_path: Path
) -> None:
    """A plan made for more memory: simulated it does not fit, and emulated the kernel ends the worker."""
    large = {**WORKLOAD, "model": model, "num_samples": 2, "batch_size": 2, "seq_len": 8, "steps": 1}
    _, plan = runner.make_plan(one({**large, "method": "eddl", "testbed": "local-2"}, {}))
    (tmp_path / "plan.json").write_text(to_json(plan))
    testbed = library_file(tmp_path / "small.toml", count=2, medium="loopback", memory_bytes=mib * 2**20)
    asked = {**large, "plan": str(tmp_path / "plan.json"), "testbed": testbed}
    simulated = runner.run(one({**asked, "mode": "simulated"}, {}))
    with nothing_left(own_folders):
        real = runner.run(one({**asked, "mode": "emulated"}, {}))
    for record in (simulated, real):
        assert record.status == "oom" and record.reason is not None
        assert f" MiB and has {mib}.0 MiB" in record.reason
    assert real.reason is not None and real.reason.endswith("the kernel ended its worker at the limit")
    assert real.peak_memory_bytes == simulated.peak_memory_bytes


def library_file(
    path: Path,
    count: int = 0,
    medium: str = "ethernet",
    memory_bytes: int | None = None,
    cpu_shares: Sequence[float] = (),
) -> str:
    """A testbed of processes of this machine: so many of whole cores, or some with these shares of one."""
    constants = {"nominal_mbit_per_s": 100, "tcp_efficiency": 1, "latency_s": 1e-4}
    link = "".join(
        f'[link.{key}]\nvalue = {value}\nprovenance = "definition"\nsource = "a test"\n'
        for key, value in constants.items()
    )
    memory = "" if memory_bytes is None else f"memory_bytes = {memory_bytes}\n"
    devices = "".join(
        f'[[devices]]\nprofile = "this-machine"\ncpu_share = {share}\n{memory}'
        for share in cpu_shares or (1.0,) * count
    )
    path.write_text(
        f'description = "of a test"\nmodes = ["simulated", "emulated"]\n{devices}'
        f'[link]\nmedium = "{medium}"\nduplex = "full"\n{link}'
    )
    return str(path)
