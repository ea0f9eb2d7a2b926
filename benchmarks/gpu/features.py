"""The whole path for a pair of SAEs: sums of codes, a certified solve for every feature, held-out R^2."""

from collections.abc import Iterator

from benchmarks.gpu.device import Device, forget_peak, once, peak_gib
from benchmarks.gpu.parts import Figures, Size
from benchmarks.sae_scale import pair_of, small_part
from tl_circuitlasso.features.fit import Regressed
from tl_circuitlasso.features.regression import Rule, needed_bytes, regress_pair
from tl_circuitlasso.synthetic.codes import planted_codes

GOAL = 10.0  # seconds, for 32k x 32k features and a million tokens on an H200


def pairs(device: Device, size: Size) -> Iterator[Figures]:
    """A planted pair; codes are on the host, as a collection leaves them."""
    problem = planted_codes(size.tokens, size.features, active=size.active, seed=0)
    pair, found = pair_of(problem), list[Regressed]()
    for penalty in ("l1", "adaptive"):
        rule = Rule("auto", penalty)
        regress_pair(small_part(pair), rule, device=device.kind)  # compiles
        forget_peak(device.kind)
        spent = once(device.kind, lambda rule=rule: found.append(regress_pair(pair, rule, device=device.kind)))
        needed = needed_bytes(pair.sources, len(pair.child_features))
        yield {
            "penalty": penalty,
            "features": f"{len(pair.features)} x {len(pair.child_features)}",
            "tokens": size.tokens,
            "all s": spent,
            "statistics s": found[-1].seconds["statistics"],
            "solve s": found[-1].seconds["solve"],
            "held-out s": found[-1].seconds["held out"],
            "goal": f"{'within' if spent < GOAL else 'above'} {GOAL:.0f} s",
            "worst gap": float(found[-1].gap.max()),
            "planned GiB": round(needed / 2**30, 3),
            "GiB": peak_gib(device.kind),
        }
