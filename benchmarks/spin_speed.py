"""Spin's speed as a whole: learning a word, then sampling with the injection. Both alone have more options.

python tools/run.py benchmarks.spin_speed [--threads N] [--models paperland sd15]
"""

import argparse

from . import injection_speed as spin_injection
from . import word_learning_speed as spin_embedding
from .speed_cases import cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--models", nargs="+", choices=list(cases()), default=["paperland", "sd15"])
    # The two read the same options.
    parser.parse_args()
    spin_embedding.main()
    print()
    spin_injection.main()
