"""Preference stores, as several commands open and describe them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError


def open_store(path: Path, *, must_exist: bool) -> Any:
    from reward_service.preferences.store import PreferenceStore

    if must_exist and not path.is_file():
        raise UserError(
            "no such preference store", where=str(path), fix="make one: accord preferences import"
        )
    return PreferenceStore(path)


def statistics(store: Any) -> dict[str, Any]:
    """Counts, agreement between annotators and position bias, as one JSON-able dict."""
    from reward_service.preferences.quality import agreement, position_bias

    labels = store.judgements()
    return {
        **store.stats(),
        "agreement": dict(agreement(labels)),
        "position_bias": asdict(position_bias(labels)),
    }
