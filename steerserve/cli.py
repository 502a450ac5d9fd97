"""The ``steerserve`` command. What is heavy to import is imported inside the command that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from steerserve.errors import InvalidRequestError, SteerserveError

if TYPE_CHECKING:
    from steerserve.types import StepOutput

DEFAULT_TARGET = "127.0.0.1:50051"
SIDECAR_PACKAGES = {"envoy", "opentelemetry", "starlette", "uvicorn"}
"""What the extra of that name brings."""
STEER_HELP = (
    "TARGET=OP\\[:VALUE]\\[@PHASE]\\[ if TARGET>NUMBER], repeatable. "
    "TARGET: CONCEPT, SAE/FEATURE, direction:FILE.npy@SITE or a head such as L12H5 (scale and block alone). "
    "OP: clamp, clamp_always, clip, block, scale, add, monitor. VALUE: a number, or '2.0x', a multiple of the "
    "recorded maximum activation. PHASE: all, prompt, generated. Example: profanity=block"
)
GUARD_HELP = (
    "TARGET>NUMBER=ACTION\\[@PHASE], repeatable. ACTION: flag, redact, block, or rewind:TOKENS\\[*RETRIES], which "
    "goes on with ' with INTERVENTION\\[; INTERVENTION]...\\[ else flag]'. "
    "Example: 'profanity>1=rewind:8 with profanity=block'"
)

Target = Annotated[str, typer.Option(envvar="STEERSERVE_TARGET", help="Server address, host:port.")]
ApiKeyFile = Annotated[str | None, typer.Option(help="File that holds the API key. [$STEERSERVE_API_KEY_FILE]")]


class _Commands(TyperGroup):
    """Ends a command that raised our own error, or lacks an optional package, with one clear line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SteerserveError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            extra = "sidecar" if (error.name or "").partition(".")[0] in SIDECAR_PACKAGES else "lab"
            message = f"{error.name} is not installed; the {extra} needs: pip install 'steerserve[{extra}]'"
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a language model over gRPC, with its features and concepts edited per request.",
)
models_app = typer.Typer(no_args_is_help=True, help="Models that can be fetched by name.")
app.add_typer(models_app, name="models")


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="YAML with the sections 'server' and 'engine'; --print-config shows one.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every setting, and where it is from, and end.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Known name, Hugging Face id or directory. [smollm2-135m-instruct]")
    ] = None,
    pack: Annotated[
        list[str] | None, typer.Option(help="Concept pack: built-in name or directory. Repeatable.")
    ] = None,
    sae: Annotated[list[str] | None, typer.Option(help="SAE: built-in name or directory. Repeatable.")] = None,
    policy_dir: Annotated[
        str | None,
        typer.Option(help="Directory of policy files, read again when they change; left out: the built-in ones."),
    ] = None,
    monitor_plan: Annotated[
        str | None,
        typer.Option(help="What to read of every response: built-in plan, or file of `discover`; left out: nothing."),
    ] = None,
    access: Annotated[
        str | None, typer.Option(help="YAML file of tenants and keys; left out: no keys, on loopback alone.")
    ] = None,
    certificate: Annotated[str | None, typer.Option(help="PEM file: gRPC and HTTP speak TLS alone.")] = None,
    private_key: Annotated[str | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    client_ca: Annotated[
        str | None, typer.Option(help="PEM file: every client must show a certificate of these authorities.")
    ] = None,
    insecure_bind: Annotated[
        bool, typer.Option("--insecure-bind", help="Listen beyond loopback without keys or TLS.")
    ] = False,
    admin_port: Annotated[
        int | None,
        typer.Option(help="Port of operators, for `steerserve policy reload`; left out: they use that of gRPC."),
    ] = None,
    admin_host: Annotated[str | None, typer.Option(help="Address of that port. [127.0.0.1]")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one. [50051]")] = None,
    http_port: Annotated[
        int | None,
        typer.Option(help="Port of the OpenAI-compatible HTTP interface; 0 picks a free one. Left out: no HTTP."),
    ] = None,
    http_host: Annotated[str | None, typer.Option(help="Address of the HTTP interface. [127.0.0.1]")] = None,
    envoy_policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policy, NAME or NAME@VERSION, that judges another model's traffic as Envoy's external processor "
            "on the gRPC port. Repeatable. Left out: that service is off."
        ),
    ] = None,
    envoy_fail_open: Annotated[
        bool, typer.Option("--envoy-fail-open", help="Let pass what cannot be checked, instead of refusing it.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32. [bfloat16]")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests that run at the same time. [16]")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus response, in tokens. [1024]")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one step: bounds how long a prompt delays the tokens of others. [128]")
    ] = None,
    kv_cache_tokens: Annotated[
        int | None, typer.Option(help="Room of the KV cache; left out: all that --max-num-seqs requests can need.")
    ] = None,
    site: Annotated[list[str] | None, typer.Option(help="Site that can be steered; left out: all. Repeatable.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile the model: slow to start, faster to serve.")
    ] = False,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads; torch chooses if left out.")] = None,
    drain_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds for running requests after SIGTERM. [30]")
    ] = None,
    audit_dir: Annotated[str | None, typer.Option(help="Directory of the audit log; left out: none.")] = None,
    audit_key: Annotated[
        str | None, typer.Option(help="Key of its MACs, made by `steerserve audit key create`.")
    ] = None,
    audit_heads: Annotated[
        str | None, typer.Option(help="File of its signed heads, out of reach of who can write the log.")
    ] = None,
    audit_signing_key: Annotated[str | None, typer.Option(help="Key that signs the heads.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of Prometheus' /metrics; 0 picks a free one. Left out: no metrics.")
    ] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="Address of the metrics, which ask for no key. [127.0.0.1]")
    ] = None,
    traces: Annotated[
        bool, typer.Option("--traces", help="Send OpenTelemetry spans where OTEL_EXPORTER_OTLP_ENDPOINT says.")
    ] = False,
    log_format: Annotated[str | None, typer.Option(help="console or json; on standard error. [console]")] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO (a line for each request), WARNING or ERROR. [INFO]")
    ] = None,
) -> None:
    """Serve a model. Without --pack or --sae, every built-in one made for the model is loaded.

    What is not said here is taken from the environment (STEERSERVE_SERVER__HTTP__PORT=8080), then from --config.
    """
    import asyncio

    from steerserve.settings import Layers

    server = {
        "model": model,
        "packs": pack,
        "saes": sae,
        "monitor_plan": monitor_plan,
        "host": host,
        "port": port,
        "drain_timeout_s": drain_timeout_s,
        "policies": {"directory": policy_dir},
        "access": {
            "file": access,
            "certificate": certificate,
            "private_key": private_key,
            "client_ca": client_ca,
            "insecure_bind": insecure_bind or None,
            "admin_port": admin_port,
            "admin_host": admin_host,
        },
        "http": {"host": http_host, "port": http_port},
        "envoy": {"policies": envoy_policy, "fail_open": envoy_fail_open or None},
        "audit": {
            "directory": audit_dir,
            "key": audit_key,
            "heads": audit_heads,
            "signing_key": audit_signing_key,
        },
        "telemetry": {
            "metrics_port": metrics_port,
            "metrics_host": metrics_host,
            "traces": traces or None,
            "log_format": log_format,
            "log_level": log_level,
        },
    }
    engine_flags = {
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_tokens": kv_cache_tokens,
        "sites": site,
        "compile": compile or None,
        "dtype": dtype,
        "num_threads": num_threads,
    }
    layers = Layers(config, _said({"server": server, "engine": engine_flags}))
    if print_config:
        print(layers.described(), end="")
        return
    settings = layers.settings()

    from steerserve.serving.app import Server, load_engine
    from steerserve.serving.app import serve as run_server
    from steerserve.serving.logs import configure_logs

    configure_logs(settings.server.telemetry)
    engine = load_engine(settings.server, settings.engine)

    def announce(server: Server) -> None:
        print(f"serving {engine.model.name} on {server.address}", flush=True)
        if server.http_address is not None:
            scheme = "http" if settings.server.access.certificate is None else "https"
            print(f"serving the OpenAI API on {scheme}://{server.http_address}/v1", flush=True)
        if server.admin_address is not None:
            print(f"serving operators on {server.admin_address}", flush=True)
        if server.metrics_address is not None:
            print(f"serving metrics on http://{server.metrics_address}/metrics", flush=True)

    asyncio.run(run_server(engine, settings.server, announce))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="Server-side policy, NAME or NAME@VERSION. Repeatable.")
    ] = None,
    steer: Annotated[list[str] | None, typer.Option(help=STEER_HELP)] = None,
    guard: Annotated[list[str] | None, typer.Option(help=GUARD_HELP)] = None,
    target: Target = DEFAULT_TARGET,
    api_key_file: ApiKeyFile = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    n: Annotated[
        int, typer.Option("--n", help="Responses to draw; more than one are shown when all are complete.")
    ] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the distribution to draw from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Most likely tokens to draw from; 0 is no limit.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the most likely one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: against tokens of prompt and response.")] = 1.0,
    frequency_penalty: Annotated[float, typer.Option(help="Above 0: against tokens, by their count so far.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Above 0: against tokens of the response.")] = 0.0,
    biases: Annotated[
        list[str] | None, typer.Option("--logit-bias", help="TOKEN_ID=BIAS, added to its logit. Repeatable.")
    ] = None,
    stop_strings: Annotated[
        list[str] | None, typer.Option("--stop", help="String that ends the response. Repeatable.")
    ] = None,
    stop_tokens: Annotated[
        list[int] | None, typer.Option("--stop-token-id", help="Token that ends the response. Repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the response reproducible.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Show each token's log-probability, and this many of the most likely tokens.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Lower is served first.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's turn through the chat template.")
    ] = False,
    activations: Annotated[
        bool, typer.Option("--activations", help="Show each intervention's score at each token.")
    ] = False,
) -> None:
    """Stream a response from a running server to standard output; its receipt goes to standard error."""
    from steerserve.client import SteerserveClient
    from steerserve.display import response_view
    from steerserve.types import Message

    responses: dict[int, list[StepOutput]] = {}
    with SteerserveClient(target, api_key_file=api_key_file) as client:
        for piece in client.generate_stream(
            [Message("user", prompt)] if chat else prompt,
            policies=policy or (),
            steer=steer or (),
            guards=guard or (),
            max_tokens=max_tokens,
            n=n,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=dict(_bias(text) for text in biases or ()),
            stop=stop_strings or (),
            stop_token_ids=stop_tokens or (),
            seed=seed,
            logprobs=logprobs,
            priority=priority,
            return_activations=activations,
        ):
            responses.setdefault(piece.index, []).append(piece)
            if n == 1:
                print(piece.text, end="", flush=True)
    console = Console(stderr=True)
    for _, pieces in sorted(responses.items()):
        print("" if n == 1 else "".join(piece.text for piece in pieces), flush=True)
        console.print(response_view(pieces, activations))


