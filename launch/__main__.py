"""`python -m launch [OPTIONS] pretrain/main.py [FIELDS]`: as `accelerate launch`, whose options it takes."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

from launch.run.launcher import start

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(start(sys.argv[1:]))
