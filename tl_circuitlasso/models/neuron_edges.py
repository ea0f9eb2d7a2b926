"""Direct effects between chosen neurons: through the residual stream and attention, MLPs in between stopped.

For a target neuron t with multiplier m_t[p] (what the goal moves per unit of t's output), the sweep starts at what t
reads and goes down through norms and heads only:

    g[s -> t] = sum_q <what t reads, scaled by m_t, pulled down to the output of s at q> (s[q] - s'[q])

is the part of t's own contribution that comes from s without another MLP. Every chosen neuron (and the goal itself) is
one direction of a single sweep; `memory` says what a direction takes.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.neuron_sweep import (
    Ends,
    Rules,
    gate_slopes,
    slope_of_act,
    sweep,
    through_attention,
    through_norm,
)

Chosen = Mapping[int, Sequence[int]]  # by layer, which of its neurons
WORKSPACE = 256 << 20  # bytes that the directions swept at once may take


@dataclass(frozen=True, eq=False)
class Effects:
    """What flows into every target: from the input, and from each chosen neuron, in order of layers.

    value: (prompt, 1 + neurons, neurons + 1); row 0 is the input, the last column the goal itself.
    own: each neuron's whole contribution to the goal.
    """

    value: Float[Tensor, "prompt source target"]
    own: Float[Tensor, "prompt neuron"]


def memory(adapter: Adapter, prompts: int, positions: int) -> int:
    """Bytes that one direction of the sweep takes, to the leading term."""
    shape = adapter.shape
    per_position = 4 * shape.d_model + 4 * shape.n_heads * (shape.d_head + positions)
    return 4 * prompts * positions * per_position


def direct_effects(
    ends: Ends, at_final: Float[Tensor, "prompt 1 pos d_model"], chosen: Chosen, rules: Rules
) -> Effects:
    """The direct effect of every chosen neuron on every later one, and on the goal, prompt by prompt.

    One sweep finds what the goal reads of the chosen neurons, then one for each block of targets.
    """
    order = [(layer, neuron) for layer in sorted(chosen) for neuron in chosen[layer]]
    at: dict[int, Tensor] = {}
    for found in sweep(ends, at_final, rules):
        if found.layer in chosen and found.neurons is not None:
            at[found.layer] = found.neurons[:, 0][..., list(chosen[found.layer])]
    own = [(at[layer] * _change(ends, layer, chosen)).sum(1) for layer in sorted(chosen)]
    value = at_final.new_zeros(at_final.shape[0], 1 + len(order), len(order) + 1)
    size = max(1, WORKSPACE // memory(ends.adapter, at_final.shape[0], at_final.shape[2]))
    for first in range(0, len(order) + 1, size):
        columns = range(first, min(first + size, len(order) + 1))
        value[:, :, list(columns)] = _block(ends, at_final, at, chosen, order, columns, rules)
    return Effects(value, torch.cat(own, dim=1))


def _change(ends: Ends, layer: int, chosen: Chosen) -> Float[Tensor, "prompt pos neuron"]:
    difference = ends.difference(act("mlp_post", layer))[..., list(chosen[layer])]
    return torch.where(ends.mask[..., None], difference, 0.0)


def _block(
    ends: Ends,
    at_final: Float[Tensor, "prompt 1 pos d_model"],
    at: Mapping[int, Tensor],
    chosen: Chosen,
    order: Sequence[tuple[int, int]],
    columns: range,
    rules: Rules,
) -> Float[Tensor, "prompt source column"]:
    """The columns of some targets: they join the sweep one layer after another, the goal first; none runs before."""
    adapter = ends.adapter
    prompts, _, pos, width = at_final.shape
    value = at_final.new_zeros(prompts, 1 + len(order), len(columns))
    m = at_final.new_zeros(prompts, len(columns), pos, width)
    goal, top = len(order), adapter.shape.n_layers
    start = {layer: next(i for i, (where, _) in enumerate(order) if where == layer) for layer in chosen}
    layers = [order[i][0] if i < goal else top for i in columns]  # of the targets, ascending
    if goal in columns:
        m[:, -1] = through_norm(ends, top, at_final, rules, mlp=False)[:, 0]
    for layer in reversed(range(min(layers[-1] + 1, top))):
        joins, above = bisect_left(layers, layer), bisect_right(layers, layer)
        own = slice(joins, above)
        if layer in chosen and above < len(layers):
            rows = slice(1 + start[layer], 1 + start[layer] + len(chosen[layer]))
            value[:, rows, above:] = _into(ends, layer, m[:, above:], chosen)
        which = [columns[i] - start[layer] for i in range(joins, above)]
        reads = _reads(ends, layer, at, chosen, which, rules) if which else m[:, own]
        if adapter.shape.parallel:  # these neurons read what the layer's heads read
            m[:, above:] += through_attention(ends, layer, m[:, above:], rules)
            m[:, own] = reads
        else:
            m[:, own] = reads
            m[:, joins:] += through_attention(ends, layer, m[:, joins:], rules)
    first = torch.where(ends.mask[..., None], ends.difference(act("resid_pre", 0)), 0.0)
    value[:, 0] = torch.einsum("bcpd,bpd->bc", m, first)
    return value


def _into(
    ends: Ends, layer: int, m: Float[Tensor, "prompt column pos d_model"], chosen: Chosen
) -> Float[Tensor, "prompt neuron column"]:
    written = ends.adapter.mlp(layer).w_out[list(chosen[layer])]
    at_post = (m * ends.inverse(act("scale.mlp_out", layer)).unsqueeze(1)) @ written.T
    return torch.einsum("bcpn,bpn->bnc", at_post, _change(ends, layer, chosen))


def _reads(
    ends: Ends, layer: int, at: Mapping[int, Tensor], chosen: Chosen, which: Sequence[int], rules: Rules
) -> Float[Tensor, "prompt column pos d_model"]:
    """What each of some neurons reads of the residual stream, times its multiplier."""
    mlp = ends.adapter.mlp(layer)
    neurons = [chosen[layer][i] for i in which]
    at_post = at[layer][..., list(which)]
    slopes = slope_of_act(ends, layer, rules)[..., neurons]
    if mlp.w_gate is None:
        read = torch.einsum("bpn,dn->bnpd", at_post * slopes, mlp.w_in[:, neurons])
    else:
        linear, active = (part[:, 0][..., neurons] for part in gate_slopes(ends, layer, rules))
        read = torch.einsum("bpn,dn->bnpd", at_post * linear * slopes, mlp.w_gate[:, neurons])
        read = read + torch.einsum("bpn,dn->bnpd", at_post * active, mlp.w_in[:, neurons])
    return through_norm(ends, layer, read, rules, mlp=True)
