"""The command ``simulate``: predict the time of updates on clusters of any size, planned in several ways."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from async_eplb.cli.numbers import natural, positive
from async_eplb.cli.render import print_columns, progress
from async_eplb.errors import InvalidOptions, MissingExtra
from async_eplb.report.text import in_bytes
from async_eplb.simulate import CLUSTERS, MODELS, VARIANTS, UpdateCase, UpdateCosts, compare_plans

_DESCRIPTION = """\
Plan a real update for a cluster that need not be there, and predict its time by a model of the
cluster's links. Experts' loads are drawn, a policy places the experts; then loads drift, the policy
places them again, and the update between both placements is planned in several ways:

  reference  sources as serving engines choose them
  balanced   the busiest sender sends as little as it can
  relabel    besides, ranks and nodes trade places so that fewest experts move (needs scipy)
  relay      besides, an expert crosses to a node once and is passed on there

A layer takes the latency of a link, and then as long as its busiest rank or node; layers are
transferred one after another, and passed on beside the next. The bound is what no plan between
the same placements can beat. Nothing is measured: bandwidths are nominal ones, latencies
assumptions.
"""

_EPILOG = """\
examples:
  async_eplb simulate --ranks 32                            DeepSeek-V3 on 4 H100 nodes
  async_eplb simulate --ranks 320 --nodes 40 --drift 0.3    loads that have changed more
  async_eplb simulate --model kimi-k2 --cluster gb200 --ranks 144 --policy incremental
  async_eplb simulate --ranks 8 64 320 1024 --layers 8 --plot scale.png --json scale.json
