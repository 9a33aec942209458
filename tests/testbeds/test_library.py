"""The testbed library: every file of it, the arithmetic from constants to a cluster, and mistakes in files."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import OrreryError
from testbeds import library
from testbeds.constants import PROVENANCES
from testbeds.library import Testbed, devices, load, load_device, names

MBIT_PER_S = 1e6 / 8

BOARD = """
title = "A board"
accelerator = "gpu"
note = "A board of this test."
[peak_fp32_flops_per_s]
value = 100e9
provenance = "datasheet"
source = "test"
[efficiency_matmul]
value = 0.5
low = 0.4
high = 0.6
provenance = "assumed"
source = "test"
[kernel_overhead_s]
value = 0
provenance = "measured"
source = "test"
[usable_memory_bytes]
value = 1_000_000
provenance = "measured"
source = "test"
[memory_bandwidth_bytes_per_s]
value = 1e9
provenance = "datasheet"
source = "test"
[idle_w]
value = 1
provenance = "measured"
source = "test"
[load_w]
value = 5
provenance = "measured"
source = "test"
[ethernet_mbit_per_s]
value = 250
provenance = "measured"
source = "test"
"""

ENVIRONMENT = """
description = "A test"
modes = ["simulated"]
[[devices]]
profile = "board.toml"
count = 2
[[devices]]
profile = "jetson-nano-10w"
[link]
medium = "ethernet"
duplex = "half"
[link.nominal_mbit_per_s]
value = 1000
provenance = "definition"
source = "test"
[link.tcp_efficiency]
value = 0.9
provenance = "derived"
source = "test"
[link.latency_s]
value = 0
provenance = "definition"
source = "test"
"""


def write(folder: Path, board: str = BOARD, environment: str = ENVIRONMENT) -> str:
    (folder / "board.toml").write_text(board)
    path = folder / "mine.toml"
    path.write_text(environment)
    return str(path)


@pytest.mark.parametrize("name", devices())
def test_every_constant_of_every_device_has_an_origin(name: str) -> None:
    profile = load_device(name)
    assert profile.constants
    for key, constant in profile.constants.items():
        assert constant.provenance in PROVENANCES, key
        assert len(constant.source) > 3, key
        assert (constant.provenance == "fitted") == bool(constant.cells), key
        if constant.provenance == "assumed":
            assert constant.low is not None and constant.high is not None, key
        if constant.low is not None and constant.high is not None:
            assert constant.low <= constant.value <= constant.high, key


@pytest.mark.parametrize("name", names())
def test_every_testbed_loads(name: str) -> None:
    testbed = load(name)
    assert testbed.name == testbed.cluster.name == name
    assert testbed.cluster.names == tuple(f"device{i}" for i in range(len(testbed.cluster.devices)))
    assert testbed.path.exists()
    assert all(device.memory_bytes > 0 for device in testbed.cluster.devices)


@pytest.mark.parametrize("n", [1, 2, 4, 6, 8])
def test_pac_cluster_is_what_the_paper_prints(n: int) -> None:
    cluster = load(f"pac-nano-{n}").cluster
    assert len(cluster.devices) == n
    nano = cluster.devices[0]
    assert all(replace(device, name="device0") == nano for device in cluster.devices)
    assert nano.memory_bytes == 1550 * 2**20
    assert nano.rates["matmul"] == (0.534 * 235.8e9, 0.688 * 235.8e9)
    assert cluster.duplex == "full"
    assert cluster.link("device0", f"device{n - 1}").bandwidth == pytest.approx(940 * MBIT_PER_S, rel=1e-12)


def test_assumptions_are_the_assumed_and_fitted_constants_in_use() -> None:
    testbed = load("pac-nano-4")
    found = {(a.owner, a.key): a.constant.provenance for a in testbed.assumptions}
    nano = "jetson-nano-10w"
    assert found == {
        (nano, "efficiency_matmul_forward"): "fitted",
        (nano, "efficiency_matmul_backward"): "fitted",
        (nano, "efficiency_conv"): "assumed",
        (nano, "efficiency_depthwise"): "assumed",
        (nano, "kernel_overhead_s"): "assumed",
        (nano, "storage_read_bytes_per_s"): "assumed",
        (nano, "storage_write_bytes_per_s"): "assumed",
        (nano, "ethernet_mbit_per_s"): "assumed",
        ("link", "latency_s"): "assumed",
    }
    assert tuple(cell for a in testbed.assumptions for cell in a.constant.cells) == (
        "pac fig8a T5-Base Full forward",
        "pac fig8a BART-Large Full forward",
        "pac fig8a T5-Base Full backward",
        "pac fig8a BART-Large Full backward",
    )


def test_galaxys_environments_have_the_ratio_of_their_clocks() -> None:
    """3.65 : 2.29 : 1; everything about them is assumed but what is on the boards."""
    testbed = load("galaxy-f")
    fast, middle, slow = (device.rates["matmul"][0] for device in testbed.cluster.devices)
    assert (fast / slow, middle / slow) == pytest.approx((1.47 / 0.403, 0.921 / 0.403), rel=1e-3)
    assert middle == pytest.approx(8e9, rel=1e-3)
    assert [device.memory_bytes for device in testbed.cluster.devices] == [1_500_000_000, 1_200_000_000, 700_000_000]
    assert {a.owner for a in testbed.assumptions} == {"jetson-nano-l", "jetson-nano-m", "jetson-nano-s", "link"}


def test_a_name_can_ask_for_other_links(tmp_path: Path) -> None:
    usual, other = load("galaxy-e"), load("galaxy-e@500mbit@5ms")
    assert other.name == other.cluster.name == "galaxy-e@500mbit@5ms"
    assert other.cluster.devices == usual.cluster.devices
    link = other.cluster.link("device0", "device1")
    assert (link.bandwidth, link.latency_s) == pytest.approx((470 * MBIT_PER_S, 5e-3))
    assert load("galaxy-e@0ms").cluster.latency_s == 0
    assert load("pac-nano-4@100mbit").cluster.link("device0", "device3").bandwidth == pytest.approx(94 * MBIT_PER_S)
    assert load(f"{write(tmp_path)}@10mbit").name.endswith("@10mbit")
    assert ("link", "nominal_mbit_per_s") not in {(a.owner, a.key) for a in other.assumptions}


def test_a_name_can_ask_for_other_memory() -> None:
    usual, other = load("galaxy-e"), load("galaxy-e@0.5gib@5ms")
    assert [device.memory_bytes for device in other.cluster.devices] == [2**29, 2**29]
    assert [replace(d, memory_bytes=0) for d in other.cluster.devices] == [
        replace(d, memory_bytes=0) for d in usual.cluster.devices
    ]
    assert "usable_memory_bytes" in {a.key for a in usual.assumptions} - {a.key for a in other.assumptions}
    assert other.own_memory == usual.own_memory
    assert load("local-2@1gib").own_memory == {"device0", "device1"}


def test_a_name_can_ask_how_long_a_launch_takes() -> None:
    usual, other = load("demo-hetero-3"), load("demo-hetero-3@1000mbit@145us")
    assert [device.kernel_overhead_s for device in usual.cluster.devices] == [0, 0, 0]
    assert [device.kernel_overhead_s for device in other.cluster.devices] == pytest.approx([145e-6] * 3)
    assert [replace(d, kernel_overhead_s=0) for d in other.cluster.devices] == list(usual.cluster.devices)
    assert "kernel_overhead_s" in {a.key for a in usual.assumptions} - {a.key for a in other.assumptions}
    assert load("demo-hetero-3@0us").cluster.devices == usual.cluster.devices
    with pytest.raises(OrreryError, match="in its measured times"):
        load("local-2@145us")


@pytest.mark.parametrize("asked", ["500", "500Mbit", "0mbit", "0gib", "8gib@9gib", "-5ms", "5ms@6ms", "1mbit@2mbit"])
def test_changes_that_make_no_sense_are_refused(asked: str) -> None:
    with pytest.raises(OrreryError, match="asks for "):
        load(f"galaxy-e@{asked}")


def test_nothing_shapes_loopback() -> None:
    with pytest.raises(OrreryError, match="nothing shapes the links of a testbed on loopback"):
        load("local-2@25mbit")


def test_the_path_of_a_file_may_have_an_at_sign(tmp_path: Path) -> None:
    folder = tmp_path / "me@lab"
    folder.mkdir()
    path = write(folder)
    assert load(str(path)).cluster.latency_s != load(f"{path}@7ms").cluster.latency_s == 7e-3


def test_demo_is_heterogeneous() -> None:
    cluster = load("demo-hetero-3").cluster
    assert [d.profile for d in cluster.devices] == ["jetson-nano-10w", "jetson-tx2-maxn", "jetson-xavier-nx-15w"]
    assert len({d.rates["matmul"] for d in cluster.devices}) == 3
    assert cluster.link("device0", "device2").bandwidth == pytest.approx(94 * MBIT_PER_S, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in names() if re.fullmatch("mix-.*|nano-[0-9]+", name)])
def test_a_name_says_what_is_in_it(name: str) -> None:
    """Boards in the order of the name, behind links of 100 Mbit/s, or of as many as are asked for."""
    cluster = load(name).cluster
    boards = re.findall("([0-9]+)(nano|tx2|nx)", name) or [(name.rpartition("-")[2], "nano")]
    short = {"jetson-nano-10w": "nano", "jetson-tx2-maxn": "tx2", "jetson-xavier-nx-15w": "nx"}
    assert [short[d.profile] for d in cluster.devices] == [kind for count, kind in boards for _ in range(int(count))]
    assert cluster.link("device0", cluster.names[-1]).bandwidth == pytest.approx(94 * MBIT_PER_S)
    fast = load(f"{name}@1000mbit").cluster
    assert fast.link("device0", cluster.names[-1]).bandwidth == pytest.approx(940 * MBIT_PER_S)


@pytest.mark.parametrize("n", [1, 3, 17])
def test_processes_share_this_machine(n: int) -> None:
    testbed = load(f"local-{n}")
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert len(testbed.cluster.devices) == n
    for device in testbed.cluster.devices:
        assert device.measured == "local"
        assert device.rates == {}
        assert device.memory_bytes == installed // n


def test_own_file(tmp_path: Path) -> None:
    testbed = load(write(tmp_path))
    assert testbed.name == "mine"
    assert [d.profile for d in testbed.cluster.devices] == ["board", "board", "jetson-nano-10w"]
    board = testbed.cluster.devices[0]
    assert board.rates == {"matmul": (50e9, 50e9)}
    assert (board.memory_bytes, board.idle_w, board.load_w, board.storage_read) == (1_000_000, 1, 5, None)
    link = testbed.cluster.link
    assert link("device0", "device1").bandwidth == 250 * MBIT_PER_S  # the board's own port is the bottleneck
    assert link("device2", "device0").bandwidth == 250 * MBIT_PER_S
    assert testbed.cluster.bandwidth["device2"] == 900 * MBIT_PER_S  # nominal x TCP efficiency, below its port's 940
    assert link("device0", "device1").medium == link("device1", "device0").medium is not None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('duplex = "half"', 'duplex = "halve"', ["link.duplex", "'halve'", "full, half, shared", "'half'"]),
        ('duplex = "half"', "duplex = half", ["mine.toml", "line 11"]),
        ('["simulated"]', '["simulated"]\ncomputing = "fast"', ["computing", "'fast'", "paced, quota"]),
        ('["simulated"]', '["simulated"]\nheartbeat_timeout_s = 0.1', ["heartbeat_timeout_s", "at least 0.6"]),
        ("value = 1000", "value = 0", ["link.nominal_mbit_per_s.value", "above 0"]),
        ("value = 1000", 'value = "fast"', ["link.nominal_mbit_per_s.value", "'fast'", "a number"]),
        ("value = 1000", "value = true", ["link.nominal_mbit_per_s.value", "a number"]),
        ("value = 1000", "value = nan", ["link.nominal_mbit_per_s.value", "above 0"]),
        ("value = 0.9", "value = 94", ["link.tcp_efficiency", "94", "at most 1"]),
        ("value = 0.9\n", "value = 0.9\nlow = 0.95\nhigh = 1\n", ["link.tcp_efficiency", "outside of its own range"]),
        ('provenance = "derived"', 'provenance = "guessed"', ["link.tcp_efficiency.provenance", "'guessed'"]),
        ('provenance = "derived"', 'provenance = "assumed"', ["link.tcp_efficiency", "both low and high"]),
        ('provenance = "derived"', 'provenance = "fitted"', ["link.tcp_efficiency", "cells"]),
        ("count = 2", "battery_j = 0", ["devices[0].battery_j", "is 0", "above 0"]),
        ("count = 2", 'battery_j = "9 Wh"', ["devices[0].battery_j", "'9 Wh'", "a number"]),
        ("count = 2", "bateri_j = 9", ["devices[0].bateri_j", "Did you mean 'battery_j'"]),
        (
            '"board.toml"',
            '"jetson-nano-l"\nbattery_j = 9',
            ["devices[0].battery_j", "jetson-nano-l", "idle_w and load_w"],
        ),
        ("count = 2", "cuont = 2", ["devices[0].cuont", "Did you mean 'count'"]),
        ("count = 2", "count = 0", ["devices[0].count", "is 0", "1 to 10000"]),
        ("count = 2", "count = 1_000_000", ["devices[0].count", "1 to 10000"]),
        ("count = 2", "count = 1.5", ["devices[0].count", "1.5", "whole number"]),
        ('profile = "board.toml"', 'profile = "none.toml"', ["devices[0].profile", "no file", "none.toml"]),
        ('profile = "jetson-nano-10w"', 'profile = "jetson-nano-10"', ["devices[1].profile", "jetson-nano-10w"]),
        ('profile = "jetson-nano-10w"', 'profil = "x"', ["devices[1].profile", "missing", "Did you mean 'profil'"]),
        ('profile = "jetson-nano-10w"', 'profile = "jetson-tx2-max-q"', ["memory_bandwidth_bytes_per_s", "unknown"]),
        ('medium = "ethernet"', 'medium = "wifi"', ["wifi_mbit_per_s", "unknown"]),
        ('modes = ["simulated"]', "modes = []", ["modes", "at least one"]),
        ('modes = ["simulated"]', 'modes = ["dreamt"]', ["modes", "'dreamt'", "simulated, emulated, real"]),
        ('modes = ["simulated"]', 'modes = ["simulated"]\ncounts = [1]', ["counts", "no known key"]),
        ('description = "A test"', "", ["description", "missing", "a text"]),
    ],
)
def test_mistakes_in_a_testbed_file_are_named(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert old in ENVIRONMENT
    path = write(tmp_path, environment=ENVIRONMENT.replace(old, new, 1))
    with pytest.raises(OrreryError) as caught:
        load(path)
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[efficiency_matmul]", "[efficiency_matmul_forward]", ["efficiency_matmul", "efficiency_matmul_backward"]),
        ("[peak_fp32_flops_per_s]", "[peak_fp16_flops_per_s]", ["efficiency_matmul", "peak_fp32_flops_per_s"]),
        ("[idle_w]\nvalue = 1", "[idle_w]\nvalue = 6", ["idle_w", "load_w"]),
        (
            "[idle_w]",
            '[wait_w]\nvalue = 6\nprovenance = "measured"\nsource = "test"\n[idle_w]',
            ["wait_w", "load_w (5)"],
        ),
        ("[idle_w]\nvalue = 1", "[network_w]\nvalue = 1", ["network_w", "idle_w and load_w"]),
        ("[idle_w]", "[idel_w]", ["idel_w", "Did you mean 'idle_w'"]),
        ('accelerator = "gpu"', 'accelerator = "npu"', ["accelerator", "'npu'", "cpu, gpu"]),
        ('accelerator = "gpu"', 'accelerator = "gpu"\nmeasured = "local"', ["usable_memory_bytes"]),
    ],
)
def test_mistakes_in_a_device_file_are_named(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert old in BOARD
    path = write(tmp_path, board=BOARD.replace(old, new, 1))
    with pytest.raises(OrreryError) as caught:
        load(path)
    for part in [*expected, "board.toml"]:
        assert part in str(caught.value)


def test_a_family_is_no_testbed(tmp_path: Path) -> None:
    path = tmp_path / "mine-N.toml"
    path.write_text(ENVIRONMENT)
    with pytest.raises(OrreryError, match="family"):
        load(str(path))


ONE, TWO = '[[devices]]\nprofile = "board.toml"\n', '[[devices]]\nprofile = "jetson-nano-10w"\n'


@pytest.mark.parametrize(
    ("counts", "entries", "expected"),
    [
        ("counts = [1, 2]", ONE + "count = 2\n", "contradicts `counts`"),
        ("counts = [1, 2]", ONE + TWO, "repeats exactly one"),
        ("counts = [1, 1, 2]", ONE, "each once"),
        ("counts = [0, 2]", ONE, "at least 1"),
        ("counts = [1, 2]\nany_count = 1", ONE, "true or false"),
        ("", ONE, "counts is missing"),
    ],
)
def test_mistakes_in_a_family_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: str, entries: str, expected: str
) -> None:
    link = ENVIRONMENT[ENVIRONMENT.index("[link]") :]
    head = 'description = "A family"\nmodes = ["simulated"]\n'
    (tmp_path / "board.toml").write_text(BOARD)
    (tmp_path / "mine-N.toml").write_text(f"{head}{counts}\n{entries}{link}")
    monkeypatch.setattr(library, "_folder", lambda: tmp_path)
    with pytest.raises(OrreryError, match=expected):
        load("mine-2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pac-nano-3", "pac-nano-1, pac-nano-2, pac-nano-4, pac-nano-6, pac-nano-8"),
        ("pac-nano-04", "pac-nano-4"),
        ("demo-hetero", "demo-hetero-3"),
        ("local-0", "local-1"),
        ("local-10000000", "1 to 10000"),
        ("nowhere.toml", "no file nowhere.toml"),
    ],
)
def test_unknown_testbeds_name_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(OrreryError, match=expected):
        load(name)


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(OrreryError, match="raspberry-pi-4b-8gb"):
        load_device("raspberry-pi-4b")


def test_thousand_boards(tmp_path: Path) -> None:
    testbed = load(write(tmp_path, environment=ENVIRONMENT.replace("count = 2", "count = 999")))
    assert len(testbed.cluster.devices) == 1000
    assert testbed.cluster.devices[-1].name == "device999"


def test_loading_is_fast_and_light() -> None:
    """A testbed loads in under 50 ms (best of five), and neither torch nor pandas is imported on the way."""
    program = "import sys, testbeds.library as l; l.load('demo-hetero-3'); print(*sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "numpy", "transformers", "pydantic"} & set(done.stdout.split())

    def seconds() -> float:
        began = time.perf_counter()
        load("demo-hetero-3")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < 0.05


def test_rates_are_peak_times_efficiency_for_every_device() -> None:
    for name in devices():
        profile = load_device(name)
        for operator, (forward, backward) in profile.rates().items():
            peak = profile.constants["peak_fp32_flops_per_s"].value
            both = profile.constants.get(f"efficiency_{operator}")
            parts = [profile.constants.get(f"efficiency_{operator}_{d}", both) for d in ("forward", "backward")]
            assert all(part is not None and 0 < part.value < 1 for part in parts)
            assert math.isclose(forward, peak * parts[0].value)  # type: ignore[union-attr]
            assert math.isclose(backward, peak * parts[1].value)  # type: ignore[union-attr]


def test_testbed_is_a_value() -> None:
    assert load("pac-nano-4") == load("pac-nano-4")
    assert isinstance(load("local-1"), Testbed)
