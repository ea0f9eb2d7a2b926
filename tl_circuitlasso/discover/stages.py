"""The stages of a job, each with the bytes at its peak and its forward passes, told from shapes: nothing is run.

Bytes are those beside the model's own weights, put together from what the stages allocate: activations
(models/footprint.py), pairs swept at once (models/sweep.py), sums and rows (models/read.py), moments. How much of each
stands in memory at once was measured, and is held by the tests.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from tl_circuitlasso.data.schema import FOLDS
from tl_circuitlasso.data.targets import Labels, Values
from tl_circuitlasso.discover.job import PAIR, Job
from tl_circuitlasso.discover.probing import CAPACITY
from tl_circuitlasso.discover.provenance import per_prompt
from tl_circuitlasso.discover.refining import PAIRS as LOOKED_AT
from tl_circuitlasso.discover.refining import ROUNDS
from tl_circuitlasso.models import footprint, neuron_scores, outcome, read, readout, sweep
from tl_circuitlasso.models.bases import Component, Neuron, Residual
from tl_circuitlasso.models.designs import Design, Routed
from tl_circuitlasso.models.neuron_sweep import SECANT
from tl_circuitlasso.models.read import ReadDesign
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.solve import RESAMPLED

SWEEP_PEAK = 3  # what a part of a sweep has at its peak, in units of `sweep.memory`
OUTCOME_COPIES = 8  # predictions of both prompts of a pair, logarithms, signs and shares of a large vocabulary
DIVERGENCE_COPIES = 6  # the same at every position of one pair, while positions are drawn
ROW_COPIES = 3  # rows held, rows joined, and the rows that stay
CHECK_COPIES = 3  # activations of the closure check's prompts, and what they are compared with
MOMENT_COPIES = 8  # of a Gram, while it is centred, scaled and cut to a child's parents
PROBE_COPIES = 6  # of a probe's samples: as they are, standardised, halved, and what the solver makes of them
CHILD_COPIES = 4  # of a child's rows, and of its Gram
LOGIT_COLUMNS = 32  # directions of the logits in design `activation`
NEURON_LOGITS = 6  # of logits, while two runs of a batch are compared and read
ALLOCATOR = 16 << 20  # what an allocator rounds up and holds on to


@dataclass(frozen=True)
class Stage:
    """A part of the work: bytes at its peak beside the model's weights, and forward passes.

    passes: for each prompt given, as `provenance["forward_passes"]` counts them, counterparts included. at_most: it may
    be less, for it depends on what was found before. forwards, seconds: what it takes in passes over all prompts given,
    and by the clock. None where nothing was measured, or nobody can know.
    """

    name: str
    bytes: int
    passes: int | float | None = 0
    at_most: bool = False
    forwards: float | None = None
    seconds: float | None = None


def stages_of(job: Job) -> list[Stage]:
    """Bytes and passes of everything that the job will do."""

    def each(calls: int | float | None) -> float | None:
        return None if calls is None else per_prompt(calls, job.given, job.batch_size)

    return [replace(stage, passes=each(stage.passes)) for stage in _in_batches(job)]


def _in_batches(job: Job) -> list[Stage]:
    """The stages, with passes over batches in place of passes per prompt."""
    if isinstance(job.what, SAEFeatures):
        return _feature_stages(job, job.what)
    if isinstance(job.what, Neuron):
        return _neuron_stages(job)
    return _read_stages(job, job.what) if isinstance(job.what, ReadDesign) else _moment_stages(job, job.what)


def _sizes(job: Job) -> tuple[int, int]:
    """The rows of a forward pass, counterparts included, and its positions."""
    return min(job.batch_size, job.used) * job.sides, job.prompts.width


def _read_stages(job: Job, design: ReadDesign) -> list[Stage]:
    rows, positions = _sizes(job)
    adapter, both = job.adapter, job.sides
    keys = design.wanted(adapter, job.target)
    base, acts = footprint.folded(adapter) + ALLOCATOR, footprint.held(adapter, keys, rows, positions)
    passing = footprint.passing(adapter, rows, positions, logits=job.target is None)
    sums, kept = _sums(job, design), _rows(job, design)
    swept = _swept(job, design)
    checked = CHECK_COPIES * footprint.held(adapter, keys, min(rows, PAIR * 2), positions)
    stages = []
    if job.used < job.given and not isinstance(job.target, Labels | Values):
        stages.append(_outputs_stage(job))
    if isinstance(job.target, Labels | Values):
        stages.append(_probe_stage(job))
    peak = base + sums + ROW_COPIES * kept + max(acts + passing, acts + swept, checked)
    stages.append(Stage("statistics", peak, both * ceil(job.used / job.batch_size)))
    stages.append(Stage("solve", ALLOCATOR + sums + kept + _solved(job, design), at_most=True))
    if job.refined:
        looks = ROUNDS * both * ceil(min(LOOKED_AT, job.used) / job.batch_size)
        some = min(rows, both * LOOKED_AT)
        part = footprint.held(adapter, keys, some, positions) + max(swept, passing)
        stages.append(Stage("second look", base + sums + kept + part, looks, at_most=True))
    return [*stages, *_confirm_stage(job)]


def _outputs_stage(job: Job) -> Stage:
    """What every prompt's model says, by which those that are looked at are drawn."""
    rows, positions = min(job.batch_size, job.given), job.prompts.width
    logits = footprint.held(job.adapter, ["logits"], rows, positions)
    need = ALLOCATOR + logits + footprint.passing(job.adapter, rows, positions, logits=True)
    return Stage("outputs", need, ceil(job.given / job.batch_size))


