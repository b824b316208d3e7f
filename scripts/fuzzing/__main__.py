"""Run targets, each in its own process: libFuzzer makes up bytes, guided by the branches that they reach."""

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import atheris
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["async_eplb"]):
    from fuzzing.mutation import mutate_json
    from fuzzing.targets import TARGETS, Target

_HANGS_AFTER_S = 20
_MEMORY_MIB = 4096
_LONGEST = 16384

_EPILOG = """\
examples:
  scripts/fuzz-inputs                          all targets, 60 s each
  scripts/fuzz-inputs log --seconds 600        one of them for longer
  scripts/fuzz-inputs log --input found/log-crash-...  what a failure wrote

Exit status: 0 if every input was taken or refused with a typed error, 1 if not.
"""


def main() -> int:
    """Parse the command line and run the targets it names."""
    names = "\n".join(f"  {name:<16}{target.reads}" for name, target in TARGETS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz-inputs",
        description=f"Feed made-up bytes to what reads bytes from outside.\n\ntargets:\n{names}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="targets (default: all)")
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="for each target (default: 60)")
    parser.add_argument("--runs", type=int, metavar="N", help="inputs for each target, instead of --seconds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="repeats a run; 0 draws one (default: 0)")
    parser.add_argument("--found", type=Path, default=Path("found"), metavar="DIR", help="for inputs that fail")
    parser.add_argument("--input", type=Path, metavar="FILE", help="run this input only")
    options = parser.parse_args()
    for name in options.names:
        if name not in TARGETS:
            parser.error(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    if options.input is not None:
        if len(options.names) != 1:
            parser.error("--input needs the one target that reads it")
        run_input(TARGETS[options.names[0]], options.input.read_bytes())
        print("taken, or refused with a typed error")
        return 0
    options.found.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.names or TARGETS if not _runs_well(name, options)]
    if not any(options.found.iterdir()):
        options.found.rmdir()
    return 1 if failed else 0


def run_input(target: Target, data: bytes) -> None:
    """Feed one input to a target in an empty folder; what it prints goes nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        target.guarded()(data)


def fuzz(name: str, options: argparse.Namespace) -> None:
    """Turn this process into a run of libFuzzer on one target; does not return."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        work, corpus, words = (Path(folder) / part for part in ("work", "corpus", "words"))
        work.mkdir()
        corpus.mkdir()
        for number, seed in enumerate(target.seeds()):
            (corpus / str(number)).write_bytes(seed)
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        limit = f"-max_total_time={options.seconds}" if options.runs is None else f"-runs={options.runs}"
        found = options.found.resolve()
        os.chdir(work)
        arguments = [
            limit,
            f"-seed={options.seed}",
            f"-timeout={_HANGS_AFTER_S}",
            f"-rss_limit_mb={_MEMORY_MIB}",
            f"-max_len={_LONGEST}",
            *([f"-dict={words}"] if target.words else []),
            f"-artifact_prefix={found}/{name}-",
            "-use_value_profile=1",
            "-print_final_stats=1",
            str(corpus),
        ]
        options_of_json = {"custom_mutator": mutate_json} if target.is_json else {}
        atheris.Setup([sys.argv[0], *arguments], target.guarded(), **options_of_json)
        atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _runs_well(name: str, options: argparse.Namespace) -> bool:
    """Run a target in a fork, and return whether it found no fault.

    libFuzzer ends the process that it runs in, and importing everything anew takes longer than a short run.
    """
    with tempfile.TemporaryFile() as file:
        process = multiprocessing.get_context("fork").Process(target=_fuzz_into, args=(file.fileno(), name, options))
        process.start()
        process.join()
        file.seek(0)
        output = file.read().decode(errors="replace")
    if process.exitcode == 0:
        print(f"{name}: {_figure(output)} inputs taken or refused with a typed error", flush=True)
        return True
    print(output, file=sys.stderr)
    print(f"{name}: FAILED; again: scripts/fuzz-inputs {name} --input {options.found}/{name}-...", flush=True)
    return False


def _fuzz_into(descriptor: int, name: str, options: argparse.Namespace) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    fuzz(name, options)


def _figure(text: str) -> str:
    marker = "stat::number_of_executed_units:"
    return next((line.removeprefix(marker).strip() for line in text.splitlines() if line.startswith(marker)), "?")


if __name__ == "__main__":
    sys.exit(main())
