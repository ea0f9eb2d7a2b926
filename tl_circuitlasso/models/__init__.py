"""Models: the adapter that makes every supported transformer look the same, and what stands on it.

Nothing in here imports transformer_lens: a model brings its library along.
"""

from tl_circuitlasso.models.adapter import Adapter as Adapter
from tl_circuitlasso.models.adapter import adapt as adapt
from tl_circuitlasso.models.architecture import Shape as Shape
from tl_circuitlasso.models.closure import (
    Closure as Closure,
)
from tl_circuitlasso.models.closure import (
    closure_check as closure_check,
)
from tl_circuitlasso.models.closure import (
    closure_report as closure_report,
)
from tl_circuitlasso.models.edit import (
    Edit as Edit,
)
from tl_circuitlasso.models.edit import (
    Edited as Edited,
)
from tl_circuitlasso.models.edit import (
    edit as edit,
)
from tl_circuitlasso.models.rotary import position_ids as position_ids
from tl_circuitlasso.models.tokens import Batch as Batch
from tl_circuitlasso.models.tokens import Positions as Positions
from tl_circuitlasso.models.tokens import Prompts as Prompts
from tl_circuitlasso.models.weights import MLP as MLP
from tl_circuitlasso.models.weights import Reader as Reader