def _probe_stage(job: Job) -> Stage:
    """A linear probe of the final stream, on as many samples as it needs."""
    rows, positions = _sizes(job)
    final = job.adapter.final
    stream = footprint.held(job.adapter, [final], rows, positions)
    samples = job.used * (1 if job.last else positions)
    need = 8 * PROBE_COPIES * min(samples, CAPACITY) * job.adapter.shape.d_model
    passing = footprint.passing(job.adapter, rows, positions, logits=False)
    passes = ceil(job.used / job.batch_size)
    return Stage("probe", ALLOCATOR + max(stream + passing, need), passes, at_most=samples > CAPACITY)


def _confirm_stage(job: Job) -> Iterator[Stage]:
    """Kept edges, or circuits of some sizes, are patched: how many nobody knows before."""
    if job.causal is not None:
        rows, positions = job.causal.pairs.batch_size, job.prompts.width
        keys = sweep.wanted(job.adapter)
        need = 2 * footprint.held(job.adapter, keys, rows, positions)
        yield Stage("confirm", need + footprint.passing(job.adapter, rows, positions, logits=True), None)


def directions(job: Job) -> int:
    """How many directions of the target a sweep follows."""
    if isinstance(job.target, Labels):
        return int(job.target.y.max()) + 1
    return outcome.count(job.adapter, job.target, None)


