"""The command `orrery`. Standard output carries the result and nothing else; progress and errors are beside it."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.errors import Broken, OrreryError, OutOfMemory, Unsupported

if TYPE_CHECKING:
    from harness.experiment import Request

#: Bad input, or nothing that was asked for could be run.
REFUSED = 2
#: A run broke, or a comparison failed.
FAILED = 1


class Commands(typer.core.TyperGroup):
    """What the user can mend or must live with is one paragraph on standard error and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (OrreryError, OutOfMemory, Unsupported, Broken) as error:
            print(f"orrery: {error}", file=sys.stderr)
            raise typer.Exit(REFUSED) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has seen enough
                raise
            print(f"orrery: {error}. Free some space, or mend what is in the way.", file=sys.stderr)
            raise typer.Exit(REFUSED) from error


app = typer.Typer(
    cls=Commands,
    help="Benchmark and reproduce collaborative edge AI: plan, simulate, run and compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Method = Annotated[str | None, typer.Option("--method", help="name of a method, or path of a Python file")]
PlanFile = Annotated[str | None, typer.Option("--plan", help="a saved or hand-written plan instead of a method")]
Model = Annotated[str | None, typer.Option("--model")]
Technique = Annotated[
    str | None, typer.Option("--technique", help="full (default), lora, adapters, parallel-adapters, or inference")
]
Dataset = Annotated[str | None, typer.Option("--dataset", help="default: mrpc for text, digits for images")]
NumSamples = Annotated[int | None, typer.Option("--num-samples", help="default: the data set's training split")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="default: 16")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="tokens; default: the data set's")]
DecoderSeqLen = Annotated[int | None, typer.Option("--decoder-seq-len", help="tokens; default: 1")]
NewTokens = Annotated[
    int | None,
    typer.Option("--new-tokens", help="that each request generates, with inference; default: it is classified"),
]
ImageSize = Annotated[int | None, typer.Option("--image-size", help="pixels; default: the data set's")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="default: 1")]
Steps = Annotated[int | None, typer.Option("--steps", help="iterations, instead of epochs")]
Optimizer = Annotated[str | None, typer.Option("--optimizer", help="sgd (default), sgd-momentum or adamw")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate")]
ClipNorm = Annotated[float | None, typer.Option("--clip-norm", help="scale larger gradients down to this norm")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="default: float32")]
Attention = Annotated[str | None, typer.Option("--attn-implementation", help="eager (default) or sdpa")]
Dropout = Annotated[float | None, typer.Option("--dropout", help="default: the model's own")]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="folder, hub name, or package:MODULE/FOLDER; default: seeded")
]
Seed = Annotated[int | None, typer.Option("--seed")]
Testbed = Annotated[str | None, typer.Option("--testbed", help="name of a testbed, or path of a TOML file")]
Mode = Annotated[str | None, typer.Option("--mode", help="simulated (default), emulated or real")]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="folder of the data set's files; default: the hub")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME.OPTION=VALUE", help="option of a method or a technique")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="as --set METHOD.cache=false")]
Out = Annotated[Path, typer.Option("--out", help="folder of results")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, nothing else")]
DEFAULT_OUT = Path("orrery-runs")


@app.command("list")
def list_(
    kind: Annotated[
        str, typer.Argument(metavar="systems|baselines|testbeds|devices|models|datasets|experiments|meters")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="methods: import each and name the broken ones; meters: which work here")
    ] = False,
) -> None:
    """List what can be named."""
    from harness import listing

    entries = listing.entries(kind)
    for name, summary in entries:
        print(f"{name:<28}  {summary}".rstrip())
    if check and kind == listing.METERS:
        for name, why in listing.meters_here():
            print(f"here: {name}" if why is None else f"not here: {name}: {why}")
    elif check:
        broken = listing.broken(kind)
        for name, why in broken.items():
            print(f"broken: {name}: {why}")
        raise typer.Exit(FAILED if broken else 0)


@app.command()
def doctor(
    testbed: Testbed = None,
    clean: Annotated[bool, typer.Option("--clean", help="remove what dead runs have left on this machine")] = False,
    out: Out = DEFAULT_OUT,
    as_json: Json = False,
) -> None:
    """Check this installation and machine."""
    import dataclasses

    from harness import registry
    from harness.doctor import examine

    if clean:
        for path in registry.leftovers().clean():
            print(f"removed: {path}", file=sys.stderr)
    checks = examine(out, testbed)
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks]))
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.found}")
            if check.remedy:
                print(f"      {check.remedy}")
    raise typer.Exit(0 if all(check.ok for check in checks) else FAILED)


