"""Several hosts on one machine for tests: a typed cover of the script ``lab`` beside this file.

Every host has its own address, name, /tmp, current folder and HOME. Nothing but the code and its
environment is on all of them.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAB = Path(__file__).with_name("lab")
ROOT = Path(__file__).resolve().parents[2]
RAY_PORT = 6379
MOST_LABS = 40


def missing() -> str | None:
    """Why no lab can be had on this machine, None where it can."""
    if os.geteuid() != 0:
        return "needs root (network namespaces)"
    absent = [name for name in ("ip", "unshare", "tc") if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install iproute2 util-linux"
    probe = subprocess.run(["ip", "netns", "list"], capture_output=True, check=False)
    return None if probe.returncode == 0 else f"ip netns: {probe.stderr.decode().strip()}"


@dataclass(slots=True)
class Lab:
    """Hosts 1 to ``count``. Made by ``hosts`` only, which removes it."""

    number: int
    count: int
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def lab(self, *words: object) -> str:
        done = subprocess.run(
            [LAB, *map(str, words)], env=self._environment(), capture_output=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"lab {' '.join(map(str, words))}: {done.stderr.decode()}")
        return done.stdout.decode().strip()

    def address(self, host: int) -> str:
        return f"10.77.{self.number}.{host}"

    def disk(self, host: int) -> Path:
        """Where the host's /host lies outside."""
        return Path(self.lab("disk", host))

    def run(
        self, host: int, *words: object, timeout_s: float = 120.0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end. Its exit code is not checked."""
        return subprocess.run(
            [LAB, "on", str(host), *map(str, words)],
            env=self._environment(env),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, host: int, *words: object, out: Path, **env: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, in a session of its own; both outputs go to ``out``."""
        with out.open("wb") as file:
            process = subprocess.Popen(
                [LAB, "on", str(host), *map(str, words)],
                env=self._environment(env),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def cut(self, host: int) -> None:
        self.lab("cut", host)

    def heal(self, host: int) -> None:
        self.lab("heal", host)

    def rate(self, host: int, megabits_per_s: int) -> None:
        self.lab("rate", host, megabits_per_s)

    def kill(self, host: int) -> None:
        """Every process of the host ends at once, as with a power failure."""
        self.lab("kill", host)

    def pids(self, host: int) -> list[int]:
        return [int(word) for word in self.lab("pids", host).split()]

    # -- Ray --------------------------------------------------------------------------------------

    @property
    def ray_address(self) -> str:
        return f"{self.address(1)}:{RAY_PORT}"

    def ray_head(self, *, cpus: int = 4, words: tuple[str, ...] = (), **env: str) -> None:
        """`ray start --head` on host 1, with a token that every host has in its HOME."""
        for host in range(1, self.count + 1):
            folder = self.disk(host) / "home" / ".ray"
            folder.mkdir(exist_ok=True)
            path = folder / "auth_token"
            path.write_text(self.token)
            path.chmod(0o600)
        self._ray(1, "--head", f"--port={RAY_PORT}", f"--num-cpus={cpus}", *words, **env)

    def ray_join(
        self, host: int, *, cpus: int = 4, words: tuple[str, ...] = (), **env: str
    ) -> None:
        """`ray start --address` on another host."""
        self._ray(host, f"--address={self.ray_address}", f"--num-cpus={cpus}", *words, **env)

    def ray_join_all(self, words_of: Mapping[int, tuple[str, ...]], **options: Any) -> None:
        """Several hosts join at once: most of the time each waits for answers. ``words_of``: host
        -> its words. ``options``: as of ``ray_join``, for all."""
        with ThreadPoolExecutor(len(words_of)) as threads:
            joining = [
                threads.submit(self.ray_join, host, words=words, **options)
                for host, words in words_of.items()
            ]
        for joined in joining:
            joined.result()

    def _ray(self, host: int, *words: str, **env: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        common = (
            f"--node-ip-address={self.address(host)}",
            "--disable-usage-stats",
            "--object-store-memory=200000000",
        )
        # To a file: Ray's processes inherit the outputs, and a pipe would never end.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [LAB, "on", str(host), ray, "start", *words, *common],
                env=self._environment({"RAY_AUTH_MODE": "token", **env}),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=90,
                check=False,
            )
            output.seek(0)
            if done.returncode:
                raise RuntimeError(f"ray start on host {host}: {output.read().decode()[-2000:]}")

    # -- ending -----------------------------------------------------------------------------------

    def down(self) -> None:
        self.lab("down")
        for process in self.started:
            process.wait(10)

    def _environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        own = {
            "LAB_ID": str(self.number),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "2000",
        }
        return {**os.environ, **own, **(more or {})}


@contextmanager
def hosts(count: int) -> Iterator[Lab]:
    """A lab of so many hosts. Labs of several test processes run side by side."""
    with _number() as number:
        lab = Lab(number, count)
        lab.down()  # what a killed test process left
        try:
            lab.lab("up", count)
            yield lab
        finally:
            lab.down()


@contextmanager
def _number() -> Iterator[int]:
    """A number that no other lab of this machine has now."""
    for number in range(1, MOST_LABS + 1):
        path = Path("/run") / f"accord-lab-{number}.lock"
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # its holder removed it meanwhile, and somebody may have made a new one
            try:
                yield number
            finally:
                path.unlink(missing_ok=True)
            return
    raise RuntimeError(f"{MOST_LABS} labs run already")


def wait_until(
    reached: Callable[[], Any], timeout_s: float, what: str, every_s: float = 0.2
) -> Any:
    """The first true answer of ``reached``. Raises AssertionError when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not (answer := reached()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(every_s)
    return answer
