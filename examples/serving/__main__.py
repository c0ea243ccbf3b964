"""Start the service on this machine, in the foreground: `python -m examples.serving --port 8000`.

It ends with Ctrl-C or SIGTERM. Ray's processes belong to it and end with it.
"""

import argparse
import logging
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny_pipeline"
OBJECT_STORE_BYTES = 200 * 2**20


def main(arguments: list[str] | None = None) -> int:
    """Run the service until a signal ends it; return the exit status."""
    options = _parser().parse_args(arguments)
    if not _is_free(options.host, options.port):
        print(f"{options.host}:{options.port} is taken; choose another port with --port", file=sys.stderr)
        return 1
    if options.pipeline == TINY and not options.adapters.exists():
        shutil.copytree(TINY / "adapters", options.adapters)
    print("starting Ray and loading the pipeline ...", flush=True)
    try:
        _start(options)
        print(_greeting(f"http://{options.host}:{options.port}"), flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        print("ending ...", flush=True)
    finally:
        _stop()
    return 0


def _start(options: argparse.Namespace) -> None:
    """Start a cluster of one machine, and the application on it."""
    # Ray reads these when it is imported. Its workers inherit them.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Ray then knows this machine by its loopback address and listens there, as it does on Windows and macOS.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Ray would kill its own processes when other programs use nearly all memory of the machine.
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # Or it announces that this will be the default.
    # What libraries say of packages that are missing, and Ray of its start, is of no use here.
    for name in ("bitsandbytes", "diffusers", "torch", "torchao", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)
    import ray
    from ray import serve

    from examples.serving.deployment import Settings, build

    _interrupt_on_signals()
    ray.init(
        address="local",
        num_cpus=options.replicas + 1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    _interrupt_on_signals()  # Ray has set handlers of its own.
    serve.start(http_options={"host": options.host, "port": options.port})
    settings = Settings(
        pipeline=str(options.pipeline),
        adapters=str(options.adapters.resolve()),
        slots=options.slots,
        samples=options.samples,
        pool_bytes=options.pool_mib * 2**20,
        compiled=options.compile or False,
        replicas=options.replicas,
    )
    serve.run(build(settings), name="diffadapt")


def _interrupt_on_signals() -> None:
    """Raise `KeyboardInterrupt` where SIGTERM or Ctrl-C finds the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _stop() -> None:
    """End the application and all processes of Ray; nothing interrupts this."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()


def _is_free(host: str, port: int) -> bool:
    """Return whether a server can listen at this address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _greeting(url: str) -> str:
    """Return what the terminal shows when the service is ready."""
    body = '{"prompt": "a red circle on a blue background", "adapters": {"ink": 1.0}, "seed": 1}'
    decode = "tr '\"' '\\n' | awk 'length > 200' | base64 -d"
    return (
        f"ready: {url}\n"
        f"curl -s {url}/v1/images/generations -H 'Content-Type: application/json' -d '{body}' | {decode} > picture.png"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m examples.serving", description="Serve adapters on one pipeline.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: %(default)s)")
    parser.add_argument("--pipeline", default=TINY, help="path or hub id of the pipeline (default: the embedded one)")
    parser.add_argument(
        "--adapters",
        type=Path,
        default=ROOT / "build" / "serving" / "adapters",
        help="folder of adapters, also for uploads (default: a copy of those of the embedded pipeline)",
    )
    parser.add_argument("--replicas", type=int, default=1, help="pipelines to run (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="pictures to draw at once (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="different adapters in a batch (default: %(default)s)")
    parser.add_argument(
        "--pool-mib", type=int, default=1024, help="MiB of adapters to keep in memory (default: %(default)s)"
    )
    parser.add_argument("--compile", metavar="BACKEND", help="compile the denoiser: inductor, aot_eager, ...")
    return parser


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # All that is left is to unload torch, which takes seconds.
