"""The names under which designs leave their statistics and the learner finds them: one home for both sides.

| name                   | holds                                                                             |
|------------------------|-----------------------------------------------------------------------------------|
| moments `nodes`        | design `activation`: all feature columns; a head's own name: what it saw (`routed`) |
| moments `target`       | all feature columns, then the target's                                             |
| sums `pairs`, `count`  | design `read`: pairs that the sample stands for, and that were looked at, by fold   |
| sums `square/...`      | where costs are a number's changes: their squares, by which edges are chosen       |
| sums `node`            | what each node costs the target, by fold                                           |
| sums `cost/<child>/`   | what each parent of a group of children costs, all ports together, by fold          |
| sums `cost/<child>/q`  | the same through one port                                                          |
| sums `effect/<child>/` | the mean change of a target that is a number, with its sign, by port and fold       |
| rows `contributions`   | what every edge contributes, a row a pair and direction, times the root of its      |
|                        | weight; rows `weight`: how many pairs of the data each row stands for              |

Children come in groups: `a3` are the heads of layer 3, `m3` its MLP, `target` what is explained.
"""

from tl_circuitlasso.data.sites import PORTS, Site

NODES, TARGET = "nodes", "target"
PAIRS, NODE_COSTS = "pairs", "node"
COUNT, CONTRIBUTIONS, WEIGHT = "count", "contributions", "weight"
FOLDS = 10  # parts of the data that are kept apart where intervals, stability or cross-validation compare parts


def heads(layer: int) -> str:
    """The group of a layer's heads."""
    return f"a{layer}"


def mlp(layer: int) -> str:
    """The group of a layer's MLP, which is alone in it."""
    return f"m{layer}"


def group(site: Site) -> str:
    """The group that a child belongs to.

    >>> group(Site("head", 3, 1)), group(Site("mlp", 0)), group(Site("logits"))
    ('a3', 'm0', 'target')
    """
    return heads(site.layer) if site.kind == "head" else mlp(site.layer) if site.kind == "mlp" else TARGET


def ports(children: str) -> tuple[str, ...]:
    """The inputs that a group's children have.

    >>> ports("a3"), ports("m3")
    (('q', 'k', 'v'), ('',))
    """
    return PORTS[1:] if children.startswith("a") else PORTS[:1]


def cost(children: str, port: str = "") -> str:
    """Where a group's costs are: through one port, or through all together."""
    return f"cost/{children}/{port}"


def square(children: str) -> str:
    """Where a group's squared changes are, all ports together."""
    return f"square/{children}"


def effect(children: str, port: str = "") -> str:
    """Where a group's mean changes are, one port at a time."""
    return f"effect/{children}/{port}"
