"""Ray for a sweep: started on this machine for itself alone, or a running cluster joined; nothing is sent anywhere."""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from finetune.sweeping.config import RayConfig, ResourceConfig
from vim_backbone.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CODE = ("finetune", "pretrain", "launch", "vim_backbone", "kernels/vim_kernels")
PASSED_ON = ("VIM_", "ACCELERATE_", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_")
OBJECT_STORE = 200 * 2**20
"""Bytes; trials exchange checkpoints by files."""


@contextmanager
def ray_session(config: RayConfig, resources: ResourceConfig) -> Iterator[None]:
    """Ray inside the block, with this checkout's code on every node.

    Raises UserError where the address does not answer, or a trial fits on no node.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    variables = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    variables["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "30"  # what a stopped trial may take to let go of its worker
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": variables},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address is None:
        # the checkout itself, not a copy: a copy's CPU kernels would be compiled anew for every sweep
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        _stay_on_loopback()
        ray.init(
            address="local", num_cpus=config.cpus, num_gpus=config.gpus, include_dashboard=config.dashboard,
            dashboard_host="127.0.0.1", object_store_memory=OBJECT_STORE, _node_ip_address="127.0.0.1", **options,
        )  # fmt: skip
    else:
        options["runtime_env"]["py_modules"] = [str(ROOT / name) for name in CODE]
        _join(address, config.wait_seconds, options)
    try:
        if not config.autoscaling:
            _refuse_what_never_fits(resources)
        yield
    finally:
        ray.shutdown()


def _stay_on_loopback() -> None:
    """Have Ray listen on 127.0.0.1 alone: by itself it listens on every interface (2.60)."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # as Ray does where it has no clusters
    ray_constants.ENABLE_RAY_CLUSTER = False


def _join(address: str, seconds: float, options: dict[str, Any]) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=seconds).close()
        except OSError as error:
            raise UserError(f"ray.address {address} does not answer ({error}): is the cluster up?") from error
    elif address != "auto":
        raise UserError(f"ray.address is {address!r}: it must be HOST:PORT or auto")
    # a port that answers may still be no Ray, and Ray's own patience is long
    outcome: list[BaseException | None] = []

    def connect() -> None:
        try:
            ray.init(address=address, **options)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(max(seconds, 1.0) + 20.0)
    if not outcome:
        raise UserError(f"ray.address {address} answers, but not as Ray does: is it the cluster's GCS port?")
    if outcome[0] is not None:
        raise UserError(f"ray.address {address}: {' '.join(str(outcome[0]).split())[:300]}") from outcome[0]


def _refuse_what_never_fits(resources: ResourceConfig) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    need = {"CPU": resources.cpus, "GPU": resources.gpus}
    places = sum(
        min([int(node.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount], default=0)
        for node in nodes
    )
    if places < resources.workers:
        has = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(
            f"resources: a trial takes {resources.workers} x ({resources.cpus:g} CPUs and {resources.gpus:g} GPUs), "
            "which never fits; "
            f"the {'nodes have' if len(nodes) > 1 else 'node has'} {has}"
        )


def slots(resources: ResourceConfig) -> int:
    """Trials that have room at a time, now."""
    total = ray.cluster_resources()
    need = {"CPU": resources.cpus * resources.workers, "GPU": resources.gpus * resources.workers}
    return max(1, min(int(total.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount))
