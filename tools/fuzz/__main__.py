"""Fuzzing guided by coverage: the targets and oracles of tests/fuzz, driven by atheris (libFuzzer).

    pip install atheris                                 it is not among the packages that tests need
    python -m tools.fuzz session                        until Ctrl-C or a failure
    python -m tools.fuzz session --runs 1000000         so many executions
    python -m tools.fuzz session --input FILE           one input again, with its failure
    python -m tools.fuzz session --minimise             what of .fuzz/session adds coverage, into tests/corpus/session

Inputs that reach something new are kept in .fuzz/TARGET. An input that fails is kept as .fuzz/TARGET-crash-*; once
mended it belongs into tests/corpus/TARGET, which the test suite replays.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CORPUS, WORK = ROOT / "tests/corpus", ROOT / ".fuzz"
TARGETS = ("handshake", "transmission", "session", "config", "control")
MAX_INPUT = 512
TIMEOUT_S = 10
RSS_MB = 1024
"""An input that takes longer, or a process that grows beyond, is a failure."""


def main() -> int:
    """Run one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=-1, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0: another one each time")
    parser.add_argument("--input", type=Path, metavar="FILE")
    parser.add_argument("--minimise", action="store_true")
    options = parser.parse_args()
    if options.input:
        from tests.fuzz.targets import TARGETS as FUNCTIONS  # noqa: PLC0415 - not instrumented

        FUNCTIONS[options.target](options.input.read_bytes())
        return 0
    return _minimise(options.target) if options.minimise else _drive(options)


def _minimise(name: str) -> int:
    """Keep what adds something; what was put there by hand has a name of its own, and stays."""
    from tests.fuzz.targets import TARGETS as FUNCTIONS  # noqa: PLC0415 - as above
    from tools.fuzz.minimise import minimised  # noqa: PLC0415 - not needed to fuzz

    kept = CORPUS / name
    for path in kept.glob("found-*"):
        path.unlink()
    data = [path.read_bytes() for path in (WORK / name).iterdir()]
    for number, found in enumerate(minimised(FUNCTIONS[name], data)):
        (kept / f"found-{number:03}").write_bytes(found)
    return 0


def _drive(options: argparse.Namespace) -> int:
    try:
        import atheris  # noqa: PLC0415 - the message is ours
    except ImportError:
        print("atheris is missing: pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["nbdvde"]):
        from tests.fuzz.seeds import SEEDS  # noqa: PLC0415 - imported to be instrumented
        from tests.fuzz.targets import TARGETS as FUNCTIONS  # noqa: PLC0415
    name = options.target
    found, kept = WORK / name, CORPUS / name
    for folder in (found, kept):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (found / f"seed-{number:03}").write_bytes(seed)
    arguments = [sys.argv[0], f"-max_len={MAX_INPUT}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={RSS_MB}"]
    arguments += [f"-seed={options.seed}", f"-artifact_prefix={WORK}/{name}-", "-print_final_stats=1"]
    arguments += [f"-runs={options.runs}", str(found), str(kept)]
    atheris.Setup(arguments, FUNCTIONS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
