"""How hypothesis is run where examples are the same at every run."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings


def same_at_every_run(examples: int) -> settings:
    """A failure is not minimised: that takes minutes (add Phase.shrink for it), and programs are small as they are."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
