"""``python -m serving``: run the server until interrupted."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import anyio

from serving.config import PolicyName, RebalancingConfig, ServingConfig
from serving.launcher import running_server


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve and return the exit status."""
    parser = argparse.ArgumentParser(prog="serving", description="Serve a small Mixture-of-Experts model over HTTP.")
    parser.add_argument("--ranks", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--port", type=int, default=8000, help="on the loopback interface; 0: any (default: 8000)")
    parser.add_argument(
        "--policy",
        choices=("off", *get_args(PolicyName)),
        default="incremental",
        help="where experts should go; off: they stay (default: incremental)",
    )
    parser.add_argument("--every", type=int, metavar="PASSES", help="between rebalances (default: only on request)")
    parser.add_argument(
        "--max-nbytes-per-step", type=int, metavar="BYTES", help="that a rank moves for each pass (default: no limit)"
    )
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="write each rank's events there, as JSON lines")
    options = parser.parse_args(arguments)
    if options.log_dir is not None:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    anyio.run(_serve, options)
    return 0


async def _serve(options: argparse.Namespace) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_run, options)
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                tasks.cancel_scope.cancel()


async def _run(options: argparse.Namespace) -> None:
    rebalancing = None
    if options.policy != "off":
        rebalancing = RebalancingConfig(
            policy=options.policy,
            every_steps=options.every,
            max_nbytes_per_step=options.max_nbytes_per_step,
            log_dir=options.log_dir,
        )
    async with running_server(options.ranks, ServingConfig(), port=options.port, rebalancing=rebalancing) as listening:
        print(f"{options.ranks} ranks serve on http://127.0.0.1:{listening.port}; interrupt to end", flush=True)
        await anyio.sleep_forever()


if __name__ == "__main__":
    sys.exit(main())
