"""A real SLURM of several "nodes" on this machine, for as long as a `with` lasts; needs no root, cgroup or systemd.

    with SlurmCluster(folder, nodes=3) as cluster:
        job = cluster.sbatch("--nodes=2", "job.sh")
        cluster.wait_job(job)["JobState"]

One slurmd per node, all on loopback, configured for a test's patience: a node counts as lost after 10 s without a
word. Everything is written below `folder`. With the right to (root), each node has its own host name.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
DAEMONS = ("slurmctld", "slurmd", "slurmstepd")
SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=64
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
JobRequeue=1
EnforcePartLimits=ALL
PropagateResourceLimits=NONE
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MessageTimeout=5
BatchStartTimeout=10
"""


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=SEARCHED) is None]


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


class SlurmCluster:
    def __init__(self, folder: Path, nodes: int = 3, cpus: int = 4) -> None:
        self.folder, self.cpus = folder.resolve(), cpus
        self.nodes = [f"node{n + 1}" for n in range(nodes)]
        self.config = self.folder / "slurm.conf"
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.hurried: set[str] = set()  # jobs that were spared the delay of a requeue
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        unshare = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, check=False)
        self.has_host_names = unshare.returncode == 0
        ours = ("SLURM_", "SBATCH_", "SRUN_")  # no variable of a job that this runs in
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.environment |= {"SLURM_CONF": str(self.config), "PATH": SEARCHED, "GLOO_SOCKET_IFNAME": "lo"}

    # --- its start and end

    def __enter__(self) -> SlurmCluster:
        try:
            self._write_config()
            self._start("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.config)])
            for node in self.nodes:
                self.start_node(node)
            self.wait_nodes()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._stop()

    def _write_config(self) -> None:
        for name in ("state", "log", "spool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        host = socket.gethostname()
        port, *ports = free_ports(1 + len(self.nodes))
        lines = [CONFIG.format(host=host, port=port, user=self.user, folder=self.folder)]
        hosts = [f"127.0.0.1 localhost {host}"]
        for number, (node, port) in enumerate(zip(self.nodes, ports, strict=True), 1):
            address = f"127.0.1.{number}"
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} CPUs={self.cpus} "
                "RealMemory=4096 State=UNKNOWN"
            )
            hosts.append(f"{address} {node}")
        common = f"Nodes={','.join(self.nodes)} MaxTime=INFINITE State=UP"
        lines.append(f"PartitionName=main {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5")
        lines.append(f"PartitionName=high {common} PriorityTier=10 PreemptMode=OFF")
        self.config.write_text("\n".join(lines) + "\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _start(self, name: str, command: list[str]) -> None:
        if self.has_host_names:
            names = f"mount --make-rprivate / && mount --bind {self.folder}/hosts /etc/hosts"
            own = "" if name == "slurmctld" else f" && hostname {name}"
            apart = ["unshare", "--mount", *(["--uts"] if own else [])]
            command = [*apart, "sh", "-c", f'{names}{own} && exec "$@"', "sh", *command]
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment,
                start_new_session=True, cwd=self.folder,
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self._start(node, ["slurmd", "-D", "-N", node, "-f", str(self.config)])

    def _stop(self) -> None:
        """Ends every job, then the daemons, then what is left of the jobs."""
        if "slurmctld" in self.daemons:
            self.run("scancel", "--full", "--signal=KILL", f"--user={self.user}", check=False)
            self.run("scancel", f"--user={self.user}", check=False)
        for name in [*self.nodes, "slurmctld"]:
            if name in self.daemons:
                self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        send(signal.SIGKILL, self.processes())

    # --- its nodes

    def wait_nodes(self, timeout: float = 30) -> None:
        """Until every node is idle."""
        deadline = time.monotonic() + timeout
        while (states := self.node_states()) != dict.fromkeys(self.nodes, "idle"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes are {states}; logs in {self.folder / 'log'}")
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    text = (self.folder / "log" / f"{name}.out").read_text(errors="replace")
                    raise RuntimeError(f"{name} ended with {daemon.returncode}: {text[-2000:]}")
            time.sleep(0.1)

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).stdout.splitlines()
        return dict(line.split() for line in lines if len(line.split()) == 2)

    def crash_node(self, node: str) -> None:
        """As if its power was cut: frozen first, so that nothing of it can report the others' death."""
        processes = self.node_processes(node)
        send(signal.SIGSTOP, processes)
        send(signal.SIGKILL, processes)
        self.daemons.pop(node).wait()

    def node_processes(self, node: str) -> list[int]:
        """Its slurmd, the managers of its steps, and every task."""
        found = {self.daemons[node].pid}
        for pid in self.processes():
            if variable(pid, "SLURMD_NODENAME") != node:
                continue
            found.add(pid)
            parent = parent_of(pid)
            if parent and command_name(parent) == "slurmstepd":
                found.add(parent)
        return sorted(found)

    def processes(self) -> list[int]:
        """Its daemons, managers of steps and tasks; the last two leave their daemon's session.

        Not a shell with our SLURM_CONF in which someone looks on, nor whoever started us.
        """
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        above = ancestors(os.getpid())
        ours = [pid for pid in pids if pid not in above and variable(pid, "SLURM_CONF") == str(self.config)]
        return [pid for pid in ours if command_name(pid) in DAEMONS or variable(pid, "SLURMD_NODENAME") is not None]

    # --- its jobs

    def run(
        self, *command: str | Path, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        texts = [str(part) for part in command]
        done = subprocess.run(
            texts, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def sbatch(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """The job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).stdout.strip().split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """scontrol's fields: JobState, Reason, Restarts, ExitCode, NodeList ..."""
        line = self.run("scontrol", "-o", "show", "job", number, check=False).stdout
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def hurry(self, number: str) -> dict[str, str]:
        """The same, and a job that was requeued is spared SLURM's usual delay of minutes.

        It starts after two seconds: within the same one, its nodes take the new start for the old one and refuse it.
        """
        job = self.job(number)
        start = f"{number} after {job.get('Restarts')} restarts"
        if job.get("JobState") == "PENDING" and job.get("Reason") == "BeginTime" and start not in self.hurried:
            self.hurried.add(start)
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now+2", check=False)
        return job

    def wait_job(self, number: str, states: Iterable[str] = ENDED, timeout: float = 120) -> dict[str, str]:
        """Its fields once it is in one of the states."""
        deadline, wanted = time.monotonic() + timeout, set(states)
        while (job := self.hurry(number)).get("JobState") not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {job.get('JobState')} ({job.get('Reason')})")
            time.sleep(0.2)
        return job


def send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def variable(pid: int, name: str) -> str | None:
    """Of a process's environment, as it was started; None: it has none, or is gone."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = f"{name}=".encode()
    return next((entry[len(prefix) :].decode() for entry in entries if entry.startswith(prefix)), None)


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError):
        return None


def ancestors(pid: int | None) -> set[int]:
    """With the process itself."""
    found: set[int] = set()
    while pid and pid not in found:
        found.add(pid)
        pid = parent_of(pid)
    return found


def command_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""
