"""The simulation: what an update would take on clusters of any size, planned in several ways."""

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
from async_eplb.simulate import CLUSTERS, MODELS, VARIANTS, Outcome, Scenario, simulate

_DESCRIPTION = """\
Plan a real update for a cluster that need not be there, and say what a model of its links makes of
it. Experts' loads are drawn, a policy places the experts; then loads drift, the policy places them
again, and the update between both placements is planned in several ways:

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
    """Simulate and print what updates take."""
    scenarios = {num_ranks: _scenario(options, num_ranks) for num_ranks in options.ranks}
    for option in ("json", "plot"):
        _require_folder(option, getattr(options, option))
    draw = _load_plot() if options.plot is not None else None
    outcomes: dict[int, dict[str, Outcome]] = {}
    with progress({f"{num_ranks} ranks": len(VARIANTS) for num_ranks in scenarios}) as advance:
        for num_ranks, scenario in scenarios.items():
            name = f"{num_ranks} ranks"
            outcomes[num_ranks] = simulate(scenario, on_variant=lambda _, name=name: advance(name))  # type: ignore[misc]
    for num_ranks, scenario in scenarios.items():
        print_columns(_title(options, scenario), _HEADER, [_row(*each) for each in outcomes[num_ranks].items()])
        print(f"Ranks and nodes traded places in {outcomes[num_ranks]['relabel'].relabel_ms:.0f} ms, once.")
        if options.slowest:
            _print_slowest(outcomes[num_ranks], options.slowest)
    if options.json is not None:
        options.json.write_text(json.dumps(_document(options, scenarios, outcomes), indent=1) + "\n")
    if draw is not None:
        draw(options.plot, f"{options.model}, {options.cluster}, drift {options.drift}, {options.policy}", outcomes)
    return 0


def _scenario(options: argparse.Namespace, num_ranks: int) -> Scenario:
    model, cluster = MODELS[options.model], CLUSTERS[options.cluster]
    topology = Scenario.topology_for(model, cluster, num_ranks, num_nodes=options.nodes, num_slots=options.slots)
    return Scenario(
        model,
        cluster,
        topology,
        drift=options.drift,
        policy=options.policy,
        num_layers=options.layers,
        seed=options.seed,
    )


def _require_folder(option: str, path: Path | None) -> None:
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


def _title(options: argparse.Namespace, scenario: Scenario) -> str:
    model, topology = scenario.model, scenario.topology
    nodes = "1 node" if topology.num_nodes == 1 else f"{topology.num_nodes} nodes"
    layers = scenario.num_layers or model.num_layers
    return (
        f"{options.model} on {options.cluster}: {topology.num_ranks} ranks on {nodes},\n{layers} layers of "
        f"{model.num_experts} experts of {in_bytes(model.expert_nbytes)} in {topology.num_physical_experts} slots"
    )


def _row(name: str, outcome: Outcome) -> tuple[str, ...]:
    costs = outcome.costs
    return (
        name,
        f"{outcome.time_s * 1e3:.1f}",
        f"{outcome.bound_s.sum() * 1e3:.1f}",
        f"{outcome.ratio:.2f}",
        in_bytes(float(costs.nbytes_within.sum())),
        in_bytes(float(costs.nbytes_across.sum())),
        str(int(costs.num_stages.sum())),
        f"{outcome.plan_ms:.1f} ms",
    )


def _print_slowest(outcomes: dict[str, Outcome], number: int) -> None:
    """Print the slowest layers of the reference and of relayed plans, and the spread of all."""
    rows: list[tuple[str, ...]] = []
    for name in ("reference", "relay"):
        outcome, costs = outcomes[name], outcomes[name].costs
        rows += [
            (
                name,
                str(layer),
                f"{costs.time_s[layer] * 1e3:.2f}",
                f"{outcome.bound_s[layer] * 1e3:.2f}",
                in_bytes(float(costs.nbytes_within[layer])),
                in_bytes(float(costs.nbytes_across[layer])),
                str(costs.busiest_rank[layer]),
            )
            for layer in np.argsort(-costs.time_s, kind="stable")[:number]
        ]
        rows += [
            (name, label, f"{np.quantile(costs.time_s, share) * 1e3:.2f}", "", "", "", "")
            for label, share in (("median", 0.5), ("fastest", 0.0))
        ]
    print_columns("Slowest layers", ("plan", "layer", "ms", "bound", "within", "across", "busiest rank"), rows)


def _document(
    options: argparse.Namespace, scenarios: dict[int, Scenario], outcomes: dict[int, dict[str, Outcome]]
) -> dict[str, object]:
    """Return everything, per layer, in seconds and bytes."""
    return {
        "model": asdict(MODELS[options.model]),
        "cluster": asdict(CLUSTERS[options.cluster]),
        "drift": options.drift,
        "policy": options.policy,
        "updates": [
            {
                "topology": asdict(scenarios[num_ranks].topology),
                "plans": {name: _figures(outcome) for name, outcome in by_name.items()},
            }
            for num_ranks, by_name in outcomes.items()
        ],
    }


def _figures(outcome: Outcome) -> dict[str, object]:
    costs = outcome.costs
    return {
        "time_s": outcome.time_s,
        "bound_s": float(outcome.bound_s.sum()),
        "ratio": outcome.ratio,
        "relabel_ms": outcome.relabel_ms,
        "plan_ms": outcome.plan_ms,
        "layers": {
            "time_s": costs.time_s.tolist(),
            "bound_s": outcome.bound_s.tolist(),
            "nbytes_within": costs.nbytes_within.tolist(),
            "nbytes_across": costs.nbytes_across.tolist(),
            "busiest_rank": costs.busiest_rank.tolist(),
            "num_stages": costs.num_stages.tolist(),
        },
    }