@app.command()
def profile(
    ctx: typer.Context,
    testbed: Annotated[str, typer.Option("--testbed", help="name of a testbed, or path of a TOML file")],
    model: Annotated[str, typer.Option("--model")],
    technique: Technique = None,
    dataset: Dataset = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_seq_len: DecoderSeqLen = None,
    new_tokens: NewTokens = None,
    image_size: ImageSize = None,
    dtype: Dtype = None,
    attn_implementation: Attention = None,
    options: Set = None,
) -> None:
    """Count what a model costs unit by unit, and time it where the testbed is this machine. Both are kept."""
    from harness import registry, runner, show
    from harness.experiment import counted

    bed = registry.load_testbed(testbed)
    workload = counted(_tables(ctx), "the command line")
    print(show.costs_table(runner.profile_of(workload, bed), bed.cluster, workload.batch_size))


@app.command()
def plan(
    ctx: typer.Context,
    method: Method = None,
    plan_file: PlanFile = None,
    model: Model = None,
    technique: Technique = None,
    dataset: Dataset = None,
    num_samples: NumSamples = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_seq_len: DecoderSeqLen = None,
    new_tokens: NewTokens = None,
    image_size: ImageSize = None,
    epochs: Epochs = None,
    steps: Steps = None,
    optimizer: Optimizer = None,
    clip_norm: ClipNorm = None,
    dtype: Dtype = None,
    attn_implementation: Attention = None,
    testbed: Testbed = None,
    options: Set = None,
    no_cache: NoCache = False,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective", metavar="time|energy|edp|co2", help="rank all methods (or --method) and device sets"
        ),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", metavar="S", help="with --objective: what takes longer is left out")
    ] = None,
    carbon: Annotated[
        str | None,
        typer.Option("--carbon", metavar="G_PER_KWH|COUNTRY", help="with --objective: what the grid emits; or assumed"),
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="with --objective: the best candidate's plan, for --plan")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="draw the first iteration, or the front: .svg, .pdf or .png")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Chrome trace of the simulated run")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the plan itself, for --plan; or a candidate a line")] = False,
) -> None:
    """Show a method's plan, without running it; or, with an objective, which method and devices are best."""
    from harness import runner
    from harness.plan import serial
    from harness.plan.text import describe

    if objective is not None:
        _advise(ctx, objective, deadline, carbon, save_plan, picture, as_json)
        return
    for flag in ("deadline", "carbon", "save_plan"):
        if ctx.params[flag] is not None:
            raise OrreryError(f"--{flag.replace('_', '-')} is for choosing among methods. Give --objective, too.")
    (request,) = _flags(ctx)
    costs, made = runner.make_plan(request)
    if picture is not None or trace is not None:
        from harness.picture import gantt
        from harness.simulator import simulate
        from harness.trace_export import write_chrome_trace

        cluster = request.testbed.cluster
        simulated = simulate(made, costs, cluster)
        if picture is not None:
            budget = {device.name: device.memory_bytes for device in cluster.devices}
            gantt(simulated, picture, title=str(request), memory_budget_bytes=budget)
        if trace is not None:
            write_chrome_trace(simulated, trace)
    print(serial.to_json(made) if as_json else describe(made), end="")


