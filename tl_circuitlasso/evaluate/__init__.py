"""Is a circuit right? `structure` compares it with a known truth, everything else measures it by intervention."""

from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.evaluate.calibration import Calibration as Calibration
from tl_circuitlasso.evaluate.calibration import calibrate as calibrate
from tl_circuitlasso.evaluate.confirm import confirm as confirm
from tl_circuitlasso.evaluate.curves import MIB_SHARES as MIB_SHARES
from tl_circuitlasso.evaluate.curves import Curve as Curve
from tl_circuitlasso.evaluate.curves import curve as curve
from tl_circuitlasso.evaluate.curves import curves as curves
from tl_circuitlasso.evaluate.curves import magnitude as magnitude
from tl_circuitlasso.evaluate.edges import EdgeCheck as EdgeCheck
from tl_circuitlasso.evaluate.edges import edges as edges
from tl_circuitlasso.evaluate.faithfulness import Faithfulness as Faithfulness
from tl_circuitlasso.evaluate.faithfulness import completeness as completeness
from tl_circuitlasso.evaluate.faithfulness import faithfulness as faithfulness
from tl_circuitlasso.evaluate.feature_attribution import feature_attribution as feature_attribution
from tl_circuitlasso.evaluate.hypotheses import CircuitTests as CircuitTests
from tl_circuitlasso.evaluate.hypotheses import tests as tests
from tl_circuitlasso.evaluate.metrics import accuracy as accuracy
from tl_circuitlasso.evaluate.metrics import cross_entropy as cross_entropy
from tl_circuitlasso.evaluate.metrics import kl as kl
from tl_circuitlasso.evaluate.metrics import logit_diff as logit_diff
from tl_circuitlasso.evaluate.metrics import next_token as next_token
from tl_circuitlasso.evaluate.metrics import prob_diff as prob_diff
from tl_circuitlasso.evaluate.minimal import minimality as minimality
from tl_circuitlasso.evaluate.report import METRICS as METRICS
from tl_circuitlasso.evaluate.report import Report as Report
from tl_circuitlasso.evaluate.report import metric_by_name as metric_by_name
from tl_circuitlasso.evaluate.report import read_pairs as read_pairs
from tl_circuitlasso.evaluate.report import report as report
from tl_circuitlasso.evaluate.smallest import smallest as smallest
from tl_circuitlasso.evaluate.stability import Stability as Stability
from tl_circuitlasso.evaluate.stability import Wording as Wording
from tl_circuitlasso.evaluate.stability import agreement as agreement
from tl_circuitlasso.evaluate.stability import stability as stability
from tl_circuitlasso.evaluate.stability import wording as wording
from tl_circuitlasso.evaluate.steer import Steered as Steered
from tl_circuitlasso.evaluate.steer import steer as steer
from tl_circuitlasso.evaluate.structure import (
    Interval as Interval,
)
from tl_circuitlasso.evaluate.structure import (
    PairedTest as PairedTest,
)
from tl_circuitlasso.evaluate.structure import (
    Structure as Structure,
)
from tl_circuitlasso.evaluate.structure import (
    bootstrap as bootstrap,
)
from tl_circuitlasso.evaluate.structure import (
    paired_test as paired_test,
)
from tl_circuitlasso.evaluate.structure import (
    structure as structure,
)
from tl_circuitlasso.evaluate.structure import (
    summary as summary,
)
from tl_circuitlasso.experiment import Optimal as Optimal
from tl_circuitlasso.naming import directory as _directory

__dir__ = _directory(__name__, "Optimal")
_guard(__name__, __dir__())
