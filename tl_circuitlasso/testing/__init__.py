"""Put your own model, SAE, file format or method to the test that this library's pass: what scikit-learn's estimator
checks are for estimators.

Each `check_...` runs all its checks and raises one `CheckFailure` that names every check that failed and why; it
returns the names of those that passed. In a test suite one line does: `check_method(my_method)`.

>>> from tl_circuitlasso import baselines
>>> check_method(baselines.random_edges)
('gives a graph of the model', 'finite scores', 'leaves the model as it was', 'leaves the prompts as they were', \
'same again', 'counts its passes')
"""

from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.naming import directory as _directory
from tl_circuitlasso.testing.bases import check_basis as check_basis
from tl_circuitlasso.testing.checking import CheckFailure as CheckFailure
from tl_circuitlasso.testing.formats import check_format as check_format
from tl_circuitlasso.testing.methods import check_method as check_method
from tl_circuitlasso.testing.models import check_model as check_model

__dir__ = _directory(__name__)
_guard(__name__, __dir__())