"""

_HEADER = ("plan", "ms", "bound", "ratio", "within", "across", "stages", "planned in")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``simulate`` to the command line."""
    parser = commands.add_parser(
        "simulate",
        help="plan updates for clusters of any size, and model how long they take",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="deepseek-v3", help="(default: deepseek-v3)")
    parser.add_argument("--cluster", choices=CLUSTERS, default="h100", help="GPUs and links (default: h100)")
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[32], metavar="N", help="GPUs; several to compare (default: 32)"
    )
    parser.add_argument(
        "--nodes", type=positive, metavar="N", help="nodes that they are on (default: as few as the cluster's fit on)"
    )
    parser.add_argument(
        "--slots", type=positive, metavar="N", help="experts that a GPU holds (default: an eighth more than it must)"
    )
    parser.add_argument(
        "--drift", type=float, default=0.1, metavar="SIGMA", help="of the loads' lognormal change (default: 0.1)"
    )
    parser.add_argument(
        "--policy", choices=("full", "incremental"), default="full", help="how experts are placed anew (default: full)"
    )
    parser.add_argument("--layers", type=positive, metavar="N", help="layers to simulate (default: the model's)")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the loads (default: 0)")
    parser.add_argument(
        "--slowest", type=natural, default=3, metavar="N", help="layers to print, slowest first (default: 3)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, of every layer")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Plan the updates, and print, write and draw what they cost."""
    cases = {num_ranks: _case(options, num_ranks) for num_ranks in options.ranks}
    for option in ("json", "plot"):
        _require_folder(option, getattr(options, option))
    draw = _load_plot() if options.plot is not None else None
    costs_by_size: dict[int, dict[str, UpdateCosts]] = {}
    with progress({f"{num_ranks} ranks": len(VARIANTS) for num_ranks in cases}) as advance:
        for num_ranks, case in cases.items():
            name = f"{num_ranks} ranks"
            costs_by_size[num_ranks] = compare_plans(case, on_variant=lambda _, name=name: advance(name))  # type: ignore[misc]
    for num_ranks, case in cases.items():
        print_columns(_title(options, case), _HEADER, [_row(*each) for each in costs_by_size[num_ranks].items()])
        print(f"Ranks and nodes traded places in {costs_by_size[num_ranks]['relabel'].relabel_ms:.0f} ms, once.")
        if options.slowest:
            _print_slowest(costs_by_size[num_ranks], options.slowest)
    if options.json is not None:
        options.json.write_text(json.dumps(_document(options, cases, costs_by_size), indent=1) + "\n")
    if draw is not None:
        draw(
            options.plot, f"{options.model}, {options.cluster}, drift {options.drift}, {options.policy}", costs_by_size
        )
    return 0


def _case(options: argparse.Namespace, num_ranks: int) -> UpdateCase:
    model, cluster = MODELS[options.model], CLUSTERS[options.cluster]
    topology = UpdateCase.topology_for(model, cluster, num_ranks, num_nodes=options.nodes, num_slots=options.slots)
    return UpdateCase(
        model,
        cluster,
        topology,
        drift=options.drift,
        policy=options.policy,
        num_layers=options.layers,
        seed=options.seed,
    )


def _require_folder(option: str, path: Path | None) -> None:
    """Check that a file can be made there, before anything takes long."""
    if path is None:
        return
    try:
        is_there = path.absolute().parent.is_dir()
    except OSError as error:
        raise InvalidOptions(f"--{option}: {error.strerror}", option=option) from error
    if not is_there:
        raise InvalidOptions(f"--{option} {path}: there is no folder {path.parent}", option=option)


def _load_plot() -> Any:  # noqa: ANN401 - the function of a module that needs an extra
    try:
        from async_eplb.cli.plot import draw  # noqa: PLC0415 - needs matplotlib
    except ImportError as error:
        raise MissingExtra("--plot needs matplotlib; pip install 'async-eplb[plot]'", extra="plot") from error
    return draw


def _title(options: argparse.Namespace, case: UpdateCase) -> str:
    model, topology = case.model, case.topology
    nodes = "1 node" if topology.num_nodes == 1 else f"{topology.num_nodes} nodes"
    layers = case.num_layers or model.num_layers
    return (
        f"{options.model} on {options.cluster}: {topology.num_ranks} ranks on {nodes},\n{layers} layers of "
        f"{model.num_experts} experts of {in_bytes(model.expert_nbytes)} in {topology.num_physical_experts} slots"
    )


def _row(name: str, costs: UpdateCosts) -> tuple[str, ...]:
    layers = costs.layers
    return (
        name,
        f"{costs.time_s * 1e3:.1f}",
        f"{costs.bound_s.sum() * 1e3:.1f}",
        f"{costs.ratio:.2f}",
        in_bytes(float(layers.nbytes_within.sum())),
        in_bytes(float(layers.nbytes_across.sum())),
        str(int(layers.num_stages.sum())),
        f"{costs.plan_ms:.1f} ms",
    )


def _print_slowest(costs_by_plan: dict[str, UpdateCosts], number: int) -> None:
    """Print the slowest layers of the reference and of relayed plans, and the spread of all."""
    rows: list[tuple[str, ...]] = []
    for name in ("reference", "relay"):
        costs, layers = costs_by_plan[name], costs_by_plan[name].layers
        rows += [
            (
                name,
                str(layer),
                f"{layers.time_s[layer] * 1e3:.2f}",
                f"{costs.bound_s[layer] * 1e3:.2f}",
                in_bytes(float(layers.nbytes_within[layer])),
                in_bytes(float(layers.nbytes_across[layer])),
                str(layers.busiest_rank[layer]),
            )
            for layer in np.argsort(-layers.time_s, kind="stable")[:number]
        ]
        rows += [
            (name, label, f"{np.quantile(layers.time_s, share) * 1e3:.2f}", "", "", "", "")
            for label, share in (("median", 0.5), ("fastest", 0.0))
        ]
    print_columns("Slowest layers", ("plan", "layer", "ms", "bound", "within", "across", "busiest rank"), rows)


def _document(
    options: argparse.Namespace, cases: dict[int, UpdateCase], costs_by_size: dict[int, dict[str, UpdateCosts]]
) -> dict[str, object]:
    """Return all figures, per layer, in seconds and bytes."""
    return {
        "model": asdict(MODELS[options.model]),
        "cluster": asdict(CLUSTERS[options.cluster]),
        "drift": options.drift,
        "policy": options.policy,
        "updates": [
            {
                "topology": asdict(cases[num_ranks].topology),
                "plans": {name: _figures(costs) for name, costs in by_name.items()},
            }
            for num_ranks, by_name in costs_by_size.items()
        ],
    }


def _figures(costs: UpdateCosts) -> dict[str, object]:
    layers = costs.layers
    return {
        "time_s": costs.time_s,
        "bound_s": float(costs.bound_s.sum()),
        "ratio": costs.ratio,
        "relabel_ms": costs.relabel_ms,
        "plan_ms": costs.plan_ms,
        "layers": {
            "time_s": layers.time_s.tolist(),
            "bound_s": costs.bound_s.tolist(),
            "nbytes_within": layers.nbytes_within.tolist(),
            "nbytes_across": layers.nbytes_across.tolist(),
            "busiest_rank": layers.busiest_rank.tolist(),
            "num_stages": layers.num_stages.tolist(),
        },
    }
