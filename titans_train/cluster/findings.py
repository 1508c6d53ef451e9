"""What the facts of all ranks mean: findings, each with value, limit and remedy. Pure: no rank, no device, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titans_train.cluster.facts import Disk, Facts
from titans_train.plan import Plan, human_bytes

OK, WARNING, ERROR = "ok", "warning", "error"
CLOCK_WARNING, CLOCK_ERROR = 1.0, 60.0  # seconds; object stores refuse requests of a clock that is minutes off
GPU_WITHIN, GPU_BETWEEN = 20e9, 5e9  # bytes per second: below PCIe 4's and an InfiniBand link's
MARGIN = 1.1  # of a checkpoint's size, as saving asks for


@dataclass(frozen=True)
class Finding:
    level: str
    subject: str
    text: str  # with value and limit
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n{'':24}-> {self.remedy}" if self.remedy else ""
        return f"  {self.level:8} {self.subject:12} {self.text}{remedy}"


def judge(plan: Plan, facts: Sequence[Facts], seen: Sequence[bool], clocks: Sequence[float]) -> list[Finding]:
    """All of them but the fabric's. `seen`: of each rank, whether rank 0's file came into sight; `clocks`: seconds that
    each rank's clock is ahead of rank 0's."""
    return [
        *same_config(facts), *devices(facts), *kernels(facts), *memory(plan, facts), *software(facts),
        *clock(facts, clocks), *disk(plan, facts, seen), *data(facts),
    ]  # fmt: skip


def nodes(facts: Sequence[Facts]) -> list[str]:
    return list(dict.fromkeys(fact.host for fact in facts))


def _odd(facts: Sequence[Facts], value: Callable[[Facts], object]) -> str:
    """'a on node1, node2; b on node3' where ranks differ; empty where they agree."""
    hosts: dict[object, list[str]] = {}
    for fact in facts:
        hosts.setdefault(value(fact), []).append(fact.host)
    if len(hosts) == 1:
        return ""
    common = Counter(value(fact) for fact in facts).most_common()
    return "; ".join(f"{v} on {', '.join(_few(hosts[v]))}" for v, _ in common)


def _few(hosts: Sequence[str], most: int = 4) -> list[str]:
    distinct = list(dict.fromkeys(hosts))
    return distinct[:most] + ([f"{len(distinct) - most} more"] if len(distinct) > most else [])


def same_config(facts: Sequence[Facts]) -> list[Finding]:
    if odd := _odd(facts, lambda fact: fact.config):
        return [Finding(ERROR, "config", f"the nodes read different configs: {odd}", "give every node the same file")]
    return []


def devices(facts: Sequence[Facts]) -> list[Finding]:
    found = []
    for fact in facts:
        device = fact.device
        if device.kind == "cuda" and device.count < fact.local_ranks:
            if fact.local_rank == 0:
                text = f"{fact.host} shows {device.count} GPUs for {fact.local_ranks} ranks; each needs its own"
                found.append(Finding(ERROR, "devices", text, "ask for as many GPUs as ranks, or drain the node"))
        elif not device.right:
            what = device.error or "a product of matrices is wrong"
            text = f"{fact.host}, rank {fact.rank}, device {fact.local_rank} ({device.name}): {what}"
            found.append(Finding(ERROR, "devices", text, "drain the node and have the device looked at"))
        elif device.kind == "cpu" and fact.local_rank == 0 and device.count < fact.local_ranks:
            text = f"{fact.host}: {device.count} CPUs for {fact.local_ranks} ranks"
            found.append(Finding(WARNING, "devices", text, "give each rank a CPU of its own: --cpus-per-task"))
    if odd := _odd(facts, lambda fact: fact.device.name):
        text = f"the ranks' devices differ, and all wait for the slowest: {odd}"
        found.append(Finding(WARNING, "devices", text, "choose nodes of one kind: --constraint, --partition"))
    one = facts[0].device
    count = f"{one.count} {'GPUs' if one.kind == 'cuda' else 'CPUs'} ({one.name}) on {facts[0].host}"
    return found or [Finding(OK, "devices", f"{count}; right results on all {len(facts)} ranks")]


def kernels(facts: Sequence[Facts]) -> list[Finding]:
    """What computes the model."""
    for level, said in ((ERROR, "ready_error"), (WARNING, "ready")):
        hosts: dict[str, list[str]] = {}
        for fact in facts:
            if text := getattr(fact, said):
                hosts.setdefault(text, []).append(fact.host)
        if hosts:
            remedy = "install a C++ compiler there, or build once in a folder that all nodes see (TITANS_TRAIN_CACHE)"
            return [Finding(level, "kernels", f"on {', '.join(_few(on))}: {t}", remedy) for t, on in hosts.items()]
    return [Finding(OK, "kernels", "what computes the model is there on every rank")]


def memory(plan: Plan, facts: Sequence[Facts]) -> list[Finding]:
    """A rank's memory, as planned, beside what is there."""
    needed = plan.memory_bytes["total"]
    known = [fact for fact in facts if fact.device.memory and (fact.device.kind == "cuda" or fact.local_rank == 0)]
    if not known:
        return []
    least = min(known, key=lambda fact: fact.device.memory / _sharing(fact))
    share = least.device.memory // _sharing(least)
    text = f"{human_bytes(needed)} planned per rank, {human_bytes(share)} there (least: {least.host})"
    if needed <= share:
        return [Finding(OK, "memory", text)]
    remedy = "a higher parallel.zero_stage, training.activation_checkpointing, a smaller micro-batch or more ranks"
    return [Finding(ERROR if least.device.kind == "cuda" else WARNING, "memory", text, remedy)]


