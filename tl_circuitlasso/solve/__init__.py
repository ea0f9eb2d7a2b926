"""Sparse regression of many targets with a proof of optimality for each. Matrices in, matrices out.

A problem is a **loss** (how well coefficients fit), a **penalty** (what makes them sparse) and a **solver** (how the
sum of the two is lowered); the three meet only through the contracts in `base`, and the **certificate** that says when
to stop belongs to none of them.

Three combinations as examples:

- the Lasso of every node on its ancestors: `QuadraticGram` x `L1` x `WorkingSet`, which is `lasso(...)`;
- which component feeds which: `QuadraticGram` x `Group` x `GroupSet`, which is `lasso(..., penalty=Group(...))`;
- which contributions make a prediction: `Softmax` x `L1(non_negative=True)` x `ProxNewton`, which is
  `cross_entropy_garrote(...)`.

Strengths are fractions of the smallest one with an empty solution unless `strength_is="absolute"`. Everything that
chooses a strength (`select`, `stability`) works from `Moments`, so the data are read once.
"""

from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.naming import directory as _directory
from tl_circuitlasso.solve.base import AbstractLoss as AbstractLoss
from tl_circuitlasso.solve.base import AbstractPenalty as AbstractPenalty
from tl_circuitlasso.solve.base import AbstractSolver as AbstractSolver
from tl_circuitlasso.solve.base import Answer as Answer
from tl_circuitlasso.solve.base import Solution as Solution
from tl_circuitlasso.solve.base import Status as Status
from tl_circuitlasso.solve.blocks import Layout as Layout
from tl_circuitlasso.solve.blocks import block_lasso as block_lasso
from tl_circuitlasso.solve.certificate import duality_gap as duality_gap
from tl_circuitlasso.solve.certificate import relative_gap as relative_gap
from tl_circuitlasso.solve.classify import cross_entropy_garrote as cross_entropy_garrote
from tl_circuitlasso.solve.classify import logistic_lasso as logistic_lasso
from tl_circuitlasso.solve.classify import multinomial_lasso as multinomial_lasso
from tl_circuitlasso.solve.distributed import all_reduce_moments as all_reduce_moments
from tl_circuitlasso.solve.distributed import lasso_sharded as lasso_sharded
from tl_circuitlasso.solve.distributed import scatter_sums as scatter_sums
from tl_circuitlasso.solve.fista import Fista as Fista
from tl_circuitlasso.solve.group_set import GroupSet as GroupSet
from tl_circuitlasso.solve.groups import Group as Group
from tl_circuitlasso.solve.groups import row_group as row_group
from tl_circuitlasso.solve.lasso import Prepared as Prepared
from tl_circuitlasso.solve.lasso import lasso as lasso
from tl_circuitlasso.solve.lasso import prepare as prepare
from tl_circuitlasso.solve.likelihoods import Logistic as Logistic
from tl_circuitlasso.solve.likelihoods import Softmax as Softmax
from tl_circuitlasso.solve.losses import QuadraticGram as QuadraticGram
from tl_circuitlasso.solve.newton import ProxNewton as ProxNewton
from tl_circuitlasso.solve.nonlinear import Dictionary as Dictionary
from tl_circuitlasso.solve.nonlinear import fit_dictionary as fit_dictionary
from tl_circuitlasso.solve.pairs import PairSums as PairSums
from tl_circuitlasso.solve.pairs import refit_entries as refit_entries
from tl_circuitlasso.solve.path import Moments as Moments
from tl_circuitlasso.solve.path import geometric_strengths as geometric_strengths
from tl_circuitlasso.solve.path import moments_of as moments_of
from tl_circuitlasso.solve.path import path as path
from tl_circuitlasso.solve.path import total as total
from tl_circuitlasso.solve.penalties import L1 as L1
from tl_circuitlasso.solve.penalties import ElasticNet as ElasticNet
from tl_circuitlasso.solve.penalties import adaptive_weights as adaptive_weights
from tl_circuitlasso.solve.residual import regress as regress
from tl_circuitlasso.solve.row_set import RowSet as RowSet
from tl_circuitlasso.solve.rules import CLASS_STRENGTH as CLASS_STRENGTH
from tl_circuitlasso.solve.rules import COLLINEAR as COLLINEAR
from tl_circuitlasso.solve.rules import RESAMPLED as RESAMPLED
from tl_circuitlasso.solve.rules import STABLE as STABLE
from tl_circuitlasso.solve.rules import Found as Found
from tl_circuitlasso.solve.rules import at_strength as at_strength
from tl_circuitlasso.solve.rules import if_stable as if_stable
from tl_circuitlasso.solve.separate import lassos as lassos
from tl_circuitlasso.solve.sparse import CodeSums as CodeSums
from tl_circuitlasso.solve.sparse import code_sums as code_sums
from tl_circuitlasso.solve.strength import Choice as Choice
from tl_circuitlasso.solve.strength import cross_validate as cross_validate
from tl_circuitlasso.solve.strength import ebic as ebic
from tl_circuitlasso.solve.strength import refit_support as refit_support
from tl_circuitlasso.solve.strength import select as select
from tl_circuitlasso.solve.strength import stability as stability
from tl_circuitlasso.solve.sweeps import Sweeps as Sweeps
from tl_circuitlasso.solve.torch_set import TorchSet as TorchSet
from tl_circuitlasso.solve.working_set import WorkingSet as WorkingSet

__dir__ = _directory(__name__)
_guard(__name__, __dir__())
