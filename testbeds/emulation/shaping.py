"""Links as slow and as far as those of a testbed: token buckets at both ends of a device's link to the switch.

What a device sends waits at its own end, what it is sent at the switch's: the port of a full-duplex switch. Several
that send to one device share its port, and TCP's own congestion control shares it out, as on a real switch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from harness.errors import OrreryError
from testbeds.emulation.namespaces import DEVICE_PORT, in_namespace, program, run, switch_port

#: Ethernet's largest frame without its checksum, which is what a bucket counts.
FRAME_BYTES = 1514
#: Small messages may leave at once up to this, and every transfer is this much too fast. Long enough for late timers:
#: above `FAST_MBIT_PER_S` the kernel sends up to 64 KiB at a time, and a bucket below twice that loses 5 to 40 %.
BURST_S, FAST_BURST_S = 0.5e-3, 1e-3
FAST_MBIT_PER_S = 200.0
#: What waits at a port beyond this is dropped. TCP fills it only while several send to one device; then this is also
#: the longest that a small message waits. Below `LEAST_QUEUE_BYTES` senders that share a port wait for retransmissions.
QUEUE_S = 0.1
LEAST_QUEUE_BYTES = 64_000
#: Packets on their way through a latency: of 64 KiB each, so that this holds any rate times any latency.
DELAYED_PACKETS = 100_000
#: What `tc` calls the token bucket, wherever it hangs, so that its rate can be changed.
BUCKET = "2:"


def shape(pid: int, rank: int, mbit_per_s: float, latency_s: float = 0.0) -> None:
    """The link of a plugged device passes `mbit_per_s` in each direction, Ethernet's headers included.

    TCP gets 0.956 of it. `latency_s` is one way, for whatever reaches this device: every path has it once. It needs
    netem (`has_netem`).
    """
    if latency_s < 0:
        raise OrreryError(f"The latency of rank {rank} is {latency_s} s. It must be 0 or more.")
    bucket = ["handle", BUCKET, *_bucket(mbit_per_s)]
    port = switch_port(rank)
    unshape(pid, rank)
    in_namespace(pid, ["tc", "qdisc", "add", "dev", DEVICE_PORT, "root", *bucket])
    if latency_s == 0:
        run(["tc", "qdisc", "add", "dev", port, "root", *bucket])
        return
    netem = ["netem", "delay", f"{latency_s * 1e6:.0f}us", "limit", str(DELAYED_PACKETS)]
    run(["tc", "qdisc", "add", "dev", port, "root", "handle", "1:", *netem])
    run(["tc", "qdisc", "add", "dev", port, "parent", "1:1", *bucket])


def set_rate(pid: int, rank: int, mbit_per_s: float) -> None:
    """Change the rate of a shaped link, in both directions, under whatever is on its way."""
    bucket = ["handle", BUCKET, *_bucket(mbit_per_s)]
    in_namespace(pid, ["tc", "qdisc", "change", "dev", DEVICE_PORT, *bucket])
    run(["tc", "qdisc", "change", "dev", switch_port(rank), *bucket])


def set_link(rank: int, up: bool) -> None:
    """Pull a device's cable out of the switch, or plug it in again: the device sees no carrier and loses what it sends.

    Connections outlive it, for as long as TCP repeats.
    """
    run(["ip", "link", "set", switch_port(rank), "up" if up else "down"])


def unshape(pid: int, rank: int) -> None:
    """Let a device's link be as fast as this machine."""
    remove: list[tuple[Callable[[Sequence[str]], str], str]] = [
        (lambda command: in_namespace(pid, command), DEVICE_PORT),
        (run, switch_port(rank)),
    ]
    for call, device in remove:
        if "noqueue" not in call(["tc", "qdisc", "show", "dev", device, "root"]):
            call(["tc", "qdisc", "del", "dev", device, "root"])


def has_netem() -> bool:
    """Whether this kernel can delay packets. Tried on the loopback of a namespace made for it."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    delay = ["qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    try:
        run(["unshare", *user, "--net", program("tc"), *delay])
    except OrreryError as error:
        # Either the module is missing, or the kernel was built without it.
        if "kind is unknown" in str(error) or "No such file" in str(error):
            return False
        raise
    return True


def _bucket(mbit_per_s: float) -> list[str]:
    """tc's words for a token bucket of this rate."""
    if not 0.01 <= mbit_per_s <= 100_000:
        raise OrreryError(f"A link of {mbit_per_s} Mbit/s can't be emulated. It must pass 0.01 to 100000 Mbit/s.")
    rate = mbit_per_s * 1e6 / 8
    burst = max(2 * FRAME_BYTES, rate * (FAST_BURST_S if mbit_per_s > FAST_MBIT_PER_S else BURST_S))
    limit = max(LEAST_QUEUE_BYTES, rate * QUEUE_S)
    return ["tbf", "rate", f"{mbit_per_s * 1e6:.0f}bit", "burst", f"{burst:.0f}", "limit", f"{limit:.0f}"]
