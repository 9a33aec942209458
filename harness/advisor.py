"""The advisor: the phases of collaborative edge training (Zeng et al. 2024) that come before the training.

1. Participant selection: the sets of devices that differ (`harness.participants`).
2. Orchestration: on each set the plan of every method that it is given; their time, energy and memory by simulation.
3. Distribution: the weights go from the testbed's first device to all that take part, once, before the run.
What is better depends on the objective; what is not worse in everything is on the Pareto front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

from harness import batteries, power, runner
from harness.cluster import Cluster
from harness.cores import on_all_cores
from harness.costs import Costs
from harness.distribution import distribution
from harness.errors import BatteryEmpty, Broken, OrreryError, OutOfMemory, Unsupported
from harness.experiment import Request
from harness.participants import bound, sets_of_devices
from harness.plain import plain
from harness.plan import Plan
from harness.search import overflow
from harness.simulator import simulate

TIME, ENERGY, EDP, CO2 = OBJECTIVES = ("time", "energy", "edp", "co2")
#: With so few devices every method is planned on every set of them.
EVERY_SET_UP_TO = 4
#: With more, every method on all devices, and these many of the best on other sets; of those near the best set, these
#: many in a step.
LEADERS, MOST_NEAR = 3, 6


@dataclass(frozen=True)
class Candidate:
    """One method on one set of devices: what it would take, or why it can't.

    `options` are those that are not the method's defaults, `devices` those that take part. Time and energy are of the
    whole run and of the distribution before it; energy is None where a power is unknown. `missing_on`: the device whose
    memory is too small. `offered`: the devices that the method could have used. `plan`: its summary.
    """

    method: str
    options: Mapping[str, object]
    devices: tuple[str, ...]
    status: str
    reason: str | None = None
    time_s: float | None = None
    energy_j: float | None = None
    peak_memory_bytes: int | None = None
    distribution_s: float | None = None
    distribution_j: float | None = None
    missing_on: str | None = None
    offered: tuple[str, ...] = ()
    plan: Mapping[str, Any] | None = None

    def value(self, objective: str) -> float | None:
        """What is to be least. CO2 goes with energy where all draw on one grid."""
        if objective == TIME or self.time_s is None or self.energy_j is None:
            return self.time_s if objective == TIME else None
        return self.energy_j * self.time_s if objective == EDP else self.energy_j


class Advice(NamedTuple):
    """`ranked`: candidates that can be done in time, best first; `others`: those that can't, or not be compared.

    `front`: those of `ranked` that no other one beats. Of `num_sets` sets of devices `num_planned` were planned for.
    """

    ranked: list[Candidate]
    others: list[Candidate]
    front: list[Candidate]
    num_sets: int
    num_planned: int


def advise(
    requests: Sequence[Request],
    costs: Costs,
    objective: str,
    deadline_s: float | None = None,
) -> Advice:
    """Candidates of these requests, which ask for one workload on one testbed by different methods or options.

    Raises OrreryError where none can be done, or none until the deadline.
    """
    cluster = requests[0].testbed.cluster
    sets = sets_of_devices(cluster)
    if len(cluster.devices) <= EVERY_SET_UP_TO:
        found = _evaluated([(request, names) for names in sets for request in requests], costs)
        planned = len(sets)
    else:
        found, planned = _near_the_best(requests, costs, objective, sets)
    distinct = {_what(candidate): candidate for candidate in reversed(found)}  # of equal ones the first
    return _ranked(list(distinct.values())[::-1], objective, deadline_s, len(sets), planned)


def _near_the_best(
    requests: Sequence[Request], costs: Costs, objective: str, sets: Sequence[tuple[str, ...]]
) -> tuple[list[Candidate], int]:
    """Every method on all devices, and again without those that lack memory for it. Then the best of them on the set of
    each size that could be best, and from the best set of all step by step to the next; but on none whose bound is no
    better than what is found. At the end every method on the best set: where another one is better there, on from it.
    Also the number of sets that were planned for."""
    cluster, workload = requests[0].testbed.cluster, requests[0].workload
    everybody = list(range(len(requests)))
    found: dict[tuple[int, tuple[str, ...]], Candidate] = {}

    def plan_for(pairs: Iterable[tuple[int, tuple[str, ...]]]) -> None:
        new = [pair for pair in pairs if pair not in found]
        found.update(zip(new, _evaluated([(requests[n], names) for n, names in new], costs), strict=True))

    def values(names: tuple[str, ...] | None = None) -> list[tuple[float, int, tuple[str, ...]]]:
        """Of what can be done, on these devices or on any, the best first."""
        known = ((c.value(objective), *pair) for pair, c in found.items() if names is None or pair[1] == names)
        return sorted((value, n, offered) for value, n, offered in known if value is not None)

    @cache
    def at_best(names: tuple[str, ...]) -> float:
        seconds, joules = bound(workload, costs, cluster.only(names).devices)
        if objective == TIME:
            return seconds
        return float("inf") if joules is None else joules * seconds if objective == EDP else joules

    todo = [(number, sets[0]) for number in everybody]
    while todo:
        plan_for(todo)
        todo = [
            (number, fewer)
            for number, names in todo
            if (fewer := _with_more_memory(cluster, names, found[number, names].missing_on))
        ]
    by_bound = sorted(sets, key=at_best)
    sizes = {len(names): names for names in reversed(by_bound)}  # of each size the one that is best at best
    leaders = [number for _, number, _ in values(sets[0])[:LEADERS]] or everybody
    chosen, numbers, best = list(sizes.values()), leaders, float("inf")
    while True:
        limit = values()[0][0] if values() else float("inf")
        plan_for([(number, names) for names in chosen if at_best(names) < limit for number in numbers])
        ranked = values()
        if ranked and ranked[0][0] < best:
            best, _, around = ranked[0]
            leaders = [number for _, number, _ in values(around)[:LEADERS]] if numbers is everybody else leaders
            chosen, numbers = [names for names in by_bound if _near(names, around)][:MOST_NEAR], leaders
        elif ranked and numbers is not everybody:
            chosen, numbers = [around], everybody
        else:
            return list(found.values()), len({names for _, names in found})


def _near(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether they differ in one device that joins, leaves or takes another one's place."""
    joining, leaving = set(names).difference(others), set(others).difference(names)
    return max(len(joining), len(leaving)) == 1


