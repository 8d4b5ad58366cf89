"""What every command's config has in common: the run, the model, logging, the cluster.

No torch, ray, vllm or grpc in this package, so that ``--help`` and a config error answer at once. A
role receives only its own section. Unknown keys are errors (``file`` names the nearest valid one),
nothing is repaired silently, nothing changes while a run goes on.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from cluster.contracts.plugins import load_plugins

AUTO = "auto"
LONGEST_NAME = 200  # bytes; file systems allow 255, and files beside it add some


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _auto_is_left_out(cls, tree: Any) -> Any:
        """A key set to "auto" counts as not set, so that `cluster.assembly.auto` chooses it."""
        if not isinstance(tree, dict):
            return tree
        chosen = {name for name, field in cls.model_fields.items() if auto_rule(field)}
        return {k: v for k, v in tree.items() if k not in chosen or v != AUTO}

    @model_serializer(mode="wrap")
    def _auto_stays_auto(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was not set is written as "auto": read again, it is still to be chosen."""
        tree: dict[str, Any] = dump(self)
        for name, field in type(self).model_fields.items():
            if name in tree and auto_rule(field) and name not in self.model_fields_set:
                tree[name] = AUTO
        return tree


def auto(fallback: Any, *, rule: str, description: str, **limits: Any) -> Any:
    """A key whose default is chosen for the machine and the model (`cluster.assembly.auto`).

    It is chosen where the key was not set, which pydantic keeps in `model_fields_set`; so the key
    keeps its plain type and no role has to ask whether it holds a number. rule: how it is chosen,
    for the reference page. fallback: its value in a config that was made by hand and not resolved.
    """
    return Field(fallback, description=description, json_schema_extra={AUTO: rule}, **limits)


def auto_rule(field: FieldInfo) -> str | None:
    """How a key's value is chosen, None for a key with a default of its own."""
    extra = field.json_schema_extra
    return str(extra[AUTO]) if isinstance(extra, dict) and AUTO in extra else None


def resources(role: str) -> Any:
    return Field(
        default_factory=dict,
        description=f"Further Ray resources that {role} asks for, such as {{rollout = 1}}. Start "
        "nodes with `ray start --resources` to offer them.",
    )


def labels(role: str) -> Any:
    return Field(
        default_factory=dict,
        description=f"Labels that a node must have for {role}, such as "
        '{"ray.io/market-type" = "spot"}. Ray\'s selectors `!value` and `in(a, b)` are allowed.',
    )


Resources = dict[str, Annotated[float, Field(gt=0)]]
Labels = dict[str, str]

DType = Literal["float32", "bfloat16"]
PluginFiles = Annotated[list[str], AfterValidator(load_plugins)]
"""Loads the files. A config has them first, so that their words are known when others are read."""
Option = bool | int | float | str


class RunConfig(Section):
    name: str = Field(
        "",
        description="Name of the run's folder in `run.dir`. Empty: made from the command and "
        "the time.",
    )
    dir: str = Field(
        "runs",
        description="Folder that holds the run directories, or a URL that fsspec knows, such as "
        "`s3://bucket/runs` (docs/fault-model.md).",
    )
    seed: int = Field(0, ge=0, description="Seed of data order, initialisation and sampling.")
    parents: dict[str, str] = Field(
        default_factory=dict,
        description="For the run's record only: role -> run or model directory that it came from.",
    )

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        return folder_name(name)


