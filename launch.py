"""Composition root and command line: `accord COMMAND` and `python launch.py COMMAND` are the same.

Heavy imports happen inside the commands, so that `--help` and a mistake in a config answer at once.
"""

from __future__ import annotations

import bootstrap

bootstrap.reexec()

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.contracts.errors import AccordError, BadReward, UserError

app = typer.Typer(
    name="accord",
    help="Reinforcement learning from human feedback, the whole loop: supervised fine-tuning, "
    "preferences, reward model, PPO with vLLM and Ray, evaluation.\n\n"
    "Start with: accord quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
preferences_app = typer.Typer(
    no_args_is_help=True, help="Import, export and look at preference data."
)
app.add_typer(preferences_app, name="preferences")

Config = Annotated[Path, typer.Argument(help="TOML file; see examples/.", metavar="CONFIG.toml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings over the file's, as section.key=value.", metavar="[KEY=VALUE]..."
    ),
]
OptionalConfig = Annotated[
    Path | None, typer.Argument(help="TOML file; see examples/.", metavar="CONFIG.toml")
]
Resume = Annotated[
    Path | None,
    typer.Option(help="Continue this run directory where it stopped, instead of a CONFIG."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only the result, no progress.")]


@app.command()
def quickstart(
    directory: Annotated[str, typer.Option("--dir", help="Where the run goes.")] = "runs",
    name: Annotated[
        str, typer.Option(help="Name of the run; empty: quickstart, if taken made from the time.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of data, models and sampling.")] = 0,
    scale: Annotated[
        float,
        typer.Option(help="Size of the job; 1 takes some minutes on 2 cores, 0.1 is a smoke test."),
    ] = 1.0,
    kl_coef: Annotated[
        float | None, typer.Option(help="KL coefficient of PPO; 0 shows what happens without it.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """The whole loop on an embedded help-desk task: no GPU, no account, no model hub.

    Makes a small language model, fine-tunes it on demonstrations, samples answers with vLLM, lets
    simulated annotators compare them, learns a reward model, runs PPO on Ray, and compares the
    result with where it started.

    Example: `accord quickstart --seed 1`
    """
    _say("accord quickstart: the whole loop on an embedded help-desk task", quiet)
    from cluster.quickstart.quickstart import quickstart as run

    run(directory, name, seed, scale, kl_coef, _reporter(quiet))


@app.command()
def sft(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Supervised fine-tuning on the assistant's tokens.

    Example: `accord sft examples/sft.toml model.path=my-model fit.epochs=2`
    """
    from cluster.assembly.offline import resume_offline, run_sft
    from cluster.contracts.config.offline import SftConfig

    if resume is not None:
        words = _words(config, overrides)
        _result(resume_offline("sft", str(resume), words, _reporter(quiet)))
        return
    _result(run_sft(_load(SftConfig, _required(config, "sft"), overrides), _reporter(quiet)))


@app.command("reward-model")
def reward_model(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Learn a reward model from comparisons (prompt, chosen, rejected).

    Example: `accord reward-model examples/reward_model.toml data.path=pairs.jsonl`
    """
    from cluster.assembly.offline import resume_offline, run_reward_model
    from cluster.contracts.config.offline import RewardModelConfig

    if resume is not None:
        words = _words(config, overrides)
        _result(resume_offline("reward-model", str(resume), words, _reporter(quiet)))
        return
    _result(
        run_reward_model(
            _load(RewardModelConfig, _required(config, "reward-model"), overrides), _reporter(quiet)
        )
    )


@app.command()
def dpo(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Direct preference optimisation on the same comparisons.

    Example: `accord dpo examples/dpo.toml beta=0.2`
    """
    from cluster.assembly.offline import resume_offline, run_dpo
    from cluster.contracts.config.offline import DpoConfig

    if resume is not None:
        words = _words(config, overrides)
        _result(resume_offline("dpo", str(resume), words, _reporter(quiet)))
        return
    _result(run_dpo(_load(DpoConfig, _required(config, "dpo"), overrides), _reporter(quiet)))


@app.command()
def train(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """PPO (or GRPO, RLOO, ...) on Ray: workers generate with vLLM while the learner optimises.

    Example: `accord train examples/ppo.toml batch.steps=200 staleness.bound=2`

    Example: `accord train --resume runs/my-run`
    """
    from cluster.assembly.training import resume_training, train_policy

    if resume is not None:
        words = _words(config, overrides)
        _result(resume_training(str(resume), words, _reporter(quiet)))
        return
    from cluster.contracts.config.train import TrainConfig

    _result(
        train_policy(_load(TrainConfig, _required(config, "train"), overrides), _reporter(quiet))
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    prompts: Annotated[str, typer.Argument(help="Prompts: JSONL, Parquet or datasets:NAME.")],
    out: Annotated[Path, typer.Option(help="JSONL to write.")] = Path("answers.jsonl"),
    samples: Annotated[int, typer.Option(help="Answers a prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option()] = 64,
    temperature: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    quiet: Quiet = False,
) -> None:
    """Sample answers with the rollout workers.

    Example: `accord generate runs/q/sft/policy prompts.jsonl --samples 4 --out answers.jsonl`
    """
    from cluster.commands.generate import generate_to_file

    generate_to_file(
        model, prompts, out, samples=samples, max_tokens=max_tokens, temperature=temperature,
        seed=seed, reporter=_reporter(quiet),
    )  # fmt: skip
    _result(out)


@app.command()
def evaluate(config: Config, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Compare two policies on the same prompts: win rate and its interval, by a judge you choose.

    Example: `accord evaluate examples/evaluate.toml policy.path=runs/q/policy`
    """
    from cluster.assembly.evaluation import run_evaluation
    from cluster.contracts.config.evaluate import EvaluateConfig

    _result(run_evaluation(_load(EvaluateConfig, config, overrides), _reporter(quiet)))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html and summary.json again from a run's files (also while it goes on).

    Example: `accord report runs/my-run`
    """
    from cluster.runs.run import Run
    from learner.evaluation.report import write_report

    _result(write_report(Run.open(str(run)).path))


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Directory of a run of `accord train`.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Exit code 1, naming the step, at the first difference."),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Only so many steps, from the first.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train again on a run's saved rollouts: the learner alone, without Ray and without vLLM.

    Shows how fast the learner is by itself and, with --verify, that the same weights come out, bit
    for bit.

    Example: `accord replay runs/my-run --verify`
    """
    from cluster.commands.replay import replay_run

    replay_run(str(run), verify, steps, _reporter(quiet))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Run directory, model directory or hub id.")],
    before: Annotated[
        str | None, typer.Option(help="A second model whose answer is shown beside it.")
    ] = None,
    max_tokens: Annotated[int, typer.Option()] = 64,
    temperature: Annotated[float, typer.Option(help="0: the most likely answer.")] = 0.7,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Talk to a policy (in this process, with transformers; Ctrl-D ends).

    Example: `accord chat runs/quickstart --before runs/quickstart/sft/policy`
    """
    from cluster.commands.chat import chat_loop

    chat_loop(model, before, max_tokens=max_tokens, temperature=temperature, seed=seed)


@app.command("serve-reward")
def serve_reward(
    config: Config,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 0,
    token_file: Annotated[Path | None, typer.Option(help="File with a bearer token.")] = None,
) -> None:
    """Serve rewards over gRPC (accord.reward.v1) until interrupted; CONFIG needs [reward].

    Example: `accord serve-reward examples/ppo.toml --port 7070`
    """
    from cluster.commands.serve import serve_forever

    serve_forever(str(config), overrides or [], host, port, token_file)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Where a run stands, from its files.

    Example: `accord status runs/my-run --json`
    """
    from cluster.commands.status import show_status

    show_status(run, as_json)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="Directory of a run that goes on.")],
    workers: Annotated[int, typer.Argument(min=1, help="Rollout workers wanted.")],
) -> None:
    """Add or drain rollout workers of a run while it goes on.

    Example: `accord scale runs/my-run 3`
    """
    from cluster.runs.control import want_workers

    want_workers(run, workers)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run each role for some seconds; predict the run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check a training config and print every value in force and what follows from them.

    With --probe also step time, bottleneck, staleness and workers needed, and memory.

    Example: `accord plan examples/ppo.toml batch.prompts_per_step=16`
    """
    from cluster.commands.plan import show_plan
    from cluster.contracts.config.train import TrainConfig

    show_plan(_load(TrainConfig, config, overrides), as_json, probe, _reporter(quiet=as_json))


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="overlap, overlap-tail, overlap-fp32, rollout, learner, weights or controller."
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="About a minute, fewer repeats.")] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Measurements; the median counts. [5, quick: 1]")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 when a ratio is out of its limits.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast a part of Accord is on this machine; docs/measure.md says how to read it.

    Example: `accord bench overlap --quick`
    """
    from cluster.measure.bench.common import BenchOptions, run_benchmark

    options = BenchOptions(repeats=repeats or (1 if quick else 5), quick=quick)
    run_benchmark(name, options, json_file, check, _reporter(quiet))


@app.command()
def simulate(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="The scenario, as in docs/scale.md.", metavar="[KEY=VALUE]..."),
    ] = None,
    workers: Annotated[
        str, typer.Option(help="Numbers of workers, with commas; all else grows in proportion.")
    ] = "",
    from_run: Annotated[
        Path | None, typer.Option("--from", help="A training run whose lengths and times to take.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run the real controller on a virtual clock, with workers that only pass the time.

    Prints how busy both sides are, step time, goodput, staleness, waste and scaling efficiency.

    Example: `accord simulate --workers 64,256 bound=8 stragglers=0.01`
    """
    from cluster.commands.simulate import show_simulation

    show_simulation(workers, settings or [], from_run, as_json, _reporter(quiet or as_json))


@preferences_app.command("stats")
def preferences_stats(
    store: Annotated[Path, typer.Argument(help="A preference store (*.db).")],
) -> None:
    """Counts, agreement and position bias of a store.

    Example: `accord preferences stats runs/q/preferences.db`
    """
    from cluster.commands.preferences import show_stats

    show_stats(store)


@preferences_app.command("export")
def preferences_export(
    store: Annotated[Path, typer.Argument(help="A preference store (*.db).")],
    out: Annotated[Path, typer.Argument(help="*.jsonl or *.parquet to write.")],
) -> None:
    """Write prompt/chosen/rejected rows (ties and both-bad are left out and counted).

    Example: `accord preferences export runs/q/preferences.db pairs.jsonl`
    """
    from cluster.commands.preferences import export

    export(store, out)


@preferences_app.command("import")
def preferences_import(
    rows: Annotated[Path, typer.Argument(help="prompt/chosen/rejected as JSONL.")],
    store: Annotated[Path, typer.Argument(help="A preference store (*.db), made if absent.")],
) -> None:
    """Read prompt/chosen/rejected rows into a store.

    Example: `accord preferences import pairs.jsonl preferences.db`
    """
    from cluster.commands.preferences import import_rows

    import_rows(rows, store)


def _required(config: Path | None, command: str) -> Path:
    if config is None:
        raise UserError(
            "no config given", where=f"accord {command}", fix=f"accord {command} CONFIG.toml"
        )
    return config


def _words(config: Path | None, overrides: list[str] | None) -> list[str]:
    """With --resume there is no CONFIG argument: the first word is an override."""
    return ([str(config)] if config else []) + (overrides or [])


def _load(model: Any, path: Path, overrides: list[str] | None) -> Any:
    from cluster.contracts.config.file import load_config

    return load_config(model, str(path), overrides or [])


def _reporter(quiet: bool) -> Any:
    from cluster.runs.console import Reporter

    return Reporter(quiet=quiet)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _result(path: Path) -> None:
    print(path, flush=True)


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 stopped by an error, 2 wrong input, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    # Compute threads that spin while they wait starve the other processes of a small machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # gRPC would write lines of its own beside our one message.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        # typer hands an Exit back as a number, and an interrupt as 130, instead of raising.
        code = int(app(standalone_mode=False) or 0)
    except (UserError, BadReward) as problem:  # an unusable reward is the reward's author's to mend
        print(f"accord: error: {problem}", file=sys.stderr)
        code = 2
    except AccordError as problem:
        print(f"accord: stopped: {problem}", file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except typer.Exit as done:
        code = done.exit_code
    except Exception as problem:
        code = _usage_code(problem)
    if code == 130:
        print("accord: interrupted; what was done is kept", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 130:
        os._exit(code)  # background threads of libraries must not hold up the exit
    sys.exit(code)


def _usage_code(problem: Exception) -> int:
    """Wrong words on the command line are typer's to explain; all else is ours, shown whole."""
    show = getattr(problem, "show", None)
    if show is None:
        raise problem
    show()
    return int(getattr(problem, "exit_code", 2))


if __name__ == "__main__":
    main()