def _sharing(fact: Facts) -> int:
    """Ranks that share the memory of the fact's device."""
    return fact.local_ranks if fact.device.kind == "cpu" else 1


def software(facts: Sequence[Facts]) -> list[Finding]:
    found = []
    for name in sorted({name for fact in facts for name in fact.versions}):
        if odd := _odd(facts, lambda fact, name=name: fact.versions.get(name, "none")):  # type: ignore[misc]
            text = f"{name} differs between nodes: {odd}"
            found.append(Finding(ERROR, "software", text, "use one environment for all nodes: VENV or CONTAINER_IMAGE"))
    shown = ", ".join(f"{name} {text}" for name, text in facts[0].versions.items())
    return found or [Finding(OK, "software", f"the same on every node: {shown}")]


def clock(facts: Sequence[Facts], ahead: Sequence[float]) -> list[Finding]:
    worst = max(range(len(ahead)), key=lambda rank: abs(ahead[rank]))
    offset = abs(ahead[worst])
    text = (
        f"{facts[worst].host} is {offset:.3f} s from {facts[0].host} (limits: {CLOCK_WARNING:g} and {CLOCK_ERROR:g} s)"
    )
    if offset < CLOCK_WARNING:
        return [Finding(OK, "clock", text)]
    return [Finding(ERROR if offset > CLOCK_ERROR else WARNING, "clock", text, "run chrony or ntpd on the nodes")]


def disk(plan: Plan, facts: Sequence[Facts], seen: Sequence[bool]) -> list[Finding]:
    found, firsts = [], [(fact, fact.disk) for fact in facts if fact.disk is not None]
    shared = "put run.folder on a file system that all nodes share, at the same path"
    for fact, at in firsts:
        if at.error:
            text = f"{fact.host} cannot write in {at.place}: {at.error}"
            found.append(Finding(ERROR, "disk", text, "choose another run.folder, or have it mended"))
        elif not seen[fact.rank]:
            text = f"a file that {facts[0].host} wrote in {firsts[0][1].place} is not seen from {fact.host}"
            found.append(Finding(ERROR, "disk", text, shared))
    usable = [at for _, at in firsts if not at.error]
    return [*found, *(room(plan, min(usable, key=lambda at: at.free)) if usable else [])]


def room(plan: Plan, at: Disk) -> list[Finding]:
    """For checkpoints: those kept and the one that is being written."""
    one, keep = plan.checkpoint_bytes, plan.config.checkpoint.keep
    text = f"{human_bytes(at.free)} free at {at.place}; a checkpoint takes {human_bytes(one)}, {keep} are kept"
    remedy = "free some space, lower checkpoint.keep, or choose another run.folder"
    speed = f"{at.speed / 1e6:,.0f} MB/s written and flushed: about {one / at.speed:,.0f} s for one from one node"
    if at.free < MARGIN * one:
        return [Finding(ERROR, "disk", text, remedy)]
    tight = at.free < (keep + 1) * one
    return [Finding(WARNING if tight else OK, "disk", f"{text}; {speed}", remedy if tight else "")]


def data(facts: Sequence[Facts]) -> list[Finding]:
    firsts = [fact for fact in facts if fact.local_rank == 0]
    found = [
        Finding(ERROR, "data", f"from {fact.host}: {fact.data_error}", "mount or copy the data where this node sees it")
        for fact in firsts
        if fact.data_error
    ]
    readable = [fact for fact in firsts if not fact.data_error]
    if readable and _odd(readable, lambda fact: fact.data):
        text = f"the nodes see different data at the same path: {', '.join(_few([fact.host for fact in readable]))}"
        found.append(Finding(ERROR, "data", text, "copy the data again to the nodes where it is old"))
    return found or [Finding(OK, "data", "the same on every node")]


def fabric(rates: Sequence[Mapping[str, Any]], facts: Sequence[Facts], least: Mapping[str, float]) -> list[Finding]:
    """Of the all-reduce. `rates`: of each rank, bytes per second, by subject (parallel/fabric.py); `least`: what the
    user demands."""
    found = [
        Finding(ERROR, "all-reduce", f"{fact.host}, rank {fact.rank}: {rate['error']}", _slow("between"))
        for fact, rate in zip(facts, rates, strict=True)
        if "error" in rate
    ]
    for subject, label in (("within", "within nodes"), ("between", "between nodes"), ("all", "over all ranks")):
        measured = {rank: rate[subject] for rank, rate in enumerate(rates) if subject in rate}
        if not measured:
            continue
        slowest = min(measured, key=lambda rank: measured[rank])
        usual = {"within": GPU_WITHIN, "between": GPU_BETWEEN}.get(subject, 0.0)
        usual = usual if facts[0].device.kind == "cuda" else 0.0
        limit = least.get(subject, usual)
        value = measured[slowest]
        where = f" (slowest: {facts[slowest].host})" if subject == "within" else ""
        text = f"{label}: {value / 1e9:.2f} GB/s{where}" + (f", at least {limit / 1e9:g} expected" if limit else "")
        level = OK if value >= limit else ERROR if subject in least else WARNING
        remedy = "" if level == OK else _slow(subject)
        found.append(Finding(level, "all-reduce", text, remedy))
    return found


def _slow(subject: str) -> str:
    if subject == "within":
        return "see nvidia-smi topo -m: NVLink or PCIe peers? NCCL_DEBUG=INFO names what NCCL uses"
    return "NCCL_SOCKET_IFNAME, NCCL_IB_HCA: NCCL_DEBUG=INFO names the network that NCCL uses"