def host_port(address: str) -> str:
    """``address``, if it is host:port. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("must be host:port with a port from 1 to 65535, such as 127.0.0.1:7070")
    return address


Address = Annotated[str, AfterValidator(host_port)]


def folder_name(name: str) -> str:
    """``name``, if it is the name of one folder. Raises ValueError for a path, which would lead out
    of the folder of runs, and for what no file system takes."""
    if name in (".", "..") or any(c in "/\\" or not c.isprintable() for c in name):
        raise ValueError(
            "must be the name of one folder, not a path; the folder of runs is run.dir"
        )
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        raise ValueError(f"must have at most {LONGEST_NAME} bytes")
    return name


class ModelConfig(Section):
    path: str = Field(description="A model directory (Hugging Face layout) or a hub id.")
    revision: str | None = Field(None, description="Revision of a hub id. none: the newest.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    dtype: DType = auto(
        "float32",
        rule="bfloat16 on a GPU that has it; on a CPU whichever was measured to be faster",
        description="Number type that the learner computes in. Master weights stay float32.",
    )
    chat_template: str | None = Field(
        None, description="Path of a Jinja chat template, for a tokenizer that has none."
    )


class LoggingConfig(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard files into the run directory.")
    wandb: bool = Field(False, description="Send the metrics to Weights & Biases.")
    wandb_project: str = Field("accord", description="Project of Weights & Biases.")
    ray_metrics: bool = Field(
        True, description="Export the metrics through Ray, for Prometheus and Grafana."
    )
    save_rollouts: bool = Field(
        True, description="Write every trained group to `rollouts/*.parquet` in the run directory."
    )
    otel: str | None = Field(
        None,
        description="Send traces of completions to this OpenTelemetry collector (OTLP over HTTP), "
        "such as `http://127.0.0.1:4318`. env: the one that the standard variables "
        "`OTEL_EXPORTER_OTLP_...` name. none: no traces.",
    )
    otel_share: float = Field(
        0.01, gt=0, le=1, description="Share of the prompts whose completions are traced."
    )
    samples_every: int = Field(
        25,
        ge=0,
        description="Print some completions with their scores every so many learner steps: the "
        "best, the worst and a random one of the step. 0: never. Needs "
        "`save_rollouts`.",
    )


class ClusterConfig(Section):
    address: str | None = Field(
        None,
        description="Ray cluster to join: `auto` or HOST:PORT. `local`: start one on this machine. "
        "none: join the cluster that the variable RAY_ADDRESS names (as in a Ray job), else start "
        "one on this machine.",
    )
    num_cpus: int | None = auto(
        None,
        rule="one per core, at least 8, and enough for all roles",
        ge=1,
        description="Logical CPUs of a cluster that Accord starts. Ray counts them to place "
        "processes, and does not limit what a process uses.",
    )
    object_store_mb: int = auto(
        256,
        rule="room for three versions of the weights; at least 256, at most 80 % of the "
        "shared memory",
        ge=80,
        description="Object store of a cluster that Accord starts, in MiB.",
    )
    dashboard: bool = auto(
        False,
        rule="on for `accord train` with at least 4 cores",
        description="Start Ray's dashboard with a cluster that Accord starts. Its Metrics tab and "
        "its Overview show the run while it goes on.",
    )
    page_port: int = Field(
        8266,
        ge=1,
        le=65535,
        description="Port of the run's page in Ray's dashboard, on the loopback address. If it is "
        "taken on a cluster that Accord starts, any free one.",
    )
    dashboard_origins: list[str] = Field(
        default_factory=list,
        description="More addresses under which a browser shows Ray's dashboard, such as "
        "`https://ray.example.org`. Pages of other addresses cannot show the run in a frame.",
    )
    room_timeout_s: float = Field(
        1800,
        ge=0,
        description="On a cluster that was joined: the run ends when learner and reward service "
        "have found no room for this many seconds. The run says what is missing meanwhile. 0: "
        "it waits for ever.",
    )
    stall_timeout_s: float = Field(
        600,
        gt=0,
        description="`accord train`: when nothing has moved for this many seconds (no token, "
        "group, step, weights or checkpoint), the run writes `stall-TIME.txt`, which says who "
        "waits for what. "
        "After twice the time, and after every deadline of what it waits for, it ends with exit "
        "code 75.",
    )
    pin_cores: bool = auto(
        True,
        rule="on if all roles compute on this machine's CPUs and there are enough cores",
        description="Give each role cores of its own.",
    )

    @property
    def to_join(self) -> str | None:
        """Address of the cluster to join; None where one is to be started on this machine."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        return None if address in (None, "", "local") else address