def _swept(job: Job, design: ReadDesign) -> int:
    """Bytes of the pairs that are swept at once, with what is read of their logits."""
    adapter, room = job.adapter, design.swept or read.swept_bytes(job.adapter)
    one = sweep.memory(adapter, job.prompts.width, directions(job))
    pairs = min(max(1, room // one), _pairs_of_batch(job, design))
    vocabulary = adapter.shape.d_vocab_out * adapter.compute_dtype.itemsize if job.target is None else 0
    drawn = DIVERGENCE_COPIES * job.prompts.width * vocabulary
    return max(SWEEP_PEAK * pairs * one + OUTCOME_COPIES * pairs * vocabulary, drawn)


def _pairs_of_batch(job: Job, design: ReadDesign) -> int:
    size = min(job.batch_size, job.used)
    if not design.contrast:
        return size * job.draws
    return size * (1 if job.last or job.prompts.positions == "last" else job.prompts.width)


def _sums(job: Job, design: ReadDesign) -> int:
    """Bytes of the running sums."""
    columns, pairs = read.columns(job.adapter), _pairs_of_components(job)
    number = outcome.is_number(job.adapter, job.target)
    return 8 * FOLDS * (columns * (1 + (number and design.contrast)) + pairs * (1 + number))


def _pairs_of_components(job: Job) -> int:
    return sum(heads * sources for _, heads, sources in read.children(job.adapter))


def _row_count(job: Job, design: ReadDesign) -> int:
    batches = ceil(job.used / job.batch_size)
    return min(read.row_capacity(job.adapter, design.rows), batches * _pairs_of_batch(job, design) * directions(job))


def _rows(job: Job, design: ReadDesign) -> int:
    """Bytes of the contributions that are kept whole."""
    return 4 * _row_count(job, design) * read.columns(job.adapter)


def _solved(job: Job, design: ReadDesign) -> int:
    """Bytes of the largest child's regression, and of all edges side by side."""
    rows, columns = _row_count(job, design), read.columns(job.adapter)
    widest = max(sources * (3 if key.startswith("a") else 1) for key, _, sources in read.children(job.adapter))
    edges = 8 * (2 * FOLDS * (columns + 2 * _pairs_of_components(job)) + 8 * columns)
    return edges + CHILD_COPIES * 8 * (rows * widest + widest**2)


def _moment_stages(job: Job, design: Design) -> list[Stage]:
    rows, positions = _sizes(job)
    adapter, keys = job.adapter, design.wanted(job.adapter, job.target)
    nodes, folds = _nodes(design, job), FOLDS if job.strength in RESAMPLED else 1
    target = LOGIT_COLUMNS if job.target is None else 1
    moments = 8 * folds * (nodes**2 + (nodes + target) ** 2 + _seen_by_heads(design, job))
    acts = footprint.held(adapter, keys, rows, positions)
    passing = footprint.passing(adapter, rows, positions, logits="logits" in keys)
    raw = footprint.held(adapter, [key for key in keys if key != "logits"], rows, positions)
    samples = rows * positions
    encoded = samples * (nodes + target) * (2 * adapter.compute_dtype.itemsize + 3 * 8)
    piloted = raw + samples * adapter.shape.d_model * 8 * 3
    base = ALLOCATOR + footprint.folded(adapter)
    peak = base + moments + acts + max(passing, encoded, piloted)
    solved = ALLOCATOR + moments + 8 * MOMENT_COPIES * (nodes + target) ** 2
    return [
        Stage("statistics", peak, ceil(job.used / job.batch_size)),
        Stage("solve", solved, at_most=True),
        *_confirm_stage(job),
    ]


def _nodes(design: Design, job: Job) -> int:
    """How many columns the regressions have, at most."""
    shape, basis = job.adapter.shape, design.basis
    if isinstance(basis, Component):
        most = basis.directions or shape.d_model  # None: all
        heads = shape.n_layers * shape.n_heads * min(most, shape.d_head)
        return heads + (1 + shape.n_layers * (not shape.attn_only)) * min(most, shape.d_model)
    wide = shape.n_layers * shape.d_mlp if isinstance(basis, Neuron) else (shape.n_layers + 1) * shape.d_model
    return min(basis.max_nodes, wide) if isinstance(basis, Neuron | Residual) else wide


def _seen_by_heads(design: Design, job: Job) -> int:
    """Entries of the Grams of design `routed`: each head's own, of all that comes before it."""
    if not isinstance(design, Routed):
        return 0
    shape, all_nodes = job.adapter.shape, _nodes(design, job)
    layers = range(1, shape.n_layers + 1)
    return sum(shape.n_heads * (all_nodes * layer // shape.n_layers) ** 2 for layer in layers)


def _neuron_stages(job: Job) -> list[Stage]:
    rows, positions = min(job.batch_size, job.used), job.prompts.width
    adapter, shape = job.adapter, job.adapter.shape
    way = neuron_scores.BySweep(SECANT, alone=False)
    keys = {*way.wanted(adapter), *(f"mlp_post.{layer}" for layer in range(shape.n_layers))}
    acts = 2 * footprint.held(adapter, keys, rows, positions)
    logits = NEURON_LOGITS * footprint.held(adapter, ["logits"], rows, positions)
    swept = footprint.itemsize(adapter) * rows * positions * (4 * shape.d_mlp + 8 * shape.d_model)
    tally = 8 * 4 * positions * shape.n_layers * shape.d_mlp
    passing = footprint.passing(adapter, rows, positions, logits=True)
    need = ALLOCATOR + footprint.folded(adapter) + acts + tally + max(logits + swept, passing)
    return [Stage("forward and sweep", need, 2 * ceil(job.used / job.batch_size))]


def _feature_stages(job: Job, basis: SAEFeatures) -> list[Stage]:
    """Encoding; what the regressions take is known only when it's known which features fire, and checked then."""
    rows, positions = _sizes(job)
    encoders = basis.encoders().values()
    widths = {encoder.hook: encoder.width for encoder in encoders}
    hooks = {name for encoder in encoders for name in (encoder.hook, encoder.hook_out)}
    patterns = [f"pattern.{layer}" for layer in range(job.adapter.shape.n_layers)]
    keys = [*hooks, *(patterns if basis.mixing in ("mean", "heads") else ()), *readout.wanted(job.adapter, job.target)]
    acts = footprint.held(job.adapter, keys, rows, positions, widths)
    dense = max(4 * 4 * min(encoder.rows_at_once(), rows * positions) * encoder.features for encoder in encoders)
    logits = 8 * job.adapter.shape.d_model**2 * 3 if job.target is None else 0
    passing = footprint.passing(job.adapter, rows, positions, logits="logits" in keys)
    need = ALLOCATOR + acts + max(dense, passing, logits)
    return [Stage("encode", need, ceil(job.given / job.batch_size)), Stage("solve", 0, at_most=True)]
