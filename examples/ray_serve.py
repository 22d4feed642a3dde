"""Replicas of a mixture's server on a Ray cluster, behind Ray Serve's proxy.

    pip install 'ray[serve]' 'xpert-toolkit[serve]'
    XPERT_MIXTURE=me/desk XPERT_REGISTRY=s3://bucket/registry serve run examples.ray_serve:deployment

Every replica is a whole server: it loads the base once, answers in batches of its own, and follows the registry by
itself. Ray starts and restarts replicas, spreads requests over them, and scales their number with the requests that are
on their way; `max_ongoing_requests` is what one replica takes before the proxy looks elsewhere.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve

MAX_BATCH, MAX_QUEUE = 16, 32


def build() -> Any:
    """Runs in the replica."""
    from xpert.experts.server.opening import open_app
    from xpert.experts.server.options import ServeOptions

    options = ServeOptions(max_batch=MAX_BATCH, max_queue=MAX_QUEUE)
    return open_app(os.environ["XPERT_MIXTURE"], options, registry=os.environ.get("XPERT_REGISTRY"))


def deploy(*, replicas: int = 1, most: int = 4, gpus: float = 0.0) -> Any:
    """The deployment; `gpus` of each replica."""
    made: Any = serve.deployment(
        serve.ingress(build)(),
        name="xpert",
        max_ongoing_requests=MAX_BATCH + MAX_QUEUE,
        ray_actor_options={"num_gpus": gpus},
        autoscaling_config={
            "min_replicas": replicas,
            "max_replicas": max(replicas, most),
            "target_ongoing_requests": MAX_BATCH,
        },
        health_check_period_s=10,
        graceful_shutdown_timeout_s=60,
    )
    return made.bind()


deployment = deploy()
