"""The compiled sweep of the solver for small problems: nothing but the coordinate step, so that it compiles at once."""

from typing import no_type_check

from tl_circuitlasso.solve.jit import kernel


@kernel
@no_type_check
def sweep_whole(gram, coef, pull, cut, ridge, upper, one_sided, still, most):
    """Up to `most` sweeps of coordinate descent over all sources of every target, in place; unit diagonal.

    Arrays are target-major; `cut` is lambda * weight, infinite where an entry is forbidden, and `pull` stays
    cross - coef @ gram. A target is left once no coefficient moves by more than `still`. The step is `prox.threshold`
    of one number; calling `kernels.threshold` would compile what lies beside it.
    """
    for t in range(coef.shape[0]):
        a, g, w, r, u = coef[t], pull[t], cut[t], ridge[t], upper[t]
        for _ in range(most):
            widest = 0.0
            for k in range(gram.shape[0]):
                x, new = g[k] + a[k], 0.0
                if x > w[k]:
                    new = min((x - w[k]) / (1 + r[k]), u[k])
                elif x < -w[k] and not one_sided:
                    new = (x + w[k]) / (1 + r[k])
                step = new - a[k]
                if step != 0:
                    a[k], row = new, gram[k]
                    widest = max(widest, abs(step))
                    for m in range(gram.shape[0]):  # the next coordinate sees this one's step
                        g[m] -= step * row[m]
            if widest <= still:
                break
