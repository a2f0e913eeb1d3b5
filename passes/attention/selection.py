"""Which attention sites a pass rewrites: a slice of them, less every n-th, and none of which something is exposed."""

from __future__ import annotations

from graphopt.sites import AttentionSite, Findings, Refusal
from graphopt.sites.vocabulary import name_of


def selected(found: Findings, layers: str, keep_every: int) -> Findings:
    """The sites among `layers` without every n-th; the others count as refused.

    Args:
        found: all sites, in the order of execution.
        layers: a slice such as `2:`.
        keep_every: n; 0 leaves none away.
    """
    kept = {site.name for site in found.sites[slice_of(layers)]}
    if keep_every:
        order = [site.name for site in found.sites if site.name in kept]
        kept -= set(order[keep_every - 1 :: keep_every])
    left = [
        Refusal(site.kind, site.name, f"left as it is by layers={layers}, keep_every={keep_every}")
        for site in found.sites
        if site.name not in kept
    ]
    return Findings(tuple(site for site in found.sites if site.name in kept), (*found.refusals, *left))


def slice_of(text: str) -> slice:
    """`2:`, `:-1`, `1:8:2` as a slice.

    Raises:
        ValueError: it is none.
    """
    parts = text.split(":")
    try:
        numbers = [int(p) if p.strip() else None for p in parts]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= 3 or (len(numbers) == 3 and numbers[2] == 0):
        raise ValueError(f"expected layers to be a slice such as 2: or :-1, got {text!r}")
    return slice(*numbers)


def exposure(site: AttentionSite) -> str | None:
    """Why a site whose scores or weights are used elsewhere stays; None where they are not."""
    if not site.exposed:
        return None
    users = [u for n in site.exposed for u in n.users if u not in site.nodes]
    by = "an output of the model" if users[0].op == "output" else name_of(users[0])
    return f"its scores or weights are used outside (by {by}), so replacing it would save nothing"
