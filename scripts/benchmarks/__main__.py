"""Run one benchmark of this folder, print its figures, and write them as JSON.

A benchmark is a module of this package with ``add_arguments(parser)`` and ``run(options)``, which returns a flat
dictionary of figures; its docstring's first line says what is measured.
"""

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
sys.path[:1] = [str(_FOLDER.parent), str(_FOLDER.parent.parent / "examples")]


def main() -> int:
    """Parse the command line and run the benchmark it names."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure one thing; both sides in one run.")
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    modules = {}
    for path in sorted(_FOLDER.glob("[!_]*.py")):
        module = importlib.import_module(f"{_FOLDER.name}.{path.stem}")
        name = path.stem.replace("_", "-")
        modules[name] = module
        doc = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=doc.splitlines()[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the machine there")
        module.add_arguments(command)
    options = parser.parse_args()
    if options.name is None:
        parser.print_help()
        return 0
    before = machine()
    figures = modules[options.name].run(options)
    document = {"benchmark": options.name, "machine": before, "figures": figures}
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def machine() -> dict[str, object]:
    """Return what figures depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
