"""A real SLURM on this machine, for tests: munged, MariaDB, slurmdbd, slurmctld and two slurmd, all as root on
loopback, on free ports, in a folder of their own. A SLURM that is already there is left alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
NODES = ("n1", "n2")
SBIN = "/usr/sbin:/usr/local/sbin:/sbin"

SLURM = """\
ClusterName=soup
SlurmctldHost=localhost
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
AccountingStoreFlags=job_comment
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=grace Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN"

SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


class Cluster:
    """`environment` leads SLURM's commands to it. Nodes n1 and n2 have four CPUs each, whatever the machine has; of the
    partitions, high preempts low and grace by requeueing, grace after a minute in which a job may end by itself."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="soup-slurm-"))  # short: a socket's path has 107 bytes
        self.environment = {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(self.folder / "db.socket"),
            "PATH": f"{os.environ['PATH']}:{SBIN}",
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Returns when both nodes are idle and accounting answers.

        Raises:
            RuntimeError: a package is missing, or a daemon does not come up; its log is in the message.
        """
        missing = [name for name in PROGRAMS if not shutil.which(name, path=self.environment["PATH"])]
        if missing or os.geteuid() != 0:
            raise RuntimeError(
                f"needs root, and {', '.join(missing) or 'all programs are there'}: apt-get install "
                "slurm-wlm slurmdbd mariadb-server munge, as .ci/run does"
            )
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        ports = _free_ports(2 + len(NODES))
        nodes = "\n".join(
            NODE.format(name=name, port=port) for name, port in zip(NODES, ports[2:], strict=True)
        )
        values = {"folder": self.folder, "ctld": ports[0], "dbd": ports[1], "nodes": nodes}
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(SLURM.format(**values))
        database = self.folder / "slurmdbd.conf"
        database.write_text(SLURMDBD.format(**values))
        database.chmod(0o600)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _start(self) -> None:
        here = self.folder
        munged = [f"--{name}={here}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={here}/munge.key", *munged)
        self._run(
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            f"--datadir={here}/db",
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
        )
        self._daemon(
            "mariadbd",
            "--no-defaults",
            "--user=root",
            "--skip-networking",
            f"--datadir={here}/db",
            f"--socket={here}/db.socket",
            f"--pid-file={here}/db.pid",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=64M",
        )
        self._until("MariaDB", (here / "db.socket").exists)
        self._daemon("slurmdbd", "-D")
        self._until("slurmdbd", lambda: self._says("sacctmgr", "-n", "show", "cluster") is not None)
        self._run("sacctmgr", "-i", "add", "cluster", "soup")
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        self._until(
            "a node", lambda: (self._says("sinfo", "-h", "-N", "-p", "low", "-o", "%T") or "") == "idle\nidle"
        )

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-D", "-N", name, called=name)

    def kill_node(self, name: str) -> None:
        """SIGKILL to its slurmd; what runs there goes on, as on a real node."""
        self.daemons[name].kill()
        self.daemons.pop(name).wait()

    def stop(self) -> None:
        """Ends every job, then the daemons in the opposite order of their start; only those started here."""
        if "slurmctld" in self.daemons:
            self._says("scancel", "--user=root", "--signal=KILL", "--full")
            self._says("scancel", "--user=root")
            end = time.monotonic() + 15
            while self._says("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.2)
        for process in reversed(self.daemons.values()):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str) -> str:
        """A command's output; it must succeed."""
        return self._run(*command)

    def states(self, *, all_lives: bool = False) -> Mapping[str, list[str]]:
        """Job to what sacct says of it, by the ids that people see (`12_0`); with `all_lives` each requeue's too."""
        lines = self.run(
            "sacct", "-n", "-X", "-P", *(["-D"] if all_lives else []), "-o", "JobID,State"
        ).split("\n")
        found: dict[str, list[str]] = {}
        for line in filter(None, lines):
            job, _, state = line.partition("|")
            found.setdefault(job, []).append(state.split()[0])
        return found

    def start_now(self, job: str) -> None:
        """A requeued job, which SLURM holds for two minutes. Not within the second in which slurmd ended it, whose
        clock for this ticks in seconds: "already killed, do not launch", it says, and the job is FAILED."""
        time.sleep(1.1)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def _daemon(self, program: str, *arguments: str, called: str | None = None) -> None:
        name = called or program
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "TERM",
                    program,
                    *arguments,
                ],  # ends with a test that is killed, too
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def _says(self, *command: str) -> str | None:
        """A command's output, or `None` where it fails."""
        try:
            return self._run(*command)
        except (RuntimeError, subprocess.TimeoutExpired):
            return None

    def _until(self, what: str, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(
                    path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.[lo][ou][gt]")
                )
                raise RuntimeError(f"{what} does not come up (ended: {', '.join(dead) or 'none'})\n{logs}")
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
