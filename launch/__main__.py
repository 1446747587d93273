"""`python -m launch [OPTIONS] pretrain/main.py [FIELDS]`: as `accelerate launch`, whose options it takes."""

import sys

from launch.run.launcher import start

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
