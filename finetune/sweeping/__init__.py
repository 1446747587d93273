"""Sweeps over fine-tuning runs: Ray Tune runs the trials, Optuna's study is the record of them.

Ray reads these settings when it is first imported, which every module here does.
"""

import os
import secrets
import sys
from pathlib import Path

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial without GPUs sees none
    "RAY_AIR_NEW_OUTPUT": "0",  # its table; ours is in progress.py
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger has it all
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that cannot run reports why, and no metric
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
os.environ.update({key: value for key, value in SETTINGS.items() if key not in os.environ})
TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
PRIVATE_TOKEN = not (
    "ray" in sys.modules
    or any(name in os.environ for name in (*TOKEN, "RAY_ADDRESS"))
    or (Path.home() / ".ray/auth_token").exists()
)
"""Whether this process obeys a token made for it alone, which no cluster knows."""
if PRIVATE_TOKEN:
    # without one, any user of this machine could have a Ray on it run code
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