def _with_more_memory(cluster: Cluster, names: Sequence[str], missing_on: str | None) -> tuple[str, ...]:
    if missing_on not in cluster.names:
        return ()
    least = cluster.device(missing_on).memory_bytes
    return tuple(name for name in names if cluster.device(name).memory_bytes > least)


def _evaluated(asked: Sequence[tuple[Request, tuple[str, ...]]], costs: Costs) -> list[Candidate]:
    with on_all_cores(partial(_candidate, costs=costs), asked) as candidates:
        return list(candidates)


def _candidate(asked: tuple[Request, tuple[str, ...]], costs: Costs) -> Candidate:
    """A request on a part of its testbed's devices."""
    request, names = asked
    whole = request.testbed.cluster
    part = whole.only(names)
    refused = partial(Candidate, request.method.name, _chosen(request), names, offered=names)
    try:
        plan = _plan(request, names, costs)
        trace = simulate(plan, costs, part)
        error = overflow(trace, part) or batteries.first_empty(trace, plan, part)
        if error is not None:
            raise error
    except OutOfMemory as miss:
        return refused("oom", str(miss), missing_on=miss.device)
    except (Unsupported, OrreryError) as reason:
        return refused("unsupported", str(reason))
    except (BatteryEmpty, Broken) as reason:
        return refused("failed", str(reason))
    used, sent = power.energy(trace, part), distribution(plan, whole)
    return Candidate(
        request.method.name,
        _chosen(request),
        trace.devices,
        "ok",
        time_s=trace.total_s + sent.seconds,
        energy_j=None if used is None or sent.joules is None else used.gross_j + sent.joules,
        peak_memory_bytes=max(trace.peak_bytes.values()),
        distribution_s=sent.seconds,
        distribution_j=sent.joules,
        offered=names,
        plan=plain(dict(plan.summary)),
    )


