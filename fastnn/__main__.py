"""The command line: ``python -m fastnn info | verify | bench | warmup``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastnn", description="Hand-written neural network kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("info", help="versions, CPU, caches, threads, what is installed: the text for a bug report")

    verify = commands.add_parser(
        "verify", help="check every operator on this machine against float64, beside PyTorch's own error"
    )
    verify.add_argument("family", nargs="*", help="matmul, activation, softmax, … (default: all)")
    verify.add_argument("--dtype", help="one of float32, float64, bfloat16, float16 (default: all)")
    verify.add_argument("--backend", help="check this backend only (default: whatever fastnn chooses)")
    verify.add_argument("--failures", action="store_true", help="print only the lines that failed")
    verify.add_argument("--html", metavar="FILE", help="write the whole report as one self-contained page")
    verify.add_argument("--json", metavar="FILE", help="write one record a line")

    bench = commands.add_parser(
        "bench", help="measure speed against PyTorch, torch.compile, NumPy, ONNX Runtime; each result checked first"
    )
    bench.add_argument(
        "family",
        nargs="*",
        help="matmul, activation, softmax, … (default: all); or: compare OLD.json NEW.json, which measures nothing, shows "
        "what changed between two results of one machine, and exits with 1 if a case became slower or wrong",
    )
    bench.add_argument(
        "--threads", type=int, nargs="+", metavar="N", help="numbers of threads (default: torch.get_num_threads())"
    )
    bench.add_argument("--dtype", help="run every case in this dtype (default: what the case says, mostly float32)")
    bench.add_argument(
        "--case", metavar="PATTERN", help="only cases whose name contains, or as a shell pattern matches, this"
    )
    bench.add_argument(
        "--quick", action="store_true", help="a few representative cases, shorter: a minute or two a family"
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what is measured (default: cpu)")
    methods = bench.add_mutually_exclusive_group()
    methods.add_argument("--cold", action="store_true", help="empty the caches before every call")
    methods.add_argument(
        "--interleaved",
        action="store_true",
        help="call PyTorch's operation before every call, as in a half-replaced model",
    )
    bench.add_argument("--json", metavar="FILE", help="write one record a case and provider; updated after each case")
    bench.add_argument(
        "--save",
        action="store_true",
        help="write bench/results/MACHINE/FAMILY.json for each family; what was not measured again stays",
    )
    bench.add_argument("--html", metavar="FILE", help="write one page with everything, plots included; needs no other file")
    bench.add_argument(
        "--plot", metavar="DIR", help="write PNGs a family: ratio bars, rooflines, speed against size"
    )
    bench.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="only these of: fastnn torch torch.compile max-autotune numpy onnxruntime, and for attention on a GPU sdpa.flash "
        "sdpa.cudnn sdpa.efficient sdpa.math",
    )

    warmup = commands.add_parser("warmup", help="compile all kernels into the cache, so that no later call waits")
    warmup.add_argument("family", nargs="*", help="matmul, activation, softmax, … (default: all)")
    warmup.add_argument("--dtype", help="one of float32, float64, bfloat16, float16 (default: all)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 well, 1 a check failed, 2 wrong arguments or something is missing."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "info":
            from . import _info

            print(_info.text())
            return 0
        if arguments.command == "verify":
            from . import verify

            return verify.main(arguments)
        if arguments.command == "warmup":
            from . import _warmup

            return _warmup.main(arguments)
        # Not an import statement: type checkers know these files as bench.*, where they lie in a checkout.
        return int(import_module("fastnn.bench.command").main(arguments))
    except ImportError as problem:
        package = (problem.name or "").split(".")[0]
        if package not in ("rich", "matplotlib", "mpmath", "numba", "llvmlite", "numpy"):
            raise
        print(f"{package} is needed for this: pip install {package}", file=sys.stderr)
        return 2
    except ValueError as problem:
        print(f"python -m fastnn {arguments.command}: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