@app.command()
def run(
    ctx: typer.Context,
    experiment: Annotated[Path | None, typer.Argument(help="TOML file; lists in it are a sweep")] = None,
    method: Method = None,
    plan_file: PlanFile = None,
    model: Model = None,
    technique: Technique = None,
    dataset: Dataset = None,
    num_samples: NumSamples = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    decoder_seq_len: DecoderSeqLen = None,
    new_tokens: NewTokens = None,
    image_size: ImageSize = None,
    epochs: Epochs = None,
    steps: Steps = None,
    optimizer: Optimizer = None,
    learning_rate: LearningRate = None,
    clip_norm: ClipNorm = None,
    dtype: Dtype = None,
    attn_implementation: Attention = None,
    dropout: Dropout = None,
    checkpoint: Checkpoint = None,
    seed: Seed = None,
    testbed: Testbed = None,
    mode: Mode = None,
    repeats: Annotated[int | None, typer.Option(help="medians of N; simulated runs need no repeating")] = None,
    data_dir: DataDir = None,
    cache_dir: Annotated[
        str | None, typer.Option(help="folder where activation caches are kept; default: a temporary one")
    ] = None,
    verify: Annotated[bool | None, typer.Option("--verify", help="do the same on one device and compare")] = None,
    evaluate: Annotated[bool | None, typer.Option("--evaluate", help="measure quality on the validation split")] = None,
    save_adapter: Annotated[
        str | None, typer.Option("--save-adapter", metavar="FILE", help="file for what the technique trains")
    ] = None,
    inject: Annotated[
        list[str] | None,
        typer.Option(metavar="FAULT", help="such as 'crash device1 at step 3 during backward'; again for another one"),
    ] = None,
    options: Set = None,
    no_cache: NoCache = False,
    force: Annotated[bool, typer.Option("--force", help="repeat runs that are finished")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep state after every epoch, and go on with the state of a killed run")
    ] = False,
    meter: Annotated[
        str | None,
        typer.Option("--meter", metavar="NAME[:ARGUMENT]", help="see `orrery list meters`; default: what is found"),
    ] = None,
    idle_baseline: Annotated[
        float, typer.Option("--idle-baseline", metavar="SECONDS", help="measure the idle machine first")
    ] = 0.0,
    carbon: Annotated[
        str | None, typer.Option("--carbon", metavar="G_PER_KWH|COUNTRY", help="turn measured energy into CO2")
    ] = None,
    out: Out = DEFAULT_OUT,
    as_json: Json = False,
) -> None:
    """Run one method on one testbed, or the sweep of an experiment file."""
    from harness import meters, show, store
    from harness.experiment import read
    from harness.runner import sweep

    if experiment is not None and any(_tables(ctx).values()):
        raise OrreryError(f"The run is described twice: by {experiment} and by flags. Put everything into one of them.")
    requests = read(experiment) if experiment is not None else _flags(ctx)
    records = []
    with show.progress(len(requests)) as ended:
        for outcome in sweep(requests, out, force, resume, meters.Choice(meter, idle_baseline, carbon)):
            records.append(outcome.record)
            if as_json:
                print(outcome.record.json_line(), flush=True)
            ended(f"{outcome.request}: {show.ending(outcome.record)}{' (done before)' if outcome.skipped else ''}")
    store.table(out)
    if not as_json:
        print(show.records_table(records))
    statuses = {record.status for record in records}
    raise typer.Exit(FAILED if "failed" in statuses else REFUSED if statuses == {"unsupported"} else 0)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="results folder or record file")],
    b: Annotated[Path, typer.Argument(help="results folder or record file")],
    fail_if: Annotated[
        list[str] | None, typer.Option(help="FIELD:N% - exit code 1 if the field is worse in B by more")
    ] = None,
) -> None:
    """Ratios of the metrics of the runs that A and B share."""
    from harness import show
    from harness.compare import compare as rows_of
    from harness.compare import parse_limit, read

    limits = [parse_limit(text) for text in fail_if or ()]
    rows = rows_of(read(a), read(b))
    cells = [[row.run, row.field, *map(show.number, (row.a, row.b, row.ratio))] for row in rows]
    print(show.columns(("run", "field", "a", "b", "b / a"), cells))
    worse = [f"{row.run}: {row.field}" for row in rows if any(row.worse_than(limit) for limit in limits)]
    for text in worse:
        print(f"worse: {text}", file=sys.stderr)
    raise typer.Exit(FAILED if worse else 0)


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[all|NAME]...", help="see `orrery list experiments`; default: all")
    ] = None,
    data_dir: DataDir = None,
    force: Annotated[bool, typer.Option("--force", help="repeat runs that are finished")] = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """Run the experiments behind the tables and figures, and report them beside the papers."""
    from harness import registry

    reproduction = registry.load_results("reproduce")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    records = reproduction.run(names or [], out, force, folder)
    for text in reproduction.texts(names or [], records, out):
        print(f"{text}\n")
    print(f"report: {out / 'index.html'}")
    raise typer.Exit(FAILED if any(record.status == "failed" for record in records) else 0)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="results folder")] = DEFAULT_OUT,
) -> None:
    """Write tables, figures, report.md and index.html of a results folder into it."""
    from harness import registry

    print(registry.load_results("report").write(folder))


