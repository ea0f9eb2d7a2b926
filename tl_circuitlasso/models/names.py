"""The names of activations, in one spelling: a kind and a layer, as "z.3", the same for every model.

| kind                        | what it holds                                                                       |
|-----------------------------|-------------------------------------------------------------------------------------|
| resid_pre, resid_post       | the residual stream in front of a layer, and behind it                               |
| q, k, v                     | what heads read, after rotation and norm; projected.q, .k, .v: as it is projected    |
| pattern, z                  | attention, and what heads make of it, each on its own axis                           |
| attn_out, mlp_out           | what attention and MLP add to the stream                                             |
| mlp_stream, mlp_read        | what the norm in front of an MLP reads, and the MLP itself                           |
| mlp_pre, mlp_linear, mlp_post | neurons before their nonlinearity, the gated factor, and neurons after it          |
| scale.attn, .mlp, .attn_out, .mlp_out, .q, .k | the divisors of the norms                                         |
| block                       | whatever a layer puts out                                                            |

Three names have no layer: "logits", "scale.final" and "pos_embed". A hook name of TransformerLens is a name of its own.
"""

from typing import Literal, NewType, TypeAlias, get_args

from tl_circuitlasso.models.weights import Port

Name = NewType("Name", str)
Kind: TypeAlias = Literal[
    "resid_pre",
    "resid_post",
    "q",
    "k",
    "v",
    "projected.q",
    "projected.k",
    "projected.v",
    "pattern",
    "z",
    "attn_out",
    "mlp_out",
    "mlp_stream",
    "mlp_read",
    "mlp_pre",
    "mlp_linear",
    "mlp_post",
    "scale.attn",
    "scale.mlp",
    "scale.attn_out",
    "scale.mlp_out",
    "scale.q",
    "scale.k",
    "block",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROJECTED: tuple[Kind, ...] = ("projected.q", "projected.k", "projected.v")


def act(kind: Kind, layer: int) -> Name:
    """The activation of a kind in a layer.

    >>> act("scale.attn_out", 3)
    'scale.attn_out.3'
    """
    return Name(f"{kind}.{layer}")


def as_projected(port: Port, layer: int) -> Name:
    """What heads read through a port, as it is projected."""
    return Name(f"projected.{port}.{layer}")


def head_scale(port: Port, layer: int) -> Name:
    """The divisor of the norm of queries or keys, where a model has one."""
    return Name(f"scale.{port}.{layer}")
