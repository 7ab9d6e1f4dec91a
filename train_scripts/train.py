"""`vislora train` for several GPUs: `accelerate launch train_scripts/train.py --config samples/ink.toml`."""

import sys

from vislora.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