def plan_of(candidate: Candidate, requests: Sequence[Request], costs: Costs) -> Plan:
    """The whole plan of a candidate that one of these requests has led to."""
    request = next(r for r in requests if (r.method.name, _chosen(r)) == (candidate.method, candidate.options))
    return _plan(request, candidate.offered, costs)


def _plan(request: Request, names: Sequence[str], costs: Costs) -> Plan:
    part = replace(request.testbed, cluster=request.testbed.cluster.only(names))  # type: ignore[type-var]
    return runner.checked_plan(replace(request, testbed=part), costs)


def _chosen(request: Request) -> dict[str, object]:
    """The options that are not the method's defaults."""
    defaults = request.method.options
    chosen: dict[str, object] = plain({k: v for k, v in request.options.items() if v != defaults.get(k)})
    return chosen


def _what(candidate: Candidate) -> tuple[object, ...]:
    """The same where a method makes nothing of further devices, or refuses for the same reason: once is enough."""
    c = candidate
    options = repr(sorted(c.options.items())) if c.time_s is None else None
    where = c.devices if c.time_s is not None or c.status != "unsupported" else ()
    return c.method, options, where, c.reason, c.time_s, c.energy_j, c.peak_memory_bytes


def _ranked(
    found: Sequence[Candidate], objective: str, deadline_s: float | None, num_sets: int, planned: int
) -> Advice:
    """Of equal candidates the one that is better in time, energy and memory, in this order, comes first; then the one
    with fewer devices, then the method that is named first."""
    able = [candidate for candidate in found if candidate.status == "ok"]
    if not able:
        reasons = "; ".join(f"{c.method}: {c.reason}" for c in found[:3])
        raise OrreryError(f"No method can do this workload on these devices, such as {reasons}.")
    known = [candidate for candidate in able if candidate.value(objective) is not None]
    if not known:
        raise OrreryError(
            f"The objective {objective} needs the powers of all devices that take part, and of every candidate one is "
            "unknown. Choose --objective time, or add idle_w and load_w to a device file of your own."
        )
    in_time = [c for c in known if deadline_s is None or (c.time_s or 0.0) <= deadline_s]
    if not in_time:
        quickest = min(known, key=lambda c: c.time_s or 0.0)
        raise OrreryError(
            f"No candidate is done in {deadline_s:g} s. The fastest is {quickest.method} on "
            f"{', '.join(quickest.devices)} in {quickest.time_s:.6g} s. Allow that much, or name a smaller workload or "
            "faster links."
        )
    ranked = sorted(in_time, key=_order(objective))
    others = [replace(c, reason=_why_not(c, objective)) if c.status == "ok" else c for c in found if c not in ranked]
    return Advice(ranked, others, pareto_front(ranked), num_sets, planned)


def _order(objective: str) -> Callable[[Candidate], tuple[float, ...]]:
    def key(candidate: Candidate) -> tuple[float, ...]:
        c = candidate
        return tuple(v or 0.0 for v in (c.value(objective), c.time_s, c.energy_j, c.peak_memory_bytes, len(c.devices)))

    return key


def _why_not(candidate: Candidate, objective: str) -> str:
    return "no energy is known of one of its devices" if candidate.value(objective) is None else "misses the deadline"


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those than which no other one is better in time, energy or memory without being worse in another of them.

    Energy that is not known counts as endless."""
    points = [(c.time_s, float("inf") if c.energy_j is None else c.energy_j, c.peak_memory_bytes) for c in candidates]
    return [c for c, mine in zip(candidates, points, strict=True) if not any(_beats(other, mine) for other in points)]


def _beats(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