def _advise(
    ctx: typer.Context,
    objective: str,
    deadline_s: float | None,
    carbon: str | None,
    save_plan: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Rank the methods that there are."""
    from harness import advice, advisor, runner, store
    from harness.carbon import intensity_of
    from harness.errors import unknown_name
    from harness.plan import serial

    if objective not in advisor.OBJECTIVES:
        raise unknown_name("objective", objective, advisor.OBJECTIVES)
    if deadline_s is not None and not deadline_s > 0:
        raise OrreryError(f"--deadline is {deadline_s:g} s; it must be more than 0.")
    for flag in ("plan_file", "trace"):
        if ctx.params[flag] is not None:
            name = flag.removesuffix("_file")
            raise OrreryError(f"--{name} is about one plan, and --objective ranks those of all methods. Leave one out.")
    intensity = intensity_of(carbon)
    requests, broken = _methods_to_try(_tables(ctx))
    costs, samples = runner.costs_of(requests[0]), requests[0].workload.total_samples
    found = advisor.advise(requests, costs, objective, deadline_s)
    found = found._replace(others=[*found.others, *(advisor.Candidate(n, {}, (), "failed", w) for n, w in broken)])
    if save_plan is not None:
        best = serial.to_json(advisor.plan_of(found.ranked[0], requests, costs))
        store.write_whole(save_plan, lambda part: part.write_text(best, encoding="utf-8"))
    if picture is not None:
        workload, testbed = requests[0].workload, requests[0].testbed
        advice.draw(found, picture, f"{workload.model} · {workload.technique} · {testbed.name}, by {objective}")
    if as_json:
        for line in advice.lines(found, intensity, samples):
            print(line)
    else:
        print(advice.table(found, intensity, samples))


def _methods_to_try(tables: dict[str, dict[str, Any]]) -> tuple[list[Request], list[tuple[str, str]]]:
    """A request for every method, or the one that is named, with each of its variants but for options that are set;
    and which methods are broken, and why."""
    from harness import registry
    from harness.experiment import expand

    names, broken = [], []
    named = tables["run"].get("method")
    for name in registry.methods() if named is None else [named]:
        try:
            method = registry.load_method(name)
        except OrreryError as error:
            if named is not None:
                raise
            broken.append((name, str(error)))
            continue
        names.append(name)
        if options := {**method.variants, **tables["options"].get(method.name, {})}:
            tables["options"][method.name] = options
    tables["run"]["method"] = names
    requests = expand(tables, "the command line")
    if len({request.workload for request in requests}) > 1:
        raise OrreryError("--objective ranks methods for one workload. Give one value for each option of a technique.")
    return requests, broken


def _flags(ctx: typer.Context) -> list[Request]:
    """The requests that the flags of a command ask for."""
    from harness.experiment import expand

    return expand(_tables(ctx), "the command line")


def _tables(ctx: typer.Context) -> dict[str, dict[str, Any]]:
    """The flags that were given, as the tables of an experiment file."""
    from harness.experiment import KEYS

    given = {
        **ctx.params,
        "plan": ctx.params.get("plan_file"),
        "inject": "; ".join(ctx.params.get("inject") or ()) or None,
    }
    tables: dict[str, dict[str, Any]] = {
        section: {key: given[key] for key in keys if given.get(key) is not None} for section, keys in KEYS.items()
    }
    options = _options(given.get("options") or ())
    if given.get("no_cache"):
        options.setdefault(_method_name(tables["run"]), {})["cache"] = False
    return {**tables, "options": options}


def _method_name(run: dict[str, Any]) -> str:
    """The name that the options of the method go by; a method in a file has one, too."""
    from harness.registry import load_method

    if "method" not in run:
        raise OrreryError("--no-cache is an option of a method, and none is named. Give --method.")
    return load_method(run["method"]).name


def _options(settings: Iterable[str]) -> dict[str, dict[str, object]]:
    """`name.option=value`, the name of a method or a technique; the value as TOML reads it, or else the text itself."""
    from harness.experiment import toml_value

    options: dict[str, dict[str, object]] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        owner, dot, option = name.partition(".")
        if not (equals and dot and owner and option):
            raise OrreryError(
                f"--set is {setting!r}. Allowed is METHOD.OPTION=VALUE or TECHNIQUE.OPTION=VALUE, such as "
                "eddl.shares=speed or lora.rank=4."
            )
        options.setdefault(owner.replace("_", "-"), {})[option] = toml_value(value)
    return options


def main() -> None:
    """The command on the process's own streams: results are UTF-8 in every locale, and a closed stream swallows."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        app()
    finally:
        _flush()


def _flush() -> None:
    """What is still in the buffer meets a full disk or a closed pipe here, not when Python has shut down."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(FAILED)
        print(f"orrery: Standard output can't be written: {error.strerror}.", file=sys.stderr)
        sys.exit(REFUSED)
