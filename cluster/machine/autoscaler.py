"""What the run will want of Ray's autoscaler. Without one, nothing follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.machine.resources import Need


def ask_for_machines(needs: Sequence[Need]) -> None:
    """Ask for room for all of ``needs`` at once, those that run already included. The request
    holds until the next one, and takes the place of others' on the same cluster; with no needs it
    is withdrawn. Asks Ray's head, which may take a while."""
    from ray.autoscaler.sdk import request_resources

    bundles = [need.bundle() for need in needs for _ in range(need.count)]
    labels = [dict(need.labels) for need in needs for _ in range(need.count)]
    request_resources(bundles=bundles, bundle_label_selectors=labels if any(labels) else None)