@app.command()
def score(
    text: Annotated[str | None, typer.Argument(help="Text to read, such as another model's answer.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='Texts to read instead, JSON lines of {"text": ...}; each comes back with its scores.'),
    ] = None,
    concept: Annotated[list[str] | None, typer.Option(help="Concept to look for. Repeatable. [all]")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Policy whose rules judge the text, NAME or NAME@VERSION. Repeatable.")
    ] = None,
    target: Target = DEFAULT_TARGET,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Show how much texts show the loaded concepts, and where; exit code 1 if one is flagged or a rule acts."""
    import json

    from rich.progress import track

    from steerserve.client import SteerserveClient
    from steerserve.display import score_view
    from steerserve.serving.score_file import as_json, read_lines, score_lines

    if (text is None) is (file is None):
        raise typer.BadParameter("give a text or --file, one of them")
    finds = False

    with SteerserveClient(target, api_key_file=api_key_file) as client:
        if text is not None:
            read = client.score(text, concept or (), policy or (), return_tokens=True)
            Console().print(score_view(text, read))
            finds = read.flagged or read.acted_on
        elif file is not None:
            lines = read_lines(file)
            scored = score_lines(lines, lambda each: client.score(each, concept or (), policy or ()))
            progress = track(scored, "scoring", len(lines), console=Console(stderr=True))
            for line, read in zip(lines, progress, strict=True):
                print(json.dumps(as_json(line, read), ensure_ascii=False), flush=True)
                finds |= read.flagged or read.acted_on
    raise typer.Exit(int(finds))


@app.command()
def info(target: Target = DEFAULT_TARGET, api_key_file: ApiKeyFile = None) -> None:
    """Show what a running server serves, and what requests can name."""
    from steerserve.client import SteerserveClient

    with SteerserveClient(target, api_key_file=api_key_file) as client:
        model, server = client.get_model_info(), client.get_server_info()
    table = Table("", "", show_header=False)
    table.add_row("server", f"steerserve {server.version}, up {server.uptime_seconds:.0f} s")
    table.add_row(
        "requests",
        f"{server.num_requests_running} of {server.max_num_seqs} running, {server.num_requests_waiting} waiting",
    )
    table.add_row("model", f"{model.model_name} ({model.model_fingerprint[:12]})")
    heads = f"{model.n_heads} heads of {model.d_head}"
    table.add_row(
        "size", f"{model.n_layers} layers of {heads}, d_model {model.d_model}, at most {model.max_model_len} tokens"
    )
    for sae in model.saes:
        table.add_row("SAE", f"{sae.name}: {sae.d_sae} features at {sae.site}")
    for concept in model.concepts:
        table.add_row("concept", f"{concept.name}@{concept.version}: {concept.num_features} features at {concept.site}")
    table.add_row("policies", ", ".join(model.policies) or "none")
    for entry in model.monitor_plan.entries:
        table.add_row(f"monitor {model.monitor_plan.name}", f"{entry.name}: {entry.reading} at {entry.site}")
    Console().print(table)


@app.command()
def health(
    target: Target = DEFAULT_TARGET,
    service: Annotated[str, typer.Option(help="readiness: it takes requests; or liveness.")] = "readiness",
    wait: Annotated[float, typer.Option(help="Seconds to ask again until it does.")] = 0.0,
) -> None:
    """Ask whether a server takes requests; the exit code is 1 if not."""
    import time

    from steerserve.client import SteerserveClient

    give_up = time.monotonic() + wait
    while True:
        # A channel of its own for each: one that has failed waits longer and longer before it tries again.
        with SteerserveClient(target) as client:
            is_serving = client.is_serving(service)
        if is_serving or time.monotonic() > give_up:
            break
        time.sleep(0.5)
    print("serving" if is_serving else "not serving")
    raise typer.Exit(int(not is_serving))


@app.command()
def demo(
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with a 'prompt' each; built-in ones if left out.")
    ] = None,
) -> None:
    """Start a server and show the profanity policy at work, side by side and in numbers."""
    from steerserve.demo import run_demo

    run_demo(prompts)


@models_app.command("pull")
def models_pull(name: Annotated[str, typer.Argument(help="A name that `steerserve models list` shows.")]) -> None:
    """Fetch a model into the cache; prints its directory."""
    from steerserve.models.pull import pull

    print(pull(name))


@models_app.command("list")
def models_list() -> None:
    """Show the models that can be fetched by name."""
    from steerserve.models.pull import MODELS, cache_dir

    table = Table("name", "licence", "download", "in the cache")
    for name, model in MODELS.items():
        directory = cache_dir() / "models" / name
        table.add_row(
            name, model.licence, f"{model.wheel_bytes / 1e6:.0f} MB", str(directory) if directory.is_dir() else "no"
        )
    Console().print(table)


# Options and --help of these are parsed by applications of their own, imported only when they are asked for.
_PASSED_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


@app.command(**_PASSED_ON)
def sae(ctx: typer.Context) -> None:
    """Inspect, convert and verify SAEs of any known format."""
    from steerserve.lab.commands.sae import app as sae_app

    sae_app(args=ctx.args, prog_name="steerserve sae")


@app.command(**_PASSED_ON)
def keys(ctx: typer.Context) -> None:
    """Make API keys, and check the file that says what they are for."""
    from steerserve.serving.key_commands import app as keys_app

    keys_app(args=ctx.args, prog_name="steerserve keys")


@app.command(**_PASSED_ON)
def policy(ctx: typer.Context) -> None:
    """Check, explain and try out policy files."""
    from steerserve.serving.policy_commands import app as policy_app

    policy_app(args=ctx.args, prog_name="steerserve policy")


@app.command(**_PASSED_ON)
def audit(ctx: typer.Context) -> None:
    """Make the keys of the audit log, and verify one."""
    from steerserve.serving.audit.commands import app as audit_app

    audit_app(args=ctx.args, prog_name="steerserve audit")


@app.command(**_PASSED_ON)
def lab(ctx: typer.Context) -> None:
    """Harvest activations; train, evaluate and interpret SAEs."""
    from steerserve.lab.cli import app as lab_app

    lab_app(args=ctx.args, prog_name="steerserve lab")


@app.command(**_PASSED_ON)
def concept(ctx: typer.Context) -> None:
    """Build concept packs, and measure what they do."""
    from steerserve.lab.cli import concept_app

    concept_app(args=ctx.args, prog_name="steerserve concept")


@app.command(**_PASSED_ON)
def analyse(ctx: typer.Context) -> None:
    """Patch, probe and read a model's activations on pairs of prompts."""
    from steerserve.circuits.cli import app as analyse_app

    analyse_app(args=ctx.args, prog_name="steerserve analyse")


@app.command(**_PASSED_ON)
def discover(ctx: typer.Context) -> None:
    """Find the circuit of a behaviour: which heads and MLPs matter, and through which edges."""
    from steerserve.circuits.cli import discover_app

    discover_app(args=ctx.args, prog_name="steerserve discover")


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise InvalidRequestError("--logit-bias", text, "TOKEN_ID=BIAS, e.g. '1234=-5'") from None


def _said(values: dict[str, Any]) -> dict[str, Any]:
    """What was given on the command line, without what was left out."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if section := _said(value):
                given[name] = section
        elif value is not None:
            given[name] = value
    return given
