"""``python -m serving``: run the server until interrupted."""

import argparse
import signal
import sys
from collections.abc import Sequence

import anyio

from serving.config import ServingConfig
from serving.launcher import running_server


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve and return the exit status."""
    parser = argparse.ArgumentParser(prog="serving", description="Serve a small Mixture-of-Experts model over HTTP.")
    parser.add_argument("--ranks", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--port", type=int, default=8000, help="on the loopback interface; 0: any (default: 8000)")
    parser.add_argument("--rebalancing", choices=("off", "blocking"), default="blocking", help="how experts move")
    parser.add_argument("--every", type=int, default=0, help="passes between rebalances; 0: on request (default: 0)")
    options = parser.parse_args(arguments)
    anyio.run(_serve, options)
    return 0


async def _serve(options: argparse.Namespace) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_run, options)
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                tasks.cancel_scope.cancel()


async def _run(options: argparse.Namespace) -> None:
    server = running_server(
        options.ranks,
        ServingConfig(),
        port=options.port,
        rebalancing=options.rebalancing,
        rebalance_every=options.every,
    )
    async with server as listening:
        print(f"{options.ranks} ranks serve on http://127.0.0.1:{listening.port}; interrupt to end", flush=True)
        await anyio.sleep_forever()


if __name__ == "__main__":
    sys.exit(main())
