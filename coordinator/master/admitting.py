"""What a person admits to a run that stands still: corrected sources, or workers that are unlike."""

from __future__ import annotations

from torchord.cache.ledger.incarnation import revised
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.coordinator.spec.fingerprints import digests_of, fingerprint, skewed


def respecify(ledger: Ledger, head: Head, *, admit_skew: bool, admit_code: bool) -> None:
    """Record in the run's spec what is admitted; nothing changes where nothing is.

    Args:
        ledger: of a run that is paused or has failed.
        head: of it.
        admit_skew: workers take part whose torch, hardware or code differs.
        admit_code: the recipe's sources as this process sees them are the run's from now on; after a failure
            they are in any case.
    """
    spec = ledger.spec()
    before = str(spec.get("fingerprint", ""))
    here = fingerprint(spec["recipe"], like=before)
    changed = skewed(before, here)
    corrected = bool(changed) and (admit_code or head.status == "failed")
    if not corrected and not admit_skew:
        return
    if corrected:
        digests = {**digests_of(before), **digests_of(here)}
        spec["fingerprint"] = ",".join(f"{name}={digest}" for name, digest in sorted(digests.items()))
        admitted = {"version": head.version, "modules": changed}
        spec["admitted"] = [*spec.get("admitted", []), {**admitted, "fingerprint": spec["fingerprint"]}]
        ledger.emit("code admitted", admitted)
    if admit_skew:
        spec["skew"] = "admit"
    skew = spec.get("skew", spec["config"].get("skew", "refuse"))
    ledger.respec(spec, incarnation=revised(head.incarnation), skew=skew)
